r"""Respacing: chains over a subset of the T timesteps, and their schedules.

A chain that skips timesteps is a chain of its own, with a beta for each jump, and every sampler runs on it unchanged;
only the network's input stays the timesteps of the schedule that it was trained with.

>>> from ddpm_jax.schedules import make_betas
>>> betas = make_betas("linear", 1000)
>>> short = respace(betas, evenly_spaced(1000, 5))
>>> short.timesteps
Array([  0, 250, 500, 749, 999], dtype=int32)
"""

import itertools
import math
import typing
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from ddpm_jax.names import Prediction, Spacing
from ddpm_jax.reverse import check_end
from ddpm_jax.schedules import Schedule, concrete, exact_log_alphas, numbers, schedule_from_log_alphas

# Below it there is almost no signal, and the last timesteps of the cosine schedule would crowd there.
_LEAST_LOG_SNR = 2 * -5.1


def default_spacing(name: str, num_steps: int | None) -> Spacing:
    """Returns the spacing of a sampler's timesteps, chosen by the table in `docs/results/spacings.md`.

    ================================  ==================================================================
    dpm++2m, dpm++2m_sde, unipc       "log_snr": their orders need even steps in log SNR; in fewer than 8
                                      steps, where those leave too few for high noise, "cubic"
    ancestral                         "trailing": the noise of a long last step would stay in the image
    ddim                              "linspace", as published DDIM numbers; no other spacing is better on
                                      all laws
    ================================  ==================================================================

    Args:
      name: the name of the sampler.
      num_steps: N; None for all T.

    Returns:
      a `Spacing`.

    >>> default_spacing("unipc", 5), default_spacing("unipc", 10), default_spacing("ddim", 10)
    ('cubic', 'log_snr', 'linspace')
    """
    if name == "ancestral":
        return "trailing"
    if name == "ddim":
        return "linspace"
    return "cubic" if num_steps is not None and num_steps < 8 else "log_snr"


def respaced_betas(betas: ArrayLike, timesteps: ArrayLike) -> np.ndarray:
    r"""Returns the betas of the chain over a subset of the timesteps.

    .. math:: \beta'_k = 1 - \bar\alpha_{S_k} / \bar\alpha_{S_{k-1}}, \quad \bar\alpha_{S_{-1}} = 1

    Args:
      betas: (T,) of the whole chain, each in (0, 1], 1 at the last step alone.
      timesteps: (N,) 0-based timesteps S, increasing, each in [0, T).

    Returns:
      (N,) float64, with the same :math:`\bar\alpha` at these timesteps as the whole chain.

    Raises:
      ValueError: the timesteps are empty, not integers, not increasing, or outside [0, T).

    Nichol & Dhariwal 2021, eq. 19, and its code (`SpacedDiffusion`).

    >>> betas = np.array([0.1, 0.2, 0.5])
    >>> respaced_betas(betas, [1, 2]).round(12)                    # the first jump is 1 - 0.9 * 0.8
    array([0.28, 0.5 ])
    """
    return -np.expm1(_log_alphas_of_jumps(exact_log_alphas(betas), timesteps))


def _log_alphas_of_jumps(log_alphas: np.ndarray, timesteps: ArrayLike) -> np.ndarray:
    timesteps = np.asarray(timesteps)
    if timesteps.ndim != 1 or timesteps.size < 1 or not np.issubdtype(timesteps.dtype, np.integer):
        raise ValueError(f"timesteps must be a vector of at least one integer, not {timesteps!r}")
    if timesteps[0] < 0 or timesteps[-1] >= log_alphas.size or (np.diff(timesteps) <= 0).any():
        raise ValueError(f"timesteps must increase within [0, {log_alphas.size}), unlike {timesteps.tolist()}")
    # A jump is the sum of its steps' log(alpha), which keeps the digits of a small beta; -inf where alpha is 0.
    starts = np.append(0, timesteps[:-1] + 1)
    return np.add.reduceat(log_alphas[: timesteps[-1] + 1], starts)


