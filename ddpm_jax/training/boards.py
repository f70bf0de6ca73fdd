"""The numbers and pictures of a run on TensorBoard and Weights & Biases, beside `metrics.jsonl`.

A run that goes on goes on there too: what was logged after its checkpoint is dropped (TensorBoard) or logged again with
the same numbers.
"""

import contextlib
import dataclasses
import secrets
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.config import Config
from ddpm_jax.errors import UserError
from ddpm_jax.files import write_whole
from ddpm_jax.hosts import is_first


class Board(typing.Protocol):
    """A place that shows a run."""

    def numbers(self, step: int, values: dict[str, float]) -> None:
        """Shows numbers by their names."""

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Shows a picture, (H, W, C) uint8."""

    def close(self) -> None:
        """Writes what is not written yet."""


class Boards:
    """All boards of a run; none if none was asked for."""

    def __init__(self, boards: list[Board]):
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
def open_boards(config: Config, run: Path, *, first: int) -> Iterator[Boards]:
    """Opens the boards that a configuration asks for.

    Args:
      config: of the run: `log.tensorboard` and `log.wandb`.
      run: its folder.
      first: how many steps are done; what a board has of later ones is void.

    Yields:
      the `Boards`; none on hosts but the first.

    Raises:
      UserError: a package is missing, or Weights & Biases cannot be reached or does not know who you are.
    """
    with contextlib.ExitStack() as opened:
        boards: list[Board] = []
        for wanted, make in ((config.log.tensorboard, _TensorBoard), (config.log.wandb, _WandB)):
            if wanted and is_first():
                board = make(config, run, first)
                opened.callback(board.close)
                boards.append(board)
        yield Boards(boards)


def _missing(field: str, package: str) -> UserError:
    return UserError(f"{field} needs the package {package}, which is not installed: pip install {package}")


class _TensorBoard:
    def __init__(self, config: Config, run: Path, first: int):
        del config
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise _missing("log.tensorboard", "tensorboardX") from None
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first + 1 if first else None)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


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
