"""The examples run, each in its short form."""

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from ddpm_jax.data.sources import resolve
from ddpm_jax.run.experiments import load_config
from ddpm_jax.run.trained import load_run
from ddpm_jax.run.validation import validate
from ddpm_jax.system.errors import UserError
from ddpm_jax.training.loop import train

ROOT = Path(__file__).parents[1]


def run_example(name, *words, cwd):
    """Runs an example as a user does; returns what it prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)  # one device, as a user has it
    command = [sys.executable, str(ROOT / "examples" / name), *words]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_minimal(tmp_path):
    printed = run_example("minimal.py", "3", "10", cwd=tmp_path)
    assert float(printed.removeprefix("step 0: loss ")) < 1.3
    assert np.asarray(Image.open(tmp_path / "minimal.png")).std() > 0


@pytest.fixture(autouse=True, scope="module")
def _as_users_have_it():
    """Adam mixes types."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def own(steps=4, **sections):
    config = load_config(ROOT / "configs" / "digits.py")
    short = {
        "diffusion": {"num_steps": 20, "schedule": "cosine"},
        "log": {"every": 2, "samples_every": 4, "num_samples": 8, "sample_steps": 2},
        "train": {"steps": steps, "batch_size": 8},
        "checkpoints": {"every": 2},
    }
    for name, fields in {**short, **sections}.items():
        config = dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **fields)})
    validate(config)
    return dataclasses.replace(config, data=resolve(config.data))


def named(file, function):
    return f"{ROOT / 'examples' / file}:{function}"


def ema_of(run):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(load_run(run).params)]


@pytest.mark.parametrize("function", ["make_network", "make_nnx_network", "make_plain_network"])
def test_own_network_trains_resumes_and_draws(function, tmp_path, run_script):
    """The run's folder is all that sampling needs: it draws the same images wherever that is."""
    model = {"network": named("own_network.py", function), "width": 8}
    train(own(model=model), tmp_path / "whole")
    train(own(model=model, steps=2), tmp_path / "resumed")
    train(own(model=model), tmp_path / "resumed")
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (tmp_path / "resumed" / "metrics.jsonl").read_bytes()
    for whole, resumed in zip(ema_of(tmp_path / "whole"), ema_of(tmp_path / "resumed"), strict=True):
        np.testing.assert_array_equal(whole, resumed)
    images = []
    for folder in ("resumed", "moved"):
        status, _, error = run_script("sample.py", tmp_path / folder, "--num", 8, "--steps", 3, "--format", "npz")
        assert status == 0, error
        found = next((tmp_path / folder / "samples").rglob("samples.npz"))
        images.append(np.load(found)["arr_0"])
        if folder == "resumed":
            shutil.move(tmp_path / folder, tmp_path / "moved")
            shutil.rmtree(next((tmp_path / "moved" / "samples").rglob("samples.npz")).parent)
    np.testing.assert_array_equal(*images)


@pytest.mark.parametrize("function", ["make_source", "make_stream"])
def test_own_data_trains_from_memory_or_streamed_with_the_same_numbers(function, tmp_path, request):
    data = {"source": named("own_data.py", function), "height": 6, "width": 8, "channels": 3}
    model = {"network": named("own_network.py", "make_network"), "width": 8, "num_classes": 2}
    train(own(model=model, data=data), tmp_path)
    metrics = request.config.stash.setdefault(_METRICS, {})
    metrics[function] = (tmp_path / "metrics.jsonl").read_bytes()
    assert len(set(metrics.values())) == 1


_METRICS = pytest.StashKey[dict]()


def test_a_changed_file_is_refused_and_the_copy_is_checked(tmp_path):
    file, run = tmp_path / "my_net.py", tmp_path / "run"
    shutil.copy(ROOT / "examples" / "own_network.py", file)
    config = own(model={"network": f"{file}:make_plain_network"})
    train(config, run)
    assert (run / "code" / "network.py").read_bytes() == file.read_bytes()
    file.write_text(file.read_text() + "# changed")
    with pytest.raises(UserError, match=r"my_net.py has changed since .*run was started .* \(a copy is .*network.py\)"):
        train(own(model={"network": f"{file}:make_plain_network"}, steps=6), run)
    load_run(run)
    file.unlink()
    load_run(run)
    with contextlib.suppress(FileNotFoundError):
        (run / "code" / "network.py").write_text("def make_plain_network(config): pass")
    with pytest.raises(UserError, match=r"code/network.py is not the file that .*run was trained with"):
        load_run(run)
