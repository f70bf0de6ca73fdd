"""A step that is not finite is done again, and the layer that was the first is named."""

import dataclasses
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.config import CheckpointConfig, Config, LogConfig, TrainConfig
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import read_json, write_json
from ddpm_jax.training import setup
from ddpm_jax.training.diagnosis import find_not_finite, first_not_finite
from ddpm_jax.training.loop import train
from ddpm_jax.training.setup import make_setup
from ddpm_jax.training.step import Batch

CONFIG = Config(
    train=TrainConfig(steps=8, batch_size=8, learning_rate=1e-3, warmup_steps=2, ema_decay=0.5),
    checkpoints=CheckpointConfig(every=3, keep=2),
    log=LogConfig(every=2, samples_every=0),
)


class Layers(nn.Module):
    """eps = last(first(x)) + sqrt(root): the root's derivative at 0 is not finite."""

    num_classes: int = 0

    @nn.compact
    def __call__(self, x, t, labels=None, *, dropout_keys=None):
        h = nn.Dense(4, name="first")(x)
        h = nn.Dense(1, name="last")(nn.tanh(h))
        return h + jnp.sqrt(self.param("root", nn.initializers.ones, (1,)))[None, None, None]


@pytest.fixture(scope="module", autouse=True)
def _small_network(training):
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(setup, "build_network", lambda config: training.as_network(Layers()))
        yield


@pytest.fixture(scope="module")
def start(training):
    parts = make_setup(CONFIG)
    return parts, jax.jit(parts.init)(parts.keys.init), Batch(training.images_of(0, 8), np.arange(8, dtype=np.int32))


def with_param(state, layer, name, value):
    params = dict(state.params)
    leaf = params[layer][name] if name else params[layer]
    filled = jnp.full_like(leaf, value)
    params[layer] = {**params[layer], name: filled} if name else filled
    return dataclasses.replace(state, params=params)


@pytest.mark.parametrize(
    ("layer", "name", "value", "message"),
    [
        ("first", "kernel", 3e38, "the layer first is the first whose output is not finite; its input is, and at most"),
        ("last", "bias", jnp.nan, "the parameter last/bias was not finite before the step"),
        ("last", "bias", 1e30, "the loss is the first that is not finite: all layers are"),
        ("root", "", 0.0, "all layers are finite, and the gradient of root is the first that is not"),
    ],
)
def test_the_first_that_is_not_finite_is_named(start, layer, name, value, message):
    parts, state, batch = start
    assert first_not_finite(parts, with_param(state, layer, name, value), batch).startswith(message)


def test_a_run_is_followed_from_its_checkpoint_to_its_bad_step(tmp_path):
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, learning_rate=1e30))
    with pytest.raises(UserError) as error:
        train(config, tmp_path)
    step, loss = str(error.value).split(", gradient")[0].split(": loss ")
    assert "--debug-nans names the layer" in str(error.value)
    times_of = lambda: {path: path.stat().st_mtime_ns for path in tmp_path.rglob("[!.]*") if path.is_file()}
    before = times_of()
    found = find_not_finite(config, tmp_path)
    assert found.startswith(f"{step}: loss {loss}, gradient norm ")
    assert "the update or a norm is not" in found  # 1e30 is a number, its square is not
    assert times_of() == before


def test_a_sound_run_is_found_sound(tmp_path):
    assert find_not_finite(CONFIG, tmp_path) == "all steps from 0 to 8 are finite"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, steps=1)), folder)
    return folder


def test_another_run_is_refused_in_the_words_of_training(run):
    """The step of another configuration, or of other images, is not the run's bad step."""
    changed = {"train": {"seed": 5}, "loss": {"weighting": "min_snr"}, "data": {"split": "test"}}
    lines = {}
    for section, fields in changed.items():
        config = dataclasses.replace(CONFIG, **{section: dataclasses.replace(getattr(CONFIG, section), **fields)})
        for start in (find_not_finite, train):
            with pytest.raises(UserError) as error:
                start(config, run)
            lines[section, start] = str(error.value)
        assert lines[section, find_not_finite] == lines[section, train]
        assert f"{run} contains a run with a different configuration ({section}." in lines[section, train]


def test_other_images_are_refused_and_nothing_is_written(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "data.json"
    there = read_json(file)
    write_json(file, {**there, "crc32": there["crc32"] ^ 1})
    with pytest.raises(UserError, match="was begun on other images than .*other pixels or labels"):
        find_not_finite(CONFIG, tmp_path / "run")
    file.unlink()
    assert find_not_finite(CONFIG, tmp_path / "run").startswith("all steps from 1 to 8")
    assert not file.exists()
