r"""Which times a training step looks at: uniform, in antithetic pairs, or where the bound is largest.

A sampler of times is a triple of pure functions. What it remembers between steps is part of the training state, so
that a resumed run goes on with it.
"""

import typing
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax import Array

TimeSamplingName = typing.Literal["uniform", "antithetic", "loss_aware"]


class LossHistory(typing.NamedTuple):
    """The last losses seen at each time."""

    losses: Array
    """(T, 10) float32: the last ten at each time, in no order."""
    counts: Array
    """(T,) int32: how many there have ever been at each time."""


class Draw(typing.NamedTuple):
    """The times of a batch."""

    t: Array
    """(B,) int32, each in [0, T)."""
    weights: Array
    """(B,) float32: what each loss must be multiplied with so that its mean is that under uniform times."""


class TimeSampler(typing.NamedTuple):
    """A way to draw times."""

    init: Callable[[], typing.Any]
    """() to what is remembered before the first step."""
    draw: Callable[[Callable[[Array], Array], Array, typing.Any], Draw]
    """(keys_of, indices, memory) to the times of the images at `indices` (B,) of the whole batch. `keys_of` gives the
    keys of images by their indices, also of images that another device holds."""
    update: Callable[[typing.Any, Array, Array], typing.Any]
    """(memory, t, losses) to the new memory, from the times and losses of the whole batch."""


def uniform_times(keys: Array, num_steps: int) -> Array:
    r"""Draws a time for every image.

    .. math:: t \sim \mathrm{Uniform}\{0, .., T-1\}

    Args:
      keys: (B,) typed keys, one an image.
      num_steps: T, static.

    Returns:
      (B,) int32.

    Ho et al. 2020, Algorithm 1, line 3 (there 1..T).
    """
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, num_steps))(keys)


def _nothing() -> tuple[()]:
    return ()


def _forget(memory: tuple[()], t: Array, losses: Array) -> tuple[()]:
    del t, losses
    return memory


def uniform(num_steps: int) -> TimeSampler:
    """Makes the sampler of the paper: every image at a time of its own, all times alike (Algorithm 1)."""

    def draw(keys_of: Callable[[Array], Array], indices: Array, memory: tuple[()]) -> Draw:
        del memory
        t = uniform_times(keys_of(indices), num_steps)
        return Draw(t, jnp.ones(t.shape))

    return TimeSampler(_nothing, draw, _forget)


def antithetic(num_steps: int) -> TimeSampler:
    r"""Makes the sampler of pairs: images 2j and 2j+1 of the batch look at t and T-1-t.

    Each time is still uniform; the mean over a batch varies less, where the loss falls or rises with t.

    Args:
      num_steps: T.

    Returns:
      the sampler.

    Song et al. 2021 (DDIM), its code.
    """

    def draw(keys_of: Callable[[Array], Array], indices: Array, memory: tuple[()]) -> Draw:
        del memory
        second = indices % 2
        t = uniform_times(keys_of(indices - second), num_steps)
        return Draw(jnp.where(second == 1, num_steps - 1 - t, t), jnp.ones(t.shape))

    return TimeSampler(_nothing, draw, _forget)


def loss_aware(num_steps: int, *, history: int = 10, uniform_share: float = 0.001) -> TimeSampler:
    r"""Makes the sampler that looks most where the loss is largest, by the second moment of the last losses.

    .. math:: p_t \propto \sqrt{E[L_t^2]}, \quad
              \text{weight} = \frac{1}{T p_t}, \quad p \leftarrow (1 - u) p + u / T

    Uniform until every time has been seen `history` times.

    Args:
      num_steps: T.
      history: losses remembered at each time.
      uniform_share: u, the share of uniform times mixed in.

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
        # How many of the batch come before, and after, each image at the same time: the ring of ten is filled as if
        # they came one by one, and of more than ten only the last ten are written.
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
    """Makes a sampler of times by name.

    Raises:
      ValueError: the name is unknown.
    """
    if name not in _SAMPLERS:
        raise ValueError(f"unknown sampler of times {name!r}: choose one of {', '.join(_SAMPLERS)}")
    return _SAMPLERS[name](num_steps)
