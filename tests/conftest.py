"""What the tests of pictures share: a small run that was never trained, and a network that compiles at once."""

import runpy
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import chains, editor
from ddpm_jax.chains import Choice
from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, build_unet, image_shape, save_config
from ddpm_jax.evaluation import bits
from ddpm_jax.sampling import Job, batch_chain
from ddpm_jax.training.checkpoints import Checkpoints
from ddpm_jax.training.state import TrainState, init_params

T = 12
ROOT = Path(__file__).parents[1]


def make_job(*, num_classes=0, data=None, seed=0, choice=None):
    config = Config(
        data=DataConfig() if data is None else data,
        diffusion=DiffusionConfig(num_steps=T, beta_start=0.05, beta_end=0.6),
        model=ModelConfig(
            width=8, multipliers=(1,), blocks=1, attention_resolutions=(), groups=4, num_classes=num_classes
        ),
    )
    shapes = jax.eval_shape(lambda key: init_params(key, build_unet(config), image_shape(config)), jax.random.key(0))
    leaves, structure = jax.tree.flatten(shapes)
    random = np.random.default_rng(0)
    # As initialised the network says almost 0.
    params = structure.unflatten([jnp.asarray(0.2 * random.normal(size=leaf.shape), jnp.float32) for leaf in leaves])
    return Job(config, params, 7, seed, Choice() if choice is None else choice)


def closed_form(unet, params, labels, **choice):
    """A network that compiles at once, for what does not depend on which network it is."""
    told = 0.0 if labels is None else 0.3 * jnp.sin(labels.astype(jnp.float32))[:, None, None, None]
    return lambda x_t, t: 0.6 * x_t + 0.2 * jnp.roll(x_t, 1, axis=1) + told


def save_run(job, folder):
    """Makes the folder of a run out of a job: its configuration, and the averaged weights alone."""
    folder.mkdir()
    save_config(job.config, folder / "config.json")
    nothing, ema = jax.tree.map(jnp.zeros_like, job.params), job.params
    with Checkpoints(folder, keep=1, warn=pytest.fail) as checkpoints:
        state = TrainState(jnp.int32(job.checkpoint), nothing, ema, (jnp.zeros(3),))
        checkpoints.save(job.checkpoint, state, notes={})
    return folder


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
        patch.setattr(chains, "network", closed_form)
        patch.setattr(editor, "network", closed_form)
        patch.setattr(bits, "network", closed_form)
        batch_chain.cache_clear()
        bits.batch_bound.cache_clear()
        yield types.SimpleNamespace(T=T, make_job=make_job, save_run=save_run)
    batch_chain.cache_clear()
    bits.batch_bound.cache_clear()
