r"""Whole reverse chains, each one `lax.scan` (Ho et al. 2020, Algorithm 2).

A sampler is a pair of pure functions, `init` and `step`, that close over the network and the schedule. `run_chain`
scans any range of a sampler's steps; `sample` runs the whole chain from noise to images. Nothing here is jitted: jit
the call with the network's parameters as an argument, and one compiled program serves every seed and checkpoint.

>>> schedule = make_schedule("linear", 10)
>>> nothing = lambda x_t, t: jnp.zeros_like(x_t)                         # a network that always predicts 0
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
from ddpm_jax.schedules import concrete


class Chain(typing.NamedTuple):
    """The state of a reverse chain: a pytree that can be scanned, sharded and saved."""

    x: Array
    """The current images, (B, H, W, C)."""
    memory: typing.Any = ()
    """What a multistep sampler keeps from earlier steps; empty for other samplers."""


class ChainInfo(typing.NamedTuple):
    """Diagnostics of one step."""

    time: Array
    """The 0-based timestep, scalar int32."""
    x_t: Array
    """The images before the step, (B, H, W, C)."""
    x0: Array
    """The step's prediction of x_0, (B, H, W, C)."""


class Sampler(typing.NamedTuple):
    """A reverse chain from noise to images in `num_steps` steps."""

    num_steps: int
    """The number of steps of the whole chain."""
    timesteps: np.ndarray
    """(num_steps,) the 0-based timestep of each step, decreasing."""
    init: Callable[[Array], Chain]
    """Maps x_T to the chain's first state."""
    step: Callable[[Array, Chain, Array], tuple[Chain, ChainInfo]]
    """Maps (keys, state, k) to (state, info) at step k = 0, .., num_steps - 1, counted from x_T; keys are (B,)."""


# The uses of an image's key: 0 is for x_T, for every sampler and number of steps alike; 1 + t is for the step at t.
_LATENT, _FIRST_STEP = 0, 1


def initial_noise(keys: Array, shape: Sequence[int]) -> Array:
    """Draws x_T, (B, H, W, C), from (B,) keys and the shape of one image, (H, W, C): the same for every sampler."""
    return per_image_keys.normal(per_image_keys.fold(keys, _LATENT), shape)


def step_noise(keys: Array, t: Array, shape: Sequence[int]) -> Array:
    """Draws the noise, (B, H, W, C), that the step at scalar timestep `t` adds, from (B,) keys."""
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

    The images keep their dtype: from bfloat16 or float16 each step computes in float32 and rounds.

    Consecutive ranges give, bit for bit, the same result as one range over all of them. `first` may be traced, so one
    compiled program serves all ranges of the same length.

    Args:
      keys: (B,) keys, one per image; or one key for the batch.
      sampler: the sampler.
      state: the state of the chain before the range.
      first: the first step of the range, counted from the noise, in [0, sampler.num_steps).
      num_steps: the number of steps in the range, static.
      progress: a function called on the host, from inside the scan, with the number of finished steps of the chain.
      progress_every: the number of steps between calls of `progress`, static.

    Returns:
      the state of the chain after the range.

    Raises:
      ValueError: the range is not within the chain (checked where `first` is known).
    """
    keys, known = per_image_keys.for_batch(keys, state.x), concrete(first)
    if known is not None and not 0 <= known <= known + num_steps <= sampler.num_steps:
        raise ValueError(f"steps {first} to {first + num_steps} are not within a chain of {sampler.num_steps} steps")

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
    """Draws images by running the whole chain from noise.

    Args:
      key: a typed scalar key; image i depends only on `fold_in(key, i)`.
      sampler: the sampler.
      shape: (B, H, W, C).
      indices: (B,) the indices i of the images to draw; 0..B-1 if None.
      progress: see `run_chain`.
      progress_every: see `run_chain`.

    Returns:
      (B, H, W, C) float32, nominally in [-1, 1] but not clipped.

    Ho et al. 2020, Algorithm 2.
    """
    keys = per_image_keys.image_keys(key, jnp.arange(shape[0]) if indices is None else indices)
    chex.assert_shape(keys, shape[:1])
    state = sampler.init(initial_noise(keys, shape[1:]))
    return run_chain(
        keys, sampler, state, 0, num_steps=sampler.num_steps, progress=progress, progress_every=progress_every
    ).x


class Trajectory(typing.NamedTuple):
    """A chain at K chosen timesteps."""

    timesteps: Array
    """(K,) the timesteps, in the requested order."""
    x_t: Array
    """(K, B, H, W, C) the images at those timesteps."""
    x0: Array
    """(K, B, H, W, C) the clean images predicted from them."""


def sample_trajectory(
    key: Array, sampler: Sampler, shape: Sequence[int], *, at: Sequence[int], indices: Array | None = None
) -> tuple[Array, Trajectory]:
    """Draws images as `sample` does and also returns the chain at chosen timesteps.

    Only those frames are kept: memory grows with their number, not with the length of the chain.

    Args:
      key: a typed scalar key; image i depends only on `fold_in(key, i)`.
      sampler: the sampler.
      shape: (B, H, W, C).
      at: 0-based timesteps, static, each in `sampler.timesteps`.
      indices: (B,) the indices i of the images to draw; 0..B-1 if None.

    Returns:
      the images, (B, H, W, C), equal to those of `sample`, and the `Trajectory`.

    Raises:
      ValueError: a timestep is not in the chain, or is given twice.

    Ho et al. 2020, sec. 4.3 (progressive generation).
    """
    slot_of_time = {int(time): slot for slot, time in enumerate(at)}
    if len(slot_of_time) < len(at):
        raise ValueError(f"timesteps must be distinct, unlike {list(at)}")
    slot_of_step = [slot_of_time.pop(int(time), len(at)) for time in sampler.timesteps]
    if slot_of_time:
        raise ValueError(f"timestep {min(slot_of_time)} is not in the chain")
    slots = jnp.asarray(slot_of_step)
    keys = per_image_keys.image_keys(key, jnp.arange(shape[0]) if indices is None else indices)
    state = sampler.init(initial_noise(keys, shape[1:]))
    frames = jnp.broadcast_to(jnp.zeros_like(state.x), (2, len(at), *shape))

    def body(carry: tuple[Chain, Array], k: Array) -> tuple[tuple[Chain, Array], None]:
        state, frames = carry
        state, info = sampler.step(keys, state, k)
        # Steps that are not kept have a slot beyond the last, which drops their frame.
        return (state, frames.at[:, slots[k]].set(jnp.stack([info.x_t, info.x0]), mode="drop")), None

    (state, frames), _ = jax.lax.scan(body, (state, frames), jnp.arange(sampler.num_steps))
    return state.x, Trajectory(jnp.asarray(at, jnp.int32), frames[0], frames[1])
