r"""What a trained chain does to images that are given: reconstruct, vary, interpolate, fill in.

Each function starts the reverse chain of a `Sampler` in its middle. How far from the end is its depth: the number of
steps that are left, which is the paper's 1-based t; at depth 0 an image is clean, at depth T it is noise. The chain may
be of any length, but of single steps: what a sampler of several steps remembers is not there in the middle.

>>> schedule = make_schedule("linear", 10)
>>> nothing = lambda x_t, t: jnp.zeros_like(x_t)                         # a network that sees no noise
>>> images = jnp.zeros((2, 4, 4, 1))
>>> encode_decode(jax.random.key(0), schedule, ancestral(schedule, nothing), images, depth=5, draws=3).shape
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
from ddpm_jax.forward import per_image, q_sample, q_step
from ddpm_jax.samplers.chain import Chain, ChainInfo, Sampler, initial_noise, run_chain
from ddpm_jax.schedules import Schedule


class Start(typing.NamedTuple):
    """Where reverse chains begin: a pytree."""

    keys: Array
    """(N,) the keys of the noise of their steps."""
    x: Array
    """(N, H, W, C) the images at the chains' depths."""


def _check_single_step(state: Chain) -> None:
    if jax.tree.leaves(state.memory):
        raise ValueError("a sampler that remembers earlier steps cannot begin in its middle: use ancestral or ddim")


def _check_depth(depth: int, num_steps: int) -> None:
    if not 0 <= depth <= num_steps:
        raise ValueError(f"depth={depth} is outside [0, {num_steps}]: it is how many steps of the chain are left")


def _indices(number: int, indices: Array | None) -> Array:
    return jnp.arange(number) if indices is None else indices


def diffuse(keys: Array, schedule: Schedule, x0: Array, depth: Array) -> Array:
    r"""Diffuses clean images to a depth; at depth 0 they stay as they are.

    .. math:: x_d \sim q(x_d | x_0)

    Args:
      keys: (B,) typed keys of the noise.
      schedule: tables of T steps.
      x0: clean images, (B, H, W, C), in [-1, 1].
      depth: (B,) int32, each in [0, T].

    Returns:
      (B, H, W, C).

    Ho et al. 2020, eq. 4.
    """
    eps = per_image_keys.normal(keys, x0.shape[1:])
    x_t = q_sample(schedule, x0, jnp.maximum(depth - 1, 0), eps)
    return jnp.where(per_image(depth) > 0, x_t, x0)


def decode(start: Start, sampler: Sampler, *, depth: int, until: int = 0) -> Array:
    """Runs the reverse chain from one depth to another.

    Args:
      start: keys and images at `depth`.
      sampler: the rule, of single steps.
      depth: where the chain begins, in [0, T], static.
      until: where it ends, in [0, depth], static; 0 is the clean image.

    Returns:
      (N, H, W, C) the images at `until`.

    Raises:
      ValueError: a depth is out of range, or the sampler remembers earlier steps.
    """
    _check_depth(depth, sampler.num_steps)
    _check_depth(until, depth)
    state = sampler.init(start.x)
    _check_single_step(state)
    return run_chain(start.keys, sampler, state, sampler.num_steps - depth, num_steps=depth - until).x


def between(sampler: Sampler, depth: Array, until: Array) -> Sampler:
    """Lets every image take part in its own steps of a chain alone, so that one batch holds images of many depths.

    Args:
      sampler: the rule, of single steps.
      depth: (B,) int32, where each image's chain begins; before, it waits.
      until: (B,) int32, where it ends.

    Returns:
      the `Sampler`, of as many steps.

    Raises:
      ValueError: the sampler remembers earlier steps.
    """

    def step(keys: Array, state: Chain, k: Array) -> tuple[Chain, ChainInfo]:
        _check_single_step(state)
        left = sampler.num_steps - k
        moved, info = sampler.step(keys, state, k)
        return Chain(jnp.where(per_image((left <= depth) & (left > until)), moved.x, state.x)), info

    return sampler._replace(step=step)


