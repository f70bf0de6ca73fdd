"""One training step: a pure function, Algorithm 1 and what the original code puts around it."""

import typing
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from ddpm_jax import keys as per_image_keys
from ddpm_jax.averages import update_power_average
from ddpm_jax.networks import Network
from ddpm_jax.pixels import flip, to_float
from ddpm_jax.time_sampling import TimeSampler
from ddpm_jax.training.accumulation import in_parts
from ddpm_jax.training.objective import Objective
from ddpm_jax.training.state import Params, TrainState


class Batch(typing.NamedTuple):
    """The images of one step, or one device's share of them."""

    images: ArrayLike
    """(B, H, W, C) uint8."""
    indices: ArrayLike
    """(B,) int32: the place of each image in the whole batch, over all devices and hosts."""
    labels: ArrayLike | None = None
    """(B,) int32, each in [0, num_classes), for a conditional network."""


class StepInfo(typing.NamedTuple):
    """What one step has to say of itself, float32."""

    loss: Array
    """Mean loss of the batch, before the update."""
    grad_norm: Array
    """Global norm of the gradient, before clipping."""
    param_norm: Array
    """Global norm of the parameters, after the update."""
    quartile_sums: Array
    """(4,) sums of the losses of the images whose times are in each quarter of [0, T)."""
    quartile_counts: Array
    """(4,) how many images those are."""


class StepKeys(typing.NamedTuple):
    """The keys of one step, (B,) each: one an image for each of its uses."""

    flip: Array
    time: Array
    noise: Array
    dropout: Array
    label: Array


class _Rows(typing.NamedTuple):
    """What the loss of each image is made of."""

    x0: Array
    t: Array
    weights: Array
    labels: Array | None
    noise: Array
    dropout: Array


TrainingStep = Callable[[typing.Any, TrainState, typing.Any], tuple[TrainState, StepInfo]]
"""(key, state, batch) to (state, info); also of what `input_pipeline` makes of it, whose arguments are others."""


def step_keys(key: Array, step: Array, indices: Array) -> StepKeys:
    r"""Derives every key of a step from the run's key.

    .. math:: k_{s,i} = \mathrm{fold\_in}(\mathrm{fold\_in}(k, s), i)

    Args:
      key: the run's key, a typed scalar key.
      step: scalar int32.
      indices: (B,) places in the whole batch.

    Returns:
      the keys: the same for an image whichever device holds it.
    """
    keys = per_image_keys.image_keys(jax.random.fold_in(key, step), indices)
    return StepKeys(*per_image_keys.split(keys, len(StepKeys._fields)))


def update_ema(ema: Params, params: Params, step: Array, *, decay: float) -> Params:
    r"""Moves the average towards new parameters.

    .. math:: \bar\theta \leftarrow d\,\bar\theta + (1 - d)\,\theta, \quad d = 0 \text{ at the first update}

    Args:
      ema: the average so far.
      params: the parameters after the update.
      step: how many updates there were before this one, scalar int32.
      decay: d in [0, 1); 0.9999 has a half-life of 6,931 steps.

    Returns:
      the new average.

    Ho et al. 2020, app. B; its code copies at the first update.
    """
    decay_now = jnp.where(step == 0, 0.0, decay)
    return jax.tree.map(lambda average, new: decay_now * average + (1 - decay_now) * new, ema, params)


def hide_labels(keys: Array, labels: Array, *, rate: float, num_classes: int) -> Array:
    """Replaces each label by "no label" (num_classes) with probability `rate`, from the key of its image.

    Ho & Salimans 2022 (classifier-free guidance), Algorithm 1.
    """
    hidden = jax.vmap(lambda key: jax.random.bernoulli(key, rate))(keys)
    return jnp.where(hidden, num_classes, labels)


