"""Samplers by name: what a script needs to go from a word and a number of steps to a `Sampler`."""

import difflib
import typing
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from ddpm_jax.reverse import Predict, Prediction, Variance, predict_x0, split_output
from ddpm_jax.samplers.ancestral import ancestral
from ddpm_jax.samplers.chain import Sampler
from ddpm_jax.samplers.ddim import EpsAfterClipping, ddim
from ddpm_jax.samplers.dpm_solver import dpm_solver_pp_2m, dpm_solver_pp_2m_sde
from ddpm_jax.samplers.respacing import Spacing, choose_times, respace
from ddpm_jax.samplers.unipc import unipc
from ddpm_jax.schedules import schedule_from_betas

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ancestral": ancestral,
    "ddim": ddim,
    "dpm++2m": dpm_solver_pp_2m,
    "dpm++2m_sde": dpm_solver_pp_2m_sde,
    "unipc": unipc,
}
"""(schedule, predict, *, prediction, variance, clip_x0) to a sampler; "ddim" also takes `eta` and
`eps_after_clipping`."""

SamplerName = typing.Literal["ancestral", "ddim", "dpm++2m", "dpm++2m_sde", "unipc"]

# At 10 steps it loses 0.108 on "trailing" and 0.135 on "log_snr"; at 12, 0.076 and 0.013.
_FEW_STEPS_OF_UNIPC = 10


def default_spacing(name: str, num_steps: int | None) -> Spacing:
    """Names the times that suit a sampler: solvers of second order and more want steps of one length in log SNR.

    Even steps of time end in one that spans several units of log SNR, over which a slope of x0 is carried too far.
    But in ten steps and fewer even steps of log SNR are themselves too long for the third order of "unipc", and it is
    better on "trailing": `docs/results/sampler_order.csv` has what each sampler loses by which spacing.

    Args:
      name: of the sampler.
      num_steps: N; None for all the times there are, which are the same whatever the spacing.

    Returns:
      a `Spacing`.

    >>> default_spacing("unipc", 10), default_spacing("unipc", 20), default_spacing("ddim", 10)
    ('trailing', 'log_snr', 'linspace')
    """
    if name in ("ancestral", "ddim"):
        return "linspace"
    if name == "unipc" and num_steps is not None and num_steps <= _FEW_STEPS_OF_UNIPC:
        return "trailing"
    return "log_snr"


def make_sampler(
    name: str,
    betas: ArrayLike,
    predict: Predict,
    *,
    num_steps: int | None = None,
    spacing: str | None = None,
    extra_timesteps: Sequence[int] = (),
    eta: float | None = None,
    eps_after_clipping: EpsAfterClipping | None = None,
    prediction: Prediction = "eps",
    variance: Variance = "fixed_large",
    clip_x0: bool = True,
) -> Sampler:
    r"""Makes a sampler by name, of any number of steps.

    ===========  =====================================================================================
    ancestral    the paper's Algorithm 2, on the visited times; the best images in many steps
    ddim         `ddim.ddim`: deterministic at eta = 0
    dpm++2m      `solvers.dpm_solver_pp_2m`: deterministic, of second order
    dpm++2m_sde  `solvers.dpm_solver_pp_2m_sde`: the same with noise at every step
    unipc        `solvers.unipc`: deterministic, a predictor of third order and a corrector; for few steps
    ===========  =====================================================================================

    Args:
      name: one of the names above.
      betas: (T,) of the schedule that the network was trained with, each in (0, 1], 1 at the last step alone.
      predict: the network, which is told times of that schedule.
      num_steps: N, in [1, T]; all T, or as many as `spacing` says, if None.
      spacing: which times are visited, see `respacing.choose_times`; `default_spacing` if None.
      extra_timesteps: 0-based timesteps that the chain includes besides; N is larger by those that are new.
      eta: the share of the noise, in [0, 1], for "ddim" alone; 0 if None.
      eps_after_clipping: how eps follows from the clipped x0, for "ddim" alone (see there); "recompute" if None.
      prediction: what the network predicts.
      variance: the variance of p(x_{t-1} | x_t), for "ancestral"; the others only drop a learned one's half.
      clip_x0: whether the predicted clean image is clipped to [-1, 1] at every step.

    Returns:
      a `Sampler` of N steps.

    Raises:
      ValueError: the name or the spacing is unknown, N is outside [1, T], `eta` is outside [0, 1], it or
        `eps_after_clipping` is given to a sampler that has none, or "ancestral" is to skip steps with a "learned"
        variance, which is of single
        steps.

    >>> betas = np.linspace(1e-4, 0.02, 1000)
    >>> make_sampler("unipc", betas, lambda x_t, t: x_t, num_steps=8).num_steps
    8
    """
    if name not in SAMPLERS:
        near = difflib.get_close_matches(name, SAMPLERS, n=1, cutoff=0)[0]
        raise ValueError(f"unknown sampler {name!r}: did you mean {near!r}? There are {', '.join(SAMPLERS)}")
    options = {
        key: value for key, value in (("eta", eta), ("eps_after_clipping", eps_after_clipping)) if value is not None
    }
    if options and name != "ddim":
        given = ", ".join(f"{key}={value}" for key, value in options.items())
        raise ValueError(f"{given} applies only to the sampler 'ddim', not to {name!r}")
    betas = np.asarray(betas, np.float64)
    spacing = default_spacing(name, num_steps) if spacing is None else spacing
    times = choose_times(betas, num_steps=num_steps, spacing=spacing, extra_timesteps=extra_timesteps)
    if len(times) < len(betas):
        if name == "ancestral" and variance == "learned":
            raise ValueError(
                f"a 'learned' variance is of single steps: sample in all {len(betas)} steps, or with another sampler "
                "where one can be chosen"
            )
        if prediction == "mean":
            predict, prediction = x0_of_mean(betas, predict, variance=variance), "x0"
    schedule = respace(betas, times)
    return SAMPLERS[name](schedule, predict, prediction=prediction, variance=variance, clip_x0=clip_x0, **options)


def x0_of_mean(betas: np.ndarray, predict: Predict, *, variance: Variance) -> Predict:
    """Turns a network that predicts the mean of x_{t-1} into one that predicts x0, which is of no step's length.

    Args:
      betas: (T,) of the schedule that the network was trained with.
      predict: the network.
      variance: whether the output has a second half for the variance, which stays as it is.

    Returns:
      the network of x0, for chains that skip times too.
    """
    with jax.ensure_compile_time_eval():
        schedule = schedule_from_betas(betas)

    def predict_clean(x_t: Array, t: Array) -> Array:
        mean, second_half = split_output(predict(x_t, t), variance=variance)
        x0 = predict_x0(schedule, mean, x_t, t, prediction="mean")
        return x0 if second_half is None else jnp.concatenate([x0, second_half], axis=-1)

    return predict_clean