def encode(
    key: Array, schedule: Schedule, x0: Array, depth: Array, *, draws: int = 1, indices: Array | None = None
) -> Start:
    """Diffuses images, each once, for several reverse chains from the same x_t.

    Args:
      key: the job's key. What happens to image i depends on it and on i alone.
      schedule: tables of T steps.
      x0: clean images, (B, H, W, C), in [-1, 1].
      depth: (B,) int32, each in [0, T].
      draws: chains for each image, static.
      indices: (B,) the images' indices in the job; 0..B-1 if not given.

    Returns:
      the start of B * draws chains, those of one image after one another.
    """
    noise_key, chain_key = jax.random.split(key)
    indices = _indices(len(x0), indices)
    x_t = diffuse(per_image_keys.image_keys(noise_key, indices), schedule, x0, depth)
    return branch(per_image_keys.image_keys(chain_key, indices), x_t, draws=draws)


def branch(keys: Array, x_t: Array, *, draws: int) -> Start:
    """Starts several reverse chains from each image.

    Args:
      keys: (B,) typed keys.
      x_t: (B, H, W, C).
      draws: chains for each image, static.

    Returns:
      the start of B * draws chains, those of one image after one another.
    """
    chex.assert_shape(keys, x_t.shape[:1])
    each = jax.vmap(lambda key: jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(draws)))(keys)
    return Start(each.reshape(-1), jnp.repeat(x_t, draws, axis=0))


def encode_decode(
    key: Array,
    schedule: Schedule,
    sampler: Sampler,
    x0: Array,
    *,
    depth: int,
    draws: int = 1,
    indices: Array | None = None,
) -> Array:
    r"""Reconstructs images from their x_t: what was lost on the way is made up anew by every draw.

    .. math:: x_t \sim q(x_t | x_0), \quad \hat x_0 \sim p_\theta(x_0 | x_t)

    Args:
      key: the job's key. What happens to image i depends on it and on i alone.
      schedule: tables of the sampler's T steps.
      sampler: the rule, of single steps.
      x0: clean images, (B, H, W, C), in [-1, 1].
      depth: t, in [0, T], static. At 0 the images come back as they are, at T they are new ones.
      draws: reconstructions of each image from one x_t, static.
      indices: (B,) the images' indices in the job; 0..B-1 if not given.

    Returns:
      (B, draws, H, W, C).

    Raises:
      ValueError: the depth is out of range, or the sampler remembers earlier steps.

    Ho et al. 2020, sec. 4.3 (progressive decoding) and Fig. 7.
    """
    _check_depth(depth, sampler.num_steps)
    start = encode(key, schedule, x0, jnp.full(len(x0), depth, jnp.int32), draws=draws, indices=indices)
    return decode(start, sampler, depth=depth).reshape(len(x0), draws, *x0.shape[1:])


def share_latents(
    key: Array, sampler: Sampler, shape: Sequence[int], *, depth: int, draws: int, indices: Array | None = None
) -> tuple[Array, Array]:
    r"""Draws several images from one x_t that was itself drawn: they share what x_t has of them.

    .. math:: x_t \sim p_\theta(x_t), \quad x_0^{(1)}, .., x_0^{(n)} \sim p_\theta(x_0 | x_t)

    Args:
      key: the job's key. Latent i depends on it and on i alone, and is the same whatever `draws` is.
      sampler: the rule, of single steps.
      shape: (B, H, W, C) of the latents.
      depth: t, in [0, T], static: at T they share x_T, the noise, and hardly anything else.
      draws: images from each latent, static.
      indices: (B,) the latents' indices in the job; 0..B-1 if not given.

    Returns:
      the latents x_t, (B, H, W, C), and the images, (B, draws, H, W, C).

    Raises:
      ValueError: the depth is out of range, or the sampler remembers earlier steps.

    Ho et al. 2020, sec. 4.3 and Fig. 7.
    """
    _check_depth(depth, sampler.num_steps)
    latent_key, chain_key = jax.random.split(key)
    indices = _indices(shape[0], indices)
    keys = per_image_keys.image_keys(latent_key, indices)
    x_t = decode(Start(keys, initial_noise(keys, shape[1:])), sampler, depth=sampler.num_steps, until=depth)
    start = branch(per_image_keys.image_keys(chain_key, indices), x_t, draws=draws)
    return x_t, decode(start, sampler, depth=depth).reshape(shape[0], draws, *shape[1:])


