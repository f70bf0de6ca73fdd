r"""The forward process q, which turns data into noise (Ho et al. 2020, sec. 2).

Here and in the rest of the mathematics an image may have any shape: where (B, H, W, C) stands, (B, L, C) or
(B, D, H, W, C) will do, or, with a scalar `t`, one image without a batch.
"""

import typing
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ddpm_jax.schedules import Schedule, concrete


class Gaussian(typing.NamedTuple):
    """A diagonal Gaussian over images: each field broadcasts against (B, H, W, C)."""

    mean: Array
    log_variance: Array


def per_image(values: Array, images: Array) -> Array:
    """Reshapes one number per image, (B,), to (B, 1, .., 1), so that it broadcasts over the images; a scalar stays."""
    chex.assert_rank(values, {0, 1})
    return jnp.expand_dims(values, tuple(range(1, images.ndim))) if values.ndim else values


def at(table: Array, t: Array, images: Array | None = None) -> Array:
    """Reads a table of a schedule at timesteps.

    Args:
      table: (T,).
      t: (B,) int32, or a scalar for all images.
      images: if given, the result is shaped to broadcast over them.

    Returns:
      shaped as `t`, or (B, 1, .., 1).
    """
    # On a mesh with explicit axes, indexing must say where its result lies: with its indices.
    values = table.at[t].get(out_sharding=jax.typeof(t).sharding)
    return values if images is None else per_image(values, images)


def where_positive(root: Callable[[Array], Array], values: Array) -> Array:
    """Computes a root of values >= 0 whose derivative at 0 is 0, not infinite."""
    positive = values > 0
    return jnp.where(positive, root(jnp.where(positive, values, jnp.ones_like(values))), jnp.zeros_like(values))


def check_t(schedule: Schedule, t: ArrayLike, images: Array | None = None) -> None:
    """Checks timesteps: integers, a scalar or one per image, and in [0, T) where their values are known.

    Raises:
      TypeError: they are not integers.
      ValueError: one is outside [0, T).
      AssertionError: they are neither a scalar nor one per image.
    """
    if not jnp.issubdtype(jnp.result_type(t), jnp.integer):
        raise TypeError(f"timesteps are integers in [0, {schedule.num_steps}), not {jnp.result_type(t)}")
    if images is not None and jnp.ndim(t):
        chex.assert_shape(t, images.shape[:1])
    known = concrete(t)
    if known is None:
        return
    outside = known[(known < 0) | (known >= schedule.num_steps)]
    if outside.size:
        raise ValueError(f"timestep {outside[0]} is outside [0, {schedule.num_steps}): t counts from 0")


def as_floats(images: ArrayLike, name: str) -> Array:
    """Returns images as floats; half precision as float32, since the formulas lose too many digits in it.

    Raises:
      TypeError: they are integers, such as uint8 pixels.
    """
    images = jnp.asarray(images)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"{name} is {images.dtype}, not floats: ddpm_jax.to_float converts uint8 pixels to [-1, 1]")
    return images.astype(jnp.float32) if jnp.finfo(images.dtype).bits < 32 else images


def q_step(schedule: Schedule, x_prev: Array, t: Array, eps: Array) -> Array:
    r"""Computes x_t from x_{t-1} and noise: one step of the forward process.

    .. math:: x_t = \sqrt{1 - \beta_t}\, x_{t-1} + \sqrt{\beta_t}\, \epsilon

    Args:
      schedule: tables of T steps.
      x_prev: x_{t-1}, (B, H, W, C); x_0 where t is 0.
      t: 0-based timesteps, (B,) int32, each in [0, T).
      eps: standard normal noise, shaped as `x_prev`.

    Returns:
      x_t, shaped as `x_prev`: a sample of q(x_t | x_{t-1}).

    Ho et al. 2020, eq. 2.
    """
    x_prev, eps = as_floats(x_prev, "x_prev"), as_floats(eps, "eps")
    chex.assert_equal_shape([x_prev, eps])
    check_t(schedule, t, x_prev)
    signal = where_positive(lambda alpha: alpha**0.5, at(schedule.alphas, t, x_prev))
    return signal * x_prev + at(schedule.betas, t, x_prev) ** 0.5 * eps


