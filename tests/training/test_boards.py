"""TensorBoard and Weights & Biases show the numbers that were written, read back by their own formats."""

import dataclasses
import sys

import numpy as np
import pytest

from ddpm_jax.config import Config, LogConfig
from ddpm_jax.errors import UserError
from ddpm_jax.training.boards import open_boards

LINE = {"step": 20, "loss": 0.25, "loss_quartiles": [1.0, None, 0.5, 0.125], "model_flops_utilisation": None}


def events_of(folder):
    """Reads TensorBoard's files: records of (length, checksum, event, checksum)."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            events.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return events


def test_tensorboard_holds_numbers_and_pictures(tmp_path):
    pytest.importorskip("tensorboardX")
    config = Config(log=LogConfig(tensorboard=True))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 3)).astype(np.uint8)
    with open_boards(config, tmp_path, first=0) as boards:
        boards.numbers(LINE)
        boards.picture(20, "samples", pixels)
    values = {value.tag: value for event in events_of(tmp_path / "tensorboard") for value in event.summary.value}
    numbers = {tag: value.simple_value for tag, value in values.items() if tag != "samples"}
    assert numbers == {"loss": 0.25, "loss_quartiles/1": 1.0, "loss_quartiles/3": 0.5, "loss_quartiles/4": 0.125}
    assert (values["samples"].image.height, values["samples"].image.width) == (8, 6)


def test_tensorboard_drops_what_a_resumed_run_logs_again(tmp_path):
    pytest.importorskip("tensorboardX")
    config = Config(log=LogConfig(tensorboard=True))
    for first in (0, 10):
        with open_boards(config, tmp_path, first=first) as boards:
            boards.numbers(LINE)
    starts = [event.step for event in events_of(tmp_path / "tensorboard") if event.session_log.status == 1]
    assert starts == [11]


def test_weights_and_biases_goes_on_as_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = Config(log=LogConfig(wandb="a_project"))
    for first in (0, 10):
        with open_boards(config, tmp_path, first=first) as boards:
            boards.numbers({**LINE, "step": first + 1})
            boards.picture(first + 1, "samples", np.zeros((8, 6, 1), np.uint8))
    folders = [folder for folder in (tmp_path / "wandb").iterdir() if folder.name.startswith("offline-run")]
    name = (tmp_path / "wandb_id").read_text()
    assert folders
    assert all(folder.name.endswith(name) for folder in folders)
    assert all(list(folder.glob("*.wandb")) for folder in folders)


@pytest.mark.parametrize(
    ("log", "package"), [(LogConfig(tensorboard=True), "tensorboardX"), (LogConfig(wandb="a_project"), "wandb")]
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, log, package):
    monkeypatch.setitem(sys.modules, package, None)
    with (
        pytest.raises(UserError, match=rf"^log\.(tensorboard|wandb) needs .* pip install {package}$"),
        open_boards(dataclasses.replace(Config(), log=log), tmp_path, first=0),
    ):
        pass


def test_nothing_is_opened_unasked(tmp_path):
    with open_boards(Config(), tmp_path, first=0) as boards:
        boards.numbers(LINE)
        boards.picture(20, "samples", np.zeros((8, 6, 1), np.uint8))
    assert not list(tmp_path.iterdir())
