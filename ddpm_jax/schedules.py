r"""Noise schedules: :math:`\beta_t` by name, and the tables derived from it (Ho et al. 2020, sec. 2)."""

import dataclasses
import typing
from collections.abc import Callable

import jax
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from ddpm_jax.names import ScheduleName


def concrete(values: typing.Any) -> np.ndarray | None:
    """Returns the values of an array; None if they are not known: inside `jit`, `grad` or `vmap`, or on other hosts."""
    if isinstance(values, jax.core.Tracer) or (isinstance(values, jax.Array) and not values.is_fully_addressable):
        return None
    return np.asarray(values)


def numbers(table: typing.Any) -> np.ndarray:
    """Returns the values of a schedule's table in float64.

    Raises:
      TypeError: they are not known, since the schedule is traced.
    """
    known = concrete(table)
    if known is None:
        raise TypeError(
            "the schedule is traced (an argument of jit, grad or vmap), but its numbers are needed here: make the "
            "sampler outside of the traced function, or let the function close over the schedule or make it"
        )
    return known.astype(np.float64)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    r"""The tables of a diffusion of T steps: an immutable pytree of (T,) float32 arrays.

    Each is computed in float64 and rounded once. Indices are 0-based: entry `t` is the paper's t+1, and where a
    formula needs :math:`\bar\alpha_{t-1}` at t = 0, its value is 1.

    Every function that takes a schedule and `t` raises ValueError for a t outside [0, T) where its value is known.
    Inside `jit` it is not, and such a t reads another entry of the tables.
    """

    betas: Array
    r""":math:`\beta_t`, the variance added by step t."""
    alphas: Array
    r""":math:`\alpha_t = 1 - \beta_t`."""
    alphas_bar: Array
    r""":math:`\bar\alpha_t = \prod_{s \le t} \alpha_s`, the fraction of the signal's variance left at t."""
    alphas_bar_prev: Array
    r""":math:`\bar\alpha_{t-1}`, 1 at t = 0."""
    one_minus_alphas_bar: Array
    r""":math:`1 - \bar\alpha_t`, the variance of q(x_t | x_0)."""
    sqrt_alphas_bar: Array
    r""":math:`\sqrt{\bar\alpha_t}`."""
    sqrt_one_minus_alphas_bar: Array
    r""":math:`\sqrt{1 - \bar\alpha_t}`."""
    log_one_minus_alphas_bar: Array
    r""":math:`\log(1 - \bar\alpha_t)`."""
    sqrt_recip_alphas_bar: Array
    r""":math:`\sqrt{1 / \bar\alpha_t}`; infinite where :math:`\bar\alpha_t = 0` (the last step of "jsd")."""
    sqrt_recip_alphas_bar_minus_one: Array
    r""":math:`\sqrt{1 / \bar\alpha_t - 1}`; infinite where :math:`\bar\alpha_t = 0`."""
    posterior_mean_coef_x0: Array
    r""":math:`\sqrt{\bar\alpha_{t-1}}\,\beta_t / (1 - \bar\alpha_t)`, the weight of x_0 in eq. 7."""
    posterior_mean_coef_x_t: Array
    r""":math:`\sqrt{\alpha_t}\,(1 - \bar\alpha_{t-1}) / (1 - \bar\alpha_t)`, the weight of x_t in eq. 7."""
    posterior_variance: Array
    r""":math:`\tilde\beta_t` of eq. 7; 0 at t = 0."""
    posterior_log_variance_clipped: Array
    r""":math:`\log\tilde\beta_t`, with the infinite entry 0 replaced by entry 1, as the original code does."""
    log_betas: Array
    r""":math:`\log\beta_t`."""
    fixed_large_log_variance: Array
    r""":math:`\log\beta_t` with entry 0 replaced by :math:`\log\tilde\beta_1`, as the original code does "to
    get a better decoder log likelihood"."""
    log_alphas: Array
    r""":math:`\log\alpha_t`; -infinity where :math:`\beta_t = 1`."""
    log_alphas_rest: Array
    r"""What rounding took from `log_alphas`: the sum of the two has 48 bits, for what is computed on the host."""
    timesteps: Array
    """(T,) int32: the network's input at step t: 0..T-1, except in a respaced schedule."""

    @property
    def num_steps(self) -> int:
        """T."""
        return self.betas.shape[0]


