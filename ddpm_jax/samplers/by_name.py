"""Samplers by name and number of steps, as the scripts make them."""

import difflib
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array
from numpy.typing import ArrayLike

from ddpm_jax.names import EpsAfterClipping, Prediction, Variance
from ddpm_jax.reverse import Clip, Predict, predict_x0, split_output
from ddpm_jax.samplers.ancestral import ancestral
from ddpm_jax.samplers.chain import Sampler
from ddpm_jax.samplers.ddim import ddim
from ddpm_jax.samplers.dpm_solver import dpm_solver_pp_2m, dpm_solver_pp_2m_sde
from ddpm_jax.samplers.respacing import check_prediction, choose_timesteps, default_spacing, respace, skips_timesteps
from ddpm_jax.samplers.unipc import unipc
from ddpm_jax.schedules import Schedule, schedule_from_betas

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ancestral": ancestral,
    "ddim": ddim,
    "dpm++2m": dpm_solver_pp_2m,
    "dpm++2m_sde": dpm_solver_pp_2m_sde,
    "unipc": unipc,
}
"""Functions from (schedule, predict, *, prediction, variance, clip_x0) to a `Sampler`; "ddim" also takes `eta` and
`eps_after_clipping`."""


def make_sampler(
    name: str,
    schedule: Schedule | ArrayLike,
    predict: Predict,
    *,
    num_steps: int | None = None,
    spacing: str | None = None,
    extra_timesteps: Sequence[int] = (),
    eta: float | Array | None = None,
    eps_after_clipping: EpsAfterClipping | None = None,
    prediction: Prediction = "eps",
    variance: Variance = "fixed_large",
    clip_x0: Clip = True,
) -> Sampler:
    r"""Makes a sampler by name, of any number of steps.

    ===========  =====================================================================================
    ancestral    the paper's Algorithm 2; the best images in many steps
    ddim         `ddim.ddim`: deterministic at eta = 0
    dpm++2m      `dpm_solver.dpm_solver_pp_2m`: deterministic, second order
    dpm++2m_sde  `dpm_solver.dpm_solver_pp_2m_sde`: the same with noise at each step
    unipc        `unipc.unipc`: deterministic, a predictor and a corrector of second or third order; for few steps
    ===========  =====================================================================================

    Args:
      name: one of the names above.
      schedule: the schedule that the network was trained with, or its betas, (T,); not traced.
      predict: the network.
      num_steps: N, in [1, T]; if None, all T or the number that `spacing` implies.
      spacing: the spacing of the timesteps, see `respacing.choose_timesteps`; `default_spacing` if None.
      extra_timesteps: 0-based timesteps to include as well; N grows by those that are new.
      eta: the amount of noise, in [0, 1], only for "ddim"; 0 if None.
      eps_after_clipping: how eps is computed after x0 is clipped, only for "ddim" (see there); "recompute" if None.
      prediction: what the network predicts.
      variance: the variance of p(x_{t-1} | x_t), for "ancestral"; the others ignore a learned one.
      clip_x0: whether and how the predicted clean image is clipped at each step, see `reverse.clip`.

    Returns:
      a `Sampler` of N steps.

    Raises:
      TypeError: the schedule is traced.
      ValueError: the name or the spacing is unknown, N is outside [1, T], `eta` is outside [0, 1], `eta` or
        `eps_after_clipping` is given to another sampler than "ddim", or "ancestral" would skip timesteps with a
        "learned" variance, which belongs to single steps.

    >>> make_sampler("unipc", make_schedule("linear", 1000), lambda x_t, t: x_t, num_steps=8).num_steps
    8
    """
    if name not in SAMPLERS:
        near = difflib.get_close_matches(name, SAMPLERS, n=1, cutoff=0)[0]
        raise ValueError(f"unknown sampler {name!r}: did you mean {near!r}? Choose one of {', '.join(SAMPLERS)}")
    options = {
        key: value for key, value in (("eta", eta), ("eps_after_clipping", eps_after_clipping)) if value is not None
    }
    if options and name != "ddim":
        given = ", ".join(f"{key}={value}" for key, value in options.items())
        raise ValueError(f"{given} applies only to the sampler 'ddim', not to {name!r}")
    spacing = default_spacing(name, num_steps) if spacing is None else spacing
    timesteps = choose_timesteps(schedule, num_steps=num_steps, spacing=spacing, extra_timesteps=extra_timesteps)
    short = respace(schedule, timesteps)
    if prediction == "mean" and skips_timesteps(short):
        predict, prediction = x0_of_mean(schedule, predict, variance=variance), "x0"
    return SAMPLERS[name](short, predict, prediction=prediction, variance=variance, clip_x0=clip_x0, **options)


def x0_of_mean(schedule: Schedule | ArrayLike, predict: Predict, *, variance: Variance) -> Predict:
    """Makes a network that predicts x0 from one that predicts the mean of x_{t-1}, so that chains can skip timesteps.

    Args:
      schedule: the schedule that the network was trained with, or its betas, (T,).
      predict: the network.
      variance: the kind of variance; the half of the output for a learned one is kept.

    Returns:
      the network that predicts x0.

    Raises:
      ValueError: the schedule itself skips timesteps.
    """
    whole = schedule if isinstance(schedule, Schedule) else schedule_from_betas(schedule)
    check_prediction(whole, "mean")

    def predict_clean(x_t: Array, t: Array) -> Array:
        mean, second_half = split_output(predict(x_t, t), variance=variance)
        x0 = predict_x0(whole, mean, x_t, t, prediction="mean")
        return x0 if second_half is None else jnp.concatenate([x0, second_half], axis=-1)

    return predict_clean
