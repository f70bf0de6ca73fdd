r"""Shorter chains: which of the T times are visited, and the schedule that jumps between them.

A chain that skips steps is a chain of its own, with betas that say what a jump adds. Every sampler runs on it as it
does on the whole one; only the network is told the times of the schedule that it was trained with.

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

import jax
import numpy as np
from numpy.typing import ArrayLike

from ddpm_jax.reverse import Prediction
from ddpm_jax.schedules import Schedule, schedule_from_betas

Spacing = typing.Literal["linspace", "leading", "trailing", "quadratic", "log_snr"]
"""How the times of a shorter chain are chosen."""

# Below it there is next to no signal, and the last of the cosine schedule's times would be crowded there.
_LEAST_LOG_SNR = 2 * -5.1


def respaced_betas(betas: ArrayLike, times: ArrayLike) -> np.ndarray:
    r"""Gives the betas of the chain that visits only some of the times.

    .. math:: \beta'_k = 1 - \bar\alpha_{S_k} / \bar\alpha_{S_{k-1}}, \quad \bar\alpha_{S_{-1}} = 1

    Args:
      betas: (T,) of the whole chain, each in (0, 1], 1 at the last step alone.
      times: (N,) 0-based times S, rising, each in [0, T).

    Returns:
      (N,) float64, with the same :math:`\bar\alpha` at the times as the whole chain.

    Raises:
      ValueError: the times are none, are not integers, do not rise, or are outside [0, T).

    Nichol & Dhariwal 2021, eq. 19, and its code (`SpacedDiffusion`).

    >>> betas = np.array([0.1, 0.2, 0.5])
    >>> respaced_betas(betas, [1, 2]).round(12)                    # the first jump is 1 - 0.9 * 0.8
    array([0.28, 0.5 ])
    """
    betas, times = np.asarray(betas, np.float64), np.asarray(times)
    if times.ndim != 1 or times.size < 1 or not np.issubdtype(times.dtype, np.integer):
        raise ValueError(f"times must be a vector of at least one integer, not {times!r}")
    if times[0] < 0 or times[-1] >= betas.size or (np.diff(times) <= 0).any():
        raise ValueError(f"times must rise within [0, {betas.size}), unlike {times.tolist()}")
    # A jump is the sum of its steps' log(alpha), which keeps the digits of a small beta; -inf where alpha is 0.
    with np.errstate(divide="ignore"):
        log_alphas = np.log1p(-betas[: times[-1] + 1])
    starts = np.append(0, times[:-1] + 1)
    return -np.expm1(np.add.reduceat(log_alphas, starts))


def respace(betas: ArrayLike, times: ArrayLike) -> Schedule:
    r"""Makes the schedule of the chain that visits only some of the times.

    Args:
      betas: (T,) of the whole chain, each in (0, 1], 1 at the last step alone.
      times: (N,) 0-based times, rising, each in [0, T).

    Returns:
      a `Schedule` of N steps. The network is told the original times. What it says must not be of one step of the
      whole chain, as the mean of x_{t-1} and the "learned" variance are.

    Raises:
      ValueError: as `respaced_betas` and `schedule_from_betas`.

    Nichol & Dhariwal 2021, sec. 4, and its code.
    """
    # The tables are data also where a sampler is made inside a function that is traced.
    with jax.ensure_compile_time_eval():
        return schedule_from_betas(respaced_betas(betas, times), timesteps=times)


def check_prediction(schedule: Schedule, prediction: Prediction) -> None:
    """Refuses the mean of x_{t-1} as a prediction where x_{t-1} is not what the next step goes to.

    Args:
      schedule: tables of the chain's steps; one that is traced cannot be checked.
      prediction: what the network predicts.

    Raises:
      ValueError: the network predicts the mean of x_{t-1} and the schedule skips times.
    """
    if prediction != "mean" or isinstance(schedule.timesteps, jax.core.Tracer):
        return
    if (np.asarray(schedule.timesteps) != np.arange(schedule.num_steps)).any():
        raise ValueError("the mean of x_{t-1} is of single steps: a chain that skips some needs eps, x0 or v")


def _check_count(num_times: int, num_steps: int) -> None:
    if not 1 <= num_steps <= num_times:
        raise ValueError(f"a chain of {num_times} times can be run in 1 to {num_times} steps, not in {num_steps}")


def _spread(times: np.ndarray, num_times: int) -> np.ndarray:
    """Moves times that fall together apart, by as little as can be: (N,) rising, not strictly, in [0, T)."""
    k = np.arange(len(times))
    apart = np.maximum.accumulate(times - k) + k
    return np.minimum(apart, num_times - len(times) + k)


def evenly_spaced(num_times: int, num_steps: int) -> np.ndarray:
    r"""Spaces times evenly between the first and the last, both visited.

    .. math:: S_k = \mathrm{round}\left(k \frac{T-1}{N-1}\right)

    The default: a chain starts from pure noise, so its first step must be told the last time.

    Args:
      num_times: T.
      num_steps: N, in [1, T]; a single step is at T-1.

    Returns:
      (N,) int64, rising.

    Raises:
      ValueError: N is outside [1, T].

    Nichol & Dhariwal 2021, its code ("N" of `space_timesteps`, up to the rounding of halves); diffusers' "linspace".

    >>> evenly_spaced(1000, 50)[:7]
    array([  0,  20,  41,  61,  82, 102, 122])
    """
    _check_count(num_times, num_steps)
    if num_steps == 1:
        return np.array([num_times - 1])
    return np.round(np.arange(num_steps) * ((num_times - 1) / (num_steps - 1))).astype(np.int64)


def leading(num_times: int, num_steps: int) -> np.ndarray:
    r"""Spaces times evenly from the first: :math:`S_k = \lfloor k\, T / N \rfloor`.

    A whole stride apart where N divides T, and then equal to improved-diffusion's "ddimN". The last time is visited
    only if all are, which costs quality in few steps.

    Args:
      num_times: T.
      num_steps: N, in [1, T]; a single step is at T-1, for a chain starts from pure noise.

    Returns:
      (N,) int64, rising.

    Raises:
      ValueError: N is outside [1, T].

    Song et al. 2021 (DDIM), app. D.2 (linear); Lin et al. 2024, table 2, where N divides T.

    >>> leading(1000, 4), leading(1000, 3)
    (array([  0, 250, 500, 750]), array([  0, 333, 666]))
    """
    _check_count(num_times, num_steps)
    if num_steps == 1:
        return np.array([num_times - 1])
    return np.arange(num_steps) * num_times // num_steps


def trailing(num_times: int, num_steps: int) -> np.ndarray:
    r"""Spaces times evenly backwards from the last: :math:`S_k = \mathrm{round}(T - (N-1-k)\, T / N) - 1`.

    Args:
      num_times: T.
      num_steps: N, in [1, T].

    Returns:
      (N,) int64, rising.

    Raises:
      ValueError: N is outside [1, T].

    Lin et al. 2024, table 2.

    >>> trailing(1000, 4)
    array([249, 499, 749, 999])
    """
    _check_count(num_times, num_steps)
    steps_left = np.arange(num_steps)[::-1]
    return np.round(num_times - steps_left * (num_times / num_steps)).astype(np.int64) - 1


def quadratic(num_times: int, num_steps: int) -> np.ndarray:
    r"""Spaces the square roots of times evenly, up to 0.8 T.

    .. math:: S_k = \left\lfloor \left(\frac{k}{N-1} \sqrt{0.8\, T}\right)^2 \right\rfloor

    The CIFAR-10 numbers of DDIM are of these times. Times that fall together, in many steps, are moved apart.

    Args:
      num_times: T.
      num_steps: N, in [1, T]; a single step is at T-1, for a chain starts from pure noise.

    Returns:
      (N,) int64, rising.

    Raises:
      ValueError: N is outside [1, T].

    Song et al. 2021 (DDIM), app. D.2 (quadratic), and its code.

    >>> quadratic(1000, 10)
    array([  0,   9,  39,  88, 158, 246, 355, 483, 632, 800])
    """
    _check_count(num_times, num_steps)
    if num_steps == 1:
        return np.array([num_times - 1])
    times = (np.linspace(0, math.sqrt(0.8 * num_times), num_steps) ** 2).astype(np.int64)
    return _spread(times, num_times)


def evenly_spaced_in_log_snr(betas: ArrayLike, num_steps: int) -> np.ndarray:
    r"""Spaces the logarithm of the ratio of signal to noise evenly: each jump removes the same share of the noise.

    .. math:: \log \frac{\bar\alpha_{S_k}}{1 - \bar\alpha_{S_k}} \approx
              \text{evenly from its value at } 0 \text{ to that at } T-1

    Values below -10.2, of which the cosine schedule has many at its end, count as -10.2. The first and the last time
    are both visited; a single step is at T-1.

    Args:
      betas: (T,) of the whole chain, each in (0, 1], 1 at the last step alone.
      num_steps: N, in [1, T].

    Returns:
      (N,) int64, rising: the nearest times there are, and where they fall together, their neighbors.

    Raises:
      ValueError: N is outside [1, T].

    Lu et al. 2022 (DPM-Solver), sec. 3.3, and its code ("logSNR").
    """
    betas = np.asarray(betas, np.float64)
    _check_count(betas.size, num_steps)
    if num_steps == 1:
        return np.array([betas.size - 1])
    with np.errstate(divide="ignore"):
        log_alphas_bar = np.cumsum(np.log1p(-betas))
    log_snr = np.maximum(log_alphas_bar - np.log(-np.expm1(log_alphas_bar)), _LEAST_LOG_SNR)
    wanted = np.linspace(log_snr[0], log_snr[-1], num_steps)
    nearest = np.abs(wanted[:, None] - log_snr[None, :]).argmin(axis=1)
    nearest[-1] = betas.size - 1
    return _spread(nearest, betas.size)


def section_steps(num_times: int, sections: str | Sequence[int]) -> np.ndarray:
    r"""Reads improved-diffusion's rules for the times.

    "10,15,20" cuts the times into three sections of one length (the first ones longer by one where 3 does not divide
    T) and spaces 10, 15 and 20 times evenly over them, the ends of each visited. "ddim50" takes times a whole stride
    apart, the smallest that gives 50.

    Args:
      num_times: T.
      sections: such a rule, or the numbers of times, one a section.

    Returns:
      (N,) int64, rising.

    Raises:
      ValueError: the rule cannot be read, a section has fewer times than are asked for, or "ddimN" has no stride.

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
            raise ValueError(f"spacing {sections!r} is neither numbers of times, as in '10,15,20', nor as 'ddim50'")
        if sections.startswith("ddim"):
            return _whole_stride(num_times, numbers[0])
        sections = numbers
    sizes = [num_times // len(sections) + (i < num_times % len(sections)) for i in range(len(sections))]
    times: list[int] = []
    start = 0
    for size, number in zip(sizes, sections, strict=True):
        if not 1 <= number <= size:
            raise ValueError(f"a section of {size} times can be run in 1 to {size} steps, not in {number}")
        stride = (size - 1) / (number - 1) if number > 1 else 1
        # Added up, not multiplied: the original's halves fall on either side by its rounding errors.
        times += [start + round(time) for time in itertools.accumulate([0.0] + [stride] * (number - 1))]
        start += size
    return np.array(times)


def _whole_stride(num_times: int, num_steps: int) -> np.ndarray:
    for stride in range(1, num_times):
        if len(range(0, num_times, stride)) == num_steps:
            return np.arange(0, num_times, stride)
    raise ValueError(
        f"no whole stride gives {num_steps} of {num_times} times: use spacing 'leading', which takes any number"
    )


_SPACINGS: dict[str, Callable[[int, int], np.ndarray]] = {
    "linspace": evenly_spaced,
    "leading": leading,
    "trailing": trailing,
    "quadratic": quadratic,
}


def choose_times(
    betas: ArrayLike, *, num_steps: int | None = None, spacing: str = "linspace", extra_timesteps: Sequence[int] = ()
) -> np.ndarray:
    """Chooses the times of a chain by name.

    Args:
      betas: (T,) of the whole chain.
      num_steps: N, in [1, T]; all T, or as many as `spacing` says, if None.
      spacing: a `Spacing`, or a rule that `section_steps` reads.
      extra_timesteps: 0-based timesteps to include besides, each in [0, T): the chain is longer by those that are new.

    Returns:
      (N,) int64, rising. All T times are the same whatever the spacing.

    Raises:
      ValueError: N is outside [1, T], the spacing is unknown, or it says another number than N.

    >>> choose_times(np.full(1000, 0.01), num_steps=3, extra_timesteps=[99])
    array([  0,  99, 500, 999])
    """
    times = _spaced(betas, num_steps=num_steps, spacing=spacing)
    return np.union1d(times, np.asarray(extra_timesteps, times.dtype))


def _spaced(betas: ArrayLike, *, num_steps: int | None, spacing: str) -> np.ndarray:
    num_times = np.size(betas)
    if spacing not in typing.get_args(Spacing):
        if not (spacing.startswith("ddim") or spacing[:1].isdigit()):
            names = ", ".join(typing.get_args(Spacing))
            raise ValueError(
                f"unknown spacing {spacing!r}: choose one of {names}, or a rule such as '10,15,20' or 'ddim50'"
            )
        times = section_steps(num_times, spacing)
        if num_steps not in (None, len(times)):
            raise ValueError(f"spacing {spacing!r} is of {len(times)} steps, not of {num_steps}")
        return times
    num_steps = num_times if num_steps is None else num_steps
    if spacing == "log_snr":
        return evenly_spaced_in_log_snr(betas, num_steps)
    return _SPACINGS[spacing](num_times, num_steps)
