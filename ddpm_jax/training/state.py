"""What changes while a run trains, and how it starts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
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
    power_averages: tuple[Params, ...] = ()
    """Averages by power functions of time, one for each of `ema.sigma_rels`, if snapshots of them are saved."""


def to_items(state: TrainState) -> dict[str, Any]:
    """Returns the pytrees that a checkpoint stores of a state; the step is the checkpoint's own."""
    return {
        "params": state.params,
        "ema": state.ema,
        "optimizer": state.opt_state,
        "time_sampling": state.time_sampling,
        "power_averages": state.power_averages,
    }


def from_items(step: int, items: Mapping[str, Any], sharding: jax.sharding.Sharding) -> TrainState:
    """Returns the state of a checkpoint.

    Args:
      step: of the checkpoint.
      items: as `to_items` returns them.
      sharding: where the step counter lies.
    """
    count = jax.device_put(np.int32(step), sharding)
    return TrainState(
        count, items["params"], items["ema"], items["optimizer"], items["time_sampling"], items["power_averages"]
    )


def learning_rate(config: TrainConfig, rates: LearningRates = ()) -> optax.Schedule:
    r"""Returns the learning rate of update k = 0, 1, ..

    .. math:: \mathrm{lr}_k = \mathrm{lr} \cdot \min(k / \mathrm{warmup}, 1) \cdot d_k

    The first update has rate 0, as in the original code, which reads the step before it is counted. With D the
    `decay_steps`, :math:`d_k` is 1 ("constant", the paper's), :math:`(1 + \cos \pi s) / 2` where s rises from 0 to 1
    between the end of the warmup and D ("cosine"), or :math:`\min(1, \sqrt{D / k})` ("inverse_sqrt").

    Args:
      config: lr, warmup and decay.
      rates: lr and warmup by the step from which they apply, if they changed; the last of them are those of `config`.

    Ho et al. 2020, app. B; inverse_sqrt: Karras et al. 2024 (EDM2).
    """
    pieces = [(rate.step, _rate(config, rate.learning_rate, rate.warmup_steps)) for rate in rates]
    if not pieces:
        return _rate(config, config.learning_rate, config.warmup_steps)

    def schedule(count: Any) -> Any:
        if isinstance(count, int):
            return next(piece(count) for step, piece in reversed(pieces) if step <= count)
        value = pieces[0][1](count)
        for step, piece in pieces[1:]:
            value = jnp.where(count >= step, piece(count), value)
        return value

    return schedule


def _rate(config: TrainConfig, rate: float, warmup: int) -> optax.Schedule:
    rising = optax.linear_schedule(0.0, rate, warmup) if warmup else optax.constant_schedule(rate)
    last = config.decay_steps
    match config.lr_decay:
        case "cosine":
            return optax.join_schedules([rising, optax.cosine_decay_schedule(rate, max(last - warmup, 1))], [warmup])
        case "inverse_sqrt":
            return lambda count: rising(count) * jnp.sqrt(last / jnp.maximum(count, last))
        case _:
            return rising


def make_optimizer(config: TrainConfig, rates: LearningRates = ()) -> optax.GradientTransformation:
    """Makes the optimizer: the paper's Adam or another, after the gradient of the whole batch is clipped to a norm.

    The original clips on every TPU core before the cores are averaged, so that its result depends on their number;
    ours does not. Its epsilon of 1e-8 is not bias-corrected, optax's is; after warmup the two agree.

    Muon updates kernels, as matrices of inputs by outputs, in steps scaled to the size of Adam's, so that the same
    learning rate fits; all other parameters are updated by Adam with Nesterov momentum.

    Ho et al. 2020, app. B, and its code; Loshchilov & Hutter 2019 (AdamW); Jordan 2024 and Liu et al. 2025 (Muon).
    """
    rate = learning_rate(config, rates)
    match config.optimizer:
        case "adam":
            optimizer = optax.adam(rate, b1=0.9, b2=0.999, eps=1e-8)
        case "adamw":
            optimizer = optax.adamw(rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=config.weight_decay)
        case "muon":
            optimizer = optax.contrib.muon(
                rate,
                weight_decay=config.weight_decay,
                muon_weight_dimension_numbers=_kernels_as_matrices,
                consistent_rms=0.2,
            )
    return optax.chain(optax.clip_by_global_norm(config.grad_clip), optimizer) if config.grad_clip > 0 else optimizer


def _kernels_as_matrices(params: Params) -> Params:
    """Returns how Muon is to see each parameter: a kernel as a matrix with its last axis for the outputs."""

    def matrix(path: tuple[Any, ...], array: Any) -> Any:
        if path[-1].key != "kernel" or array.ndim < 2:
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(array.ndim - 1)), array.ndim - 1)

    return jax.tree_util.tree_map_with_path(matrix, params)


def init_state(
    key: Array,
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    time_sampler: TimeSampler | None = None,
    power_averages: int = 0,
) -> TrainState:
    """Makes the state of a run that has not trained a step.

    Args:
      key: a typed key; the parameters come from it.
      network: the network.
      optimizer: the optimizer.
      time_sampler: the sampler of timesteps, whose memory is part of the state; None for one that remembers nothing.
      power_averages: number of averages by power functions of time.

    Returns:
      the state at step 0; its averages are the parameters themselves.
    """
    params = network.init(key)
    copy = lambda: jax.tree.map(jnp.copy, params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # Copies, so that the state can be donated: a buffer may be given away only once.
        ema=copy(),
        opt_state=optimizer.init(params),
        time_sampling=() if time_sampler is None else time_sampler.init(),
        power_averages=tuple(copy() for _ in range(power_averages)),
    )