def respace(schedule: Schedule | ArrayLike, timesteps: ArrayLike) -> Schedule:
    r"""Makes the schedule of the chain over a subset of the timesteps.

    Args:
      schedule: the schedule of the whole chain, or its betas, (T,); not traced.
      timesteps: (N,) 0-based timesteps, increasing, each in [0, T).

    Returns:
      a `Schedule` of N steps, whose `timesteps`, the network's input, are the original ones. The network's output
      must not belong to single steps of the whole chain, as the mean of x_{t-1} and the "learned" variance do. It is
      `schedule` itself if that is a `Schedule` and all its timesteps are kept.

    Raises:
      TypeError: the schedule is traced.
      ValueError: as `respaced_betas` and `schedule_from_betas`.

    Nichol & Dhariwal 2021, sec. 4, and its code.
    """
    log_alphas = _log_alphas_of_jumps(exact_log_alphas(schedule), timesteps)
    original = np.asarray(timesteps)
    if isinstance(schedule, Schedule):
        if len(log_alphas) == schedule.num_steps:
            return schedule
        original = numbers(schedule.timesteps).astype(int)[original]
    return schedule_from_log_alphas(log_alphas, timesteps=original)


def shorten(schedule: Schedule, num_steps: int | None, *, sampler: str) -> Schedule:
    """Returns the schedule of a chain of `num_steps` steps with a sampler's default spacing; `schedule` if None."""
    if num_steps is None:
        return schedule
    spacing = default_spacing(sampler, num_steps)
    return respace(schedule, choose_timesteps(schedule, num_steps=num_steps, spacing=spacing))


def skips_timesteps(schedule: Schedule) -> bool:
    """Returns whether a schedule is part of a longer one; False for a traced schedule, for which it is not known."""
    timesteps = concrete(schedule.timesteps)
    return timesteps is not None and bool((timesteps != np.arange(schedule.num_steps)).any())


def check_prediction(schedule: Schedule, prediction: Prediction) -> None:
    """Checks that a chain can run with what the network predicts.

    Args:
      schedule: tables of the chain's steps; a traced one is not checked.
      prediction: what the network predicts.

    Raises:
      ValueError: the prediction is "mean" and the schedule skips timesteps, or as `check_end`.
    """
    check_end(schedule, prediction)
    if prediction == "mean" and skips_timesteps(schedule):
        raise ValueError("the mean of x_{t-1} belongs to single steps: a chain that skips timesteps needs eps, x0 or v")


def _check_count(num_timesteps: int, num_steps: int) -> None:
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(
            f"a chain of {num_timesteps} timesteps can be run in 1 to {num_timesteps} steps, not in {num_steps}"
        )


def _spread(timesteps: np.ndarray, num_timesteps: int) -> np.ndarray:
    """Moves equal timesteps apart, as little as possible: (N,) non-decreasing in [0, T) to increasing."""
    k = np.arange(len(timesteps))
    apart = np.maximum.accumulate(timesteps - k) + k
    return np.minimum(apart, num_timesteps - len(timesteps) + k)


def evenly_spaced(num_timesteps: int, num_steps: int) -> np.ndarray:
    r"""Returns timesteps spaced evenly from the first to the last, both included.

    .. math:: S_k = \mathrm{round}\left(k \frac{T-1}{N-1}\right)

    A chain starts from pure noise, so its first step should be at the last timestep.

    Args:
      num_timesteps: T.
      num_steps: N, in [1, T]; a single step is at T-1.

    Returns:
      (N,) int64, increasing.

    Raises:
      ValueError: N is outside [1, T].

    Nichol & Dhariwal 2021, its code ("N" of `space_timesteps`, up to the rounding of halves); diffusers' "linspace".

    >>> evenly_spaced(1000, 50)[:7]
    array([  0,  20,  41,  61,  82, 102, 122])
    """
    _check_count(num_timesteps, num_steps)
    if num_steps == 1:
        return np.array([num_timesteps - 1])
    return np.round(np.arange(num_steps) * ((num_timesteps - 1) / (num_steps - 1))).astype(np.int64)