def q_marginal(schedule: Schedule, x0: Array, t: Array) -> Gaussian:
    r"""Returns the distribution of x_t given clean images.

    .. math:: q(x_t | x_0) = \mathcal N(\sqrt{\bar\alpha_t}\, x_0, (1 - \bar\alpha_t) I)

    Args:
      schedule: tables of T steps.
      x0: clean images, (B, H, W, C), in [-1, 1].
      t: 0-based timesteps, (B,) int32, each in [0, T).

    Returns:
      the Gaussian: mean (B, H, W, C), log-variance (B, 1, 1, 1).

    Ho et al. 2020, eq. 4.
    """
    x0 = as_floats(x0, "x0")
    check_t(schedule, t, x0)
    return Gaussian(
        mean=at(schedule.sqrt_alphas_bar, t, x0) * x0, log_variance=at(schedule.log_one_minus_alphas_bar, t, x0)
    )


def q_sample(schedule: Schedule, x0: Array, t: Array, eps: Array) -> Array:
    r"""Computes x_t from clean images and noise, in closed form.

    .. math:: x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon

    Args:
      schedule: tables of T steps.
      x0: clean images, (B, H, W, C), in [-1, 1].
      t: 0-based timesteps, (B,) int32, each in [0, T).
      eps: standard normal noise, shaped as `x0`.

    Returns:
      x_t, shaped as `x0`: a sample of q(x_t | x_0).

    Ho et al. 2020, eq. 4 and the text above eq. 9.

    >>> schedule = make_schedule("linear", 1000)
    >>> x0 = jnp.ones((1, 2, 2, 1))
    >>> q_sample(schedule, x0, jnp.array([999]), jnp.zeros_like(x0)).max()   # almost no signal is left
    Array(0.00635282, dtype=float32)
    """
    x0, eps = as_floats(x0, "x0"), as_floats(eps, "eps")
    chex.assert_equal_shape([x0, eps])
    check_t(schedule, t, x0)
    return at(schedule.sqrt_alphas_bar, t, x0) * x0 + at(schedule.sqrt_one_minus_alphas_bar, t, x0) * eps


def q_posterior(schedule: Schedule, x0: Array, x_t: Array, t: Array) -> Gaussian:
    r"""Returns the distribution of x_{t-1} given both x_t and x_0.

    .. math::
      \tilde\mu_t = \frac{\sqrt{\bar\alpha_{t-1}}\beta_t}{1 - \bar\alpha_t} x_0
                  + \frac{\sqrt{\alpha_t}(1 - \bar\alpha_{t-1})}{1 - \bar\alpha_t} x_t, \quad
      \tilde\beta_t = \frac{1 - \bar\alpha_{t-1}}{1 - \bar\alpha_t} \beta_t

    Args:
      schedule: tables of T steps.
      x0: clean images, (B, H, W, C), in [-1, 1].
      x_t: noisy images, shaped as `x0`.
      t: 0-based timesteps, (B,) int32, each in [0, T).

    Returns:
      the Gaussian: mean (B, H, W, C), log-variance (B, 1, 1, 1). At t = 0 the mean is `x0` and the true variance is
      0; its log is replaced by that of t = 1, as in the original code.

    Ho et al. 2020, eqs. 6 and 7.
    """
    x0, x_t = as_floats(x0, "x0"), as_floats(x_t, "x_t")
    chex.assert_equal_shape([x0, x_t])
    check_t(schedule, t, x0)
    return Gaussian(
        mean=at(schedule.posterior_mean_coef_x0, t, x0) * x0 + at(schedule.posterior_mean_coef_x_t, t, x0) * x_t,
        log_variance=at(schedule.posterior_log_variance_clipped, t, x0),
    )
