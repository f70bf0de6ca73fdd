r"""The reverse process p_theta, which turns noise into data (Ho et al. 2020, sec. 3)."""

import typing
from collections.abc import Callable

import chex
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddpm_jax.forward import as_floats, at, check_t, per_image, q_posterior
from ddpm_jax.names import Prediction, Variance
from ddpm_jax.schedules import Schedule, concrete

Predict = Callable[[Array, Array], Array]
"""A network as the mathematics sees it: `predict(x_t, timesteps)`, (B, H, W, C) and (B,) to (B, H, W, C or 2C)."""

LEARNED_VARIANCES = ("learned", "learned_range")


class DynamicThreshold(typing.NamedTuple):
    """Clips each predicted clean image to a range of its own, and scales it into [-1, 1]: see `clip`."""

    quantile: float = 0.995
    """Fraction of the pixels' magnitudes, in (0, 1), that stays within the range."""


Clip = bool | DynamicThreshold
"""Whether the predicted clean image is clipped to [-1, 1], or to a threshold that follows it."""


class Reverse(typing.NamedTuple):
    """p(x_{t-1} | x_t): a diagonal Gaussian, and the predicted clean image behind its mean."""

    mean: Array
    log_variance: Array
    x0: Array


def check_end(schedule: Schedule, prediction: Prediction, t: Array | None = None) -> None:
    """Checks that x_0 can be computed from what the network predicts: it is divided by its weight in it.

    Args:
      schedule: tables of T steps; nothing is checked if they are traced.
      prediction: what the network predicts.
      t: the timesteps to look at; all if None, or if they are traced.

    Raises:
      ValueError: the prediction does not depend on x_0 at a timestep, as eps where alphas_bar is 0.
    """
    weights = {"eps": schedule.sqrt_alphas_bar, "mean": schedule.posterior_mean_coef_x0}.get(prediction)
    known = None if weights is None else concrete(weights)
    if known is None:
        return
    timesteps = None if t is None else concrete(t)
    if (known if timesteps is None else known[timesteps]).min(initial=1) < np.finfo(np.float32).tiny:
        raise ValueError(
            f"prediction {prediction!r} cannot tell x_0 at the last step of this schedule, where alphas_bar is 0: use "
            "'v' or 'x0', or smaller betas"
        )


def clip(x0: Array, clip_x0: Clip) -> Array:
    r"""Clips a predicted clean image.

    .. math:: \hat x_0 \leftarrow \mathrm{clip}(\hat x_0, -s, s) / s, \quad s = \max(1, q_p(|\hat x_0|))

    s is 1 in static clipping; in dynamic thresholding it follows the p-quantile of the magnitudes of each image, so
    that large guidance scales do not saturate its pixels.

    Args:
      x0: (B, H, W, C).
      clip_x0: True, False, or a `DynamicThreshold`.

    Returns:
      an array of the same shape; `x0` itself if `clip_x0` is False.

    Ho et al. 2020, its code; Saharia et al. 2022 (Imagen), sec. 2.3.

    >>> clip(jnp.array([[[[0.5], [2.0], [-3.0]]]]), DynamicThreshold(0.5)).ravel()
    Array([ 0.25,  1.  , -1.  ], dtype=float32)
    """
    if not isinstance(clip_x0, DynamicThreshold):
        return jnp.clip(x0, -1, 1) if clip_x0 else x0
    magnitudes = jnp.abs(x0.reshape(len(x0), -1))
    largest = jnp.maximum(1, jnp.quantile(magnitudes, jnp.float32(clip_x0.quantile), axis=1))
    largest = per_image(largest, x0)
    return jnp.clip(x0, -largest, largest) / largest


def predict_x0(schedule: Schedule, output: Array, x_t: Array, t: Array, *, prediction: Prediction) -> Array:
    r"""Computes the clean image from the network's output.

    .. math::
      x_0 = \frac{x_t - \sqrt{1-\bar\alpha_t}\,\epsilon}{\sqrt{\bar\alpha_t}}
          = \sqrt{\bar\alpha_t}\, x_t - \sqrt{1-\bar\alpha_t}\, v
          = \frac{\tilde\mu_t - c_{x_t} x_t}{c_{x_0}}

    Args:
      schedule: tables of T steps.
      output: the network's prediction, (B, H, W, C).
      x_t: the network's input, shaped as `output`.
      t: 0-based timesteps, (B,) int32, each in [0, T).
      prediction: what `output` is.

    Returns:
      x0, shaped as `output`; not clipped.

    Raises:
      ValueError: as `check_end`.

    Ho et al. 2020, eq. 15 for eps; Salimans & Ho 2022, app. D for v.
    """
    output, x_t = as_floats(output, "the network's output"), as_floats(x_t, "x_t")
    chex.assert_equal_shape([output, x_t])
    check_t(schedule, t, x_t)
    check_end(schedule, prediction, t)
    match prediction:
        case "x0":
            return output
        case "eps":
            coef_x_t, coef_eps = schedule.sqrt_recip_alphas_bar, schedule.sqrt_recip_alphas_bar_minus_one
            return at(coef_x_t, t, x_t) * x_t - at(coef_eps, t, x_t) * output
        case "v":
            return at(schedule.sqrt_alphas_bar, t, x_t) * x_t - at(schedule.sqrt_one_minus_alphas_bar, t, x_t) * output
        case "mean":
            coef_x0, coef_x_t = schedule.posterior_mean_coef_x0, schedule.posterior_mean_coef_x_t
            return (output - at(coef_x_t, t, x_t) * x_t) / at(coef_x0, t, x_t)
    raise ValueError(f"unknown prediction {prediction!r}: choose eps, x0, v or mean")