def leading(num_timesteps: int, num_steps: int) -> np.ndarray:
    r"""Returns timesteps spaced evenly from the first: :math:`S_k = \lfloor k\, T / N \rfloor`.

    Where N divides T the stride is constant, as in improved-diffusion's "ddimN". The last timestep is left out unless
    N = T, which costs quality in few steps.

    Args:
      num_timesteps: T.
      num_steps: N, in [1, T]; a single step is at T-1, for a chain starts from pure noise.

    Returns:
      (N,) int64, increasing.

    Raises:
      ValueError: N is outside [1, T].

    Song et al. 2021 (DDIM), app. D.2 (linear); Lin et al. 2024, table 2, where N divides T.

    >>> leading(1000, 4), leading(1000, 3)
    (array([  0, 250, 500, 750]), array([  0, 333, 666]))
    """
    _check_count(num_timesteps, num_steps)
    if num_steps == 1:
        return np.array([num_timesteps - 1])
    return np.arange(num_steps) * num_timesteps // num_steps


def trailing(num_timesteps: int, num_steps: int) -> np.ndarray:
    r"""Returns timesteps spaced evenly backwards from the last: :math:`S_k = \mathrm{round}(T - (N-1-k)\, T / N) - 1`.

    Args:
      num_timesteps: T.
      num_steps: N, in [1, T].

    Returns:
      (N,) int64, increasing.

    Raises:
      ValueError: N is outside [1, T].

    Lin et al. 2024, table 2.

    >>> trailing(1000, 4)
    array([249, 499, 749, 999])
    """
    _check_count(num_timesteps, num_steps)
    steps_left = np.arange(num_steps)[::-1]
    return np.round(num_timesteps - steps_left * (num_timesteps / num_steps)).astype(np.int64) - 1


def quadratic(num_timesteps: int, num_steps: int) -> np.ndarray:
    r"""Returns timesteps whose square roots are spaced evenly, up to 0.8 T.

    .. math:: S_k = \left\lfloor \left(\frac{k}{N-1} \sqrt{0.8\, T}\right)^2 \right\rfloor

    The DDIM paper's CIFAR-10 results use these timesteps. Equal ones, which occur in many steps, are moved apart.

    Args:
      num_timesteps: T.
      num_steps: N, in [1, T]; a single step is at T-1, for a chain starts from pure noise.

    Returns:
      (N,) int64, increasing.

    Raises:
      ValueError: N is outside [1, T].

    Song et al. 2021 (DDIM), app. D.2 (quadratic), and its code.

    >>> quadratic(1000, 10)
    array([  0,   9,  39,  88, 158, 246, 355, 483, 632, 800])
    """
    _check_count(num_timesteps, num_steps)
    if num_steps == 1:
        return np.array([num_timesteps - 1])
    timesteps = (np.linspace(0, math.sqrt(0.8 * num_timesteps), num_steps) ** 2).astype(np.int64)
    return _spread(timesteps, num_timesteps)


def cubic(num_timesteps: int, num_steps: int) -> np.ndarray:
    r"""Returns timesteps whose cube roots are spaced evenly from the first to the last, both included.

    .. math:: S_k = \mathrm{round}\left((T-1) \left(\frac{k}{N-1}\right)^3\right)

    With the linear schedule they are nearly even in log SNR where there is little noise, and in t where there is much.
    Equal ones, which occur in many steps, are moved apart.

    Args:
      num_timesteps: T.
      num_steps: N, in [1, T]; a single step is at T-1, for a chain starts from pure noise.

    Returns:
      (N,) int64, increasing.

    Raises:
      ValueError: N is outside [1, T].

    >>> cubic(1000, 10)
    array([  0,   1,  11,  37,  88, 171, 296, 470, 702, 999])
    """
    _check_count(num_timesteps, num_steps)
    if num_steps == 1:
        return np.array([num_timesteps - 1])
    timesteps = np.round((num_timesteps - 1) * np.linspace(0, 1, num_steps) ** 3).astype(np.int64)
    return _spread(timesteps, num_timesteps)


