r"""What the network is trained on: L_simple (Ho et al. 2020, sec. 3.4), the bound, and L_hybrid."""

import typing

import chex
import jax
import jax.numpy as jnp
from jax import Array

from ddpm_jax import keys as per_image_keys
from ddpm_jax.bound import Cdf, bound_term
from ddpm_jax.forward import per_image, q_posterior, q_sample
from ddpm_jax.reverse import Predict, Prediction, Variance, split_output
from ddpm_jax.schedules import Schedule

Weighting = typing.Literal["none", "min_snr", "truncated_snr"]
"""How the errors of different times are weighted against each other."""


class LossInfo(typing.NamedTuple):
    """What a loss was computed from, for other terms and for diagnostics."""

    x_t: Array
    """The diffused images, (B, H, W, C)."""
    eps: Array
    """The noise in them, (B, H, W, C)."""
    output: Array
    """What the network said of them, (B, H, W, C or 2C)."""


def regression_target(schedule: Schedule, x0: Array, t: Array, eps: Array, *, prediction: Prediction) -> Array:
    r"""Gives what the network should have said.

    ======  ========================================================================
    eps     :math:`\epsilon`
    x0      :math:`x_0`
    v       :math:`\sqrt{\bar\alpha_t}\,\epsilon - \sqrt{1 - \bar\alpha_t}\, x_0`
    mean    :math:`\tilde\mu_t(x_t, x_0)`, the posterior mean
    ======  ========================================================================

    Args:
      schedule: tables of T steps.
      x0: clean images, (B, H, W, C), in [-1, 1].
      t: 0-based times, (B,) int32, each in [0, T).
      eps: the noise in x_t, shaped as `x0`.
      prediction: what the network's output means.

    Returns:
      the target, shaped as `x0`.

    Ho et al. 2020, sec. 3.2 and Table 2; Salimans & Ho 2022, app. D for v.
    """
    chex.assert_rank(x0, 4)
    chex.assert_equal_shape([x0, eps])
    chex.assert_shape(t, x0.shape[:1])
    match prediction:
        case "eps":
            return eps
        case "x0":
            return x0
        case "v":
            scale, sigma = schedule.sqrt_alphas_bar[t], schedule.sqrt_one_minus_alphas_bar[t]
            return per_image(scale) * eps - per_image(sigma) * x0
        case "mean":
            return q_posterior(schedule, x0, q_sample(schedule, x0, t, eps), t).mean
    raise ValueError(f"unknown prediction {prediction!r}: choose eps, x0, v or mean")


def mean_squared_error(output: Array, target: Array) -> Array:
    """Averages the squared error over the elements of each image: (B, H, W, C) twice to (B,); shapes must agree."""
    chex.assert_rank(output, 4)
    chex.assert_equal_shape([output, target])
    return jnp.mean((output - target) ** 2, axis=(1, 2, 3))


def snr(schedule: Schedule, t: Array) -> Array:
    r"""Gives the signal-to-noise ratio :math:`\bar\alpha_t / (1 - \bar\alpha_t)` at times t: (B,) to (B,)."""
    return schedule.alphas_bar[t] / schedule.one_minus_alphas_bar[t]


def snr_weights(
    schedule: Schedule, t: Array, *, weighting: Weighting, prediction: Prediction, min_snr_gamma: float = 5.0
) -> Array:
    r"""Gives the weight of each image's loss, so that its error in x_0 counts by its signal-to-noise ratio.

    =============  =============================================  ================================================
    weighting      weight of the squared error in x_0             source
    =============  =============================================  ================================================
    none           that of the prediction's own error             Ho et al. 2020, eq. 14
    min_snr        :math:`\min(\mathrm{SNR}_t, \gamma)`          Hang et al. 2023, sec. 3.4
    truncated_snr  :math:`\max(\mathrm{SNR}_t, 1)`               Salimans & Ho 2022, sec. 4
    =============  =============================================  ================================================

    An error in eps is :math:`\mathrm{SNR}_t^{1/2}` times that in x_0, one in v
    :math:`(\mathrm{SNR}_t + 1)^{1/2}` times, one in the mean :math:`c_{x_0}` times; the weights are divided by the
    squares of these.

    Args:
      schedule: tables of T steps.
      t: 0-based times, (B,) int32, each in [0, T).
      weighting: which weights.
      prediction: in what the error is measured.
      min_snr_gamma: :math:`\gamma > 0`, of "min_snr" alone.

    Returns:
      (B,) float32.
    """
    ratio = snr(schedule, t)
    match weighting:
        case "none":
            return jnp.ones_like(ratio)
        case "min_snr":
            weights = jnp.minimum(ratio, min_snr_gamma)
        case "truncated_snr":
            weights = jnp.maximum(ratio, 1.0)
        case _:
            raise ValueError(f"unknown weighting {weighting!r}: choose none, min_snr or truncated_snr")
    match prediction:
        case "x0":
            return weights
        case "eps":
            return weights / ratio
        case "v":
            return weights / (ratio + 1)
        case "mean":
            return weights / schedule.posterior_mean_coef_x0[t] ** 2
    raise ValueError(f"unknown prediction {prediction!r}: choose eps, x0, v or mean")


def diffuse_and_predict(keys: Array, schedule: Schedule, predict: Predict, x0: Array, t: Array) -> LossInfo:
    """Does what every loss begins with: draws the noise, diffuses the images, asks the network.

    Args:
      keys: (B,) typed keys, one an image: its noise comes from it.
      schedule: tables of T steps.
      predict: the network.
      x0: clean images, (B, H, W, C), in [-1, 1].
      t: 0-based times, (B,) int32, each in [0, T).

    Returns:
      x_t, the noise in it, and what the network said.

    Ho et al. 2020, Algorithm 1, lines 4 and 5.
    """
    chex.assert_rank(x0, 4)
    chex.assert_shape([keys, t], x0.shape[:1])
    eps = per_image_keys.normal(keys, x0.shape[1:])
    x_t = q_sample(schedule, x0, t, eps)
    return LossInfo(x_t, eps, predict(x_t, schedule.timesteps[t]))