def exact_log_alphas(schedule: Schedule | ArrayLike) -> np.ndarray:
    r"""Returns :math:`\log\alpha_t` of a schedule or of its betas in float64, for computations on the host.

    Args:
      schedule: a schedule, or its betas, (T,); not traced.

    Returns:
      (T,) float64, of a `Schedule` to 48 bits.

    Raises:
      TypeError: the schedule is traced.
    """
    if isinstance(schedule, Schedule):
        return numbers(schedule.log_alphas) + numbers(schedule.log_alphas_rest)
    with np.errstate(divide="ignore"):
        return np.log1p(-numbers(schedule))


def _warmup(beta_start: float, beta_end: float, num_steps: int, fraction: float) -> np.ndarray:
    betas = np.full(num_steps, beta_end)
    rising = int(num_steps * fraction)
    betas[:rising] = np.linspace(beta_start, beta_end, rising)
    return betas


def _cosine(num_steps: int) -> np.ndarray:
    # Nichol & Dhariwal 2021, eq. 17, with s = 0.008 and the last entries clipped to 0.999.
    alphas_bar = np.cos((np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alphas_bar[1:] / alphas_bar[:-1], 0.999)


_BETAS: dict[str, Callable[[int, float, float], np.ndarray]] = {
    "linear": lambda T, start, end: np.linspace(start, end, T),
    "quad": lambda T, start, end: np.linspace(start**0.5, end**0.5, T) ** 2,
    "const": lambda T, start, end: np.full(T, end),
    "warmup10": lambda T, start, end: _warmup(start, end, T, 0.1),
    "warmup50": lambda T, start, end: _warmup(start, end, T, 0.5),
    "jsd": lambda T, start, end: 1 / np.linspace(T, 1, T),
    "sigmoid": lambda T, start, end: (end - start) / (1 + np.exp(-np.linspace(-6, 6, T))) + start,
    "cosine": lambda T, start, end: _cosine(T),
}


def make_betas(name: ScheduleName, num_steps: int, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    r"""Returns :math:`\beta_0 .. \beta_{T-1}` of a named schedule in float64.

    ========  ====================================================================================
    linear    :math:`\beta` rises linearly from `beta_start` to `beta_end` (the paper's)
    quad      :math:`\sqrt\beta` rises linearly
    const     `beta_end` at every step
    warmup10  rises linearly over the first 10% of the steps, then stays at `beta_end`
    warmup50  rises linearly over the first 50% of the steps, then stays at `beta_end`
    jsd       1/T, 1/(T-1), .., 1, so that :math:`\bar\alpha_t = 1 - (t+1)/T`
    sigmoid   rises from `beta_start` to `beta_end` along a sigmoid over [-6, 6]
    cosine    :math:`\bar\alpha` falls as :math:`\cos^2`, with each beta at most 0.999
    ========  ====================================================================================

    Args:
      name: one of the names above.
      num_steps: T >= 1.
      beta_start: first beta, in (0, 1]; ignored by const, jsd and cosine. For a "linear" schedule of T != 1000 steps
        Improved DDPM scales both ends by 1000 / T.
      beta_end: last beta, in (0, 1]; ignored by jsd and cosine.

    Returns:
      (T,) float64.

    Raises:
      ValueError: the name is unknown, T < 1, or a beta is outside (0, 1].

    Ho et al. 2020, sec. 4 and its code (`get_beta_schedule`); sigmoid: Song et al. 2021 (DDIM), its code; cosine:
    Nichol & Dhariwal 2021, eq. 17.

    >>> [round(float(beta), 4) for beta in make_betas("linear", 3)]
    [0.0001, 0.01, 0.02]
    """
    if name not in _BETAS:
        raise ValueError(f"unknown schedule {name!r}: choose one of {', '.join(_BETAS)}")
    if num_steps < 1:
        raise ValueError(f"a schedule needs at least 1 step, not num_steps={num_steps}")
    for field, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
        if not 0 < beta <= 1:
            raise ValueError(f"{field}={beta} is outside (0, 1]: a beta is the variance that one step adds")
    return _BETAS[name](num_steps, beta_start, beta_end)


def zero_terminal_snr(betas: ArrayLike) -> np.ndarray:
    r"""Rescales betas so that nothing of x_0 is left at the last step, where chains start from pure noise.

    .. math::
      \sqrt{\bar\alpha_t} \leftarrow \frac{\sqrt{\bar\alpha_t} - \sqrt{\bar\alpha_{T-1}}}
                                      {\sqrt{\bar\alpha_0} - \sqrt{\bar\alpha_{T-1}}}\, \sqrt{\bar\alpha_0}

    The first step keeps its :math:`\bar\alpha`, and the last beta becomes 1. Train with prediction "v" or "x0": there,
    eps does not determine x_0.

    Args:
      betas: (T,), T >= 2, each in (0, 1]; 1 is allowed only at the last step.

    Returns:
      (T,) float64.

    Raises:
      ValueError: there is one step only, which cannot both keep its signal and lose it.

    Lin et al. 2024 (Common diffusion noise schedules and sample steps are flawed), Algorithm 1.

    >>> [round(float(beta), 4) for beta in zero_terminal_snr([0.1, 0.2, 0.3])]
    [0.1, 0.663, 1.0]
    """
    betas = numbers(betas)
    if betas.ndim != 1 or len(betas) < 2:
        raise ValueError(f"zero terminal SNR needs the betas of at least 2 steps, not an array of shape {betas.shape}")
    root = np.sqrt(np.cumprod(1 - betas))
    root = (root - root[-1]) / (root[0] - root[-1]) * root[0]
    ratio = np.append(root[0], root[1:] / root[:-1])
    return 1 - ratio**2


def schedule_from_betas(betas: ArrayLike, *, timesteps: ArrayLike | None = None) -> Schedule:
    r"""Computes the tables of a schedule from :math:`\beta_t`: in float64, each rounded once to float32.

    Args:
      betas: (T,), each in (0, 1]; 1 is allowed only at the last step, after which nothing of x_0 is left.
      timesteps: (T,) integers, the network's input at each step of a respaced schedule; 0..T-1 if None.

    Returns:
      the `Schedule`.

    Raises:
      TypeError: `betas` is traced, an argument of a `jit` for instance.
      ValueError: `betas` is not a vector, is empty, or has an entry outside (0, 1].

    Ho et al. 2020, eqs. 4 and 7.
    """
    betas = numbers(betas)
    _check_betas(betas)
    with np.errstate(divide="ignore"):
        return _schedule(betas, np.log1p(-betas), timesteps)


def schedule_from_log_alphas(log_alphas: np.ndarray, *, timesteps: ArrayLike | None = None) -> Schedule:
    r"""Computes the tables of a schedule from :math:`\log\alpha_t`, which keeps the digits of an alpha close to 0.

    Args:
      log_alphas: (T,) float64, each < 0; -infinity only at the last step.
      timesteps: as in `schedule_from_betas`.

    Returns:
      the `Schedule`.

    Raises:
      ValueError: as `schedule_from_betas`.
    """
    betas = -np.expm1(log_alphas)
    _check_betas(betas)
    return _schedule(betas, log_alphas, timesteps)


def _check_betas(betas: np.ndarray) -> None:
    if betas.ndim != 1 or betas.size < 1:
        raise ValueError(f"betas must be a vector of at least one step, not of shape {betas.shape}")
    wrong = ~((betas > 0) & (betas <= 1))
    wrong[:-1] |= betas[:-1] == 1
    if wrong.any():
        t = int(np.argmax(wrong))
        raise ValueError(f"beta[{t}]={betas[t]} is outside (0, 1) (1 is allowed only at the last step)")


def _schedule(betas: np.ndarray, log_alphas: np.ndarray, timesteps: ArrayLike | None) -> Schedule:
    timesteps = np.arange(betas.size) if timesteps is None else np.asarray(timesteps)
    if timesteps.shape != betas.shape:
        raise ValueError(f"timesteps of shape {timesteps.shape} do not match betas of shape {betas.shape}")

    alphas = 1 - betas
    alphas_bar = np.cumprod(alphas)
    alphas_bar_prev = np.append(1.0, alphas_bar[:-1])
    # Via logarithms: 1 - alphas_bar would lose the digits of a small beta.
    one_minus_alphas_bar = -np.expm1(np.cumsum(log_alphas))
    one_minus_alphas_bar_prev = np.append(0.0, one_minus_alphas_bar[:-1])
    posterior_variance = betas * one_minus_alphas_bar_prev / one_minus_alphas_bar
    # A chain of one step has no entry 1; its only step adds no noise, so beta will do.
    first = posterior_variance[1] if betas.size > 1 else betas[0]
    with np.errstate(divide="ignore"):
        recip_alphas_bar = 1 / alphas_bar
    finite = np.where(np.isfinite(log_alphas), log_alphas, 0.0)
    tables = dict(
        betas=betas,
        alphas=alphas,
        alphas_bar=alphas_bar,
        alphas_bar_prev=alphas_bar_prev,
        one_minus_alphas_bar=one_minus_alphas_bar,
        sqrt_alphas_bar=np.sqrt(alphas_bar),
        sqrt_one_minus_alphas_bar=np.sqrt(one_minus_alphas_bar),
        log_one_minus_alphas_bar=np.log(one_minus_alphas_bar),
        sqrt_recip_alphas_bar=np.sqrt(recip_alphas_bar),
        sqrt_recip_alphas_bar_minus_one=np.sqrt(one_minus_alphas_bar * recip_alphas_bar),
        posterior_mean_coef_x0=np.sqrt(alphas_bar_prev) * betas / one_minus_alphas_bar,
        posterior_mean_coef_x_t=np.sqrt(alphas) * one_minus_alphas_bar_prev / one_minus_alphas_bar,
        posterior_variance=posterior_variance,
        posterior_log_variance_clipped=np.log(np.append(first, posterior_variance[1:])),
        log_betas=np.log(betas),
        fixed_large_log_variance=np.log(np.append(first, betas[1:])),
        log_alphas=log_alphas,
        log_alphas_rest=finite - finite.astype(np.float32),
    )
    # Numbers also where a schedule is made inside a traced function: a solver computes its weights from them.
    with jax.ensure_compile_time_eval():
        float32 = {name: jax.numpy.asarray(table, jax.numpy.float32) for name, table in tables.items()}
        return Schedule(**float32, timesteps=jax.numpy.asarray(timesteps, jax.numpy.int32))


def make_schedule(name: ScheduleName, num_steps: int, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    r"""Makes a named schedule of T steps.

    Args:
      name: see `make_betas`.
      num_steps: T >= 1; the paper's is 1000.
      beta_start: first beta, in (0, 1].
      beta_end: last beta, in (0, 1].

    Returns:
      the `Schedule`.

    Raises:
      ValueError: as `make_betas`.

    Ho et al. 2020, sec. 4: T = 1000, linear from 1e-4 to 0.02.

    >>> schedule = make_schedule("linear", 1000)
    >>> schedule.alphas_bar[999]                                # L_T is close to 0
    Array(4.0358296e-05, dtype=float32)
    """
    return schedule_from_betas(make_betas(name, num_steps, beta_start=beta_start, beta_end=beta_end))