def evenly_spaced_in_log_snr(schedule: Schedule | ArrayLike, num_steps: int) -> np.ndarray:
    r"""Returns timesteps spaced evenly in log SNR: each jump removes the same share of the noise.

    .. math:: \log \frac{\bar\alpha_{S_k}}{1 - \bar\alpha_{S_k}} \approx
              \text{evenly from its value at } 0 \text{ to that at } T-1

    Values below -10.2, of which the cosine schedule has many at its end, count as -10.2. The first and the last
    timestep are both included; a single step is at T-1.

    Args:
      schedule: the schedule of the whole chain, or its betas, (T,); not traced.
      num_steps: N, in [1, T].

    Returns:
      (N,) int64, increasing: the nearest timesteps, and where these are equal, their neighbors.

    Raises:
      ValueError: N is outside [1, T].

    Lu et al. 2022 (DPM-Solver), sec. 3.3, and its code ("logSNR").
    """
    return _evenly_spaced_in(_log_snr(schedule), num_steps)


def evenly_spaced_in_sigma(schedule: Schedule | ArrayLike, num_steps: int, *, rho: float = 7.0) -> np.ndarray:
    r"""Returns timesteps whose :math:`\sigma^{1/\rho}` are spaced evenly, between "linspace" and "log_snr".

    .. math:: \sigma_t = \sqrt{(1 - \bar\alpha_t) / \bar\alpha_t}

    As :math:`\rho` grows they approach those of `evenly_spaced_in_log_snr`, whose floor and ends they share.

    Args:
      schedule: the schedule of the whole chain, or its betas, (T,); not traced.
      num_steps: N, in [1, T].
      rho: the exponent, > 0.

    Returns:
      (N,) int64, increasing: the nearest timesteps, and where these are equal, their neighbors.

    Raises:
      ValueError: N is outside [1, T].

    Karras et al. 2022 (EDM), eq. 5.
    """
    return _evenly_spaced_in(np.exp(_log_snr(schedule) / (-2 * rho)), num_steps)


def _log_snr(schedule: Schedule | ArrayLike) -> np.ndarray:
    log_alphas_bar = np.cumsum(exact_log_alphas(schedule))
    return np.maximum(log_alphas_bar - np.log(-np.expm1(log_alphas_bar)), _LEAST_LOG_SNR)


def _evenly_spaced_in(positions: np.ndarray, num_steps: int) -> np.ndarray:
    """Returns the timesteps nearest to even steps along (T,) monotonic positions."""
    num_timesteps = positions.size
    _check_count(num_timesteps, num_steps)
    if num_steps == 1:
        return np.array([num_timesteps - 1])
    wanted = np.linspace(positions[0], positions[-1], num_steps)
    nearest = np.abs(wanted[:, None] - positions[None, :]).argmin(axis=1)
    nearest[-1] = num_timesteps - 1
    return _spread(nearest, num_timesteps)