def from_x0(schedule: Schedule, x0: Array, x_t: Array, t: Array, *, target: Prediction) -> Array:
    r"""Converts x_0 to another parameterization: the inverse of `predict_x0`.

    .. math::
      \epsilon = \frac{x_t - \sqrt{\bar\alpha_t}\, x_0}{\sqrt{1-\bar\alpha_t}}, \quad
      v = \frac{\sqrt{\bar\alpha_t}\, x_t - x_0}{\sqrt{1-\bar\alpha_t}}, \quad
      \tilde\mu_t = c_{x_0} x_0 + c_{x_t} x_t

    Args:
      schedule: tables of T steps.
      x0: clean images, (B, H, W, C).
      x_t: noisy images, shaped as `x0`.
      t: 0-based timesteps, (B,) int32, each in [0, T).
      target: what to return.

    Returns:
      the target, shaped as `x0`.

    Ho et al. 2020, eqs. 4 and 7; Salimans & Ho 2022, app. D for v.
    """
    x0, x_t = as_floats(x0, "x0"), as_floats(x_t, "x_t")
    chex.assert_equal_shape([x0, x_t])
    check_t(schedule, t, x_t)
    sqrt_alphas_bar = at(schedule.sqrt_alphas_bar, t, x_t)
    sigma = at(schedule.sqrt_one_minus_alphas_bar, t, x_t)
    match target:
        case "x0":
            return x0
        case "eps":
            return (x_t - sqrt_alphas_bar * x0) / sigma
        case "v":
            return (sqrt_alphas_bar * x_t - x0) / sigma
        case "mean":
            return q_posterior(schedule, x0, x_t, t).mean
    raise ValueError(f"unknown prediction {target!r}: choose eps, x0, v or mean")


def convert(
    schedule: Schedule, output: Array, x_t: Array, t: Array, *, prediction: Prediction, target: Prediction
) -> Array:
    """Converts the network's output to another parameterization.

    Args:
      schedule: tables of T steps.
      output: the network's prediction, (B, H, W, C).
      x_t: the network's input, shaped as `output`.
      t: 0-based timesteps, (B,) int32, each in [0, T).
      prediction: what `output` is.
      target: what to return.

    Returns:
      the target, shaped as `output`; `output` itself if the two are the same.

    Ho et al. 2020, sec. 3.2.
    """
    if prediction == target:
        return as_floats(output, "the network's output")
    return from_x0(schedule, predict_x0(schedule, output, x_t, t, prediction=prediction), x_t, t, target=target)


def predict_eps(schedule: Schedule, output: Array, x_t: Array, t: Array, *, prediction: Prediction) -> Array:
    """Computes the noise from the network's output: `convert` to "eps"."""
    return convert(schedule, output, x_t, t, prediction=prediction, target="eps")


def predict_v(schedule: Schedule, output: Array, x_t: Array, t: Array, *, prediction: Prediction) -> Array:
    """Computes v from the network's output: `convert` to "v"."""
    return convert(schedule, output, x_t, t, prediction=prediction, target="v")


def predict_mean(schedule: Schedule, output: Array, x_t: Array, t: Array, *, prediction: Prediction) -> Array:
    """Computes the mean of x_{t-1} from the network's output: `convert` to "mean"."""
    return convert(schedule, output, x_t, t, prediction=prediction, target="mean")


def split_output(output: Array, *, variance: Variance) -> tuple[Array, Array | None]:
    """Splits the network's output into the half for the mean and the half for the variance.

    Args:
      output: (B, H, W, C) for a fixed variance; (B, H, W, 2C) for a learned one, the mean's half first.
      variance: the kind of variance.

    Returns:
      the mean's half and the variance's half, (B, H, W, C) each; None for a fixed variance.

    Raises:
      ValueError: the variance is learned and the number of channels is odd.
    """
    if variance not in LEARNED_VARIANCES:
        return output, None
    if output.shape[-1] % 2:
        raise ValueError(f"{variance} variance needs 2C output channels, not {output.shape[-1]}")
    mean_output, variance_output = jnp.split(output, 2, axis=-1)
    return mean_output, variance_output


