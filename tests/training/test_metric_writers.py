"""TensorBoard and Weights & Biases show the numbers that were written."""

import dataclasses
import re
import subprocess
import sys

import numpy as np
import pytest

from ddpm_jax.config import Config, LogConfig
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import read_json
from ddpm_jax.training.loop import train
from ddpm_jax.training.metric_writers import open_metric_writers

LINE = {"step": 20, "loss": 0.25, "loss_quartiles": [1.0, None, 0.5, 0.125], "model_flops_utilization": None}


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


def test_tensorboard_has_scalars_and_images(tmp_path):
    pytest.importorskip("tensorboardX")
    config = Config(log=LogConfig(tensorboard=True))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 3)).astype(np.uint8)
    with open_metric_writers(config, tmp_path, first=0) as writers:
        writers.write_scalars(LINE)
        writers.write_image(20, "samples", pixels)
    values = {value.tag: value for event in events_of(tmp_path / "tensorboard") for value in event.summary.value}
    numbers = {tag: value.simple_value for tag, value in values.items() if tag != "samples"}
    assert numbers == {"loss": 0.25, "loss_quartiles/1": 1.0, "loss_quartiles/3": 0.5, "loss_quartiles/4": 0.125}
    assert (values["samples"].image.height, values["samples"].image.width) == (8, 6)


@pytest.mark.parametrize("first", [0, 10])
def test_tensorboard_drops_what_a_run_logs_again(tmp_path, first):
    """A run killed before or after its first checkpoint and started again: every number is there once."""
    pytest.importorskip("tensorboardX")
    config = Config(log=LogConfig(tensorboard=True))
    for done, steps in ((0, (5, 10, 15, 20)), (first, range(first + 5, 30, 5))):
        with open_metric_writers(config, tmp_path, first=done) as writers:
            for step in steps:
                writers.write_scalars({"step": step, "loss": 100 * done + step})
    shown = []
    for event in events_of(tmp_path / "tensorboard"):
        if event.session_log.status == 1:  # what TensorBoard does at a start: it drops this step and later ones
            shown = [(step, value) for step, value in shown if step < event.step]
        shown += [(event.step, value.simple_value) for value in event.summary.value]
    assert shown == [(step, 100 * first * (step > first) + step) for step in range(5, 30, 5)]


def test_a_full_disk_is_one_line_and_an_end(tmp_path):
    """In a process of its own, whose files may not grow beyond a few lines."""
    pytest.importorskip("tensorboardX")
    program = """
import pathlib, resource, signal, sys
from ddpm_jax.config import Config, LogConfig
from ddpm_jax.system.errors import UserError
from ddpm_jax.training.metric_writers import open_metric_writers
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
try:
    with open_metric_writers(Config(log=LogConfig(tensorboard=True)), pathlib.Path(sys.argv[1]), first=0) as writers:
        for step in range(1000):
            writers.write_scalars({"step": step, **{f"number_{i}": 0.5 for i in range(10)}})
except UserError as error:
    sys.exit(f"step {step}: {error}")
"""
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert re.fullmatch(rf"step \d+: cannot write {tmp_path}/tensorboard: File too large\n", ended.stderr)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    pytest.importorskip("tensorboardX")
    (tmp_path / "tensorboard").write_text("a file")
    with (
        pytest.raises(UserError, match=r"^cannot write .*/tensorboard: File exists$"),
        open_metric_writers(Config(log=LogConfig(tensorboard=True)), tmp_path, first=0),
    ):
        pass


def test_weights_and_biases_resumes_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = Config(log=LogConfig(wandb="a_project"))
    for first in (0, 10):
        with open_metric_writers(config, tmp_path, first=first) as writers:
            writers.write_scalars({**LINE, "step": first + 1})
            writers.write_image(first + 1, "samples", np.zeros((8, 6, 1), np.uint8))
    folders = [folder for folder in (tmp_path / "wandb").iterdir() if folder.name.startswith("offline-run")]
    name = read_json(tmp_path / "wandb.json")["id"]
    assert folders
    assert all(name in folder.name.split("-") for folder in folders)  # then "-1", if both began in the same second
    assert all(list(folder.glob("*.wandb")) for folder in folders)


@pytest.mark.parametrize(
    ("log", "package"), [(LogConfig(tensorboard=True), "tensorboardX"), (LogConfig(wandb="a_project"), "wandb")]
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, log, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"^log\.(tensorboard|wandb) needs .* pip install {package}$"):
        train(dataclasses.replace(Config(), log=log), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_nothing_is_opened_unasked(tmp_path):
    with open_metric_writers(Config(), tmp_path, first=0) as writers:
        writers.write_scalars(LINE)
        writers.write_image(20, "samples", np.zeros((8, 6, 1), np.uint8))
    assert not list(tmp_path.iterdir())
