r"""Multistep solvers of the probability-flow ODE and of the reverse SDE: good images in 5 to 20 steps.

With :math:`\alpha = \sqrt{\bar\alpha}`, :math:`\sigma = \sqrt{1 - \bar\alpha}` and half the logarithm of the ratio of
signal to noise, :math:`\lambda = \log(\alpha / \sigma)`, the ODE of the diffusion has the exact solution

.. math:: x_t = \frac{\sigma_t}{\sigma_s} x_s
                + \sigma_t \int_{\lambda_s}^{\lambda_t} e^\lambda\, \hat x_0(x_\lambda, \lambda)\, d\lambda

(Lu et al. 2022, DPM-Solver++, eq. 9). A multistep solver puts under the integral a polynomial through the predictions
of the last steps, so that each step costs one evaluation of the network. All that depends on the schedule is worked
out in float64 when the sampler is made; a step is a weighted sum of a few images.

>>> from ddpm_jax.respacing import evenly_spaced_in_log_snr, respace
>>> from ddpm_jax.schedules import make_betas
>>> betas = make_betas("linear", 1000)
>>> schedule = respace(betas, evenly_spaced_in_log_snr(betas, 10))
>>> nothing = lambda x_t, t: jnp.zeros_like(x_t)                         # a network that sees no noise
>>> sample(jax.random.key(0), dpm_solver_pp_2m(schedule, nothing), (2, 4, 4, 1)).shape
(2, 4, 4, 1)
"""

import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddpm_jax.respacing import check_prediction
from ddpm_jax.reverse import Predict, Prediction, Variance, predict_x0, split_output
from ddpm_jax.samplers import Chain, Sampler, StepInfo, step_noise
from ddpm_jax.schedules import Schedule


class Path(typing.NamedTuple):
    """The N + 1 places that a chain of N steps passes, from the noise to the clean image: (N + 1,) float64 each."""

    alpha: np.ndarray
    r""":math:`\alpha = \sqrt{\bar\alpha}`; 1 at the end."""
    sigma: np.ndarray
    r""":math:`\sigma = \sqrt{1 - \bar\alpha}`; 0 at the end."""
    log_ratio: np.ndarray
    r""":math:`\lambda = \log(\alpha / \sigma)`, rising; infinite at the end."""


class Combination(typing.NamedTuple):
    """Weights of the weighted sums that take x from step k to step k + 1; row k is step k's, float64."""

    x: np.ndarray
    """(N,) of the images."""
    x0: np.ndarray
    """(N, n) of the clean images predicted at steps k, k - 1, .., k - n + 1; 0 for a step before the first."""
    noise: np.ndarray
    """(N,) of standard normal noise."""


class Correction(typing.NamedTuple):
    """Weights of the weighted sums that mend the images of step k once x0 is predicted from them, float64."""

    x: np.ndarray
    """(N,) of the images to be mended; 1 at the first step, which has nothing to mend, and 0 after it."""
    x_before: np.ndarray
    """(N,) of the images of the step before, mended."""
    x0: np.ndarray
    """(N, n) of the clean images predicted at steps k, k - 1, .., k - n + 1."""


def path(schedule: Schedule) -> Path:
    r"""Reads the places that a chain passes out of its schedule.

    Args:
      schedule: tables of N steps; not traced.

    Returns:
      the `Path`. Where :math:`\bar\alpha` is 0 it counts as 1e-24, so that :math:`\lambda` is finite.
    """
    alphas_bar = np.maximum(np.asarray(schedule.alphas_bar, np.float64), 1e-24)[::-1]
    one_minus_alphas_bar = np.asarray(schedule.one_minus_alphas_bar, np.float64)[::-1]
    log_ratio = 0.5 * (np.log(alphas_bar) - np.log(one_minus_alphas_bar))
    return Path(
        np.append(np.sqrt(alphas_bar), 1.0), np.append(np.sqrt(one_minus_alphas_bar), 0.0), np.append(log_ratio, np.inf)
    )


class _Memory(typing.NamedTuple):
    x: Array
    """(B, H, W, C) the images of the step before, mended."""
    x0: Array
    """(n, B, H, W, C) the clean images predicted at the steps before, the latest first."""


def _weighted(weights: Array, images: Array) -> Array:
    return jnp.tensordot(weights, images, axes=1)


