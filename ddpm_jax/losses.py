r"""What the network is trained on (Ho et al. 2020, sec. 3): Algorithm 1 and the loss L_simple."""

import typing

import chex
import jax.numpy as jnp
from jax import Array

from ddpm_jax import keys as per_image_keys
from ddpm_jax.forward import per_image, q_posterior, q_sample
from ddpm_jax.reverse import Predict, Prediction
from ddpm_jax.schedules import Schedule


class LossInfo(typing.NamedTuple):
    """What a loss was computed from, for other terms and for diagnostics."""

    x_t: Array
    """The diffused images, (B, H, W, C)."""
    eps: Array
    """The noise in them, (B, H, W, C)."""
    output: Array
    """What the network said of them, (B, H, W, C)."""


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


def l_simple(
    keys: Array, schedule: Schedule, predict: Predict, x0: Array, t: Array, *, prediction: Prediction = "eps"
) -> tuple[Array, LossInfo]:
    r"""Computes one draw of L_simple an image: how well the network tells the noise at time t.

    .. math:: L_\mathrm{simple} = E_{t, x_0, \epsilon} \| \epsilon - \epsilon_\theta(x_t, t) \|^2

    The norm is a mean over the elements of the image, as in the original code. For the other predictions the same
    with their own target (see `regression_target`).

    Args:
      keys: (B,) typed keys, one an image: its noise comes from it.
      schedule: tables of T steps.
      predict: the network.
      x0: clean images, (B, H, W, C), in [-1, 1].
      t: 0-based times, (B,) int32, each in [0, T): see `times`.
      prediction: what the network's output means.

    Returns:
      the loss of each image, (B,), and what it was computed from.

    Ho et al. 2020, eq. 14 and Algorithm 1.
    """
    chex.assert_rank(x0, 4)
    chex.assert_shape([keys, t], x0.shape[:1])
    eps = per_image_keys.normal(keys, x0.shape[1:])
    x_t = q_sample(schedule, x0, t, eps)
    output = predict(x_t, schedule.times[t])
    target = regression_target(schedule, x0, t, eps, prediction=prediction)
    return mean_squared_error(output, target), LossInfo(x_t, eps, output)
