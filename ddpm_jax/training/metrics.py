"""What a run says of itself, one JSON line at a time.

`metrics.jsonl` holds what follows from the configuration alone: a resumed run writes, byte for byte, what a run never
stopped writes. What depends on the machine and the hour (speed) goes to `timing.jsonl`.
"""

import json
import math
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.errors import UserError
from ddpm_jax.files import write_whole


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


def summarise(window: Sequence[StepNumbers]) -> dict[str, Any]:
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


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the whole lines of a file of metrics; a last line cut off by a crash is left out; [] if there is none."""
    lines = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return lines


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


def rewind(path: Path, step: int) -> None:
    """Drops the lines after `step`, which a run resumed from there will write again."""
    kept = [line for line in read_lines(path) if line["step"] <= step]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    write_whole(path, lambda file: file.write(text.encode()))