def model_log_variance(
    schedule: Schedule, variance_output: Array | None, x_t: Array, t: Array, *, variance: Variance
) -> Array:
    r"""Returns the log-variance of p(x_{t-1} | x_t).

    ==============  =====================================================================================
    fixed_small     :math:`\log\tilde\beta_t`, optimal for data that is one point
    fixed_large     :math:`\log\beta_t`, optimal for data that is N(0, I)
    learned         the second half of the network's output, as it is
    learned_range   :math:`f \log\beta_t + (1-f)\log\tilde\beta_t`, :math:`f = (v+1)/2`, v the second half
    ==============  =====================================================================================

    At t = 0 both fixed tables have :math:`\log\tilde\beta_1`, as in the original code; f is not clamped.

    Args:
      schedule: tables of T steps.
      variance_output: the second half of the output, (B, H, W, C); None for a fixed variance.
      x_t: noisy images, (B, H, W, C).
      t: 0-based timesteps, (B,) int32, each in [0, T).
      variance: the kind of variance.

    Returns:
      (B, 1, 1, 1) for a fixed variance, (B, H, W, C) for a learned one.

    Ho et al. 2020, sec. 3.2; learned_range: Nichol & Dhariwal 2021, eq. 15.
    """
    check_t(schedule, t, x_t)
    match variance:
        case "fixed_small":
            return at(schedule.posterior_log_variance_clipped, t, x_t)
        case "fixed_large":
            return at(schedule.fixed_large_log_variance, t, x_t)
        case "learned" | "learned_range" if variance_output is None:
            raise ValueError(f"{variance} variance needs the network's second half")
        case "learned":
            return as_floats(variance_output, "the network's output")
        case "learned_range":
            fraction = (as_floats(variance_output, "the network's output") + 1) / 2
            largest, smallest = schedule.log_betas, schedule.posterior_log_variance_clipped
            return fraction * at(largest, t, x_t) + (1 - fraction) * at(smallest, t, x_t)
    raise ValueError(f"unknown variance {variance!r}: choose fixed_small, fixed_large, learned or learned_range")


def p_mean_variance(
    schedule: Schedule,
    output: Array,
    x_t: Array,
    t: Array,
    *,
    prediction: Prediction = "eps",
    variance: Variance = "fixed_large",
    clip_x0: Clip = True,
) -> Reverse:
    r"""Returns the model's distribution of x_{t-1} given x_t.

    .. math:: p_\theta(x_{t-1} | x_t) = \mathcal N(\tilde\mu_t(x_t, \hat x_0), \sigma_t^2 I)

    Without clipping the mean is that of the paper's Algorithm 2. The original code clips :math:`\hat x_0` to [-1, 1]
    before computing the mean, which the paper does not mention and without which samples are worse.

    Args:
      schedule: tables of T steps.
      output: the network's output, (B, H, W, C), or (B, H, W, 2C) for a learned variance.
      x_t: noisy images, (B, H, W, C).
      t: 0-based timesteps, (B,) int32, each in [0, T).
      prediction: what `output` (its first half) is.
      variance: the kind of variance.
      clip_x0: whether and how to clip :math:`\hat x_0`, see `clip`. With prediction "mean" the network's mean is used
        as it is, and only the reported x0 is clipped, as in the original code.

    Returns:
      the Gaussian, and the predicted x0 behind its mean.

    Ho et al. 2020, eqs. 1, 7, 11 and 15, and its code.
    """
    mean_output, variance_output = split_output(output, variance=variance)
    x0 = predict_x0(schedule, mean_output, x_t, t, prediction=prediction)
    x0 = clip(x0, clip_x0)
    mean = as_floats(mean_output, "mean") if prediction == "mean" else q_posterior(schedule, x0, x_t, t).mean
    return Reverse(mean, model_log_variance(schedule, variance_output, x_t, t, variance=variance), x0)


def p_sample(reverse: Reverse, t: Array, z: Array) -> Array:
    r"""Computes x_{t-1} from p(x_{t-1} | x_t) and noise: one step of Algorithm 2.

    .. math:: x_{t-1} = \mu_\theta(x_t, t) + \sigma_t z, \quad z = 0 \text{ at the last step}

    Args:
      reverse: p(x_{t-1} | x_t), of (B, H, W, C).
      t: 0-based timesteps, (B,) int32; no noise is added where t is 0.
      z: standard normal noise, (B, H, W, C).

    Returns:
      x_{t-1}, (B, H, W, C).

    Ho et al. 2020, Algorithm 2, line 4.
    """
    chex.assert_equal_shape([reverse.mean, z])
    if jnp.ndim(t):
        chex.assert_shape(t, z.shape[:1])
    sigma = jnp.exp(0.5 * reverse.log_variance)
    return reverse.mean + jnp.where(per_image(jnp.asarray(t), z) > 0, sigma, jnp.zeros_like(sigma)) * z
