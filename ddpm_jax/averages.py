r"""Averages of the weights by power functions of time, and how those of other widths are reconstructed from them.

.. math:: \hat\theta_\gamma(t) = \int_0^t p_{\gamma,t}(\tau)\,\theta(\tau)\,d\tau, \quad
   p_{\gamma,t}(\tau) = \frac{\gamma + 1}{t^{\gamma + 1}}\,\tau^\gamma

Time is the number of training steps. The width of a profile is the standard deviation of tau in units of t, called
sigma_rel: 0.1 averages over about the last tenth of the training, however long it was.

Karras et al. 2024 (EDM2), sec. 3 and app. C.
"""

import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddpm_jax.names import WIDEST

Params = typing.Any
"""Arrays in nested dictionaries, by name."""


def gamma_of(sigma_rel: float) -> float:
    r"""Computes the exponent of a profile from its width.

    .. math:: (\gamma + 2)^2 (\gamma + 3) = (\gamma + 1) / \sigma_\mathrm{rel}^2

    Args:
      sigma_rel: the width, in (0, 0.28].

    Returns:
      the largest root, > 0.

    Raises:
      ValueError: the width is out of range.

    Karras et al. 2024, sec. 3.1 and app. C.

    >>> [round(gamma_of(width), 2) for width in (0.05, 0.10, 0.15)]
    [16.97, 6.94, 3.56]
    """
    if not 0 < sigma_rel <= WIDEST:
        raise ValueError(f"sigma_rel must be above 0 and at most {WIDEST}, not {sigma_rel}")
    square = float(sigma_rel) ** -2
    return float(np.roots([1, 7, 16 - square, 12 - square]).real.max())


def sigma_rel_of(gamma: float) -> float:
    r"""Computes the width of a profile from its exponent.

    .. math:: \sigma_\mathrm{rel} = \frac{(\gamma + 1)^{1/2}}{(\gamma + 2)\,(\gamma + 3)^{1/2}}

    Karras et al. 2024, sec. 3.1.
    """
    return float((gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5))


def update_power_average(average: Params, params: Params, step: Array, *, gamma: float) -> Params:
    r"""Moves a power-function average towards new parameters.

    .. math:: \hat\theta \leftarrow \beta_t\,\hat\theta + (1 - \beta_t)\,\theta, \quad
       \beta_t = (1 - 1/t)^{\gamma + 1}, \quad t = \mathrm{step} + 1

    The weight of the parameters after update k is then :math:`(k^{\gamma+1} - (k-1)^{\gamma+1}) / t^{\gamma+1}`: the
    integral of the profile over the k-th step, exactly.

    Args:
      average: the average so far; not used at the first update, which copies the parameters.
      params: the parameters after the update.
      step: number of updates before this one, scalar int32.
      gamma: the exponent, >= 0.

    Returns:
      the new average.

    Karras et al. 2024, sec. 3.1.
    """
    # In float32, 1 - beta would keep two digits after a million steps.
    rate = -jnp.expm1((gamma + 1) * jnp.log1p(-1 / (step + 1).astype(jnp.float32)))
    move = lambda old, new: jnp.where(step == 0, new, old + rate.astype(old.dtype) * (new - old))
    return jax.tree.map(move, average, params)


class Profiles(typing.NamedTuple):
    """N profiles."""

    gamma: np.ndarray
    """(N,) float64 exponents."""
    time: np.ndarray
    """(N,) float64, each above 0: the t that the profile ends at."""


def inner_products(a: Profiles, b: Profiles) -> np.ndarray:
    r"""Computes the inner product of every profile of one set with every one of another.

    .. math:: \langle p_a, p_b \rangle = \int p_a\,p_b\,d\tau = \frac{(\gamma_a + 1)(\gamma_b + 1)}
       {\gamma_a + \gamma_b + 1} \cdot \frac{m^{\gamma_a + \gamma_b + 1}}{t_a^{\gamma_a + 1}\,t_b^{\gamma_b + 1}},
       \quad m = \min(t_a, t_b)

    Args:
      a: N profiles.
      b: M profiles.

    Returns:
      (N, M) float64.

    Karras et al. 2024, sec. 3.2 and app. C.
    """
    gamma_a, time_a = (each[:, None] for each in a)
    gamma_b, time_b = (each[None] for each in b)
    least = np.minimum(time_a, time_b)
    factor = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) / least
    return factor * (least / time_a) ** (gamma_a + 1) * (least / time_b) ** (gamma_b + 1)


class Reconstruction(typing.NamedTuple):
    """How a profile is reconstructed from others."""

    weights: np.ndarray
    """(N,) float64 weights of the given profiles, whose sum is 1."""
    error: float
    """Distance between the reconstructed profile and the requested one, relative to the norm of this one."""


def reconstruct(given: Profiles, *, gamma: float, time: float) -> Reconstruction:
    r"""Finds the weighted sum of given profiles that comes nearest to another one.

    .. math:: \min_x \int \Big(\sum_i x_i\,p_i(\tau) - p_{\gamma,t}(\tau)\Big)^2 d\tau
       \quad \text{with} \quad \sum_i x_i = 1

    The same sum of the averages of weights is the reconstructed average. Without the constraint, as in the paper, a
    profile that the given ones fit badly would also scale the weights of the network.

    Args:
      given: N profiles, no two of them equal.
      gamma: exponent of the requested profile.
      time: t of the requested profile.

    Returns:
      the `Reconstruction`.

    Karras et al. 2024, sec. 3.2 and app. C.
    """
    wanted = Profiles(np.array([gamma]), np.array([time]))
    products, right = inner_products(given, given), inner_products(given, wanted)[:, 0]
    square = float(inner_products(wanted, wanted)[0, 0])
    # Profiles of norm 1: the system is conditioned as well as the profiles allow.
    norm = np.sqrt(np.diag(products))
    system = np.zeros((len(norm) + 1,) * 2)
    system[:-1, :-1] = products / norm / norm[:, None]
    system[-1, :-1] = system[:-1, -1] = norm.min() / norm
    # The least squares of the system itself, which two profiles that are nearly equal make nearly singular.
    solved = np.linalg.lstsq(system, np.append(right / norm, norm.min()), rcond=None)[0][:-1] / norm
    residual = square - 2 * right @ solved + solved @ products @ solved
    return Reconstruction(solved, float(np.sqrt(max(residual, 0) / square)))
