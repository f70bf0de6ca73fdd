r"""What a trained chain does to given images: reconstruct, vary, interpolate, inpaint.

Each function starts the reverse chain of a `Sampler` at a noise level: the number of reverse steps left, 0 for a clean
image and N for pure noise. For a chain of all T steps it is the paper's 1-based t. The sampler must be of single steps
("ancestral" or "ddim"): a multistep sampler has no memory of the steps before the start.

>>> schedule = make_schedule("linear", 10)
>>> zeros = lambda x_t, t: jnp.zeros_like(x_t)                           # a network that predicts no noise
>>> images = jnp.zeros((2, 4, 4, 1))
>>> encode_decode(jax.random.key(0), schedule, ancestral(schedule, zeros), images, level=5, draws=3).shape
(2, 3, 4, 4, 1)
"""

import typing
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddpm_jax import keys as per_image_keys
from ddpm_jax.forward import as_floats, per_image, q_sample, q_step
from ddpm_jax.samplers.chain import Chain, ChainInfo, Sampler, initial_noise, run_chain
from ddpm_jax.schedules import Schedule, concrete


class ChainStart(typing.NamedTuple):
    """Start of N reverse chains, a pytree."""

    keys: Array
    """(N,) keys of the noise of their steps."""
    x: Array
    """(N, H, W, C) images at the chains' noise levels."""


def _check_single_step(state: Chain) -> None:
    if jax.tree.leaves(state.memory):
        raise ValueError("a multistep sampler cannot start in the middle of its chain: use ancestral or ddim")


def _check_level(level: int | np.ndarray, num_steps: int) -> None:
    if isinstance(level, jax.core.Tracer):
        raise TypeError("a noise level sets the length of a loop: an integer, not an argument of a traced function")
    if np.any(np.less(level, 0) | np.greater(level, num_steps)):
        raise ValueError(f"level={level} is outside [0, {num_steps}]: it is the number of reverse steps left")


def _repeat(values: Array, number: int) -> Array:
    # `jnp.repeat` along the batch, which also works on a mesh with explicit axes.
    batch, *shape = values.shape
    return jnp.broadcast_to(values[:, None], (batch, number, *shape)).reshape(batch * number, *shape)


def _indices(number: int, indices: Array | None) -> Array:
    return jnp.arange(number) if indices is None else indices


def diffuse(keys: Array, schedule: Schedule, x0: Array, level: Array) -> Array:
    r"""Draws images at a noise level; at level 0 they are unchanged.

    .. math:: x_l \sim q(x_l | x_0)

    Args:
      keys: (B,) typed keys of the noise.
      schedule: tables of T steps.
      x0: clean images, (B, H, W, C), in [-1, 1].
      level: (B,) int32, each in [0, T].

    Returns:
      x_l, (B, H, W, C).

    Ho et al. 2020, eq. 4.
    """
    x0, known = as_floats(x0, "x0"), concrete(level)
    if known is not None:
        _check_level(known, schedule.num_steps)
    eps = per_image_keys.normal(per_image_keys.for_batch(keys, x0), x0.shape[1:])
    x_t = q_sample(schedule, x0, jnp.maximum(level - 1, 0), eps)
    return jnp.where(per_image(level, x0) > 0, x_t, x0)


def decode(start: ChainStart, sampler: Sampler, *, level: int, end_level: int = 0) -> Array:
    """Runs the reverse chain from one noise level to another.

    Args:
      start: keys and images at `level`.
      sampler: of single steps.
      level: where the chain starts, in [0, N], static.
      end_level: where it ends, in [0, level], static; 0 is the clean image.

    Returns:
      images at `end_level`, (N, H, W, C).

    Raises:
      ValueError: a level is out of range, or the sampler is multistep.
    """
    _check_level(level, sampler.num_steps)
    _check_level(end_level, level)
    state = sampler.init(start.x)
    _check_single_step(state)
    return run_chain(start.keys, sampler, state, sampler.num_steps - level, num_steps=level - end_level).x


def between(sampler: Sampler, start_level: Array, end_level: Array) -> Sampler:
    """Makes the sampler that changes each image only between its own two noise levels, for batches of many levels.

    Args:
      sampler: of single steps.
      start_level: (B,) int32, where each image's chain starts; before that the image is unchanged.
      end_level: (B,) int32, where it ends.

    Returns:
      the `Sampler`, of the same number of steps.

    Raises:
      ValueError: the sampler is multistep.
    """

    def step(keys: Array, state: Chain, k: Array) -> tuple[Chain, ChainInfo]:
        _check_single_step(state)
        level = sampler.num_steps - k
        stepped, info = sampler.step(keys, state, k)
        active = per_image((level <= start_level) & (level > end_level), state.x)
        return Chain(jnp.where(active, stepped.x, state.x)), info

    return sampler._replace(step=step)


