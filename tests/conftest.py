"""Fixtures shared by several rooms: small trained runs that were never trained, and scripts run in this process."""

import functools
import os
import runpy
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, LossConfig, ModelConfig
from ddpm_jax.generation.job import SamplingJob
from ddpm_jax.generation.sampler_config import SamplerConfig
from ddpm_jax.networks import parameter_shapes
from ddpm_jax.run.build import build_network
from ddpm_jax.run.checkpoints import Checkpoints
from ddpm_jax.run.record import save_config
from ddpm_jax.run.trained import TrainedRun

T = 12
HELPERS = Path(__file__).parent / "training" / "helpers.py"
ROOT = Path(__file__).parents[1]

network_of = functools.cache(build_network)  # one network per config: what is compiled for it is compiled once


def make_config(*, num_classes=0, data=None, **diffusion):
    return Config(
        data=DataConfig() if data is None else data,
        diffusion=DiffusionConfig(**{"num_steps": T, "beta_start": 0.05, "beta_end": 0.6, **diffusion}),
        model=ModelConfig(
            width=8,
            channel_mult=(1,),
            num_res_blocks=1,
            attention_resolutions=(),
            num_groups=4,
            num_classes=num_classes,
        ),
        loss=LossConfig(kind="hybrid" if diffusion.get("variance", "").startswith("learned") else "simple"),
    )


def random_params(config, seed=0):
    """Weights of a network whose output matters; as initialized it is almost 0."""
    leaves, structure = jax.tree.flatten(parameter_shapes(network_of(config)))
    random = np.random.default_rng(seed)
    return structure.unflatten([jnp.asarray(0.2 * random.normal(size=leaf.shape), jnp.float32) for leaf in leaves])


def make_trained(config, *, seed=0, step=7, folder=Path("runs/tiny")):
    """A run of the paper's network with random weights."""
    return TrainedRun(config, network_of(config), random_params(config, seed), step, folder)


def closed_form(params, x_t, t, labels=None, *, dropout_keys=None):
    """A network that compiles at once, for what does not depend on which network it is."""
    shift = 0.0 if labels is None else 0.3 * jnp.sin(labels.astype(jnp.float32))[:, None, None, None]
    return 0.6 * x_t + 0.2 * jnp.roll(x_t, 1, axis=1) + shift


def make_job(config=None, *, seed=0, sampler=None, folder=Path("runs/tiny"), **fields):
    """A sampling job of a run whose network is `closed_form`."""
    trained = make_trained(make_config(**fields) if config is None else config, folder=folder)
    trained = trained._replace(network=trained.network._replace(apply=closed_form))
    return SamplingJob(trained, seed, SamplerConfig() if sampler is None else sampler)


def save_runs(*checkpoints, folder):
    """Writes the folder of a run: its configuration, and checkpoints in which only the EMA weights matter."""
    folder.mkdir()
    save_config(checkpoints[0].config, folder / "config.json")
    with Checkpoints(folder, keep=len(checkpoints), warn=pytest.fail) as saved:
        for trained in checkpoints:
            zeros = jax.tree.map(jnp.zeros_like, trained.params)
            saved.save(trained.step, {"params": zeros, "ema": trained.params, "optimizer": (jnp.zeros(3),)}, notes={})
    return folder


@pytest.fixture(scope="session")
def runs():
    """Makes trained runs and sampling jobs."""
    return types.SimpleNamespace(
        T=T,
        make_config=make_config,
        random_params=random_params,
        make_trained=make_trained,
        closed_form=closed_form,
        make_job=make_job,
        save_runs=save_runs,
    )


@pytest.fixture(scope="session")
def training():
    """The helpers of the tests of training: tests are not a package, so they cannot import them."""
    return types.SimpleNamespace(**runpy.run_path(str(HELPERS), run_name="helpers"))


@pytest.fixture
def default_precision():
    """Sets the tests' own precision aside: a script fixes the options of jax, and would name it."""
    jax.config.update("jax_default_matmul_precision", None)
    yield
    jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def own_process(monkeypatch):
    """Sets back what a script chooses for its process."""
    names = ("jax_enable_compilation_cache", "jax_persistent_cache_min_compile_time_secs", "jax_platforms")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def run_script(monkeypatch, capsys, default_precision, own_process):
    """Runs a script in this process; returns its status, and what it wrote."""

    def run(script, *words):
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        with pytest.raises(SystemExit) as ending:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        return ending.value.code, *capsys.readouterr()

    return run
