"""The engine of the multistep solvers: steps that are weighted sums of images, predictions and noise."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddpm_jax.forward import as_floats
from ddpm_jax.names import Prediction, Variance
from ddpm_jax.reverse import Clip, Predict, clip, predict_x0, split_output
from ddpm_jax.samplers.chain import Chain, ChainInfo, Sampler, step_noise
from ddpm_jax.samplers.respacing import check_prediction
from ddpm_jax.schedules import Schedule, exact_log_alphas


class Path(typing.NamedTuple):
    """The N + 1 noise levels of a chain of N steps, from noise to clean image: (N + 1,) float64 each."""

    alpha: np.ndarray
    r""":math:`\alpha = \sqrt{\bar\alpha}`; 1 at the end."""
    sigma: np.ndarray
    r""":math:`\sigma = \sqrt{1 - \bar\alpha}`; 0 at the end."""
    log_ratio: np.ndarray
    r""":math:`\lambda = \log(\alpha / \sigma)`, increasing; infinite at the end."""


class Combination(typing.NamedTuple):
    """Weights of the sums that take x from step k to step k + 1, float64; row k is for step k."""

    x: np.ndarray
    """(N,) weights of the images."""
    x0: np.ndarray
    """(N, n) weights of the x0 predicted at steps k, k - 1, .., k - n + 1; 0 for steps before the first."""
    noise: np.ndarray
    """(N,) weights of standard normal noise."""


class Correction(typing.NamedTuple):
    """Weights of the sums that correct the images of step k once x0 is predicted from them, float64."""

    x: np.ndarray
    """(N,) weights of the images before the correction: 1 at the first step, which needs none, and 0 after it."""
    x_before: np.ndarray
    """(N,) weights of the corrected images of the previous step."""
    x0: np.ndarray
    """(N, n) weights of the x0 predicted at steps k, k - 1, .., k - n + 1."""


def path(schedule: Schedule) -> Path:
    r"""Computes the noise levels of a chain from its schedule, in float64.

    Args:
      schedule: tables of N steps; not traced.

    Returns:
      the `Path`. Where :math:`\bar\alpha` is 0, 1e-24 is used instead, so that :math:`\lambda` is finite.

    Raises:
      TypeError: the schedule is traced.
    """
    log_alphas_bar = np.maximum(np.cumsum(exact_log_alphas(schedule)), np.log(1e-24))[::-1]
    one_minus_alphas_bar = -np.expm1(log_alphas_bar)
    log_ratio = 0.5 * (log_alphas_bar - np.log(one_minus_alphas_bar))
    return Path(
        np.append(np.exp(0.5 * log_alphas_bar), 1.0),
        np.append(np.sqrt(one_minus_alphas_bar), 0.0),
        np.append(log_ratio, np.inf),
    )


class _Memory(typing.NamedTuple):
    x: Array
    """(B, H, W, C) the corrected images of the previous step."""
    x0: Array
    """(n, B, H, W, C) the x0 predicted at the previous steps, the latest first."""


def _weighted(weights: Array, images: Array) -> Array:
    return jnp.tensordot(weights, images, axes=1)


def multistep(
    schedule: Schedule,
    predict: Predict,
    combination: Combination,
    *,
    correction: Correction | None = None,
    prediction: Prediction,
    variance: Variance,
    clip_x0: Clip,
) -> Sampler:
    """Makes a sampler whose steps are given weighted sums.

    Args:
      schedule: tables of the chain's N steps; not traced.
      predict: the network.
      combination: the weights of each step.
      correction: the weights of each step's correction; None for a solver without.
      prediction: what the network predicts; "mean" only on a schedule that skips no timesteps.
      variance: the kind of variance; the half of the output for a learned one is ignored.
      clip_x0: whether and how the predicted clean image is clipped at each step, see `reverse.clip`.

    Returns:
      a `Sampler` of N steps.

    Raises:
      ValueError: the prediction is "mean" and the schedule skips timesteps.
    """
    check_prediction(schedule, prediction)
    remembered = combination.x0.shape[1] - 1 if correction is None else correction.x0.shape[1] - 1
    draws = bool(combination.noise.any())

    def init(x: Array) -> Chain:
        # Not `jnp.zeros` of a shape: they lie on the devices where x lies.
        zeros = jnp.zeros_like(x, as_floats(x, "x_T").dtype)
        return Chain(x, _Memory(zeros, jnp.broadcast_to(zeros, (remembered, *x.shape))))

    def step(keys: Array, state: Chain, k: Array) -> tuple[Chain, ChainInfo]:
        time = schedule.num_steps - 1 - k
        t = jnp.full(state.x.shape[:1], time, jnp.int32)
        output, _ = split_output(predict(state.x, schedule.timesteps[t]), variance=variance)
        x0 = predict_x0(schedule, output, state.x, t, prediction=prediction)
        x0 = clip(x0, clip_x0)
        weights, mend = jax.tree.map(lambda table: jnp.asarray(table)[k], (combination, correction))
        x, x0s = as_floats(state.x, "x_T"), jnp.concatenate([x0[None], state.memory.x0])
        if mend is not None:
            x = mend.x * x + mend.x_before * state.memory.x + _weighted(mend.x0, x0s)
        memory = _Memory(x, x0s[:remembered])
        x = weights.x * x + _weighted(weights.x0, x0s[: weights.x0.shape[0]])
        if draws:
            x = x + weights.noise * step_noise(keys, time, x.shape[1:])
        return Chain(x.astype(state.x.dtype), memory), ChainInfo(time, state.x, x0)

    return Sampler(schedule.num_steps, np.arange(schedule.num_steps)[::-1], init, step)
