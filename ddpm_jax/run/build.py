"""Makes the objects that a configuration describes: schedule, network, precision of products."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.config import FROM_PYTHON, Config
from ddpm_jax.data.source import shape_of
from ddpm_jax.networks import Network, Params, check_network, from_linen, parameter_shapes
from ddpm_jax.reverse import LEARNED_VARIANCES
from ddpm_jax.schedules import Schedule, make_betas, schedule_from_betas, zero_terminal_snr
from ddpm_jax.system import user_code
from ddpm_jax.system.errors import UserError
from ddpm_jax.unet import UNet


def build_betas(config: Config) -> np.ndarray:
    """Returns the betas, (T,) float64, of a configuration that `validate` accepts."""
    diffusion = config.diffusion
    betas = make_betas(
        diffusion.schedule, diffusion.num_steps, beta_start=diffusion.beta_start, beta_end=diffusion.beta_end
    )
    return zero_terminal_snr(betas) if diffusion.zero_terminal_snr else betas


def build_schedule(config: Config) -> Schedule:
    """Makes the schedule, of T steps, of a configuration that `validate` accepts."""
    return schedule_from_betas(build_betas(config))


def image_shape(config: Config) -> tuple[int, int, int]:
    """Returns (H, W, C) of a configuration whose `data.channels` is known.

    Raises:
      ValueError: `data.channels` is None.
    """
    return shape_of(config.data)


def build_network(config: Config) -> Network:
    """Makes the network of a configuration: the paper's U-Net, or the user's (`model.network`).

    Args:
      config: a configuration that `validate` accepts, whose `data.channels` is known.

    Returns:
      the network.

    Raises:
      ValueError: `data.channels` is None.
      UserError: the user's file or function is missing or fails, or what it returns does not fit the images.
    """
    if not config.model.network:
        return from_linen(build_unet(config), image_shape(config))
    if config.model.network == FROM_PYTHON:
        raise UserError(
            "model.network: the network of this run was given to train() in Python, and its folder cannot tell what it "
            "is: give it again, to train() or load_run()"
        )
    return _users_network(config, user_code.load("model.network", config.model.network))


@functools.lru_cache(maxsize=8)
def _users_network(config: Config, make: Callable[[Config], Any]) -> Network:
    name, shape, num_classes = config.model.network, image_shape(config), config.model.num_classes
    what, file = f"model.network: {name}", user_code.file_of(name)
    with user_code.clear_errors(what, file):
        made = make(config)
        if isinstance(made, nn.Module):
            made = from_linen(made, shape, num_classes=num_classes)
    if not isinstance(made, Network):
        raise UserError(f"{what} must return a flax.linen.Module or a ddpm_jax.Network, not {type(made).__name__}")
    if made.num_classes != num_classes:
        raise UserError(f"{what} returned a network of {made.num_classes} classes, but model.num_classes={num_classes}")
    with user_code.clear_errors(what, file):
        check_fits(made, config)
    return made


def check_fits(network: Network, config: Config) -> None:
    """Checks that a network fits the images and the variance of a configuration; raises as `check_network`."""
    shape = image_shape(config)
    check_network(network, (*shape[:2], _out_channels(config)), in_channels=shape[2])


def check_params(network: Network, params: Params, weights: str, config: str, remedy: str) -> None:
    """Checks that weights have the names, shapes and types of a network's parameters.

    Args:
      network: the network.
      params: the weights.
      weights: what they are, for the message.
      config: what describes the network.
      remedy: what to do.

    Raises:
      UserError: they do not; the message names the first array that differs.
    """
    kinds = lambda tree: {
        jax.tree_util.keystr(path): f"{leaf.shape} {leaf.dtype}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    expected, found = kinds(parameter_shapes(network)), kinds(params)
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{weights} and {config} do not fit: {name} is {found.get(name, 'absent')} in the weights and "
                f"{expected.get(name, 'absent')} by the configuration; {remedy}"
            )


def build_unet(config: Config) -> UNet:
    """Makes the paper's U-Net: one output channel per image channel, two for a learned variance.

    Args:
      config: a configuration that `validate` accepts, whose `data.channels` is known.

    Returns:
      the `UNet`, without parameters.

    Raises:
      ValueError: `data.channels` is None.
    """
    return unet_of(config, out_channels=_out_channels(config))


def _out_channels(config: Config) -> int:
    channels = image_shape(config)[-1]
    return 2 * channels if config.diffusion.variance in LEARNED_VARIANCES else channels


def matmul_precision(config: Config) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which float32 products have the precision `train.matmul_precision`."""
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
        mid_attention=model.mid_attention,
        num_heads=model.num_heads,
        num_head_channels=model.num_head_channels,
        dropout=model.dropout,
        out_channels=out_channels,
        num_groups=model.num_groups,
        norm_eps=model.norm_eps,
        symmetric_downsampling=model.symmetric_downsampling,
        freq_shift=model.freq_shift,
        cos_first=model.cos_first,
        timestep_scale=model.timestep_scale,
        embed_channels=model.embed_channels,
        scale_shift_norm=model.scale_shift_norm,
        resblock_updown=model.resblock_updown,
        num_classes=model.num_classes,
        remat=config.train.remat,
        dtype=jnp.bfloat16 if config.train.precision == "bfloat16" else jnp.float32,
    )