def encode(
    key: Array, schedule: Schedule, x0: Array, level: Array, *, draws: int = 1, indices: Array | None = None
) -> ChainStart:
    """Draws one x_t for each image, and starts several reverse chains from it.

    Args:
      key: the job's key. The result for image i depends only on it and on i.
      schedule: tables of T steps.
      x0: clean images, (B, H, W, C), in [-1, 1].
      level: (B,) int32, each in [0, T].
      draws: chains per image, static.
      indices: (B,) indices of the images in the job; 0..B-1 if not given.

    Returns:
      the start of B * draws chains, the draws of an image in a row.
    """
    noise_key, chain_key = jax.random.split(key)
    indices = _indices(len(x0), indices)
    x_t = diffuse(per_image_keys.image_keys(noise_key, indices), schedule, x0, level)
    return branch(per_image_keys.image_keys(chain_key, indices), x_t, draws=draws)


def branch(keys: Array, x_t: Array, *, draws: int) -> ChainStart:
    """Starts several reverse chains from each image.

    Args:
      keys: (B,) typed keys.
      x_t: (B, H, W, C).
      draws: chains per image, static.

    Returns:
      the start of B * draws chains, the draws of an image in a row.
    """
    keys = per_image_keys.for_batch(keys, x_t)
    each = jax.vmap(lambda key: jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(draws)))(keys)
    return ChainStart(each.reshape(-1), _repeat(x_t, draws))


def encode_decode(
    key: Array,
    schedule: Schedule,
    sampler: Sampler,
    x0: Array,
    *,
    level: int,
    draws: int = 1,
    indices: Array | None = None,
) -> Array:
    r"""Reconstructs images from their x_t; each draw fills in differently what x_t has lost.

    .. math:: x_t \sim q(x_t | x_0), \quad \hat x_0 \sim p_\theta(x_0 | x_t)

    Args:
      key: the job's key. The result for image i depends only on it and on i.
      schedule: tables of the sampler's T steps.
      sampler: of single steps.
      x0: clean images, (B, H, W, C), in [-1, 1].
      level: t, in [0, T], static. At 0 the images are unchanged, at T they are new samples.
      draws: reconstructions per image, all from one x_t, static.
      indices: (B,) indices of the images in the job; 0..B-1 if not given.

    Returns:
      (B, draws, H, W, C).

    Raises:
      ValueError: the level is out of range, or the sampler is multistep.

    Ho et al. 2020, sec. 4.3 (progressive decoding) and Fig. 7.
    """
    _check_level(level, sampler.num_steps)
    start = encode(key, schedule, x0, jnp.full(len(x0), level, jnp.int32), draws=draws, indices=indices)
    return decode(start, sampler, level=level).reshape(len(x0), draws, *x0.shape[1:])


def share_latents(
    key: Array, sampler: Sampler, shape: Sequence[int], *, level: int, draws: int, indices: Array | None = None
) -> tuple[Array, Array]:
    r"""Draws several images from one sampled x_t, which they have in common.

    .. math:: x_t \sim p_\theta(x_t), \quad x_0^{(1)}, .., x_0^{(n)} \sim p_\theta(x_0 | x_t)

    Args:
      key: the job's key. Latent i depends only on it and on i, not on `draws`.
      sampler: of single steps.
      shape: (B, H, W, C) of the latents.
      level: t, in [0, T], static. At T they share nothing but the noise x_T.
      draws: images per latent, static.
      indices: (B,) indices of the latents in the job; 0..B-1 if not given.

    Returns:
      the latents x_t, (B, H, W, C), and the images, (B, draws, H, W, C).

    Raises:
      ValueError: the level is out of range, or the sampler is multistep.

    Ho et al. 2020, sec. 4.3 and Fig. 7.
    """
    _check_level(level, sampler.num_steps)
    latent_key, chain_key = jax.random.split(key)
    indices = _indices(shape[0], indices)
    keys = per_image_keys.image_keys(latent_key, indices)
    x_t = decode(ChainStart(keys, initial_noise(keys, shape[1:])), sampler, level=sampler.num_steps, end_level=level)
    start = branch(per_image_keys.image_keys(chain_key, indices), x_t, draws=draws)
    return x_t, decode(start, sampler, level=level).reshape(shape[0], draws, *shape[1:])


