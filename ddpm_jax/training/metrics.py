"""Metrics of a run, one JSON object per line, with its checksum.

`metrics.jsonl` holds what follows from the configuration alone: a resumed run writes the same bytes as one that was
never stopped, and an extended one the same as one that was as long from the beginning. What depends on the machine
(speed) goes to `timing.jsonl`.
"""

import collections
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddpm_jax.system.errors import Damage, UserError
from ddpm_jax.system.files import copy_file, damaged_name, dump_checked, load_checked, open_file, write_whole
from ddpm_jax.training.step import StepInfo

FINAL = "final"
"""Key of a line that was written only because the run ended at its step; true, or absent."""


class StepNumbers(typing.NamedTuple):
    """Diagnostics of one step on the host, kept by the loop and in checkpoints until a line is written."""

    loss: float
    grad_norm: float
    param_norm: float
    quartile_sums: list[float]
    """(4,) as in `step.StepInfo`."""
    quartile_counts: list[float]
    """(4,)."""

    def is_finite(self) -> bool:
        """Returns whether training can continue from here."""
        return all(map(math.isfinite, (self.loss, self.grad_norm, self.param_norm)))


class RunningMean:
    """The mean of numbers added one by one: to the last bit, however often its numbers were saved on the way."""

    def __init__(self, total: float = 0.0, count: int = 0):
        """Continues with what `numbers` returned."""
        self._total, self._count = total, count

    def add(self, value: float) -> None:
        """Adds a number."""
        self._total, self._count = self._total + value, self._count + 1

    def numbers(self) -> list[float]:
        """Returns the sum and the number of numbers."""
        return [self._total, self._count]

    def take(self) -> float | None:
        """Returns the mean, None of no numbers, and begins again."""
        total, count, self._total, self._count = self._total, self._count, 0.0, 0
        return total / count if count else None


class Diagnostics:
    """The diagnostics of a run's steps: of those in flight, and since the last regular line and checkpoint."""

    window: list[StepNumbers]
    """Of the steps since the last line of metrics."""
    since_save: RunningMean
    """Of the losses since the last checkpoint."""

    def __init__(self, notes: Mapping[str, Any], *, check: Callable[[int, StepNumbers], None]):
        """Begins with the steps that a checkpoint remembers.

        Args:
          notes: of the checkpoint: "window" and "since_save", as above; {} at the beginning of a run.
          check: called with each step's number and diagnostics; raises if training cannot continue.
        """
        self.window = [StepNumbers(*numbers) for numbers in notes.get("window", [])]
        self.since_save = RunningMean(*notes.get("since_save", ()))
        self._check = check
        self._in_flight: collections.deque[tuple[range, StepInfo]] = collections.deque()

    def add(self, steps: range, infos: StepInfo) -> None:
        """Adds the steps of a call that was dispatched; does not wait for it.

        Args:
          steps: their 0-based numbers.
          infos: their diagnostics, each with a first axis of at least as many entries.
        """
        self._in_flight.append((steps, infos))

    def collect(self, *, in_flight: int = 0) -> None:
        """Waits for all calls but the last `in_flight`."""
        while len(self._in_flight) > in_flight:
            steps, infos = self._in_flight.popleft()
            rows = zip(*(values.tolist() for values in jax.device_get(infos)), strict=True)
            for step, row in zip(steps, rows, strict=False):
                numbers = StepNumbers(*row)
                self._check(step + 1, numbers)
                self.window.append(numbers)
                self.since_save.add(numbers.loss)

    def recent(self) -> dict[str, float]:
        """Returns the mean loss of up to 50 steps since the last line of metrics; {} if there are none."""
        return {"loss": float(np.mean([numbers.loss for numbers in self.window[-50:]]))} if self.window else {}


def summarize(window: Sequence[StepNumbers]) -> dict[str, Any]:
    """Returns one line of metrics from the steps since the line before.

    Args:
      window: the steps, at least one.

    Returns:
      the mean loss, the mean loss of the images whose timesteps are in each quarter of the chain (None where there were
      none), the mean gradient norm, and the last parameter norm.
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


class Lines(typing.NamedTuple):
    """The content of a metrics file."""

    intact: list[tuple[bytes, dict[str, Any]]]
    """Every line that holds what was written: its bytes without the newline, and its values."""
    damaged: list[int]
    """1-based numbers of the others; a last line cut off by a crash is not one of them."""


def check_lines(path: Path) -> Lines:
    """Reads a metrics file, and checks each line against its checksum; no lines if there is no file.

    Raises:
      UserError: it cannot be read now.
    """
    try:
        with open_file(path) as file:
            content = file.read()
    except FileNotFoundError:
        content = b""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    *ended, last = content.split(b"\n")
    intact, damaged = [], []
    for number, line in enumerate([*ended, last] if last else ended, 1):
        values = _values(line)
        if values is not None:
            intact.append((line, values))
        elif number <= len(ended) or _values(last[:-1]):  # not cut off, but its end is another character
            damaged.append(number)
    return Lines(intact, damaged)


def _values(line: bytes) -> dict[str, Any] | None:
    try:
        values = load_checked(line)
    except Damage:
        return None
    return values if isinstance(values.get("step"), int) else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of a metrics file, without damaged ones; [] if there is no file."""
    return [values for _, values in check_lines(path).intact]


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Appends one line, with its checksum.

    Raises:
      UserError: the disk is full, or the file may not be written to.
    """
    try:
        with path.open("ab") as file:
            file.write(dump_checked(line) + b"\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def rewind(path: Path, step: int, *, ends: bool = False, warn: Callable[[str], None]) -> None:
    """Drops the lines that a run resumed from `step` writes again; the others keep their bytes.

    These are the lines after `step`, and those that were written only because the run had ended at some step.

    A last line cut off by a crash is dropped silently. Any other damaged line is dropped with a warning, and the file
    as it was is kept beside it: a run cannot write again what it had written before `step`.

    Args:
      path: the file; created empty if it does not exist.
      step: the last step to keep.
      ends: whether the run ends at `step` still; then its final lines stay.
      warn: called with one line for the user.

    Raises:
      UserError: the file cannot be read or written.
    """
    lines = check_lines(path)
    if lines.damaged:
        copy = copy_file(path, damaged_name(path))
        word, were = ("lines", "were") if len(lines.damaged) > 1 else ("line", "was")
        numbers = ", ".join(map(str, lines.damaged))
        warn(f"{path}: {word} {numbers} {were} damaged and dropped; the file as it was is kept as {copy.name}")
    kept = b"".join(
        line + b"\n" for line, values in lines.intact if values["step"] <= step and (ends or not values.get(FINAL))
    )
    write_whole(path, lambda file: file.write(kept))
