"""What the tests of pictures share: a small run that was never trained, and a network that compiles at once."""

import runpy
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig
from ddpm_jax.evaluation import bits_per_dim
from ddpm_jax.generation import editor, sampler_config
from ddpm_jax.generation.batches import batch_chain
from ddpm_jax.generation.job import Job
from ddpm_jax.generation.sampler_config import SamplerConfig
from ddpm_jax.networks import parameter_shapes
from ddpm_jax.run.build import build_network
from ddpm_jax.run.checkpoints import Checkpoints
from ddpm_jax.run.record import save_config

T = 12
HELPERS = Path(__file__).parent / "training" / "helpers.py"
ROOT = Path(__file__).parents[1]


def make_job(*, num_classes=0, data=None, seed=0, choice=None):
    config = Config(
        data=DataConfig() if data is None else data,
        diffusion=DiffusionConfig(num_steps=T, beta_start=0.05, beta_end=0.6),
        model=ModelConfig(
            width=8,
            channel_mult=(1,),
            num_res_blocks=1,
            attention_resolutions=(),
            num_groups=4,
            num_classes=num_classes,
        ),
    )
    leaves, structure = jax.tree.flatten(parameter_shapes(build_network(config)))
    random = np.random.default_rng(0)
    # As initialized the network says almost 0.
    params = structure.unflatten([jnp.asarray(0.2 * random.normal(size=leaf.shape), jnp.float32) for leaf in leaves])
    return Job(config, params, 7, seed, SamplerConfig() if choice is None else choice)


def closed_form(network, params, labels, **choice):
    """A network that compiles at once, for what does not depend on which network it is."""
    told = 0.0 if labels is None else 0.3 * jnp.sin(labels.astype(jnp.float32))[:, None, None, None]
    return lambda x_t, t: 0.6 * x_t + 0.2 * jnp.roll(x_t, 1, axis=1) + told


def save_run(job, folder):
    """Makes the folder of a run out of a job: its configuration, and the averaged weights alone."""
    folder.mkdir()
    save_config(job.config, folder / "config.json")
    nothing, ema = jax.tree.map(jnp.zeros_like, job.params), job.params
    with Checkpoints(folder, keep=1, warn=pytest.fail) as checkpoints:
        items = {"params": nothing, "ema": ema, "optimizer": (jnp.zeros(3),)}
        checkpoints.save(job.checkpoint, items, notes={})
    return folder


@pytest.fixture(scope="session")
def training():
    """The helpers of the tests of training: tests are not a package, so they cannot import them."""
    return types.SimpleNamespace(**runpy.run_path(str(HELPERS), run_name="helpers"))


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Runs a script in this process; gives its status, and what it wrote."""

    def run(script, *words):
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        with pytest.raises(SystemExit) as ending:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        return ending.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def drawing():
    """Makes jobs of T steps, whose network is a closed form while the module's tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler_config, "predict_with", closed_form)
        patch.setattr(editor, "predict_with", closed_form)
        patch.setattr(bits_per_dim, "predict_with", closed_form)
        batch_chain.cache_clear()
        bits_per_dim.batch_bound.cache_clear()
        yield types.SimpleNamespace(T=T, make_job=make_job, save_run=save_run)
    batch_chain.cache_clear()
    bits_per_dim.batch_bound.cache_clear()
