"""What a run does every N steps, beside training: log, evaluate, draw, save, and whatever a caller adds."""

import functools
import time
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.config import CheckpointConfig, Config
from ddpm_jax.run.checkpoints import Checkpoints
from ddpm_jax.run.computed_on import ComputedOn
from ddpm_jax.run.snapshots import save_snapshot
from ddpm_jax.system import pictures
from ddpm_jax.system.hosts import is_primary_host
from ddpm_jax.system.mesh import to_this_host
from ddpm_jax.training import plots
from ddpm_jax.training.metric_writers import MetricWriters
from ddpm_jax.training.metrics import FINAL, Diagnostics, append_line, summarize
from ddpm_jax.training.speed import SpeedMeter
from ddpm_jax.training.state import Params, TrainState, to_items


class Event:
    """A step after which hooks run: on every host, between this step and the next."""

    step: int
    """Steps done so far, >= 1."""
    is_extra: bool
    """Whether the hook that runs is due only because the run ends or stops here: a longer run would not run it."""
    values: dict[str, Any]
    """What hooks have logged at this step, lines of an extra event excepted."""

    def __init__(self, step: int, state: Callable[[], TrainState], write: Callable[[dict[str, Any]], None]):
        self.step, self.is_extra, self.values = step, False, {}
        self._get_state, self._write = state, write

    @functools.cached_property
    def state(self) -> TrainState:
        """The training state as it is saved; the next step overwrites its arrays, so copy what outlives the hook."""
        return self._get_state()

    def log(self, values: Mapping[str, Any]) -> None:
        """Appends a line to metrics.jsonl, and sends it to TensorBoard and Weights & Biases.

        A line of an extra event is marked `"final": true`, and dropped when the run is extended.

        Args:
          values: numbers by name; also None, and lists of them. If they follow from the state alone, a resumed run
            writes the same bytes as one that was never stopped.
        """
        if not self.is_extra:
            self.values |= values
        self._write({"step": self.step, **values, **({FINAL: True} if self.is_extra else {})})


class Periodic(typing.NamedTuple):
    """A hook: something to do every N steps and after the last one.

    >>> hook = Periodic(100, lambda event: print(event.step))
    >>> [step for step in (50, 100, 150, 170) if hook.is_due(step, is_last=step == 170)]
    [100, 170]
    """

    every: int
    """N; 0: never."""
    run: Callable[[Event], None]
    """What to do. On several hosts each of them calls it, so it may run programs of all devices."""

    def is_due(self, step: int, *, is_last: bool) -> bool:
        """Returns whether the hook runs after a step."""
        return self.every > 0 and (is_last or self.is_regular(step))

    def is_regular(self, step: int) -> bool:
        """Returns whether the hook runs after a step wherever the run ends."""
        return self.every > 0 and step % self.every == 0


def calls(first: int, last: int, *, periods: Iterable[int], most: int) -> Iterator[range]:
    """Cuts the steps of a run into calls of the compiled program, so that hooks run between two calls.

    Args:
      first: the number of steps done.
      last: the number of steps at the end.
      periods: the `every` of each hook.
      most: the largest number of steps of a call.

    Yields:
      the 0-based steps of each call.

    >>> list(calls(6, 20, periods=(10, 0), most=4))
    [range(6, 10), range(10, 14), range(14, 18), range(18, 20)]
    """
    periods = [every for every in periods if every]
    while first < last:
        due = (first - first % every + every for every in periods)
        stop = min(first + most, last, *due)
        yield range(first, stop)
        first = stop


def append_metrics(run: Path, writers: MetricWriters, line: dict[str, Any]) -> None:
    """Writes a line to `metrics.jsonl`, TensorBoard and Weights & Biases."""
    if is_primary_host():
        append_line(run / "metrics.jsonl", line)
    writers.write_scalars(line)


def logging(
    run: Path,
    diagnostics: Diagnostics,
    meter: SpeedMeter,
    writers: MetricWriters,
    learning_rate: Callable[[int], Any],
) -> Callable[[Event], None]:
    """Returns the hook's function that logs the diagnostics and the speed of the steps since the last line.

    Args:
      run: the run's folder.
      diagnostics: of the steps.
      meter: of the speed.
      writers: where the speed is shown, beside timing.jsonl.
      learning_rate: of update k = 0, 1, ..
    """

    def log(event: Event) -> None:
        event.log({**summarize(diagnostics.window), "learning_rate": float(learning_rate(event.step - 1))})
        if not event.is_extra:  # else the run can be extended, and the window is not complete
            diagnostics.window.clear()
        timing = {"step": event.step, **meter.measure(event.step)}
        if is_primary_host():
            append_line(run / "timing.jsonl", timing)
        writers.write_scalars(timing)

    return log


def drawing(run: Path, draw: Callable[[Params], np.ndarray], writers: MetricWriters) -> Callable[[Event], None]:
    """Returns the hook's function that draws a grid of samples from the EMA weights, and the loss so far.

    Args:
      run: the run's folder.
      draw: from EMA weights to (N, H, W, C) uint8.
      writers: where the grid is shown, beside `samples/`.
    """

    def draw_grid(event: Event) -> None:
        images = draw(event.state.ema)
        if is_primary_host():
            picture = pictures.enlarge(pictures.grid(images))
            pictures.save_png(run / "samples" / f"step_{event.step:07d}.png", picture)
            writers.write_image(event.step, "samples", picture)
            plots.plot_run(run)

    return draw_grid


def snapshotting(run: Path, config: Config) -> Callable[[Event], None]:
    """Returns the hook's function that saves a snapshot of the power-function averages of a run."""

    def save(event: Event) -> None:
        averages = to_this_host(event.state.power_averages)
        if is_primary_host():
            save_snapshot(run, event.step, averages, config=config)

    return save


class Saving:
    """Saves a checkpoint.

    Only those of `checkpoints.every` steps compete to be the best: others are where the run was stopped or ended, and
    which checkpoints are the best must not depend on that.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        diagnostics: Diagnostics,
        config: CheckpointConfig,
        computed_on: Sequence[ComputedOn],
    ):
        """Saves the state, the diagnostics that a resumed run needs, and what the steps were computed on."""
        self._checkpoints, self._diagnostics, self._config = checkpoints, diagnostics, config
        self._computed_on = computed_on
        self._saved_at = time.monotonic()

    def is_overdue(self) -> bool:
        """Returns whether `checkpoints.minutes` have passed; True once, on the primary host alone."""
        now = time.monotonic()
        overdue = is_primary_host() and 0 < 60 * self._config.minutes <= now - self._saved_at
        if overdue:
            self._saved_at = now  # it is announced once, and saved when every host knows
        return overdue

    def __call__(self, event: Event) -> None:
        loss, diagnostics = None, self._diagnostics
        if not event.is_extra:
            mean = diagnostics.since_save.take()
            loss = mean if self._config.best_by == "loss" else event.values.get(self._config.best_by)
        numbers = {"window": diagnostics.window, "since_save": diagnostics.since_save.numbers()}
        notes = {**numbers, "computed_on": self._computed_on}
        self._checkpoints.save(event.step, to_items(event.state), notes=notes, loss=loss)
        self._saved_at = time.monotonic()
