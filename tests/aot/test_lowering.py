"""The step and every sampler lower for TPUs and GPUs, without a plug-in and without compiling."""

import re
import typing

import jax
import numpy as np
import pytest

from ddpm_jax.generation.chains import make_chain
from ddpm_jax.generation.sampler_config import SamplerConfig
from ddpm_jax.names import SamplerName
from ddpm_jax.networks import parameter_shapes
from ddpm_jax.run.build import image_shape
from ddpm_jax.samplers.chain import sample
from ddpm_jax.training.setup import make_setup
from ddpm_jax.training.step import Batch

# Of the gradient of a kernel: as JAX derives it, and as it is on CPUs, with the channels in the place of the images.
PLAIN, CANONICAL = r"\[f, 0, 1, b\]x\[i, 0, 1, o\]->\[0, 1, b, f\]", r"\[b, 0, 1, f\]x\[0, 1, i, o\]->\[b, 0, 1, f\]"


@pytest.fixture(scope="module")
def exported_step(config):
    parts = make_setup(config)
    state = jax.eval_shape(parts.init, parts.keys.init)
    rows = jax.ShapeDtypeStruct((24,), np.int32)
    batch = Batch(jax.ShapeDtypeStruct((24, *image_shape(config)), np.uint8), rows)
    key = jax.eval_shape(lambda: parts.keys.run)
    step = jax.jit(parts.make_step())
    return lambda platform: jax.export.export(step, platforms=[platform])(key, state, batch).mlir_module()


@pytest.mark.parametrize(("platform", "is_plain"), [("tpu", True), ("cuda", True), ("cpu", False)])
def test_the_training_step_lowers_with_the_convolutions_of_its_platform(exported_step, platform, is_plain):
    text = exported_step(platform)
    assert (len(re.findall(PLAIN, text)) > 10) == is_plain
    assert len(re.findall(CANONICAL, text)) > 10


@pytest.mark.parametrize("name", typing.get_args(SamplerName))
def test_every_sampler_lowers(runs, name):
    job = runs.make_job(sampler=SamplerConfig(sampler=name, steps=None if name == "ancestral" else 4))
    config, network = job.trained.config, job.trained.network
    make = make_chain(config, network, job.sampler)
    draw = jax.jit(lambda params, key: sample(key, make(params, None), (2, *image_shape(config))))
    key = jax.eval_shape(lambda: jax.random.key(0))
    exported = jax.export.export(draw, platforms=["tpu", "cuda"])(parameter_shapes(network), key)
    assert exported.platforms == ("tpu", "cuda")
    assert "stablehlo.while" in exported.mlir_module()
