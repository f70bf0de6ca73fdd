r"""Training losses: L_simple (Ho et al. 2020, sec. 3.4), the variational bound, and L_hybrid."""

import typing

import chex
import jax
import jax.numpy as jnp
from jax import Array

from ddpm_jax import keys as per_image_keys
from ddpm_jax.bound import bound_term
from ddpm_jax.forward import as_floats, at, check_t, q_posterior, q_sample
from ddpm_jax.names import Cdf, Prediction, Variance, Weighting
from ddpm_jax.reverse import Predict, check_end, split_output
from ddpm_jax.schedules import Schedule


class LossInfo(typing.NamedTuple):
    """The values that a loss was computed from, for other terms and for diagnostics."""

    x_t: Array
    """The noisy images, (B, H, W, C)."""
    eps: Array
    """The noise in them, (B, H, W, C)."""
    output: Array
    """The network's output, (B, H, W, C or 2C)."""


def regression_target(schedule: Schedule, x0: Array, t: Array, eps: Array, *, prediction: Prediction) -> Array:
    r"""Returns the regression target of the network.

    ======  ========================================================================
    eps     :math:`\epsilon`
    x0      :math:`x_0`
    v       :math:`\sqrt{\bar\alpha_t}\,\epsilon - \sqrt{1 - \bar\alpha_t}\, x_0`
    mean    :math:`\tilde\mu_t(x_t, x_0)`, the posterior mean
    ======  ========================================================================

    Args:
      schedule: tables of T steps.
      x0: clean images, (B, H, W, C), in [-1, 1].
      t: 0-based timesteps, (B,) int32, each in [0, T).
      eps: the noise in x_t, shaped as `x0`.
      prediction: what the network predicts.

    Returns:
      the target, shaped as `x0`.

    Ho et al. 2020, sec. 3.2 and Table 2; Salimans & Ho 2022, app. D for v.
    """
    x0, eps = as_floats(x0, "x0"), as_floats(eps, "eps")
    chex.assert_equal_shape([x0, eps])
    check_t(schedule, t, x0)
    match prediction:
        case "eps":
            return eps
        case "x0":
            return x0
        case "v":
            return at(schedule.sqrt_alphas_bar, t, x0) * eps - at(schedule.sqrt_one_minus_alphas_bar, t, x0) * x0
        case "mean":
            return q_posterior(schedule, x0, q_sample(schedule, x0, t, eps), t).mean
    raise ValueError(f"unknown prediction {prediction!r}: choose eps, x0, v or mean")


def mean_squared_error(output: Array, target: Array) -> Array:
    """Computes the mean squared error of each image, (B,), from two (B, H, W, C) arrays."""
    output, target = as_floats(output, "the network's output"), as_floats(target, "the target")
    chex.assert_equal_shape([output, target])
    return jnp.mean((output - target) ** 2, axis=tuple(range(1, output.ndim)))


def snr(schedule: Schedule, t: Array) -> Array:
    r"""Returns the signal-to-noise ratio :math:`\bar\alpha_t / (1 - \bar\alpha_t)` at timesteps t: (B,) to (B,)."""
    check_t(schedule, t)
    return at(schedule.alphas_bar, t) / at(schedule.one_minus_alphas_bar, t)


def snr_weights(
    schedule: Schedule, t: Array, *, weighting: Weighting, prediction: Prediction, min_snr_gamma: float = 5.0
) -> Array:
    r"""Returns the weight of each image's loss for a given weighting of the error in x_0.

    =============  =============================================  ================================================
    weighting      weight of the squared error in x_0             source
    =============  =============================================  ================================================
    none           that of an unweighted error in the prediction  Ho et al. 2020, eq. 14
    min_snr        :math:`\min(\mathrm{SNR}_t, \gamma)`          Hang et al. 2023, sec. 3.4
    truncated_snr  :math:`\max(\mathrm{SNR}_t, 1)`               Salimans & Ho 2022, sec. 4
    =============  =============================================  ================================================

    An error in eps is :math:`\mathrm{SNR}_t^{1/2}` times that in x_0, one in v
    :math:`(\mathrm{SNR}_t + 1)^{1/2}` times, one in the mean :math:`c_{x_0}` times; the weights are divided by the
    squares of these.

    Args:
      schedule: tables of T steps.
      t: 0-based timesteps, (B,) int32, each in [0, T).
      weighting: the name of the weighting.
      prediction: what the network predicts: the squared error is that of the prediction.
      min_snr_gamma: :math:`\gamma > 0`, only for "min_snr".

    Returns:
      (B,) float32.

    Raises:
      ValueError: as `check_end`: the weight of eps is infinite where alphas_bar is 0.
    """
    ratio = snr(schedule, t)
    if weighting != "none":
        check_end(schedule, prediction, t)
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
            return weights / at(schedule.posterior_mean_coef_x0, t) ** 2
    raise ValueError(f"unknown prediction {prediction!r}: choose eps, x0, v or mean")