def mix(
    key: Array,
    schedule: Schedule,
    x0_a: Array,
    x0_b: Array,
    lambdas: Array,
    depth: Array,
    *,
    indices: Array | None = None,
) -> Start:
    r"""Diffuses pairs of images and mixes them: where the chains of `interpolate` begin.

    Args:
      key: the job's key. What happens to pair i depends on it and on i alone.
      schedule: tables of T steps.
      x0_a: clean images, (B, H, W, C), in [-1, 1].
      x0_b: clean images, likewise.
      lambdas: (L,) float32, the share of b.
      depth: (B,) int32, each in [0, T].
      indices: (B,) the pairs' indices in the job; 0..B-1 if not given.

    Returns:
      the start of B * L chains, those of one pair after one another, all with the same noise.
    """
    chex.assert_equal_shape([x0_a, x0_b])
    indices = _indices(len(x0_a), indices)
    key_a, key_b, chain_key = jax.random.split(key, 3)
    x_a = diffuse(per_image_keys.image_keys(key_a, indices), schedule, x0_a, depth)
    x_b = diffuse(per_image_keys.image_keys(key_b, indices), schedule, x0_b, depth)
    keys = jnp.repeat(per_image_keys.image_keys(chain_key, indices), len(lambdas))
    x_a, x_b = (jnp.repeat(x, len(lambdas), axis=0) for x in (x_a, x_b))
    share = per_image(jnp.tile(lambdas, len(x0_a)))
    return Start(keys, (1 - share) * x_a + share * x_b)


def interpolate(
    key: Array,
    schedule: Schedule,
    sampler: Sampler,
    x0_a: Array,
    x0_b: Array,
    lambdas: Array,
    *,
    depth: int,
    indices: Array | None = None,
) -> Array:
    r"""Interpolates between pairs of images in the space of x_t.

    .. math:: x_t = (1 - \lambda)\, x_t^a + \lambda\, x_t^b, \quad \hat x_0 \sim p_\theta(x_0 | x_t)

    The noise of a pair is held fixed over :math:`\lambda`, as the paper says (its code draws it anew): that of
    :math:`x_t^a`, that of :math:`x_t^b`, and that of the reverse chain.

    Args:
      key: the job's key. What happens to pair i depends on it and on i alone.
      schedule: tables of the sampler's T steps.
      sampler: the rule, of single steps.
      x0_a: clean images, (B, H, W, C), in [-1, 1].
      x0_b: clean images, likewise.
      lambdas: (L,) float32, the share of b, about in [0, 1].
      depth: t, in [0, T], static: at 0 pixels are mixed, at T two noises.
      indices: (B,) the pairs' indices in the job; 0..B-1 if not given.

    Returns:
      (B, L, H, W, C).

    Raises:
      ValueError: the depth is out of range, or the sampler remembers earlier steps.

    Ho et al. 2020, sec. 4.4, Figs. 8 and 9.
    """
    _check_depth(depth, sampler.num_steps)
    start = mix(key, schedule, x0_a, x0_b, lambdas, jnp.full(len(x0_a), depth, jnp.int32), indices=indices)
    return decode(start, sampler, depth=depth).reshape(len(x0_a), len(lambdas), *x0_a.shape[1:])