def section_steps(num_timesteps: int, sections: str | Sequence[int]) -> np.ndarray:
    r"""Returns the timesteps of one of improved-diffusion's spacing rules.

    "10,15,20" cuts the timesteps into three sections of equal length (the first ones longer by one where 3 does not
    divide T) and spaces 10, 15 and 20 timesteps evenly over them, including the ends of each. "ddim50" uses the
    smallest integer stride that gives 50 timesteps.

    Args:
      num_timesteps: T.
      sections: such a rule, or the number of timesteps of each section.

    Returns:
      (N,) int64, increasing.

    Raises:
      ValueError: the rule is malformed, a section is shorter than its number of timesteps, or no stride gives N.

    Nichol & Dhariwal 2021, its code (`space_timesteps`).

    >>> section_steps(1000, "ddim4"), section_steps(12, "2,3")
    (array([  0, 250, 500, 750]), array([ 0,  5,  6,  8, 11]))
    """
    if isinstance(sections, str):
        try:
            numbers = [int(number) for number in sections.removeprefix("ddim").split(",")]
        except ValueError:
            numbers = []
        if not numbers or (sections.startswith("ddim") and len(numbers) != 1):
            raise ValueError(f"spacing {sections!r} is neither of the form '10,15,20' nor 'ddim50'")
        if sections.startswith("ddim"):
            return _whole_stride(num_timesteps, numbers[0])
        sections = numbers
    sizes = [num_timesteps // len(sections) + (i < num_timesteps % len(sections)) for i in range(len(sections))]
    timesteps: list[int] = []
    start = 0
    for size, number in zip(sizes, sections, strict=True):
        if not 1 <= number <= size:
            raise ValueError(f"a section of {size} timesteps can be run in 1 to {size} steps, not in {number}")
        stride = (size - 1) / (number - 1) if number > 1 else 1
        # Accumulated, not multiplied: how halves round depends on the rounding errors, as in the original.
        timesteps += [start + round(t) for t in itertools.accumulate([0.0] + [stride] * (number - 1))]
        start += size
    return np.array(timesteps)


def _whole_stride(num_timesteps: int, num_steps: int) -> np.ndarray:
    for stride in range(1, num_timesteps):
        if len(range(0, num_timesteps, stride)) == num_steps:
            return np.arange(0, num_timesteps, stride)
    raise ValueError(f"no integer stride gives {num_steps} of {num_timesteps} timesteps: use spacing 'leading' instead")


_SPACINGS: dict[str, Callable[[int, int], np.ndarray]] = {
    "linspace": evenly_spaced,
    "leading": leading,
    "trailing": trailing,
    "quadratic": quadratic,
    "cubic": cubic,
}


def choose_timesteps(
    schedule: Schedule | ArrayLike,
    *,
    num_steps: int | None = None,
    spacing: str = "linspace",
    extra_timesteps: Sequence[int] = (),
) -> np.ndarray:
    """Returns the timesteps of a chain by the name of their spacing.

    Args:
      schedule: the schedule of the whole chain, or its betas, (T,); not traced.
      num_steps: N, in [1, T]; if None, all T or the number that `spacing` implies.
      spacing: a `Spacing`, or a rule as in `section_steps`.
      extra_timesteps: 0-based timesteps to include as well, each in [0, T); N grows by those that are new.

    Returns:
      (N,) int64, increasing; all T if N = T, whatever the spacing.

    Raises:
      ValueError: N is outside [1, T], or the spacing is unknown or implies a number other than N.

    >>> choose_timesteps(np.full(1000, 0.01), num_steps=3, extra_timesteps=[99])
    array([  0,  99, 500, 999])
    """
    timesteps = _spaced(schedule, num_steps=num_steps, spacing=spacing)
    return np.union1d(timesteps, np.asarray(extra_timesteps, timesteps.dtype))


def _spaced(schedule: Schedule | ArrayLike, *, num_steps: int | None, spacing: str) -> np.ndarray:
    num_timesteps = exact_log_alphas(schedule).size
    if spacing not in typing.get_args(Spacing):
        if not (spacing.startswith("ddim") or spacing[:1].isdigit()):
            names = ", ".join(typing.get_args(Spacing))
            raise ValueError(
                f"unknown spacing {spacing!r}: choose one of {names}, or a rule such as '10,15,20' or 'ddim50'"
            )
        timesteps = section_steps(num_timesteps, spacing)
        if num_steps not in (None, len(timesteps)):
            raise ValueError(f"spacing {spacing!r} has {len(timesteps)} steps, not {num_steps}")
        return timesteps
    num_steps = num_timesteps if num_steps is None else num_steps
    if spacing == "log_snr":
        return evenly_spaced_in_log_snr(schedule, num_steps)
    if spacing == "karras":
        return evenly_spaced_in_sigma(schedule, num_steps)
    return _SPACINGS[spacing](num_timesteps, num_steps)
