r"""The variational bound on -log p(x_0), term by term (Ho et al. 2020, eq. 5)."""

import math
import typing

import chex
import jax
import jax.numpy as jnp
import jax.scipy.special
from jax import Array

from ddpm_jax.forward import Gaussian, as_floats, at, per_image, q_marginal, q_posterior
from ddpm_jax.names import Cdf, Prediction, Variance
from ddpm_jax.reverse import Reverse, p_mean_variance
from ddpm_jax.schedules import Schedule


def gaussian_kl(p: Gaussian, q: Gaussian) -> Array:
    r"""Computes KL(p || q) of two diagonal Gaussians elementwise, in nats.

    .. math:: \tfrac12\left(-1 + \log\frac{\sigma_q^2}{\sigma_p^2} + \frac{\sigma_p^2}{\sigma_q^2}
              + \frac{(\mu_p - \mu_q)^2}{\sigma_q^2}\right)

    Args:
      p: a Gaussian over images; fields broadcast against each other, of equal rank.
      q: likewise.

    Returns:
      the divergence of each element, of the broadcast shape.
    """
    difference = p.log_variance - q.log_variance
    return 0.5 * (-1 - difference + jnp.exp(difference) + (p.mean - q.mean) ** 2 * jnp.exp(-q.log_variance))


def _tanh_cdf(x: Array) -> Array:
    # (1 + tanh(y)) / 2, written so that float32 keeps its digits in the tail.
    return jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def decoder_log_likelihood(x0: Array, mean: Array, log_variance: Array, *, cdf: Cdf = "tanh") -> Array:
    r"""Computes log p(x_0 | x_1) of 8-bit pixels, in nats: the mass of a Gaussian in each pixel's bin.

    .. math:: \log \int_{x - 1/255}^{x + 1/255} \mathcal N(u; \mu, \sigma^2)\, du

    The bins of -1 and 1 extend to infinity. A mass below 1e-12 counts as 1e-12, as in the original code.

    Args:
      x0: clean images, (B, H, W, C), each pixel one of the 256 levels in [-1, 1].
      mean: of p(x_0 | x_1), shaped as `x0`.
      log_variance: of p(x_0 | x_1), broadcasts against `x0`.
      cdf: the original's approximation or the exact function (they differ by less than 4e-4 in probability).

    Returns:
      shaped as `x0`; never above 0.

    Ho et al. 2020, eq. 13, and its code (`discretized_gaussian_log_likelihood`).
    """
    x0 = as_floats(x0, "x0")
    chex.assert_equal_shape([x0, mean])
    normal_cdf = _tanh_cdf if cdf == "tanh" else jax.scipy.special.ndtr
    inverse_sigma = jnp.exp(-0.5 * log_variance)
    half_bin, offset = inverse_sigma / 255, (x0 - mean) * inverse_sigma
    # By symmetry each mass is computed in the lower tail: near 1 float32 cannot resolve small differences.
    below, above = normal_cdf(half_bin + offset), normal_cdf(half_bin - offset)
    middle = normal_cdf(half_bin - jnp.abs(offset)) - normal_cdf(-half_bin - jnp.abs(offset))
    mass = jnp.where(x0 < -0.999, below, jnp.where(x0 > 0.999, above, middle))
    return jnp.log(jnp.maximum(mass, 1e-12))


def bits_per_dim(nats: Array) -> Array:
    """Averages nats over the elements of each image and converts them to bits: (B, H, W, C) to (B,)."""
    return jnp.mean(nats, axis=tuple(range(1, nats.ndim))) / math.log(2)


def prior_bits(schedule: Schedule, x0: Array) -> Array:
    r"""Computes L_T, the prior term of the bound, in bits/dim.

    .. math:: L_T = KL(q(x_T | x_0) \| \mathcal N(0, I))

    Args:
      schedule: tables of T steps.
      x0: clean images, (B, H, W, C), in [-1, 1].

    Returns:
      (B,).

    Ho et al. 2020, eq. 5.
    """
    t = jnp.full(x0.shape[:1], schedule.num_steps - 1, jnp.int32)
    mean, log_variance = q_marginal(schedule, x0, t)
    # 1 - exp(log(1 - alphas_bar)) would lose all digits in float32; alphas_bar itself has them.
    excess = -log_variance - at(schedule.alphas_bar, t, x0)
    return bits_per_dim(0.5 * (mean**2 + excess))


class BoundTerm(typing.NamedTuple):
    """One term of the bound, and the clean image that the model predicted."""

    bits: Array
    """(B,) bits/dim: L_{t-1} of the paper, or L_0 where t is 0."""
    x0: Array
    """(B, H, W, C) the predicted clean image."""


def bound_term(
    schedule: Schedule,
    output: Array,
    x0: Array,
    x_t: Array,
    t: Array,
    *,
    prediction: Prediction,
    variance: Variance,
    clip_x0: bool,
    cdf: Cdf = "tanh",
) -> BoundTerm:
    r"""Computes the bound's term at timestep t from one sample of x_t, in bits/dim.

    .. math::
      L_{t} = KL(q(x_{t-1} | x_t, x_0) \| p_\theta(x_{t-1} | x_t)) \text{ for } t > 0, \quad
      L_0 = -\log p_\theta(x_0 | x_1) \text{ at } t = 0

    Args:
      schedule: tables of T steps.
      output: the network's output at (x_t, t), (B, H, W, C) or (B, H, W, 2C).
      x0: clean images, (B, H, W, C), each pixel one of 256 levels in [-1, 1].
      x_t: a sample of q(x_t | x_0), shaped as `x0`.
      t: 0-based timesteps, (B,) int32, each in [0, T).
      prediction: what the network predicts.
      variance: the variance of p.
      clip_x0: whether the predicted clean image is clipped; the original clips it in evaluation, not in training.
      cdf: see `decoder_log_likelihood`.

    Returns:
      the term.

    Ho et al. 2020, eqs. 5, 8 and 13.
    """
    reverse = p_mean_variance(schedule, output, x_t, t, prediction=prediction, variance=variance, clip_x0=clip_x0)
    return BoundTerm(reverse_bits(schedule, reverse, x0, x_t, t, cdf=cdf), reverse.x0)


def reverse_bits(schedule: Schedule, reverse: Reverse, x0: Array, x_t: Array, t: Array, *, cdf: Cdf = "tanh") -> Array:
    """Computes the bound's term at timestep t for a given reverse step: see `bound_term`."""
    x0, x_t = as_floats(x0, "x0"), as_floats(x_t, "x_t")
    chex.assert_equal_shape([x0, x_t, reverse.mean])
    kl = gaussian_kl(q_posterior(schedule, x0, x_t, t), Gaussian(reverse.mean, reverse.log_variance))
    decoder = -decoder_log_likelihood(x0, reverse.mean, reverse.log_variance, cdf=cdf)
    return bits_per_dim(jnp.where(per_image(t, kl) == 0, decoder, kl))