def slerp(a: Array, b: Array, lam: Array) -> Array:
    r"""Interpolates along the great circle between noises, whose norm a straight line would shrink.

    .. math:: \frac{\sin((1-\lambda)\theta)}{\sin\theta}\, a + \frac{\sin(\lambda\theta)}{\sin\theta}\, b,
              \quad \cos\theta = \frac{a \cdot b}{\|a\| \|b\|}

    Args:
      a: (B, H, W, C).
      b: shaped as `a`.
      lam: (B,) the share of b. Where a and b point the same way, the line is straight.

    Returns:
      shaped as `a`.

    Song et al. 2021 (DDIM), app. D.5, eq. 67.

    >>> slerp(jnp.array([[[[1.0, 0.0]]]]), jnp.array([[[[0.0, 1.0]]]]), jnp.array([0.5])).round(4)
    Array([[[[0.7071, 0.7071]]]], dtype=float32)
    """
    chex.assert_rank(a, 4)
    chex.assert_equal_shape([a, b])
    chex.assert_shape(lam, a.shape[:1])
    dot, squared_a, squared_b = ((x * y).sum((1, 2, 3)) for x, y in ((a, b), (a, a), (b, b)))
    theta = jnp.arccos(jnp.clip(dot / jnp.sqrt(squared_a * squared_b), -1, 1))
    curved = jnp.sin(theta) > 1e-3
    sine = jnp.where(curved, jnp.sin(theta), jnp.ones_like(theta))
    weight_a = jnp.where(curved, jnp.sin((1 - lam) * theta) / sine, 1 - lam)
    weight_b = jnp.where(curved, jnp.sin(lam * theta) / sine, lam)
    return per_image(weight_a) * a + per_image(weight_b) * b


def invert(inversion: Sampler, x0: Array) -> Array:
    """Finds the noise that deterministic DDIM draws images from: (B, H, W, C) to the same shape.

    Args:
      inversion: of `ddim.ddim_inversion`.
      x0: clean images, (B, H, W, C), in [-1, 1].

    Song et al. 2021 (DDIM), sec. 4.3.
    """
    return run_chain(unused_keys(len(x0)), inversion, inversion.init(x0), 0, num_steps=inversion.num_steps).x


def unused_keys(number: int) -> Array:
    """Gives (number,) keys for chains that draw nothing."""
    return jax.random.split(jax.random.key(0), number)


def mix_latents(x_a: Array, x_b: Array, lambdas: Array) -> Array:
    """Interpolates between pairs of noises by `slerp`.

    Args:
      x_a: (B, H, W, C).
      x_b: shaped as `x_a`.
      lambdas: (L,) float32, the share of b.

    Returns:
      (B * L, H, W, C), those of one pair after one another.
    """
    number = len(lambdas)
    return slerp(jnp.repeat(x_a, number, axis=0), jnp.repeat(x_b, number, axis=0), jnp.tile(lambdas, len(x_a)))