def mix(
    key: Array,
    schedule: Schedule,
    x0_a: Array,
    x0_b: Array,
    lambdas: Array,
    level: Array,
    *,
    indices: Array | None = None,
) -> ChainStart:
    r"""Draws x_t for pairs of images and mixes them: the start of the chains of `interpolate`.

    Args:
      key: the job's key. The result for pair i depends only on it and on i.
      schedule: tables of T steps.
      x0_a: clean images, (B, H, W, C), in [-1, 1].
      x0_b: clean images, likewise.
      lambdas: (L,) float32, the share of b.
      level: (B,) int32, each in [0, T].
      indices: (B,) indices of the pairs in the job; 0..B-1 if not given.

    Returns:
      the start of B * L chains, the mixtures of a pair in a row, all with the same noise.
    """
    x0_a, x0_b = as_floats(x0_a, "x0_a"), as_floats(x0_b, "x0_b")
    chex.assert_equal_shape([x0_a, x0_b])
    indices = _indices(len(x0_a), indices)
    key_a, key_b, chain_key = jax.random.split(key, 3)
    x_a = diffuse(per_image_keys.image_keys(key_a, indices), schedule, x0_a, level)
    x_b = diffuse(per_image_keys.image_keys(key_b, indices), schedule, x0_b, level)
    keys = _repeat(per_image_keys.image_keys(chain_key, indices), len(lambdas))
    x_a, x_b = (_repeat(x, len(lambdas)) for x in (x_a, x_b))
    share = per_image(jnp.tile(lambdas, len(x0_a)), x_a)
    return ChainStart(keys, (1 - share) * x_a + share * x_b)


def interpolate(
    key: Array,
    schedule: Schedule,
    sampler: Sampler,
    x0_a: Array,
    x0_b: Array,
    lambdas: Array,
    *,
    level: int,
    indices: Array | None = None,
) -> Array:
    r"""Interpolates between pairs of images in the space of x_t.

    .. math:: x_t = (1 - \lambda)\, x_t^a + \lambda\, x_t^b, \quad \hat x_0 \sim p_\theta(x_0 | x_t)

    All noise of a pair is fixed over :math:`\lambda`, as in the paper: that of :math:`x_t^a`, that of
    :math:`x_t^b`, and that of the reverse chain (which the paper's code draws anew for each :math:`\lambda`).

    Args:
      key: the job's key. The result for pair i depends only on it and on i.
      schedule: tables of the sampler's T steps.
      sampler: of single steps.
      x0_a: clean images, (B, H, W, C), in [-1, 1].
      x0_b: clean images, likewise.
      lambdas: (L,) float32, the share of b, usually in [0, 1].
      level: t, in [0, T], static. At 0 pixels are mixed, at T two noises.
      indices: (B,) indices of the pairs in the job; 0..B-1 if not given.

    Returns:
      (B, L, H, W, C).

    Raises:
      ValueError: the level is out of range, or the sampler is multistep.

    Ho et al. 2020, sec. 4.4, Figs. 8 and 9.
    """
    _check_level(level, sampler.num_steps)
    start = mix(key, schedule, x0_a, x0_b, lambdas, jnp.full(len(x0_a), level, jnp.int32), indices=indices)
    return decode(start, sampler, level=level).reshape(len(x0_a), len(lambdas), *x0_a.shape[1:])


def slerp(a: Array, b: Array, lam: Array) -> Array:
    r"""Interpolates along the great circle between noises; a straight line would shrink their norm.

    .. math:: \frac{\sin((1-\lambda)\theta)}{\sin\theta}\, a + \frac{\sin(\lambda\theta)}{\sin\theta}\, b,
              \quad \cos\theta = \frac{a \cdot b}{\|a\| \|b\|}

    Args:
      a: (B, H, W, C).
      b: shaped as `a`.
      lam: (B,) the share of b. Where a and b point in the same direction, interpolation is linear.

    Returns:
      shaped as `a`.

    Song et al. 2021 (DDIM), app. D.5, eq. 67.

    >>> slerp(jnp.array([[[[1.0, 0.0]]]]), jnp.array([[[[0.0, 1.0]]]]), jnp.array([0.5])).round(4)
    Array([[[[0.7071, 0.7071]]]], dtype=float32)
    """
    a, b = as_floats(a, "a"), as_floats(b, "b")
    chex.assert_equal_shape([a, b])
    chex.assert_shape(lam, a.shape[:1])
    dot, squared_a, squared_b = ((x * y).sum(tuple(range(1, a.ndim))) for x, y in ((a, b), (a, a), (b, b)))
    theta = jnp.arccos(jnp.clip(dot / jnp.sqrt(squared_a * squared_b), -1, 1))
    curved = jnp.sin(theta) > 1e-3
    sine = jnp.where(curved, jnp.sin(theta), jnp.ones_like(theta))
    weight_a = jnp.where(curved, jnp.sin((1 - lam) * theta) / sine, 1 - lam)
    weight_b = jnp.where(curved, jnp.sin(lam * theta) / sine, lam)
    return per_image(weight_a, a) * a + per_image(weight_b, b) * b


