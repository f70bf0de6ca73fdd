r"""Multistep solvers of the probability-flow ODE and of the reverse SDE: good images in 5 to 20 steps.

With :math:`\alpha = \sqrt{\bar\alpha}`, :math:`\sigma = \sqrt{1 - \bar\alpha}` and half the log SNR,
:math:`\lambda = \log(\alpha / \sigma)`, the diffusion ODE has the exact solution

.. math:: x_t = \frac{\sigma_t}{\sigma_s} x_s
                + \sigma_t \int_{\lambda_s}^{\lambda_t} e^\lambda\, \hat x_0(x_\lambda, \lambda)\, d\lambda

(Lu et al. 2022, DPM-Solver++, eq. 9). A multistep solver replaces the integrand by a polynomial through the predictions
of the last steps, so that each step costs one evaluation of the network. Everything that depends on the schedule is
computed in float64 when the sampler is made; a step is a weighted sum of a few images.

>>> schedule = make_schedule("linear", 1000)
>>> nothing = lambda x_t, t: jnp.zeros_like(x_t)                         # a network that always predicts 0
>>> sample(jax.random.key(0), dpm_solver_pp_2m(schedule, nothing, num_steps=10), (2, 4, 4, 1)).shape
(2, 4, 4, 1)
"""

import numpy as np

from ddpm_jax.names import Prediction, Variance
from ddpm_jax.reverse import Clip, Predict
from ddpm_jax.samplers.chain import Sampler
from ddpm_jax.samplers.multistep import Combination, multistep, path
from ddpm_jax.samplers.respacing import shorten
from ddpm_jax.schedules import Schedule


def _second_order(x0_weight: np.ndarray, log_ratio: np.ndarray) -> np.ndarray:
    """Returns the weights, (N, 2), of this step's x0 and of the previous step's, which gives the slope of x0."""
    h = np.diff(log_ratio)
    slope = np.zeros_like(h)
    # The first step has no memory and the last an infinite h: both are of first order.
    slope[1:-1] = 0.5 * h[1:-1] / h[:-2]
    return x0_weight[:, None] * np.stack([1 + slope, -slope], axis=1)


def dpm_solver_pp_2m(
    schedule: Schedule,
    predict: Predict,
    *,
    num_steps: int | None = None,
    prediction: Prediction = "eps",
    variance: Variance = "fixed_large",
    clip_x0: Clip = True,
) -> Sampler:
    r"""Makes the deterministic second-order multistep DPM-Solver++.

    .. math::
      x_t &= \frac{\sigma_t}{\sigma_s} x_s - \alpha_t (e^{-h} - 1) D, \quad h = \lambda_t - \lambda_s \\
      D &= \left(1 + \frac{h}{2 h_{prev}}\right) \hat x_0 - \frac{h}{2 h_{prev}} \hat x_0^{prev}

    The first and the last step are of first order (D is :math:`\hat x_0`), like DDIM.

    Args:
      schedule: tables of the chain's steps (see `respacing.respace`); not traced.
      predict: the network.
      num_steps: N, in [1, T], for a chain of N of the timesteps, spaced as `make_sampler` does; all if None.
      prediction: what the network predicts; "mean" only on a schedule that skips no timesteps.
      variance: the kind of variance; the half of the output for a learned one is ignored.
      clip_x0: whether and how the predicted clean image is clipped at each step, see `reverse.clip`.

    Returns:
      a `Sampler` with one step per timestep of the schedule.

    Raises:
      TypeError: the schedule is traced.
      ValueError: the prediction is "mean" and the schedule skips timesteps, or as
        `check_end`.

    Lu et al. 2022 (DPM-Solver++), Algorithm 2.
    """
    schedule = shorten(schedule, num_steps, sampler="dpm++2m")
    alpha, sigma, log_ratio = path(schedule)
    combination = Combination(
        x=sigma[1:] / sigma[:-1],
        x0=_second_order(-alpha[1:] * np.expm1(-np.diff(log_ratio)), log_ratio),
        noise=np.zeros(schedule.num_steps),
    )
    return multistep(schedule, predict, combination, prediction=prediction, variance=variance, clip_x0=clip_x0)


def dpm_solver_pp_2m_sde(
    schedule: Schedule,
    predict: Predict,
    *,
    num_steps: int | None = None,
    prediction: Prediction = "eps",
    variance: Variance = "fixed_large",
    clip_x0: Clip = True,
) -> Sampler:
    r"""Makes the SDE form of the second-order multistep DPM-Solver++, which adds noise at every step but the last.

    .. math::
      x_t = \frac{\sigma_t}{\sigma_s} e^{-h} x_s + \alpha_t (1 - e^{-2h}) D + \sigma_t \sqrt{1 - e^{-2h}}\, z

    with h and D of `dpm_solver_pp_2m`. Its first-order form is the ancestral chain with variance "fixed_small".

    Args:
      schedule: tables of the chain's steps (see `respacing.respace`); not traced.
      predict: the network.
      num_steps: N, in [1, T], for a chain of N of the timesteps, spaced as `make_sampler` does; all if None.
      prediction: what the network predicts; "mean" only on a schedule that skips no timesteps.
      variance: the kind of variance; the half of the output for a learned one is ignored.
      clip_x0: whether and how the predicted clean image is clipped at each step, see `reverse.clip`.

    Returns:
      a `Sampler` with one step per timestep of the schedule.

    Raises:
      TypeError: the schedule is traced.
      ValueError: the prediction is "mean" and the schedule skips timesteps, or as
        `check_end`.

    Lu et al. 2022 (DPM-Solver++), app. D.2 (SDE-DPM-Solver++(2M)).
    """
    schedule = shorten(schedule, num_steps, sampler="dpm++2m_sde")
    alpha, sigma, log_ratio = path(schedule)
    h = np.diff(log_ratio)
    combination = Combination(
        x=sigma[1:] / sigma[:-1] * np.exp(-h),
        x0=_second_order(-alpha[1:] * np.expm1(-2 * h), log_ratio),
        noise=sigma[1:] * np.sqrt(-np.expm1(-2 * h)),
    )
    return multistep(schedule, predict, combination, prediction=prediction, variance=variance, clip_x0=clip_x0)