def diffuse_and_predict(keys: Array, schedule: Schedule, predict: Predict, x0: Array, t: Array) -> LossInfo:
    """Draws the noise, computes x_t and runs the network on it: the first lines of every loss.

    Args:
      keys: (B,) keys, one per image, from which its noise is drawn; or one key for the batch.
      schedule: tables of T steps.
      predict: the network.
      x0: clean images, (B, H, W, C), in [-1, 1].
      t: 0-based timesteps, (B,) int32, each in [0, T).

    Returns:
      x_t, the noise in it, and the network's output.

    Ho et al. 2020, Algorithm 1, lines 4 and 5.
    """
    chex.assert_shape(t, x0.shape[:1])
    # A barrier, so that XLA fuses what follows alike, and rounds it the same, in a step alone and in a loop of steps.
    eps = jax.lax.optimization_barrier(per_image_keys.normal(per_image_keys.for_batch(keys, x0), x0.shape[1:]))
    x_t = q_sample(schedule, x0, t, eps)
    return LossInfo(x_t, eps, predict(x_t, at(schedule.timesteps, t)))


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
    r"""Computes L_simple of each image at its timestep: the squared error of the predicted noise.

    .. math:: L_\mathrm{simple} = E_{t, x_0, \epsilon} \| \epsilon - \epsilon_\theta(x_t, t) \|^2

    The norm is a mean over the elements of the image, as in the original code. Other predictions have their own
    targets (see `regression_target`). The loss does not depend on the variance: it leaves a learned one untrained.

    Args:
      keys: (B,) keys, one per image, from which its noise is drawn; or one key for the batch.
      schedule: tables of T steps.
      predict: the network.
      x0: clean images, (B, H, W, C), in [-1, 1].
      t: 0-based timesteps, (B,) int32, each in [0, T); see `time_sampling`.
      prediction: what the network predicts.
      variance: the kind of variance; the half of the output for a learned one is ignored.

    Returns:
      the loss of each image, (B,), and the values it was computed from.

    Ho et al. 2020, eq. 14 and Algorithm 1.
    """
    info = diffuse_and_predict(keys, schedule, predict, x0, t)
    return simple_term(schedule, info, x0, t, prediction=prediction, variance=variance), info


def simple_term(
    schedule: Schedule, info: LossInfo, x0: Array, t: Array, *, prediction: Prediction, variance: Variance
) -> Array:
    """Computes the loss of `l_simple`, (B,), from an output of the network."""
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
    r"""Computes a one-sample estimate of the bound of each image, in bits/dim, without its constant prior term.

    .. math:: L_\mathrm{vlb} \approx T \cdot L_{t-1}(x_0), \quad t \sim \mathrm{Uniform}

    Its mean over uniform timesteps is the sum of the T terms. The predicted x_0 is not clipped, as in the original
    code's training.

    Args:
      keys: (B,) keys, one per image, from which its noise is drawn; or one key for the batch.
      schedule: tables of T steps.
      predict: the network.
      x0: clean images, (B, H, W, C), each pixel one of 256 levels in [-1, 1].
      t: 0-based timesteps, (B,) int32, each in [0, T).
      prediction: what the network predicts.
      variance: the variance of the reverse steps.
      cdf: see `bound.decoder_log_likelihood`.

    Returns:
      the loss of each image, (B,), and the values it was computed from.

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

    No gradient flows through the mean in the second term, which therefore trains only the variance.

    Args:
      keys: (B,) keys, one per image, from which its noise is drawn; or one key for the batch.
      schedule: tables of T steps.
      predict: the network, with an output of (B, H, W, 2C).
      x0: clean images, (B, H, W, C), each pixel one of 256 levels in [-1, 1].
      t: 0-based timesteps, (B,) int32, each in [0, T).
      prediction: what the first half of the network's output predicts.
      variance: what the second half is, "learned" or "learned_range".
      vlb_weight: lambda, the weight of the whole bound in bits/dim (T times the term of t).
      weights: (B,) weights of the first term, see `snr_weights`; 1 if None.
      cdf: see `bound.decoder_log_likelihood`.

    Returns:
      the loss of each image, (B,), and the values it was computed from.

    Nichol & Dhariwal 2021, eq. 16.
    """
    info = diffuse_and_predict(keys, schedule, predict, x0, t)
    simple = simple_term(schedule, info, x0, t, prediction=prediction, variance=variance)
    mean_output, variance_output = split_output(info.output, variance=variance)
    if variance_output is None:
        raise ValueError(f"L_hybrid needs a learned variance, not {variance}: it has nothing to train")
    held = jnp.concatenate([jax.lax.stop_gradient(mean_output), variance_output], axis=-1)
    term = bound_term(schedule, held, x0, info.x_t, t, prediction=prediction, variance=variance, clip_x0=False, cdf=cdf)
    simple = simple if weights is None else weights * simple
    return simple + vlb_weight * schedule.num_steps * term.bits, info