def invert(inversion: Sampler, x0: Array) -> Array:
    """Computes the noise from which deterministic DDIM draws the given images.

    Args:
      inversion: from `ddim.ddim_inversion`.
      x0: clean images, (B, H, W, C), in [-1, 1].

    Returns:
      (B, H, W, C).

    Song et al. 2021 (DDIM), sec. 4.3.
    """
    return run_chain(unused_keys(len(x0)), inversion, inversion.init(x0), 0, num_steps=inversion.num_steps).x


def unused_keys(number: int) -> Array:
    """Returns (number,) keys for deterministic chains."""
    return jax.random.split(per_image_keys.make_key(0), number)


def mix_latents(x_a: Array, x_b: Array, lambdas: Array) -> Array:
    """Interpolates between pairs of noises by `slerp`.

    Args:
      x_a: (B, H, W, C).
      x_b: shaped as `x_a`.
      lambdas: (L,) float32, the share of b.

    Returns:
      (B * L, H, W, C), the mixtures of a pair in a row.
    """
    number = len(lambdas)
    return slerp(_repeat(x_a, number), _repeat(x_b, number), jnp.tile(lambdas, len(x_a)))


def ddim_interpolate(inversion: Sampler, sampler: Sampler, x0_a: Array, x0_b: Array, lambdas: Array) -> Array:
    r"""Interpolates between pairs of images along the great circle between their DDIM noises, deterministically.

    Args:
      inversion: from `ddim.ddim_inversion`.
      sampler: from `ddim.ddim` on the same schedule, with eta = 0 and without clipping.
      x0_a: clean images, (B, H, W, C), in [-1, 1].
      x0_b: clean images, likewise.
      lambdas: (L,) float32, the share of b. At 0 and 1 the results are the given images, up to the error of inversion.

    Returns:
      (B, L, H, W, C).

    Song et al. 2021 (DDIM), sec. 5.3 and app. D.5.
    """
    chex.assert_equal_shape([x0_a, x0_b])
    x_a, x_b = jnp.split(invert(inversion, jnp.concatenate([x0_a, x0_b])), 2)
    x_T = mix_latents(x_a, x_b, lambdas)
    images = run_chain(unused_keys(len(x_T)), sampler, sampler.init(x_T), 0, num_steps=sampler.num_steps).x
    return images.reshape(len(x0_a), len(lambdas), *x0_a.shape[1:])


class Walk(typing.NamedTuple):
    """The moves of RePaint's chain."""

    level: np.ndarray
    """(K,) noise level before each move."""
    down: np.ndarray
    """(K,) bool: whether the move is a reverse step, else it is a forward step."""


