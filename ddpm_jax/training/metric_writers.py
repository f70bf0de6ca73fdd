"""Metrics and sample grids on TensorBoard and Weights & Biases, in addition to `metrics.jsonl`.

A run that resumes does so there too: what was logged after its checkpoint is dropped (TensorBoard) or logged again with
the same numbers.
"""

import contextlib
import dataclasses
import importlib.util
import secrets
import socket
import time
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.config import Config
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import read_json, read_or_set_aside, write_json
from ddpm_jax.system.hosts import is_primary_host


class MetricWriter(typing.Protocol):
    """A service that shows a run."""

    def write_scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes scalars by name."""

    def write_image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Writes an image, (H, W, C) uint8."""

    def close(self) -> None:
        """Writes what is still buffered."""


class MetricWriters:
    """All metric writers of a run; none if none were requested."""

    def __init__(self, writers: list[MetricWriter]):
        self._writers = writers

    def write_scalars(self, line: dict[str, Any]) -> None:
        """Writes the numbers of a line of metrics to every writer."""
        values = flatten({name: value for name, value in line.items() if name != "step"})
        for writer in self._writers:
            writer.write_scalars(line["step"], values)

    def write_image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Writes an image, (H, W, C) uint8, to every writer."""
        for writer in self._writers:
            writer.write_image(step, name, pixels)


def flatten(line: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers of a line by name, without those that are None.

    >>> flatten({"loss": 0.5, "loss_quartiles": [1.0, None, 0.2, 0.1]})
    {'loss': 0.5, 'loss_quartiles/1': 1.0, 'loss_quartiles/3': 0.2, 'loss_quartiles/4': 0.1}
    """
    values: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, list):
            values |= {f"{name}/{number}": entry for number, entry in enumerate(value, 1) if entry is not None}
        elif value is not None:
            values[name] = value
    return values


@contextlib.contextmanager
def open_metric_writers(config: Config, run: Path, *, first: int) -> Iterator[MetricWriters]:
    """Opens the metric writers that a configuration requests.

    Args:
      config: the run's: `log.tensorboard` and `log.wandb`.
      run: its folder.
      first: the number of steps done; what was logged of later ones is void.

    Yields:
      the `MetricWriters`; empty on all hosts but the primary one.

    Raises:
      UserError: the run's folder is not writable (then or later), or Weights & Biases cannot be
        reached or rejects the login.
    """
    with contextlib.ExitStack() as opened:
        writers: list[MetricWriter] = []
        for wanted, make in ((config.log.tensorboard, _TensorBoard), (config.log.wandb, _WandB)):
            if wanted and is_primary_host():
                writer = make(config, run, first)
                opened.callback(writer.close)
                writers.append(writer)
        yield MetricWriters(writers)


def check_packages(config: Config) -> None:
    """Checks that the packages of the metric writers that a configuration requests are installed.

    Raises:
      UserError: one is not.
    """
    for field, wanted, package in (
        ("log.tensorboard", config.log.tensorboard, "tensorboardX"),
        ("log.wandb", config.log.wandb, "wandb"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"{field} needs the package {package}, which is not installed: pip install {package}")


class _TensorBoard:
    """Writes each line of metrics to an event file at once: a full disk is an error where the run can report it.

    By tensorboardX's `RecordWriter`, because its `SummaryWriter` writes in a thread, whose errors are lost.
    """

    def __init__(self, config: Config, run: Path, first: int):
        del config
        from tensorboardX import record_writer, summary
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._summary, self._event = summary, Event
        self._folder = run / "tensorboard"
        with self._writing():
            self._folder.mkdir(parents=True, exist_ok=True)
            # TensorBoard reads the files in the order of their names.
            number = len(list(self._folder.iterdir()))
            name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{number:06d}"
            self._file = record_writer.RecordWriter(str(self._folder / name))
        now, start = time.time(), SessionLog(status=SessionLog.START)
        # From here on TensorBoard drops what other files hold of this step and later ones.
        self._write(
            [
                Event(wall_time=now, file_version="brain.Event:2"),
                Event(wall_time=now, step=first + 1, session_log=start),
            ]
        )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self._folder}: {error.strerror or error}") from error

    def _write(self, events: Iterable[Any]) -> None:
        with self._writing():
            for event in events:
                self._file.write(event.SerializeToString())
            self._file.flush()

    def _write_summaries(self, step: int, summaries: Iterable[Any]) -> None:
        now = time.time()
        self._write(self._event(wall_time=now, step=step, summary=summary) for summary in summaries)

    def write_scalars(self, step: int, values: dict[str, float]) -> None:
        self._write_summaries(step, (self._summary.scalar(name, value) for name, value in values.items()))

    def write_image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._write_summaries(step, [self._summary.image(name, pixels, dataformats="HWC")])

    def close(self) -> None:
        with self._writing():
            self._file.close()


class _WandB:
    def __init__(self, config: Config, run: Path, first: int):
        del first
        import wandb

        self._wandb: types.ModuleType = wandb
        # The run's id there, kept so that a resumed run continues it.
        file = run / "wandb.json"
        found = read_or_set_aside(file, read_json) if file.exists() else None
        if found is None:
            found = {"id": secrets.token_hex(4)}
            write_json(file, found)
        try:
            self._run = wandb.init(
                project=config.log.wandb,
                name=config.name,
                id=found["id"],
                resume="allow",
                dir=str(run),
                config=dataclasses.asdict(config),
                settings=wandb.Settings(console="off", silent=True),
            )
        except Exception as error:  # no account, no network, no such project: wandb has a kind for each
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"log.wandb={config.log.wandb}: Weights & Biases says: {reason}; with WANDB_MODE=offline metrics stay "
                "in the run's folder, to be uploaded later with `wandb sync`"
            ) from error

    def write_scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def write_image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._run.log({name: self._wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        self._run.finish()
