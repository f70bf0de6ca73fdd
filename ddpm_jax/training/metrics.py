"""What a run says of itself, one JSON line at a time.

`metrics.jsonl` holds what follows from the configuration alone: a resumed run writes, byte for byte, what a run never
stopped writes. What depends on the machine and the hour (speed) goes to `timing.jsonl`.
"""

import itertools
import json
import math
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import write_whole


class StepNumbers(typing.NamedTuple):
    """The numbers of a step on the host, as the loop and a checkpoint keep them until a line is written."""

    loss: float
    grad_norm: float
    param_norm: float
    quartile_sums: list[float]
    """(4,) as in `step.StepInfo`."""
    quartile_counts: list[float]
    """(4,)."""

    def is_finite(self) -> bool:
        """Says whether training can go on from here."""
        return all(map(math.isfinite, (self.loss, self.grad_norm, self.param_norm)))


def summarize(window: Sequence[StepNumbers]) -> dict[str, Any]:
    """Makes one line of metrics of the steps since the line before.

    Args:
      window: the steps, at least one.

    Returns:
      the mean loss, the mean loss of the images whose times are in each quarter of the chain (None where there were
      none), the mean norm of the gradient, and the last norm of the parameters.
    """
    loss, grad_norm = np.mean([(step.loss, step.grad_norm) for step in window], axis=0)
    sums = np.sum([step.quartile_sums for step in window], axis=0)
    counts = np.sum([step.quartile_counts for step in window], axis=0)
    quartiles = [float(total / count) if count else None for total, count in zip(sums, counts, strict=True)]
    return {
        "loss": float(loss),
        "loss_quartiles": quartiles,
        "grad_norm": float(grad_norm),
        "param_norm": window[-1].param_norm,
    }


class _Content(typing.NamedTuple):
    """What is in a file of metrics."""

    whole: bytes
    lines: list[tuple[bytes, dict[str, Any]]]
    """Every line that can be read, as its bytes without the line's end, and what they say."""
    damaged: list[int]
    """The numbers, from 1, of the lines that cannot be read; a last one cut off by a crash is not one of them."""


def _read(path: Path) -> _Content:
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    *ended, last = content.split(b"\n")
    lines, damaged = [], []
    for number, line in enumerate([*ended, last] if last else ended, 1):
        try:
            # What is no text becomes signs that no number and no name has.
            values = json.loads(line.decode(errors="replace"))
            readable = isinstance(values, dict) and isinstance(values.get("step"), int)
        except ValueError:
            readable = False
        if readable:
            lines.append((line, values))
        elif number <= len(ended):
            damaged.append(number)
    return _Content(content, lines, damaged)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of a file of metrics; those that cannot be read are left out; [] if there is none."""
    return [values for _, values in _read(path).lines]


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Appends one line.

    Raises:
      UserError: the disk is full, or the file may not be written to.
    """
    try:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def rewind(path: Path, step: int, *, warn: Callable[[str], None]) -> None:
    """Drops the lines after `step`, which a run resumed from there will write again; the others stay as they are.

    A last line cut off by a crash goes without a word. Any other that cannot be read is left out too, but said, and
    the whole file as it was is kept beside it.

    Args:
      path: of the file; it is there afterwards, even if it was not.
      step: the last one that is kept.
      warn: tells the user one line.

    Raises:
      UserError: the file cannot be read or written.
    """
    content = _read(path)
    if content.damaged:
        names = (f"{path.name}.damaged{number or ''}" for number in itertools.count())
        copy = next(file for file in map(path.with_name, names) if not file.exists())
        write_whole(copy, lambda file: file.write(content.whole))
        word = "lines" if len(content.damaged) > 1 else "line"
        numbers = ", ".join(map(str, content.damaged))
        warn(f"{path}: {word} {numbers} cannot be read, left out; the file as it was is kept in {copy.name}")
    kept = b"".join(line + b"\n" for line, values in content.lines if values["step"] <= step)
    write_whole(path, lambda file: file.write(kept))