def ddim_interpolate(inversion: Sampler, sampler: Sampler, x0_a: Array, x0_b: Array, lambdas: Array) -> Array:
    r"""Interpolates between pairs of images along the great circle of their noises; nothing is drawn.

    Args:
      inversion: of `ddim.ddim_inversion`.
      sampler: of `ddim.ddim` on the same schedule, with eta = 0 and without clipping.
      x0_a: clean images, (B, H, W, C), in [-1, 1].
      x0_b: clean images, likewise.
      lambdas: (L,) float32, the share of b. At 0 and 1 the images come back, but for the error of the inversion.

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
    """The moves of a chain that goes up and down."""

    depth: np.ndarray
    """(K,) where each move begins."""
    down: np.ndarray
    """(K,) whether it is a step of the reverse chain, else one of the forward process."""


def repaint_walk(num_steps: int, *, jump: int, resamples: int) -> Walk:
    """Lists the moves of RePaint: down, but again and again up by `jump` steps and down once more.

    Args:
      num_steps: T >= 1.
      jump: j >= 1, how many steps up it goes at once: from depths 1, 1 + j, 1 + 2j, .., where there is room.
      resamples: r >= 1, how often it passes each stretch; 1: never up.

    Returns:
      the moves, from depth T to 0.

    Raises:
      ValueError: a number is below 1.

    Lugmayr et al. 2022 (RePaint), Algorithm 1 and app. B (jump length), and its code (`get_schedule_jump`).

    >>> repaint_walk(3, jump=1, resamples=2).depth
    array([3, 2, 3, 2, 1, 2, 1])
    """
    for name, value in (("num_steps", num_steps), ("jump", jump), ("resamples", resamples)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    times_up = {depth: resamples - 1 for depth in range(1, num_steps - jump + 1, jump)}
    moves = []
    depth = num_steps
    while depth:
        moves.append((depth, True))
        depth -= 1
        if times_up.get(depth):
            times_up[depth] -= 1
            moves += [(depth + i, False) for i in range(jump)]
            depth += jump
    depths, down = zip(*moves, strict=True)
    return Walk(np.array(depths), np.array(down))


def repaint(
    schedule: Schedule, sampler: Sampler, x0: Array, mask: Array, *, jump: int = 10, resamples: int = 10
) -> Sampler:
    r"""Makes the chain of RePaint out of another: what is known is put in at every step.

    .. math::
      x_{t-1}^{known} &\sim q(x_{t-1} | x_0), \quad x_{t-1}^{unknown} \sim p_\theta(x_{t-1} | x_t) \\
      x_{t-1} &= m\, x_{t-1}^{known} + (1 - m)\, x_{t-1}^{unknown}

    The unknown part is drawn without regard to the known one of the same step. Going up by q and down again brings
    the two in harmony; the more often, the closer to the conditional distribution, which is reached only in the limit
    of many small steps.

    Args:
      schedule: tables of the sampler's T steps.
      sampler: the rule of the steps down, single ones, with noise ("ancestral").
      x0: images, (B, H, W, C), in [-1, 1]; what is not known of them is not looked at.
      mask: (B, H, W, 1), 1 (or True) where they are known.
      jump: see `repaint_walk`.
      resamples: see `repaint_walk`; the network is asked about so many times T.

    Returns:
      a `Sampler` whose steps are the moves, to be started from noise. Its times also rise; on the way up the step's
      info has x_t for x0. Where they are known, it ends in exactly the images.

    Raises:
      ValueError: as `repaint_walk`, or the sampler remembers earlier steps.

    Lugmayr et al. 2022 (RePaint), Algorithm 1.
    """
    chex.assert_rank(x0, 4)
    chex.assert_shape(mask, (*x0.shape[:3], 1))
    walk, known = repaint_walk(sampler.num_steps, jump=jump, resamples=resamples), mask.astype(bool)

    def step(keys: Array, state: Chain, k: Array) -> tuple[Chain, ChainInfo]:
        _check_single_step(state)
        depth = jnp.asarray(walk.depth, jnp.int32)[k]
        # A depth is passed many times, so the noise is the move's, not the time's.
        reverse_keys, forward_keys = per_image_keys.split(per_image_keys.fold(keys, 1 + k), 2)
        each = lambda value: jnp.full(state.x.shape[:1], value, jnp.int32)

        def go_down() -> tuple[Chain, ChainInfo]:
            unknown, info = sampler.step(reverse_keys, state, sampler.num_steps - depth)
            return Chain(jnp.where(known, diffuse(forward_keys, schedule, x0, each(depth - 1)), unknown.x)), info

        def go_up() -> tuple[Chain, ChainInfo]:
            eps = per_image_keys.normal(forward_keys, state.x.shape[1:])
            x = q_step(schedule, state.x, each(depth), eps)
            return Chain(x), ChainInfo(depth - 1, state.x, state.x)

        return jax.lax.cond(jnp.asarray(walk.down)[k], go_down, go_up)

    return Sampler(len(walk.depth), walk.depth - 1, sampler.init, step)


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
    """Fills in what is not known of images: `repaint`, from noise.

    Args:
      key: the job's key. What happens to image i depends on it and on i alone.
      schedule: tables of the sampler's T steps.
      sampler: the rule, of single steps, with noise ("ancestral").
      x0: images, (B, H, W, C), in [-1, 1]; what is not known of them is not looked at.
      mask: (B, H, W, 1), 1 (or True) where they are known.
      jump: how many steps up the chain goes at once, see `repaint_walk`.
      resamples: how often it passes each stretch.
      indices: (B,) the images' indices in the job; 0..B-1 if not given.

    Returns:
      (B, H, W, C), equal to `x0` where it is known.

    Raises:
      ValueError: as `repaint`.

    Lugmayr et al. 2022 (RePaint), Algorithm 1.
    """
    chain = repaint(schedule, sampler, x0, mask, jump=jump, resamples=resamples)
    keys = per_image_keys.image_keys(key, _indices(len(x0), indices))
    state = chain.init(initial_noise(keys, x0.shape[1:]))
    return run_chain(keys, chain, state, 0, num_steps=chain.num_steps).x
