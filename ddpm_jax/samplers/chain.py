r"""Whole reverse chains, each one `lax.scan` (Ho et al. 2020, Algorithm 2).

A sampler is a pair of pure functions, `init` and `step`, that know the network, the schedule and the rule of the chain.
`run_chain` scans any sampler over any range of its steps; `sample` runs one from noise to image. Nothing here is
jitted: do it around the call, with the network's parameters as an argument, and one compiled program serves every
seed and every checkpoint.

>>> schedule = make_schedule("linear", 10)
>>> nothing = lambda x_t, t: jnp.zeros_like(x_t)                         # a network that sees no noise
>>> sample(jax.random.key(0), ancestral(schedule, nothing), (2, 4, 4, 1)).shape
(2, 4, 4, 1)
"""

import typing
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddpm_jax import keys as per_image_keys


class Chain(typing.NamedTuple):
    """Where a reverse chain stands: a pytree, so that it can be scanned, sharded and saved."""

    x: Array
    """The images as they are now, (B, H, W, C)."""
    memory: typing.Any = ()
    """What a sampler of several steps remembers of the steps before; empty for the others."""


class ChainInfo(typing.NamedTuple):
    """What one step saw."""

    time: Array
    """The 0-based time of the step, scalar int32."""
    x_t: Array
    """The images before the step, (B, H, W, C)."""
    x0: Array
    """The clean images that the step believed in, (B, H, W, C)."""


class Sampler(typing.NamedTuple):
    """A rule for the reverse chain: what it takes to go from noise to images in `num_steps` steps."""

    num_steps: int
    """The length of the whole chain."""
    timesteps: np.ndarray
    """(num_steps,) the 0-based time of each step, falling."""
    init: Callable[[Array], Chain]
    """From x_T to the chain's first state."""
    step: Callable[[Array, Chain, Array], tuple[Chain, ChainInfo]]
    """(keys, state, k) to (state, info): step k = 0 .. num_steps - 1, counted from the noise; keys are (B,)."""


# The uses of an image's key: 0 is x_T, the same for every sampler and every number of steps; 1 + t is the step at t.
_LATENT, _FIRST_STEP = 0, 1


def initial_noise(keys: Array, shape: Sequence[int]) -> Array:
    """Draws x_T: (B,) keys and the shape of one image, (H, W, C), to (B, H, W, C); the same for every sampler."""
    return per_image_keys.normal(per_image_keys.fold(keys, _LATENT), shape)


def step_noise(keys: Array, t: Array, shape: Sequence[int]) -> Array:
    """Draws the noise that the step at scalar time `t` adds, (B, H, W, C), from (B,) keys."""
    return per_image_keys.normal(per_image_keys.fold(keys, _FIRST_STEP + t), shape)


def run_chain(
    keys: Array,
    sampler: Sampler,
    state: Chain,
    first: Array | int,
    *,
    num_steps: int,
    progress: Callable[[int], None] | None = None,
    progress_every: int = 50,
) -> Chain:
    """Runs a range of a sampler's steps as one `lax.scan`.

    Ranges that follow one another give, bit for bit, what one range over all of them gives. `first` may be traced,
    so one compiled program serves all ranges of one length.

    Args:
      keys: (B,) typed keys, one an image.
      sampler: the rule.
      state: where the chain stands.
      first: the first step of the range, counted from the noise, in [0, sampler.num_steps).
      num_steps: how many steps, static.
      progress: called on the host, from inside the scan, with the number of steps of the chain that are done.
      progress_every: how many steps apart `progress` is called, static.

    Returns:
      the state after the range.
    """
    chex.assert_shape(keys, state.x.shape[:1])

    def body(state: Chain, k: Array) -> tuple[Chain, None]:
        state, info = sampler.step(keys, state, k)
        del info  # stacking it would keep the whole trajectory in memory
        if progress is not None:
            report = lambda: jax.debug.callback(lambda done: progress(int(done)), k + 1)
            jax.lax.cond((k + 1) % progress_every == 0, report, lambda: None)
        return state, None

    state, _ = jax.lax.scan(body, state, first + jnp.arange(num_steps))
    return state


def sample(
    key: Array,
    sampler: Sampler,
    shape: Sequence[int],
    *,
    indices: Array | None = None,
    progress: Callable[[int], None] | None = None,
    progress_every: int = 50,
) -> Array:
    """Draws images: the whole chain, from noise.

    Args:
      key: the job's key, a typed scalar key. Image i is drawn from `fold_in(key, i)` alone.
      sampler: the rule.
      shape: (B, H, W, C).
      indices: (B,) which images of the job to draw; 0..B-1 if not given.
      progress: see `run_chain`.
      progress_every: likewise.

    Returns:
      (B, H, W, C) float32, about in [-1, 1]; not clipped.

    Ho et al. 2020, Algorithm 2.
    """
    keys = per_image_keys.image_keys(key, jnp.arange(shape[0]) if indices is None else indices)
    chex.assert_shape(keys, shape[:1])
    state = sampler.init(initial_noise(keys, shape[1:]))
    return run_chain(
        keys, sampler, state, 0, num_steps=sampler.num_steps, progress=progress, progress_every=progress_every
    ).x


class Trajectory(typing.NamedTuple):
    """What a chain went through at K chosen times."""

    timesteps: Array
    """(K,) the times, in the order asked for."""
    x_t: Array
    """(K, B, H, W, C) the images at those times."""
    x0: Array
    """(K, B, H, W, C) the clean images predicted from them."""


def sample_trajectory(
    key: Array, sampler: Sampler, shape: Sequence[int], *, at: Sequence[int], indices: Array | None = None
) -> tuple[Array, Trajectory]:
    """Draws images as `sample` does, and hands back the chain at chosen times.

    Only those frames are kept: memory grows with their number, not with the length of the chain.

    Args:
      key: the job's key.
      sampler: the rule.
      shape: (B, H, W, C).
      at: 0-based times, static, each one of `sampler.timesteps`.
      indices: (B,) which images of the job to draw; 0..B-1 if not given.

    Returns:
      the images, (B, H, W, C), equal to those of `sample`, and the frames.

    Raises:
      ValueError: the chain does not pass one of the times, or one is asked for twice.

    Ho et al. 2020, sec. 4.3 (progressive generation).
    """
    slot_of_time = {int(time): slot for slot, time in enumerate(at)}
    if len(slot_of_time) < len(at):
        raise ValueError(f"a time is asked for twice in {list(at)}")
    slot_of_step = [slot_of_time.pop(int(time), len(at)) for time in sampler.timesteps]
    if slot_of_time:
        raise ValueError(f"the chain does not pass time {min(slot_of_time)}")
    slots = jnp.asarray(slot_of_step)
    keys = per_image_keys.image_keys(key, jnp.arange(shape[0]) if indices is None else indices)
    state = sampler.init(initial_noise(keys, shape[1:]))
    frames = jnp.zeros((2, len(at), *shape))

    def body(carry: tuple[Chain, Array], k: Array) -> tuple[tuple[Chain, Array], None]:
        state, frames = carry
        state, info = sampler.step(keys, state, k)
        # A step that is not asked for has a slot beyond the last: its frame is dropped.
        return (state, frames.at[:, slots[k]].set(jnp.stack([info.x_t, info.x0]), mode="drop")), None

    (state, frames), _ = jax.lax.scan(body, (state, frames), jnp.arange(sampler.num_steps))
    return state.x, Trajectory(jnp.asarray(at, jnp.int32), frames[0], frames[1])
