"""The numbers and pictures of a run on TensorBoard and Weights & Biases, beside `metrics.jsonl`.

A run that goes on goes on there too: what was logged after its checkpoint is dropped (TensorBoard) or logged again with
the same numbers.
"""

import contextlib
import dataclasses
import secrets
import socket
import struct
import time
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.config import Config
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import write_whole
from ddpm_jax.system.hosts import is_primary_host


class MetricWriter(typing.Protocol):
    """A place that shows a run."""

    def numbers(self, step: int, values: dict[str, float]) -> None:
        """Shows numbers by their names."""

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Shows a picture, (H, W, C) uint8."""

    def close(self) -> None:
        """Writes what is not written yet."""


class MetricWriters:
    """All boards of a run; none if none was asked for."""

    def __init__(self, boards: list[MetricWriter]):
        self._boards = boards

    def numbers(self, line: dict[str, Any]) -> None:
        """Shows a line of metrics on every board."""
        values = flatten({name: value for name, value in line.items() if name != "step"})
        for board in self._boards:
            board.numbers(line["step"], values)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Shows a picture on every board."""
        for board in self._boards:
            board.picture(step, name, pixels)


def flatten(line: dict[str, Any]) -> dict[str, float]:
    """Names every number of a line; what is None is left out.

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
    """Opens the boards that a configuration asks for.

    Args:
      config: of the run: `log.tensorboard` and `log.wandb`.
      run: its folder.
      first: how many steps are done; what a board has of later ones is void.

    Yields:
      the `MetricWriters`; none on hosts but the first.

    Raises:
      UserError: a package is missing, the run's folder cannot be written to (then and later), or Weights & Biases
        cannot be reached or does not know who you are.
    """
    with contextlib.ExitStack() as opened:
        boards: list[MetricWriter] = []
        for wanted, make in ((config.log.tensorboard, _TensorBoard), (config.log.wandb, _WandB)):
            if wanted and is_primary_host():
                board = make(config, run, first)
                opened.callback(board.close)
                boards.append(board)
        yield MetricWriters(boards)


def _missing(field: str, package: str) -> UserError:
    return UserError(f"{field} needs the package {package}, which is not installed: pip install {package}")


class _TensorBoard:
    """Writes a file of events, each line of metrics at once: a disk that is full is known where the run can say so.

    The `SummaryWriter` of tensorboardX writes in a thread, whose failure nobody hears of.
    """

    def __init__(self, config: Config, run: Path, first: int):
        del config
        try:
            import tensorboardX.proto.event_pb2
            import tensorboardX.record_writer
            import tensorboardX.summary
        except ImportError:
            raise _missing("log.tensorboard", "tensorboardX") from None
        self._board: types.ModuleType = tensorboardX
        folder = run / "tensorboard"
        with _written(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # TensorBoard reads the files in the order of their names.
            number = len(list(folder.iterdir()))
        now = time.time()
        self._file = folder / f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{number:06d}"
        event = tensorboardX.proto.event_pb2.Event
        start = tensorboardX.proto.event_pb2.SessionLog(status="START")
        # What other files hold of this step and later ones is void from here on.
        self._append(
            [
                event(wall_time=now, file_version="brain.Event:2"),
                event(wall_time=now, step=first + 1, session_log=start),
            ]
        )

    def _append(self, events: Sequence[Any]) -> None:
        """Appends events, each in its frame: length, checksum of the length, content, checksum of the content."""
        checksum = self._board.record_writer.masked_crc32c
        frames = bytearray()
        for content in (event.SerializeToString() for event in events):
            length = struct.pack("<Q", len(content))
            frames += length + struct.pack("<I", checksum(length)) + content + struct.pack("<I", checksum(content))
        with _written(self._file), self._file.open("ab") as file:
            file.write(frames)

    def _append_summaries(self, step: int, summaries: Iterable[Any]) -> None:
        event, now = self._board.proto.event_pb2.Event, time.time()
        self._append([event(wall_time=now, step=step, summary=summary) for summary in summaries])

    def numbers(self, step: int, values: dict[str, float]) -> None:
        scalar = self._board.summary.scalar
        self._append_summaries(step, (scalar(name, value) for name, value in values.items()))

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._append_summaries(step, [self._board.summary.image(name, pixels, dataformats="HWC")])

    def close(self) -> None:
        """All is written."""


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


class _WandB:
    def __init__(self, config: Config, run: Path, first: int):
        del first
        try:
            import wandb
        except ImportError:
            raise _missing("log.wandb", "wandb") from None
        self._wandb: types.ModuleType = wandb
        # The run's name there: kept, so that a run that goes on is the same one.
        file = run / "wandb_id"
        if not file.exists():
            write_whole(file, lambda opened: opened.write(secrets.token_hex(4).encode()))
        try:
            self._run = wandb.init(
                project=config.log.wandb,
                name=config.name,
                id=file.read_text(),
                resume="allow",
                dir=str(run),
                config=dataclasses.asdict(config),
                settings=wandb.Settings(console="off", silent=True),
            )
        except Exception as error:  # no account, no network, no such project: wandb has a kind for each
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"log.wandb={config.log.wandb}: Weights & Biases says: {reason}; WANDB_MODE=offline keeps it in the "
                "run's folder, to be sent later by `wandb sync`"
            ) from error

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._run.log({name: self._wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        self._run.finish()
