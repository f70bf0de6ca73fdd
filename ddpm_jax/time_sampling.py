r"""The timesteps of a training batch: uniform, in antithetic pairs, or sampled where the loss is largest.

A timestep sampler is a triple of pure functions. Its memory is part of the training state, so that a resumed run
continues with it.
"""

import typing
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax import Array

from ddpm_jax import keys as per_image_keys
from ddpm_jax.names import TimeSamplingName


class LossHistory(typing.NamedTuple):
    """The most recent losses at each timestep."""

    losses: Array
    """(T, 10) float32: the last ten at each timestep, in no particular order."""
    counts: Array
    """(T,) int32: the number of losses ever recorded at each timestep."""


class Draw(typing.NamedTuple):
    """The timesteps of a batch."""

    t: Array
    """(B,) int32, each in [0, T)."""
    weights: Array
    """(B,) float32: importance weights of the losses; their weighted mean estimates the mean over uniform timesteps."""


class TimeSampler(typing.NamedTuple):
    """A timestep sampler."""

    init: Callable[[], typing.Any]
    """() to the memory before the first step."""
    draw: Callable[[Callable[[Array], Array], Array, typing.Any], Draw]
    """(keys_of, indices, memory) to the timesteps of the images at `indices` (B,) of the global batch. `keys_of`
    returns the keys of any images of the global batch, including those on other devices."""
    update: Callable[[typing.Any, Array, Array], typing.Any]
    """(memory, t, losses) to the new memory, given the timesteps and losses of the global batch."""


def uniform_times(keys: Array, num_steps: int) -> Array:
    r"""Draws a timestep for each image, uniformly.

    .. math:: t \sim \mathrm{Uniform}\{0, .., T-1\}

    Args:
      keys: (B,) typed keys, one per image.
      num_steps: T, static.

    Returns:
      (B,) int32.

    Ho et al. 2020, Algorithm 1, line 3 (there 1..T).
    """
    keys = per_image_keys.typed(keys, one_per_image=True)
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, num_steps))(keys)


def _nothing() -> tuple[()]:
    return ()


def _forget(memory: tuple[()], t: Array, losses: Array) -> tuple[()]:
    del t, losses
    return memory


def uniform(num_steps: int) -> TimeSampler:
    """Makes the paper's sampler: an independent, uniform timestep for each image (Algorithm 1)."""

    def draw(keys_of: Callable[[Array], Array], indices: Array, memory: tuple[()]) -> Draw:
        del memory
        t = uniform_times(keys_of(indices), num_steps)
        return Draw(t, jnp.ones(t.shape))

    return TimeSampler(_nothing, draw, _forget)


def antithetic(num_steps: int) -> TimeSampler:
    r"""Makes the antithetic sampler: images 2j and 2j+1 of the batch get timesteps t and T-1-t.

    Each timestep is still uniform, but the batch mean of a loss that is monotonic in t has less variance.

    Args:
      num_steps: T.

    Returns:
      the `TimeSampler`.

    Song et al. 2021 (DDIM), its code.
    """

    def draw(keys_of: Callable[[Array], Array], indices: Array, memory: tuple[()]) -> Draw:
        del memory
        second = indices % 2
        t = uniform_times(keys_of(indices - second), num_steps)
        return Draw(jnp.where(second == 1, num_steps - 1 - t, t), jnp.ones(t.shape))

    return TimeSampler(_nothing, draw, _forget)


def loss_aware(num_steps: int, *, history: int = 10, uniform_share: float = 0.001) -> TimeSampler:
    r"""Makes the loss-aware sampler: importance sampling by the second moment of recent losses.

    .. math:: p_t \propto \sqrt{E[L_t^2]}, \quad
              \text{weight} = \frac{1}{T p_t}, \quad p \leftarrow (1 - u) p + u / T

    It is uniform until every timestep has been drawn `history` times.

    Args:
      num_steps: T.
      history: the number of losses kept per timestep.
      uniform_share: u, the fraction of uniform sampling that is mixed in.

    Returns:
      the sampler; its memory is a `LossHistory`.

    Nichol & Dhariwal 2021, sec. 3.3, eq. 18, and its code ("loss-second-moment").
    """

    def init() -> LossHistory:
        return LossHistory(jnp.zeros((num_steps, history)), jnp.zeros(num_steps, jnp.int32))

    def draw(keys_of: Callable[[Array], Array], indices: Array, memory: LossHistory) -> Draw:
        root = jnp.sqrt(jnp.mean(memory.losses**2, axis=1))
        root = jnp.where(jnp.min(memory.counts) >= history, root, jnp.ones_like(root))
        p = (1 - uniform_share) * root / jnp.sum(root) + uniform_share / num_steps
        t = jax.vmap(lambda key: jax.random.categorical(key, jnp.log(p)))(keys_of(indices)).astype(jnp.int32)
        return Draw(t, 1 / (num_steps * p[t]))

    def update(memory: LossHistory, t: Array, losses: Array) -> LossHistory:
        chex.assert_equal_shape([t, losses])
        # For each image, the number of images of the batch at the same timestep that come before and after it: the
        # ring buffer is filled as if they came one by one, and of more than `history` only the last are written.
        same = t[:, None] == t[None, :]
        before = jnp.sum(jnp.tril(same, -1), axis=1)
        after = jnp.sum(jnp.triu(same, 1), axis=1)
        slot = jnp.where(after < history, (memory.counts[t] + before) % history, history)
        return LossHistory(
            memory.losses.at[t, slot].set(losses, mode="drop"), memory.counts.at[t].add(jnp.ones_like(t))
        )

    return TimeSampler(init, draw, update)


_SAMPLERS: dict[str, Callable[[int], TimeSampler]] = {
    "uniform": uniform,
    "antithetic": antithetic,
    "loss_aware": loss_aware,
}


def make_time_sampler(name: TimeSamplingName, num_steps: int) -> TimeSampler:
    """Makes a timestep sampler by name.

    Raises:
      ValueError: the name is unknown.
    """
    if name not in _SAMPLERS:
        raise ValueError(f"unknown timestep sampler {name!r}: choose one of {', '.join(_SAMPLERS)}")
    return _SAMPLERS[name](num_steps)