def repaint_walk(num_steps: int, *, jump: int, resamples: int) -> Walk:
    """Lists the moves of RePaint: reverse steps, with jumps of `jump` steps back up that repeat each stretch.

    Args:
      num_steps: N >= 1.
      jump: j >= 1, length of a jump; jumps start at levels 1, 1 + j, 1 + 2j, .. up to N - j.
      resamples: r >= 1, how many times each stretch is passed; 1: no jumps.

    Returns:
      the moves, from level N to 0.

    Raises:
      ValueError: a number is below 1.

    Lugmayr et al. 2022 (RePaint), Algorithm 1 and app. B (jump length), and its code (`get_schedule_jump`).

    >>> repaint_walk(3, jump=1, resamples=2).level
    array([3, 2, 3, 2, 1, 2, 1])
    """
    for name, value in (("num_steps", num_steps), ("jump", jump), ("resamples", resamples)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    jumps_left = {level: resamples - 1 for level in range(1, num_steps - jump + 1, jump)}
    moves = []
    level = num_steps
    while level:
        moves.append((level, True))
        level -= 1
        if jumps_left.get(level):
            jumps_left[level] -= 1
            moves += [(level + i, False) for i in range(jump)]
            level += jump
    levels, down = zip(*moves, strict=True)
    return Walk(np.array(levels), np.array(down))


def repaint(
    schedule: Schedule, sampler: Sampler, x0: Array, mask: Array, *, jump: int = 10, resamples: int = 10
) -> Sampler:
    r"""Makes RePaint's sampler from another: the known pixels are inserted at every step.

    .. math::
      x_{t-1}^{known} &\sim q(x_{t-1} | x_0), \quad x_{t-1}^{unknown} \sim p_\theta(x_{t-1} | x_t) \\
      x_{t-1} &= m\, x_{t-1}^{known} + (1 - m)\, x_{t-1}^{unknown}

    The unknown part is drawn without regard to the known one of the same step. Going up by q and down again harmonizes
    the two; more passes come closer to the conditional distribution, which is reached only in the limit of many small
    steps.

    Args:
      schedule: tables of the sampler's T steps.
      sampler: of single steps, with noise ("ancestral"); makes the reverse steps.
      x0: images, (B, H, W, C), in [-1, 1]; their unknown pixels are ignored.
      mask: (B, H, W, 1), 1 (or True) where pixels are known.
      jump: see `repaint_walk`.
      resamples: see `repaint_walk`; the network is evaluated about `resamples` * T times.

    Returns:
      a `Sampler` whose steps are the moves, to be started from noise. Its timesteps also rise; info.x0 of a forward
      step is x_t. Known pixels end exactly as given.

    Raises:
      ValueError: as `repaint_walk`, or the sampler is multistep.

    Lugmayr et al. 2022 (RePaint), Algorithm 1.
    """
    x0 = as_floats(x0, "x0")
    chex.assert_shape(mask, (*x0.shape[:-1], 1))
    walk, known = repaint_walk(sampler.num_steps, jump=jump, resamples=resamples), mask.astype(bool)

    def step(keys: Array, state: Chain, k: Array) -> tuple[Chain, ChainInfo]:
        _check_single_step(state)
        level = jnp.asarray(walk.level, jnp.int32)[k]
        # A level is passed many times, so the noise depends on the move, not on the level.
        reverse_keys, forward_keys = per_image_keys.split(per_image_keys.fold(keys, 1 + k), 2)
        each = lambda value: jnp.full(state.x.shape[:1], value, jnp.int32)

        def go_down() -> tuple[Chain, ChainInfo]:
            unknown, info = sampler.step(reverse_keys, state, sampler.num_steps - level)
            x = diffuse(forward_keys, schedule, x0, each(level - 1)).astype(unknown.x.dtype)
            return Chain(jnp.where(known, x, unknown.x)), info

        def go_up() -> tuple[Chain, ChainInfo]:
            eps = per_image_keys.normal(forward_keys, state.x.shape[1:])
            x = q_step(schedule, state.x, each(level), eps)
            return Chain(x.astype(state.x.dtype)), ChainInfo(level - 1, state.x, as_floats(state.x, "x_t"))

        return jax.lax.cond(jnp.asarray(walk.down)[k], go_down, go_up)

    return Sampler(len(walk.level), walk.level - 1, sampler.init, step)


def inpaint(
    key: Array,
    schedule: Schedule,
    sampler: Sampler,
    x0: Array,
    mask: Array,
    *,
    jump: int = 10,
    resamples: int = 10,
    indices: Array | None = None,
) -> Array:
    """Fills in the unknown pixels of images by `repaint`, from noise.

    Args:
      key: the job's key. The result for image i depends only on it and on i.
      schedule: tables of the sampler's T steps.
      sampler: of single steps, with noise ("ancestral").
      x0: images, (B, H, W, C), in [-1, 1]; their unknown pixels are ignored.
      mask: (B, H, W, 1), 1 (or True) where pixels are known.
      jump: length of a jump, see `repaint_walk`.
      resamples: how many times each stretch is passed.
      indices: (B,) indices of the images in the job; 0..B-1 if not given.

    Returns:
      (B, H, W, C), equal to `x0` where the mask is 1.

    Raises:
      ValueError: as `repaint`.

    Lugmayr et al. 2022 (RePaint), Algorithm 1.
    """
    chain = repaint(schedule, sampler, x0, mask, jump=jump, resamples=resamples)
    keys = per_image_keys.image_keys(key, _indices(len(x0), indices))
    state = chain.init(initial_noise(keys, x0.shape[1:]))
    return run_chain(keys, chain, state, 0, num_steps=chain.num_steps).x
