"""What is built from a configuration is what it says."""

import dataclasses

import jax.numpy as jnp
import pytest

from ddpm_jax.config import Config, DataConfig, DiffusionConfig
from ddpm_jax.run.build import build_schedule, build_unet


def test_the_schedule_is_the_one_configured(small):
    schedule = build_schedule(dataclasses.replace(small, diffusion=DiffusionConfig(num_steps=5, beta_end=0.3)))
    assert schedule.num_steps == 5
    assert float(schedule.betas[0]) == pytest.approx(1e-4)
    assert float(schedule.betas[-1]) == pytest.approx(0.3)


def test_the_unet_is_the_one_configured(small, with_value):
    unet = build_unet(with_value(small, "data.channels", 3))
    for name in (
        "width",
        "channel_mult",
        "num_res_blocks",
        "attention_resolutions",
        "num_heads",
        "num_groups",
        "dropout",
    ):
        assert getattr(unet, name) == getattr(small.model, name)
    assert (unet.out_channels, unet.dtype, unet.remat) == (3, jnp.float32, False)
    assert build_unet(with_value(small, "diffusion.variance", "learned_range")).out_channels == 2
    assert build_unet(with_value(small, "train.remat", True)).remat
    assert build_unet(with_value(small, "train.precision", "bfloat16")).dtype == jnp.bfloat16


def test_channels_that_are_not_known_yet_are_refused():
    with pytest.raises(ValueError, match="channels is None"):
        build_unet(Config(data=DataConfig(channels=None)))