def _multistep(
    schedule: Schedule,
    predict: Predict,
    combination: Combination,
    *,
    correction: Correction | None = None,
    prediction: Prediction,
    variance: Variance,
    clip_x0: bool,
) -> Sampler:
    """Makes the sampler whose steps are the given weighted sums."""
    check_prediction(schedule, prediction)
    remembered = combination.x0.shape[1] - 1 if correction is None else correction.x0.shape[1] - 1
    draws = bool(combination.noise.any())

    def init(x: Array) -> Chain:
        return Chain(x, _Memory(jnp.zeros_like(x), jnp.zeros((remembered, *x.shape), x.dtype)))

    def step(keys: Array, state: Chain, k: Array) -> tuple[Chain, StepInfo]:
        time = schedule.num_steps - 1 - k
        t = jnp.full(state.x.shape[:1], time, jnp.int32)
        output, _ = split_output(predict(state.x, schedule.times[t]), variance=variance)
        x0 = predict_x0(schedule, output, state.x, t, prediction=prediction)
        if clip_x0:
            x0 = jnp.clip(x0, -1, 1)
        weights, mend = jax.tree.map(lambda table: jnp.asarray(table)[k], (combination, correction))
        x, x0s = state.x, jnp.concatenate([x0[None], state.memory.x0])
        if mend is not None:
            x = mend.x * x + mend.x_before * state.memory.x + _weighted(mend.x0, x0s)
        memory = _Memory(x, x0s[:remembered])
        x = weights.x * x + _weighted(weights.x0, x0s[: weights.x0.shape[0]])
        if draws:
            x = x + weights.noise * step_noise(keys, time, x.shape[1:])
        return Chain(x, memory), StepInfo(time, state.x, x0)

    return Sampler(schedule.num_steps, np.arange(schedule.num_steps)[::-1], init, step)


def _second_order(x0_weight: np.ndarray, log_ratio: np.ndarray) -> np.ndarray:
    """Shares the weight of x0 between this step's and, for the slope of x0, that of the step before: (N, 2)."""
    h = np.diff(log_ratio)
    slope = np.zeros_like(h)
    # Of first order: the first step, which remembers nothing, and the last, over an infinite h.
    slope[1:-1] = 0.5 * h[1:-1] / h[:-2]
    return x0_weight[:, None] * np.stack([1 + slope, -slope], axis=1)


def dpm_solver_pp_2m(
    schedule: Schedule,
    predict: Predict,
    *,
    prediction: Prediction = "eps",
    variance: Variance = "fixed_large",
    clip_x0: bool = True,
) -> Sampler:
    r"""Makes the multistep DPM-Solver++ of second order, which is deterministic.

    .. math::
      x_t &= \frac{\sigma_t}{\sigma_s} x_s - \alpha_t (e^{-h} - 1) D, \quad h = \lambda_t - \lambda_s \\
      D &= \left(1 + \frac{h}{2 h_{prev}}\right) \hat x_0 - \frac{h}{2 h_{prev}} \hat x_0^{prev}

    The first step and the last are of first order (D is :math:`\hat x_0`), as DDIM is.

    Args:
      schedule: tables of the chain's steps (`respacing.respace`); not traced.
      predict: the network.
      prediction: what the network's output means; "mean" only on a schedule of all times.
      variance: tells whether the output has a second half; it is not used.
      clip_x0: whether the predicted clean image is clipped to [-1, 1] at every step.

    Returns:
      a `Sampler` of as many steps as the schedule has.

    Raises:
      ValueError: "mean" is predicted on a schedule that skips times.

    Lu et al. 2022 (DPM-Solver++), Algorithm 2.
    """
    alpha, sigma, log_ratio = path(schedule)
    combination = Combination(
        x=sigma[1:] / sigma[:-1],
        x0=_second_order(-alpha[1:] * np.expm1(-np.diff(log_ratio)), log_ratio),
        noise=np.zeros(schedule.num_steps),
    )
    return _multistep(schedule, predict, combination, prediction=prediction, variance=variance, clip_x0=clip_x0)


def dpm_solver_pp_2m_sde(
    schedule: Schedule,
    predict: Predict,
    *,
    prediction: Prediction = "eps",
    variance: Variance = "fixed_large",
    clip_x0: bool = True,
) -> Sampler:
    r"""Makes the SDE form of the multistep DPM-Solver++ of second order, which draws noise at every step but the last.

    .. math::
      x_t = \frac{\sigma_t}{\sigma_s} e^{-h} x_s + \alpha_t (1 - e^{-2h}) D + \sigma_t \sqrt{1 - e^{-2h}}\, z

    with h and D of `dpm_solver_pp_2m`. Its first-order form is the ancestral chain with variance "fixed_small".

    Args:
      schedule: tables of the chain's steps (`respacing.respace`); not traced.
      predict: the network.
      prediction: what the network's output means; "mean" only on a schedule of all times.
      variance: tells whether the output has a second half; it is not used.
      clip_x0: whether the predicted clean image is clipped to [-1, 1] at every step.

    Returns:
      a `Sampler` of as many steps as the schedule has.

    Raises:
      ValueError: "mean" is predicted on a schedule that skips times.

    Lu et al. 2022 (DPM-Solver++), app. D.2 (SDE-DPM-Solver++(2M)).
    """
    alpha, sigma, log_ratio = path(schedule)
    h = np.diff(log_ratio)
    combination = Combination(
        x=sigma[1:] / sigma[:-1] * np.exp(-h),
        x0=_second_order(-alpha[1:] * np.expm1(-2 * h), log_ratio),
        noise=sigma[1:] * np.sqrt(-np.expm1(-2 * h)),
    )
    return _multistep(schedule, predict, combination, prediction=prediction, variance=variance, clip_x0=clip_x0)


