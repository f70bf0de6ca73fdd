"""From the fields of a configuration to objects: the schedule, the network, the precision of products."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.config import Config
from ddpm_jax.networks import Network, from_linen
from ddpm_jax.reverse import LEARNED_VARIANCES
from ddpm_jax.schedules import Schedule, make_betas, schedule_from_betas
from ddpm_jax.unet import UNet

# What follows from it


def build_betas(config: Config) -> np.ndarray:
    """Gives the betas of the diffusion, (T,) float64, of a configuration that `validate` accepts."""
    diffusion = config.diffusion
    return make_betas(
        diffusion.schedule, diffusion.num_steps, beta_start=diffusion.beta_start, beta_end=diffusion.beta_end
    )


def build_schedule(config: Config) -> Schedule:
    """Makes the diffusion's tables, of T steps, of a configuration that `validate` accepts."""
    return schedule_from_betas(build_betas(config))


def image_shape(config: Config) -> tuple[int, int, int]:
    """Gives (H, W, C) of a configuration whose `data.channels` is known.

    Raises:
      ValueError: `data.channels` is None.
    """
    if config.data.channels is None:
        raise ValueError("data.channels is None: take it from the images before the network is made")
    return config.data.height, config.data.width, config.data.channels


def build_network(config: Config) -> Network:
    """Makes the network of a configuration that `validate` accepts, whose `data.channels` is known.

    Raises:
      ValueError: `data.channels` is None.
    """
    return from_linen(build_unet(config), image_shape(config))


def build_unet(config: Config) -> UNet:
    """Makes the network: as many channels out as the images have, twice as many for a learned variance.

    Args:
      config: a configuration that `validate` accepts, whose `data.channels` is known.

    Returns:
      the `UNet`, without parameters.

    Raises:
      ValueError: `data.channels` is None.
    """
    channels = image_shape(config)[-1]
    return unet_of(config, out_channels=2 * channels if config.diffusion.variance in LEARNED_VARIANCES else channels)


def matmul_precision(config: Config) -> contextlib.AbstractContextManager[Any]:
    """Gives the context in which float32 products have the precision that `train.matmul_precision` says."""
    name = config.train.matmul_precision
    return jax.default_matmul_precision(None if name == "default" else name)


def unet_of(config: Config, *, out_channels: int) -> UNet:
    """Returns the U-Net with a given number of output channels."""
    model = config.model
    return UNet(
        width=model.width,
        channel_mult=model.channel_mult,
        num_res_blocks=model.num_res_blocks,
        attention_resolutions=model.attention_resolutions,
        num_heads=model.num_heads,
        dropout=model.dropout,
        out_channels=out_channels,
        num_groups=model.num_groups,
        num_classes=model.num_classes,
        remat=config.train.remat,
        dtype=jnp.bfloat16 if config.train.precision == "bfloat16" else jnp.float32,
    )
