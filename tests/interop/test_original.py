"""The original's variables: in, out and in again, bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig
from ddpm_jax.interop.checkpoints import read_checkpoint
from ddpm_jax.interop.files import read_npz
from ddpm_jax.interop.original import read_original, write_original
from ddpm_jax.networks import parameter_shapes
from ddpm_jax.run.build import build_network
from ddpm_jax.system.errors import UserError

CONFIG = Config(
    data=DataConfig(height=32, width=32, channels=3),
    diffusion=DiffusionConfig(variance="fixed_large"),
    model=ModelConfig(width=32, channel_mult=(1, 2, 2), attention_resolutions=(16,)),
)


@pytest.fixture(scope="module")
def params():
    shapes = parameter_shapes(build_network(CONFIG))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes)


@pytest.fixture
def variables(params):
    return write_original(params, CONFIG, step=790_000)


def equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_names_are_those_of_the_released_checkpoints(variables):
    average = "/ExponentialMovingAverage"
    expected = {
        "model/temb/dense0/W": (32, 128),
        "model/conv_in/b": (32,),
        "model/down_1/block_0/nin_shortcut/W": (32, 64),
        "model/down_1/attn_1/norm/gamma": (64,),
        "model/down_0/downsample/conv/W": (3, 3, 32, 32),
        "model/mid/attn_1/proj_out/W": (64, 64),
        "model/up_2/upsample/conv/b": (64,),
        "model/norm_out/beta": (32,),
    }
    assert {name: variables[f"{name}{average}"].shape for name in expected} == expected


def test_a_round_trip_is_bit_identical(params, variables, tmp_path):
    np.savez(tmp_path / "run.npz", **variables)
    found = read_checkpoint(tmp_path / "run.npz")
    equal(found.params, params)
    assert (found.step, found.averaged) == (790_000, True)
    assert dataclasses.replace(found.config.model) == CONFIG.model
    assert found.config.diffusion == CONFIG.diffusion
    assert (found.config.data.height, found.config.data.channels, found.config.name) == (32, 3, "run")


def test_half_precision_is_read(params, variables):
    half = {name: array.astype(jnp.bfloat16) if array.ndim else array for name, array in variables.items()}
    expected = jax.tree.map(lambda array: array.astype(jnp.bfloat16).astype(np.float32), params)
    equal(read_original(half, {}, name="half").params, expected)


def test_averages_are_taken_where_there_are_some(params, variables, tmp_path):
    average = "/ExponentialMovingAverage"
    weights = {name.removesuffix(average): array for name, array in variables.items() if name.endswith(average)}
    slots = {f"{name}/Adam_1": array for name, array in weights.items()} | {"beta1_power": np.float32(0.9)}
    raw = {name: 2 * array for name, array in weights.items()}
    np.savez_compressed(tmp_path / "both.npz", **variables, **slots, **raw)
    equal(read_checkpoint(tmp_path / "both.npz").params, params)
    np.savez(tmp_path / "raw.npz", **slots, **{name.removeprefix("model/"): array for name, array in raw.items()})
    found = read_checkpoint(tmp_path / "raw.npz", flags="--model_var_type fixedsmall --beta_schedule quad")
    equal(found.params, jax.tree.map(lambda leaf: 2 * leaf, params))
    assert (found.step, found.averaged) == (0, False)
    assert (found.config.diffusion.variance, found.config.diffusion.schedule) == ("fixed_small", "quad")


def test_what_the_original_does_not_have_is_not_exported(params):
    model = dataclasses.replace(CONFIG.model, num_heads=2)
    with pytest.raises(UserError, match=r"no model.num_heads=2"):
        write_original(params, dataclasses.replace(CONFIG, model=model), step=1)
    with pytest.raises(UserError, match=r"no layer extra.kernel"):
        write_original({**params, "extra": {"kernel": np.zeros(2)}}, CONFIG, step=1)


def test_other_variables_are_refused(variables, tmp_path):
    file = tmp_path / "other.npz"
    for extra in ({"model/head/kernel": np.zeros(3, np.float32)}, {"model/conv_in/W": np.zeros(3, np.int32)}):
        weights = {name.removesuffix("/ExponentialMovingAverage"): array for name, array in variables.items()}
        np.savez(file, **{**weights, **extra})
        with pytest.raises(UserError, match=next(iter(extra)).removeprefix("model/")):
            read_checkpoint(file)
    np.savez(file, images=np.zeros((2, 2)))
    with pytest.raises(UserError, match="not a checkpoint of the original code .* names such as images"):
        read_checkpoint(file)


def test_hostile_archives_are_refused(tmp_path):
    file = tmp_path / "bomb.npz"
    np.savez_compressed(file, a=np.zeros(2**26, np.uint8), b=np.zeros(2**26, np.uint8))
    assert file.stat().st_size < 2**20
    for content in (None, b"", b"PK\x03\x04", file.read_bytes()[:-30]):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(UserError, match=r"cannot read .* as an \.npz file"):
            read_npz(file)
    np.savez(file, a=np.array([{}], object), allow_pickle=True)
    with pytest.raises(UserError, match="it holds Python objects"):
        read_npz(file)
    with pytest.raises(UserError, match="no file"):
        read_npz(tmp_path / "missing.npz")
