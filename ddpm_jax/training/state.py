"""What changes while a run trains, and how it starts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ddpm_jax.config import TrainConfig
from ddpm_jax.times import TimeSampler
from ddpm_jax.unet import Params, UNet


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run remembers: with its configuration this says everything about its future."""

    step: Array
    """How many steps are done, scalar int32."""
    params: Params
    """The parameters being trained."""
    ema: Params
    """Their moving average, from which samples are drawn."""
    opt_state: optax.OptState
    """The optimiser's moments and counts."""
    times: Any = ()
    """What the sampler of times remembers: `times.LossHistory` for "loss_aware", nothing for the others."""


def learning_rate(config: TrainConfig) -> optax.Schedule:
    r"""Gives the learning rate of update k = 0, 1, ..

    .. math:: \mathrm{lr}_k = \mathrm{lr} \cdot \min(k / \mathrm{warmup}, 1)

    The first update has rate 0, as in the original code, which reads the step before it is counted.
    """
    if config.warmup == 0:
        return optax.constant_schedule(config.learning_rate)
    return optax.linear_schedule(0.0, config.learning_rate, config.warmup)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Makes the paper's optimiser: Adam, after the gradient of the whole batch is clipped to a global norm.

    The original clips on every TPU core before the cores are averaged, so that its result depends on their number;
    ours does not. Its epsilon of 1e-8 is not bias-corrected, optax's is; after warmup the two agree.

    Ho et al. 2020, app. B, and its code.
    """
    adam = optax.adam(learning_rate(config), b1=0.9, b2=0.999, eps=1e-8)
    return optax.chain(optax.clip_by_global_norm(config.grad_clip), adam) if config.grad_clip > 0 else adam


def init_params(key: Array, unet: UNet, image_shape: Sequence[int]) -> Params:
    """Draws the first parameters of a network for images of (H, W, C)."""
    return unet.init(key, jnp.zeros((1, *image_shape)), jnp.zeros((1,), jnp.int32))["params"]


def init_state(
    key: Array,
    unet: UNet,
    optimizer: optax.GradientTransformation,
    image_shape: Sequence[int],
    *,
    times: TimeSampler | None = None,
) -> TrainState:
    """Makes the state of a run that has not trained a step.

    Args:
      key: a typed key; the parameters come from it.
      unet: the network.
      optimizer: the optimiser.
      image_shape: (H, W, C).
      times: the sampler of times, whose memory is part of the state; None for one that remembers nothing.

    Returns:
      the state at step 0; its average is the parameters themselves.
    """
    params = init_params(key, unet, image_shape)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # Copies, so that the state can be donated: a buffer may be given away only once.
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        times=() if times is None else times.init(),
    )
