"""The public API, as a user of the installed package meets it: this file also runs alone, outside of the repository."""

import ast
import importlib
import inspect
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import ddpm_jax

# Available with the extra "run" alone.
RUN = {"Source", "TrainedRun", "in_memory", "load_run", "train"}
HAS_RUN = importlib.util.find_spec("tyro") is not None


def fresh(code, tmp_path):
    """Returns what a new Python process prints, started outside of the repository."""
    environment = os.environ | {"PYTHONPATH": str(Path(ddpm_jax.__file__).parents[1])}
    command = [sys.executable, "-c", f"import sys, ddpm_jax\n{code}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_every_name_is_there():
    for name in ddpm_jax.__all__:
        if name in RUN and not HAS_RUN:
            with pytest.raises(ImportError, match=rf'^ddpm_jax\.{name} needs \w+: pip install "ddpm_jax\[run\]"$'):
                getattr(ddpm_jax, name)
            continue
        value = getattr(ddpm_jax, name)
        assert value.__name__ == name
        assert inspect.getdoc(value)
        assert name in dir(ddpm_jax)


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        ddpm_jax.no_such_name  # noqa: B018


def test_type_checkers_see_the_same_names():
    tree = ast.parse(inspect.getsource(ddpm_jax))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert sorted(seen) == ddpm_jax.__all__
    assert all(getattr(importlib.import_module(seen[name]), name) for name in seen if name not in RUN)
    assert (resources.files(ddpm_jax) / "py.typed").is_file()


def test_importing_the_package_imports_nothing_else(tmp_path):
    assert {"jax", "numpy", "flax"}.isdisjoint(fresh("print(*sys.modules)", tmp_path))


def test_the_mathematics_needs_no_extra(tmp_path):
    names = sorted(set(ddpm_jax.__all__) - RUN)
    loaded = fresh(f"for name in {names}: getattr(ddpm_jax, name)\nprint(*sys.modules)", tmp_path)
    extras = {"tyro", "tqdm", "PIL", "matplotlib", "grain", "tensorflow_datasets", "safetensors", "sklearn"}
    assert extras.isdisjoint(loaded)


def test_experiments_are_found_from_anywhere(tmp_path):
    loaded = fresh("print(ddpm_jax.load_config('cifar10').train.batch_size)", tmp_path)
    assert loaded == ["128"]


def test_a_network_trains_and_draws():
    images = jnp.ones((8, 4, 4, 1)) * jnp.linspace(-1, 1, 8)[:, None, None, None]
    schedule = ddpm_jax.make_schedule("linear", 50)
    unet = ddpm_jax.UNet(
        width=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(), out_channels=1, num_groups=4
    )
    params = unet.init(jax.random.key(0), images, jnp.zeros(8, jnp.int32))["params"]
    optimizer = optax.sgd(0.1)

    @jax.jit
    def step(params, moments, key):
        t_keys, eps_keys = jnp.split(ddpm_jax.image_keys(key, jnp.arange(16)), 2)
        t = ddpm_jax.uniform_times(t_keys, schedule.num_steps)

        def loss(params):
            predict = lambda x_t, t: unet.apply({"params": params}, x_t, t)
            return ddpm_jax.l_simple(eps_keys, schedule, predict, images, t)[0].mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(params, updates), moments, value

    moments, losses = optimizer.init(params), []
    for key in jax.random.split(jax.random.key(1), 30):
        params, moments, value = step(params, moments, key)
        losses.append(float(value))
    assert losses[0] == pytest.approx(1, abs=0.3)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])

    predict = lambda x_t, t: unet.apply({"params": params}, x_t, t)
    sampler = ddpm_jax.make_sampler("dpm++2m", schedule, predict, num_steps=5)
    drawn = jax.jit(lambda key: ddpm_jax.sample(key, sampler, (2, 4, 4, 1)))(jax.random.key(2))
    assert ddpm_jax.to_uint8(drawn).dtype == jnp.uint8
    bound = jax.jit(lambda keys: ddpm_jax.bound_terms(keys, schedule, predict, images))
    bits = ddpm_jax.total_bits(bound(ddpm_jax.image_keys(jax.random.key(3), jnp.arange(8))))
    assert bits.shape == (8,)
    assert bool((bits > 0).all())