def l_simple(
    keys: Array,
    schedule: Schedule,
    predict: Predict,
    x0: Array,
    t: Array,
    *,
    prediction: Prediction = "eps",
    variance: Variance = "fixed_large",
) -> tuple[Array, LossInfo]:
    r"""Computes one draw of L_simple an image: how well the network tells the noise at time t.

    .. math:: L_\mathrm{simple} = E_{t, x_0, \epsilon} \| \epsilon - \epsilon_\theta(x_t, t) \|^2

    The norm is a mean over the elements of the image, as in the original code. For the other predictions the same
    with their own target (see `regression_target`). It says nothing of the variance: a learned one stays untrained.

    Args:
      keys: (B,) typed keys, one an image: its noise comes from it.
      schedule: tables of T steps.
      predict: the network.
      x0: clean images, (B, H, W, C), in [-1, 1].
      t: 0-based times, (B,) int32, each in [0, T): see `times`.
      prediction: what the network's output means.
      variance: whether the output has a second half for the variance, which is left out here.

    Returns:
      the loss of each image, (B,), and what it was computed from.

    Ho et al. 2020, eq. 14 and Algorithm 1.
    """
    info = diffuse_and_predict(keys, schedule, predict, x0, t)
    return simple_term(schedule, info, x0, t, prediction=prediction, variance=variance), info


def simple_term(
    schedule: Schedule, info: LossInfo, x0: Array, t: Array, *, prediction: Prediction, variance: Variance
) -> Array:
    """Computes the loss of `l_simple` from a prediction that is there already: (B,)."""
    mean_output, _ = split_output(info.output, variance=variance)
    return mean_squared_error(mean_output, regression_target(schedule, x0, t, info.eps, prediction=prediction))


def l_vlb(
    keys: Array,
    schedule: Schedule,
    predict: Predict,
    x0: Array,
    t: Array,
    *,
    prediction: Prediction = "eps",
    variance: Variance = "fixed_large",
    cdf: Cdf = "tanh",
) -> tuple[Array, LossInfo]:
    r"""Computes one draw of the bound an image, in bits/dim, but for its prior term, which has nothing to train.

    .. math:: L_\mathrm{vlb} \approx T \cdot L_{t-1}(x_0), \quad t \sim \mathrm{Uniform}

    Its mean over uniform times is the sum of the T terms. x_0 is not clipped, as in the original's training.

    Args:
      keys: (B,) typed keys, one an image: its noise comes from it.
      schedule: tables of T steps.
      predict: the network.
      x0: clean images, (B, H, W, C), each pixel one of 256 levels in [-1, 1].
      t: 0-based times, (B,) int32, each in [0, T).
      prediction: what the network's output means.
      variance: the variance of the reverse steps.
      cdf: see `bound.decoder_log_likelihood`.

    Returns:
      the loss of each image, (B,), and what it was computed from.

    Ho et al. 2020, eq. 5; Nichol & Dhariwal 2021, eq. 4.
    """
    info = diffuse_and_predict(keys, schedule, predict, x0, t)
    term = bound_term(
        schedule, info.output, x0, info.x_t, t, prediction=prediction, variance=variance, clip_x0=False, cdf=cdf
    )
    return schedule.num_steps * term.bits, info


def l_hybrid(
    keys: Array,
    schedule: Schedule,
    predict: Predict,
    x0: Array,
    t: Array,
    *,
    prediction: Prediction = "eps",
    variance: Variance = "learned_range",
    vlb_weight: float = 0.001,
    weights: Array | None = None,
    cdf: Cdf = "tanh",
) -> tuple[Array, LossInfo]:
    r"""Computes L_simple for the mean and the bound for the variance.

    .. math:: L_\mathrm{hybrid} = L_\mathrm{simple} + \lambda L_\mathrm{vlb}

    In the second term the mean is held fixed: it trains the variance alone.

    Args:
      keys: (B,) typed keys, one an image: its noise comes from it.
      schedule: tables of T steps.
      predict: the network, with an output of (B, H, W, 2C).
      x0: clean images, (B, H, W, C), each pixel one of 256 levels in [-1, 1].
      t: 0-based times, (B,) int32, each in [0, T).
      prediction: what the first half of the network's output means.
      variance: what its second half means, "learned" or "learned_range".
      vlb_weight: lambda, the weight of the whole bound in bits/dim (T times the term of t).
      weights: (B,) of the first term alone, see `snr_weights`; 1 if not given.
      cdf: see `bound.decoder_log_likelihood`.

    Returns:
      the loss of each image, (B,), and what it was computed from.

    Nichol & Dhariwal 2021, eq. 16.
    """
    info = diffuse_and_predict(keys, schedule, predict, x0, t)
    simple = simple_term(schedule, info, x0, t, prediction=prediction, variance=variance)
    mean_output, variance_output = split_output(info.output, variance=variance)
    if variance_output is None:
        raise ValueError(f"L_hybrid trains a learned variance, and {variance} has nothing to train")
    held = jnp.concatenate([jax.lax.stop_gradient(mean_output), variance_output], axis=-1)
    term = bound_term(schedule, held, x0, info.x_t, t, prediction=prediction, variance=variance, clip_x0=False, cdf=cdf)
    simple = simple if weights is None else weights * simple
    return simple + vlb_weight * schedule.num_steps * term.bits, info
