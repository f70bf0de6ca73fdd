"""UniPC: a high-order predictor and corrector, for sampling in few steps (Zhao et al. 2023)."""

import math

import numpy as np

from ddpm_jax.names import Prediction, Variance
from ddpm_jax.reverse import Clip, Predict
from ddpm_jax.samplers.chain import Sampler
from ddpm_jax.samplers.multistep import Combination, Correction, Path, multistep, path
from ddpm_jax.samplers.respacing import shorten
from ddpm_jax.schedules import Schedule


def default_order(num_steps: int) -> int:
    """Returns the order of `unipc` in N steps: 3 in at least 15, else 2, since longer steps extrapolate too far."""
    return 3 if num_steps >= 15 else 2


def _b_vector(h: float, order: int) -> np.ndarray:
    r"""(order,) :math:`n!\, \varphi_{n+1}(-h) / (e^{-h} - 1)`, n = 1, ..: the moments of the integral over a step."""
    b = []
    phi = np.expm1(-h) / -h - 1
    for n in range(1, order + 1):
        b.append(phi * math.factorial(n) / np.expm1(-h))
        phi = phi / -h - 1 / math.factorial(n + 1)
    return np.array(b)


def _slopes(log_ratio: np.ndarray, k: int, order: int) -> np.ndarray:
    """(order - 1,) the (negative) distances from step k to the steps before it, in units of the step's length."""
    h = log_ratio[k + 1] - log_ratio[k]
    return (log_ratio[k - np.arange(1, order)] - log_ratio[k]) / h


def _unipc_weights(levels: Path, order: int) -> tuple[Combination, Correction]:
    """Computes the weights of the predictor (UniP) and the corrector (UniC) of each step."""
    alpha, sigma, log_ratio = levels
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
            # The published second-order predictor does not solve for its weight: it uses that of small steps.
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
    num_steps: int | None = None,
    order: int | None = None,
    prediction: Prediction = "eps",
    variance: Variance = "fixed_large",
    clip_x0: Clip = True,
) -> Sampler:
    r"""Makes the UniPC sampler: a predictor of order p, and a corrector that raises it to p + 1 at no extra evaluation.

    .. math::
      x_t = \frac{\sigma_t}{\sigma_s} x_s - \alpha_t (e^{-h} - 1) \left(\hat x_0
            + \sum_{i=1}^{p} \frac{\rho_i}{r_i} \left(\hat x_0^{(i)} - \hat x_0\right)\right)

    The other predictions are at :math:`r_i = (\lambda_i - \lambda_s) / h`: the predictor uses those of the p - 1
    previous steps; the corrector also that at x_t, which the next step computes anyway. The :math:`\rho_i` make the
    integral exact for polynomials (the paper's B_2(h), data prediction). The order rises over the first steps and
    falls over the last.

    Args:
      schedule: tables of the chain's steps (see `respacing.respace`); not traced.
      predict: the network.
      num_steps: N, in [1, T], for a chain of N of the timesteps, spaced as `make_sampler` does; all if None.
      order: p, 1 to 3; the authors recommend 3 without guidance and 2 with it. If None, `default_order`.
      prediction: what the network predicts; "mean" only on a schedule that skips no timesteps.
      variance: the kind of variance; the half of the output for a learned one is ignored.
      clip_x0: whether and how the predicted clean image is clipped at each step, see `reverse.clip`.

    Returns:
      a `Sampler` with one step per timestep of the schedule.

    Raises:
      TypeError: the schedule is traced.
      ValueError: `order` is not 1, 2 or 3, the prediction is "mean" and the schedule skips timesteps, or as
        `check_end`.

    Zhao et al. 2023, Algorithms 5 and 6.
    """
    if order not in (None, 1, 2, 3):
        raise ValueError(f"UniPC has orders 1, 2 and 3, not {order}")
    schedule = shorten(schedule, num_steps, sampler="unipc")
    predictor, corrector = _unipc_weights(path(schedule), order or default_order(schedule.num_steps))
    return multistep(
        schedule,
        predict,
        predictor,
        correction=corrector,
        prediction=prediction,
        variance=variance,
        clip_x0=clip_x0,
    )
