r"""The forward process q, which turns data into noise (Ho et al. 2020, sec. 2)."""

import typing

import chex
from jax import Array

from ddpm_jax.schedules import Schedule


class Gaussian(typing.NamedTuple):
    """A diagonal Gaussian over images: each field broadcasts against (B, H, W, C)."""

    mean: Array
    log_variance: Array


def per_image(values: Array) -> Array:
    """Reshapes one number per image, (B,), to (B, 1, 1, 1), so that it broadcasts over the images."""
    chex.assert_rank(values, 1)
    return values[:, None, None, None]


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
    chex.assert_rank(x_prev, 4)
    chex.assert_equal_shape([x_prev, eps])
    chex.assert_shape(t, x_prev.shape[:1])
    return per_image(schedule.alphas[t] ** 0.5) * x_prev + per_image(schedule.betas[t] ** 0.5) * eps


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
    chex.assert_rank(x0, 4)
    chex.assert_shape(t, x0.shape[:1])
    return Gaussian(
        mean=per_image(schedule.sqrt_alphas_bar[t]) * x0, log_variance=per_image(schedule.log_one_minus_alphas_bar[t])
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
    chex.assert_rank(x0, 4)
    chex.assert_equal_shape([x0, eps])
    chex.assert_shape(t, x0.shape[:1])
    scale, sigma = schedule.sqrt_alphas_bar[t], schedule.sqrt_one_minus_alphas_bar[t]
    return per_image(scale) * x0 + per_image(sigma) * eps


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
    chex.assert_rank(x0, 4)
    chex.assert_equal_shape([x0, x_t])
    chex.assert_shape(t, x0.shape[:1])
    return Gaussian(
        mean=per_image(schedule.posterior_mean_coef_x0[t]) * x0 + per_image(schedule.posterior_mean_coef_x_t[t]) * x_t,
        log_variance=per_image(schedule.posterior_log_variance_clipped[t]),
    )