def _b_vector(h: float, order: int) -> np.ndarray:
    r"""(order,) :math:`n!\, \varphi_{n+1}(-h) / (e^{-h} - 1)`, n = 1, ..: the moments of the integral over a step."""
    b = []
    phi = np.expm1(-h) / -h - 1
    for n in range(1, order + 1):
        b.append(phi * math.factorial(n) / np.expm1(-h))
        phi = phi / -h - 1 / math.factorial(n + 1)
    return np.array(b)


def _slopes(log_ratio: np.ndarray, k: int, order: int) -> np.ndarray:
    """(order - 1,) how far before step k the steps lie that are looked back at, in units of its length, negative."""
    h = log_ratio[k + 1] - log_ratio[k]
    return (log_ratio[k - np.arange(1, order)] - log_ratio[k]) / h


def _unipc_weights(places: Path, order: int) -> tuple[Combination, Correction]:
    """Works out the predictor (UniP) and the corrector (UniC) of every step."""
    alpha, sigma, log_ratio = places
    num_steps = len(alpha) - 1
    predictor = Combination(np.zeros(num_steps), np.zeros((num_steps, order)), np.zeros(num_steps))
    corrector = Correction(np.zeros(num_steps), np.zeros(num_steps), np.zeros((num_steps, order + 1)))
    corrector.x[0] = 1
    for k in range(num_steps):
        x_weight, x0_weight = sigma[k + 1] / sigma[k], -alpha[k + 1] * np.expm1(log_ratio[k] - log_ratio[k + 1])
        order_here = min(order, k + 1, num_steps - k)
        ratios, powers = _slopes(log_ratio, k, order_here), np.arange(order_here)
        predictor.x[k], predictor.x0[k, 0] = x_weight, x0_weight
        if order_here > 1:
            b = _b_vector(log_ratio[k + 1] - log_ratio[k], order_here)
            # The published predictor of second order is not solved for: its weight is that of small steps.
            rho = np.linalg.solve(ratios ** powers[:-1, None], b[:-1]) if order_here > 2 else np.array([0.5])
            slopes = x0_weight * rho / ratios
            predictor.x0[k, 1:order_here] += slopes
            predictor.x0[k, 0] -= slopes.sum()
        if k + 1 < num_steps:
            b = _b_vector(log_ratio[k + 1] - log_ratio[k], order_here)
            nodes = np.append(ratios, 1.0)
            rho = np.linalg.solve(nodes ** powers[:, None], b) if order_here > 1 else np.array([0.5])
            # Of x0 at steps k + 1, k, k - 1, ..: the last node is the new prediction.
            slopes = x0_weight * rho / nodes
            corrector.x_before[k + 1] = x_weight
            corrector.x0[k + 1, 0] = slopes[-1]
            corrector.x0[k + 1, 1] = x0_weight - slopes.sum()
            corrector.x0[k + 1, 2 : order_here + 1] = slopes[:-1]
    return predictor, corrector


def unipc(
    schedule: Schedule,
    predict: Predict,
    *,
    order: int = 3,
    prediction: Prediction = "eps",
    variance: Variance = "fixed_large",
    clip_x0: bool = True,
) -> Sampler:
    r"""Makes UniPC: a predictor of order p, and a corrector that raises it to p + 1 for no evaluation more.

    .. math::
      x_t = \frac{\sigma_t}{\sigma_s} x_s - \alpha_t (e^{-h} - 1) \left(\hat x_0
            + \sum_{i=1}^{p} \frac{\rho_i}{r_i} \left(\hat x_0^{(i)} - \hat x_0\right)\right)

    :math:`r_i = (\lambda_i - \lambda_s) / h` says where the other predictions lie: the predictor has those of the
    p - 1 steps before, the corrector that of x_t too, once the network has seen it for the next step. The
    :math:`\rho_i` make the integral exact for polynomials (the paper's B_2(h), data prediction). Order rises over the
    first steps and falls over the last.

    Args:
      schedule: tables of the chain's steps (`respacing.respace`); not traced.
      predict: the network.
      order: p, 1 to 3; the authors recommend 3 without guidance and 2 with it.
      prediction: what the network's output means; "mean" only on a schedule of all times.
      variance: tells whether the output has a second half; it is not used.
      clip_x0: whether the predicted clean image is clipped to [-1, 1] at every step.

    Returns:
      a `Sampler` of as many steps as the schedule has.

    Raises:
      ValueError: `order` is not 1, 2 or 3, or "mean" is predicted on a schedule that skips times.

    Zhao et al. 2023, Algorithms 5 and 6.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"UniPC has orders 1, 2 and 3, not {order}")
    predictor, corrector = _unipc_weights(path(schedule), order)
    return _multistep(
        schedule,
        predict,
        predictor,
        correction=corrector,
        prediction=prediction,
        variance=variance,
        clip_x0=clip_x0,
    )