def quartile_losses(t: Array, losses: Array, *, num_steps: int) -> tuple[Array, Array]:
    r"""Sorts the losses of a batch by the quarter of the chain that their times are in.

    .. math:: q = \lfloor 4 t / T \rfloor

    Args:
      t: (B,) int32, each in [0, T).
      losses: (B,).
      num_steps: T, static.

    Returns:
      (4,) sums of the losses and (4,) counts of the images.

    >>> quartile_losses(jnp.array([0, 249, 250, 999]), jnp.array([1.0, 2.0, 4.0, 8.0]), num_steps=1000)
    (Array([3., 4., 0., 8.], dtype=float32), Array([2., 1., 0., 1.], dtype=float32))
    """
    chex.assert_equal_shape([t, losses])
    belongs = (jnp.arange(4)[:, None] == (4 * t // num_steps)[None]).astype(losses.dtype)
    # Chosen, not multiplied with 0: one loss that is not finite must not spoil the other quarters.
    return jnp.where(belongs > 0, losses[None], 0).sum(axis=1), belongs.sum(axis=1)


def make_training_step(
    network: Network,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    time_sampler: TimeSampler,
    *,
    num_steps: int,
    ema_decay: float,
    gammas: tuple[float, ...] = (),
    random_flip: bool = False,
    label_dropout: float = 0.0,
    parts: int = 1,
    gather: Callable[[Params], Params] = lambda params: params,
    device_mean: Callable[[typing.Any], typing.Any] = lambda tree: tree,
    whole_batch: Callable[[Array], Array] = lambda shard: shard,
) -> TrainingStep:
    r"""Makes Algorithm 1: one step of gradient descent on the objective, and of the average behind it.

    Args:
      network: the network.
      optimizer: what turns gradients into updates.
      objective: the loss.
      time_sampler: the sampler of timesteps.
      num_steps: T, for the losses by quarter of the chain.
      ema_decay: decay of the average of the parameters, a step.
      gammas: exponents of the averages by power functions of time, as many as the state has.
      random_flip: whether each image is mirrored left to right with probability 0.5.
      label_dropout: the probability that the label of an image is hidden from a class-conditional network.
      parts: in how many parts the gradient is computed; it changes no more than the rounding of sums.
      gather: brings parameters together that are shared out over devices; the identity where each has a copy.
      device_mean: the mean of a pytree over devices that each see their share of the batch; the identity where
        the step sees the whole batch.
      whole_batch: from this device's share of (B,) numbers to those of the whole batch; likewise.

    Returns:
      a pure function `(key, state, batch) -> (state, info)`, to be lifted over devices by `parallel`. `key` is the
      run's key: what is random at a step follows from it, the step's number and each image's place in the batch.

    Ho et al. 2020, Algorithm 1, and its code.
    """

    def training_step(key: Array, state: TrainState, batch: Batch) -> tuple[TrainState, StepInfo]:
        indices = jnp.asarray(batch.indices)
        keys = step_keys(key, state.step, indices)
        x0 = to_float(batch.images)
        if random_flip:
            x0 = flip(keys.flip, x0)
        labels = None
        if network.num_classes:
            labels = hide_labels(
                keys.label, jnp.asarray(batch.labels), rate=label_dropout, num_classes=network.num_classes
            )
        t, weights = time_sampler.draw(
            lambda indices: step_keys(key, state.step, indices).time, indices, state.time_sampling
        )

        def batch_loss(params: Params, rows: _Rows) -> tuple[Array, Array]:
            whole_params = gather(params)

            def predict(x_t: Array, t: Array) -> Array:
                return network.apply(whole_params, x_t, t, rows.labels, dropout_keys=rows.dropout)

            losses = objective(rows.noise, predict, rows.x0, rows.t)
            return jnp.mean(rows.weights * losses), losses

        rows = _Rows(x0, t, weights, labels, keys.noise, keys.dropout)
        gradient_of = jax.value_and_grad(batch_loss, has_aux=True)
        (loss, losses), gradient = in_parts(gradient_of, state.params, rows, parts=parts)
        loss, gradient = device_mean((loss, gradient))
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = update_ema(state.ema, params, state.step, decay=ema_decay)
        power_averages = tuple(
            update_power_average(average, params, state.step, gamma=gamma)
            for average, gamma in zip(state.power_averages, gammas, strict=True)
        )
        t, losses = whole_batch(t), whole_batch(losses)
        memory = time_sampler.update(state.time_sampling, t, losses)
        quartiles = quartile_losses(t, losses, num_steps=num_steps)
        info = StepInfo(loss, optax.tree.norm(gradient), optax.tree.norm(params), *quartiles)
        return TrainState(state.step + 1, params, ema, opt_state, memory, power_averages), info

    return training_step
