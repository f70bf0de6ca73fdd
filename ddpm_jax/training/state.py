"""What changes while a run trains, and how it starts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from ddpm_jax.config import TrainConfig
from ddpm_jax.networks import Network, Params
from ddpm_jax.run.record import LearningRates
from ddpm_jax.time_sampling import TimeSampler


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
    """The optimizer's moments and counts."""
    time_sampling: Any = ()
    """State of the timestep sampler: `time_sampling.LossHistory` for "loss_aware", empty for the others."""


def to_items(state: TrainState) -> dict[str, Any]:
    """Returns the pytrees that a checkpoint stores of a state; the step is the checkpoint's own."""
    return {
        "params": state.params,
        "ema": state.ema,
        "optimizer": state.opt_state,
        "time_sampling": state.time_sampling,
    }


def from_items(step: int, items: Mapping[str, Any], sharding: jax.sharding.Sharding) -> TrainState:
    """Returns the state of a checkpoint.

    Args:
      step: of the checkpoint.
      items: as `to_items` returns them.
      sharding: where the step counter lies.
    """
    count = jax.device_put(np.int32(step), sharding)
    return TrainState(count, items["params"], items["ema"], items["optimizer"], items["time_sampling"])


def learning_rate(config: TrainConfig, rates: LearningRates = ()) -> optax.Schedule:
    r"""Returns the learning rate of update k = 0, 1, ..

    .. math:: \mathrm{lr}_k = \mathrm{lr} \cdot \min(k / \mathrm{warmup}, 1)

    The first update has rate 0, as in the original code, which reads the step before it is counted.

    Args:
      config: lr and warmup.
      rates: the same by the step from which they apply, if they changed; the last of them are those of `config`.
    """
    if not rates:
        return _warmed_up(config.learning_rate, config.warmup_steps)
    pieces = [(rate.step, _warmed_up(rate.learning_rate, rate.warmup_steps)) for rate in rates]

    def schedule(count: Any) -> Any:
        if isinstance(count, int):
            return next(piece(count) for step, piece in reversed(pieces) if step <= count)
        value = pieces[0][1](count)
        for step, piece in pieces[1:]:
            value = jnp.where(count >= step, piece(count), value)
        return value

    return schedule


def _warmed_up(rate: float, steps: int) -> optax.Schedule:
    return optax.linear_schedule(0.0, rate, steps) if steps else optax.constant_schedule(rate)


def make_optimizer(config: TrainConfig, rates: LearningRates = ()) -> optax.GradientTransformation:
    """Makes the paper's optimizer: Adam, after the gradient of the whole batch is clipped to a global norm.

    The original clips on every TPU core before the cores are averaged, so that its result depends on their number;
    ours does not. Its epsilon of 1e-8 is not bias-corrected, optax's is; after warmup the two agree.

    Ho et al. 2020, app. B, and its code.
    """
    adam = optax.adam(learning_rate(config, rates), b1=0.9, b2=0.999, eps=1e-8)
    return optax.chain(optax.clip_by_global_norm(config.grad_clip), adam) if config.grad_clip > 0 else adam


def init_state(
    key: Array,
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    time_sampler: TimeSampler | None = None,
) -> TrainState:
    """Makes the state of a run that has not trained a step.

    Args:
      key: a typed key; the parameters come from it.
      network: the network.
      optimizer: the optimizer.
      time_sampler: the sampler of timesteps, whose memory is part of the state; None for one that remembers nothing.

    Returns:
      the state at step 0; its average is the parameters themselves.
    """
    params = network.init(key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # Copies, so that the state can be donated: a buffer may be given away only once.
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        time_sampling=() if time_sampler is None else time_sampler.init(),
    )
