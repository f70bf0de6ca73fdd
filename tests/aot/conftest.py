"""What the tests of compiling ahead of time share: a topology that is there, and the smallest configuration."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import pytest

from ddpm_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from ddpm_jax.networks import from_linen
from ddpm_jax.system.mesh import make_mesh, replicated
from ddpm_jax.system.topologies import Topology


class Convolution(nn.Module):
    """A network of one layer, with something wrong in it or nothing."""

    fault: str
    mesh: jax.sharding.Mesh

    @nn.compact
    def __call__(self, x, t):
        place = lambda x: x
        if self.fault == "gathered batch":
            place = functools.partial(jax.lax.with_sharding_constraint, shardings=replicated(self.mesh))
        if self.fault == "cannot be lowered":
            unknown = jax.extend.core.Primitive("unknown")
            unknown.def_abstract_eval(lambda x: x)
            x = jax.lax.stop_gradient(unknown.bind(jax.lax.stop_gradient(x)))
        dtype = jnp.float32 if self.fault == "float32 convolution" else jnp.bfloat16
        return place(nn.Conv(3, (3, 3), dtype=dtype)(place(x))).astype(jnp.float32)


@pytest.fixture(scope="session")
def broken():
    """Makes a network of a convolution with a fault, or with none."""
    return lambda fault, topology: from_linen(Convolution(fault, make_mesh(topology.devices)), (8, 8, 3))


@pytest.fixture(scope="session")
def topology():
    """The 8 simulated devices, as if they were a slice."""
    return Topology(
        name="cpu:8",
        devices=tuple(jax.devices()),
        per_host=8,
        chip="CPU",
        memory=2**30,
        share="",
        tflops={"float32": 1e-3, "bfloat16": 2e-3},
        gigabytes_per_second=1.0,
        platform="gpu",
        compiler_options={},
    )


@pytest.fixture(scope="session")
def config():
    """Every kind of block of the U-Net, at two resolutions."""
    return Config(
        data=DataConfig(source="idx", path="not_here", height=8, width=8, channels=3),
        model=ModelConfig(
            width=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=4, dropout=0.1
        ),
        train=TrainConfig(batch_size=24),
    )


@pytest.fixture(scope="session")
def with_train():
    return lambda config, **fields: dataclasses.replace(config, train=dataclasses.replace(config.train, **fields))


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """Adam and Flax's normalization mix types."""
    with jax.numpy_dtype_promotion("standard"):
        yield
