r"""Bits/dim of images under the model: the whole bound, rate and distortion, and the variances that minimize it.

The bound is on the mass of bins of width 2/255, as for any 8-bit image. Images with fewer levels (scikit-learn's
digits have 17) still pay for one of 256, so their bits/dim are only comparable within the same data set.

Ho et al. 2020, sec. 4.3; Bao et al. 2022 (Analytic-DPM).
"""

import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ddpm_jax import keys as per_image_keys
from ddpm_jax.bound import prior_bits, reverse_bits
from ddpm_jax.forward import as_floats, at, check_t, q_posterior, q_sample
from ddpm_jax.losses import mean_squared_error
from ddpm_jax.names import Cdf, Prediction, Variance
from ddpm_jax.reverse import Predict, p_mean_variance, predict_eps, split_output
from ddpm_jax.schedules import Schedule, numbers


class Bound(typing.NamedTuple):
    """The bound on -log2 p(x_0) of B images at K timesteps; over all T, terms and prior add up to the whole bound."""

    terms: Array
    """(K, B) bits/dim: the decoder term at t = 0, a KL divergence at the other timesteps."""
    prior: Array
    """(B,) bits/dim: L_T."""
    x0_mse: Array
    r"""(K, B) :math:`|x_0 - \hat x_0|^2` / dim, of the predicted clean image behind the mean, clipped or not."""
    eps_mse: Array
    r"""(K, B) :math:`|\epsilon - \epsilon_\theta|^2` / dim, never clipped: its mean over timesteps is L_simple."""
    mean_mse: Array
    r"""(K, B) :math:`|\tilde\mu_t - \mu_\theta|^2` / dim, of the means of x_{t-1}: what the variance has to cover."""


def bound_terms(
    keys: Array,
    schedule: Schedule,
    predict: Predict,
    x0: Array,
    first: ArrayLike = 0,
    *,
    num_steps: int | None = None,
    prediction: Prediction = "eps",
    variance: Variance = "fixed_large",
    clip_x0: bool = True,
    cdf: Cdf = "tanh",
    log_variances: Array | None = None,
) -> Bound:
    r"""Computes the bound of images at all timesteps or a range of them, from one sample of x_t for each.

    .. math:: -\log p_\theta(x_0) \le L_T + \sum_{t > 0} L_t + L_0

    The noise of an image at t is drawn from `fold_in(its key, t)`, so consecutive ranges together give the same
    numbers as one range over all of them.

    Args:
      keys: (B,) keys, one per image; or one key for the batch.
      schedule: tables of T steps.
      predict: the network.
      x0: clean images, (B, H, W, C), each pixel one of 256 levels in [-1, 1].
      first: the first timestep of the range, in [0, T).
      num_steps: K, the number of timesteps, static; T if None.
      prediction: what the network predicts.
      variance: the variance of p(x_{t-1} | x_t).
      clip_x0: whether the predicted clean image is clipped, as the original code does in evaluation.
      cdf: see `bound.decoder_log_likelihood`.
      log_variances: (T,) log-variances to use instead of `variance`'s, see `bound_at`.

    Returns:
      the `Bound`.

    Ho et al. 2020, eqs. 3 and 5, and its code (`calc_bpd_loop`).
    """
    timesteps = jnp.asarray(first, jnp.int32) + jnp.arange(schedule.num_steps if num_steps is None else num_steps)
    return bound_at(
        keys,
        schedule,
        predict,
        x0,
        jnp.broadcast_to(timesteps[:, None], (len(timesteps), len(x0))),
        prediction=prediction,
        variance=variance,
        clip_x0=clip_x0,
        cdf=cdf,
        log_variances=log_variances,
    )


def bound_at(
    keys: Array,
    schedule: Schedule,
    predict: Predict,
    x0: Array,
    timesteps: Array,
    *,
    prediction: Prediction = "eps",
    variance: Variance = "fixed_large",
    clip_x0: bool = True,
    cdf: Cdf = "tanh",
    log_variances: Array | None = None,
) -> Bound:
    """Computes the terms of the bound at given timesteps of each image.

    One `lax.scan` over K, with the network on the whole batch at once; no image is kept.

    Args:
      keys: (B,) keys, one per image; or one key for the batch.
      schedule: tables of T steps.
      predict: the network.
      x0: clean images, (B, H, W, C), each pixel one of 256 levels in [-1, 1].
      timesteps: (K, B) int32, each in [0, T).
      prediction: what the network predicts.
      variance: the variance of p(x_{t-1} | x_t).
      clip_x0: whether the predicted clean image is clipped.
      cdf: see `bound.decoder_log_likelihood`.
      log_variances: (T,) log-variances to use instead of `variance`'s, which still determines whether the output has a
        second half.

    Returns:
      the `Bound`.

    Ho et al. 2020, eq. 5.
    """
    x0 = as_floats(x0, "x0")
    keys = per_image_keys.for_batch(keys, x0)
    chex.assert_shape(timesteps, (None, len(x0)))
    check_t(schedule, timesteps)
    if log_variances is not None:
        chex.assert_shape(log_variances, (schedule.num_steps,))

    def body(carry: None, t: Array) -> tuple[None, tuple[Array, ...]]:
        eps = per_image_keys.normal(per_image_keys.fold(keys, t), x0.shape[1:])
        x_t = q_sample(schedule, x0, t, eps)
        output = predict(x_t, at(schedule.timesteps, t))
        reverse = p_mean_variance(schedule, output, x_t, t, prediction=prediction, variance=variance, clip_x0=clip_x0)
        if log_variances is not None:
            reverse = reverse._replace(log_variance=at(log_variances, t, x_t))
        mean_output, _ = split_output(output, variance=variance)
        predicted_eps = predict_eps(schedule, mean_output, x_t, t, prediction=prediction)
        bits = reverse_bits(schedule, reverse, x0, x_t, t, cdf=cdf)
        mean = q_posterior(schedule, x0, x_t, t).mean
        errors = ((reverse.x0, x0), (predicted_eps, eps), (reverse.mean, mean))
        return carry, (bits, *(mean_squared_error(predicted, true) for predicted, true in errors))

    _, (terms, *errors) = jax.lax.scan(body, None, timesteps)
    return Bound(terms, prior_bits(schedule, x0), *errors)


def strata(num_steps: int, number: int) -> np.ndarray:
    """Computes log-spaced strata of timesteps, since the terms of the bound fall roughly as 1/t.

    t = 0, the decoder term, is a stratum of its own, and so are the first timesteps, whose terms are the largest.

    Args:
      num_steps: T.
      number: K, the number of strata, in [2, T]; T of them are the timesteps themselves.

    Returns:
      (K + 1,) int64 edges: 0, 1, .., T; stratum k is [edges[k], edges[k + 1]).

    Raises:
      ValueError: K is out of range.

    >>> strata(1000, 8).tolist()
    [0, 1, 3, 8, 21, 55, 145, 381, 1000]
    """
    least = min(2, num_steps)
    if not least <= number <= num_steps:
        raise ValueError(f"the number of strata must be in [{least}, {num_steps}], not {number}")
    edges = [0, 1]
    for left in range(number - 1, 0, -1):
        ideal = round(edges[-1] * (num_steps / edges[-1]) ** (1 / left))
        edges.append(min(max(edges[-1] + 1, ideal), num_steps - left + 1))
    return np.array(edges)


def fewest_strata(num_steps: int) -> int:
    r"""Returns the smallest number of strata whose standard error can be trusted: K with :math:`T \le 6^{K-1}`.

    The estimate of `draw_timesteps` is unbiased for any K, but in wide strata it rests on the rare draws of small t: it
    is skewed, and where these did not occur the standard error is too small as well. On the digits (T = 1000, 32
    images) the interval of +-1.96 standard errors missed the whole bound in 41 % of 4,000 repetitions with K = 2, in
    11 % with 3, 7.2 % with 4, 6.2 % with 5 and 5.5 % with all T.

    Args:
      num_steps: T.

    Returns:
      K, at least min(2, T).

    >>> fewest_strata(1000), fewest_strata(10)
    (5, 3)
    """
    number = min(2, num_steps)
    while 6 ** (number - 1) < num_steps:
        number += 1
    return number


def draw_timesteps(keys: Array, edges: ArrayLike) -> Array:
    r"""Draws one timestep of each stratum for each image, uniformly.

    .. math:: L_T + \sum_k n_k L_{t_k}, \quad t_k \sim \mathrm{Uniform}(\text{stratum } k \text{, of size } n_k)

    is an unbiased estimate of the whole bound from K evaluations of the network instead of T. For small K it is
    skewed: see `fewest_strata`.

    Args:
      keys: (B,) typed keys, one per image.
      edges: (K + 1,) edges, see `strata`.

    Returns:
      (K, B) int32.
    """
    edges = jnp.asarray(edges, jnp.int32)
    # fold_in(key, t) is the key of the noise at t < T; the last edge, T, is unused.
    draw = lambda key: jax.random.randint(jax.random.fold_in(key, edges[-1]), edges[1:].shape, edges[:-1], edges[1:])
    return jax.vmap(draw)(per_image_keys.typed(keys, one_per_image=True)).T


def total_bits(bound: Bound) -> Array:
    r"""Sums the bound of each image.

    .. math:: L = L_T + \sum_t L_t

    Args:
      bound: the bound over all T timesteps.

    Returns:
      (B,) bits/dim.

    Ho et al. 2020, eq. 5.
    """
    return bound.prior + bound.terms.sum(axis=0)


class RateDistortion(typing.NamedTuple):
    """Rate and distortion along the reverse process, float64."""

    reverse_time: np.ndarray
    """(T,) 1..T, the number of reverse steps taken; at T only the decoder term is left."""
    rate: np.ndarray
    """(T,) bits/dim transmitted so far, increasing."""
    distortion: np.ndarray
    """(T,) root mean squared error of the predicted clean image, on the scale [0, 255]."""


def rate_distortion(terms: ArrayLike, prior: ArrayLike, x0_mse: ArrayLike) -> RateDistortion:
    r"""Computes the rate-distortion curve from the bound's means over a data set.

    .. math::
      R_{T-t} = L_T + \sum_{s > t} L_s, \quad
      D_{T-t} = \tfrac{255}{2} \sqrt{E |x_0 - \hat x_0(x_t, t)|^2 / \mathrm{dim}}

    where t = T-1..0 is 0-based. After reverse time T - t the receiver can sample x_t and predict the image from it.
    The last rate and the decoder term (t = 0) add up to the bound.

    The distortion is the root of the *mean* squared error over the data set, so it does not depend on how the set is
    split into batches. (The mean of the images' root errors would be smaller. The paper does not say which it took.)

    Args:
      terms: (T,) bits/dim, means over the data set.
      prior: scalar bits/dim, likewise.
      x0_mse: (T,), likewise.

    Returns:
      the curve, in the order of reverse time.

    Ho et al. 2020, sec. 4.3, Fig. 5 and Table 4.

    >>> curve = rate_distortion([1.9, 0.5, 0.25], 0.1, [1e-4, 0.01, 0.25])
    >>> curve.rate.round(2).tolist(), curve.distortion.round(1).tolist()
    ([0.1, 0.35, 0.85], [63.8, 12.8, 1.3])
    """
    bits, mse = np.asarray(terms, np.float64), np.asarray(x0_mse, np.float64)
    chex.assert_equal_shape([bits, mse])
    reversed_terms = bits[:0:-1]
    rate = np.asarray(prior, np.float64) + np.append(0.0, np.cumsum(reversed_terms))
    return RateDistortion(np.arange(1, len(bits) + 1), rate, 127.5 * np.sqrt(mse[::-1]))


def spread(means: ArrayLike, edges: ArrayLike, like: ArrayLike) -> np.ndarray:
    r"""Distributes the mean of each stratum over its timesteps, in proportion to a given profile.

    .. math:: m_t = \bar m_k \frac{w_t}{\bar w_k}, \quad t \text{ in stratum } k

    Args:
      means: (T,), constant within each stratum.
      edges: (K + 1,) edges of the strata.
      like: (T,) the profile w: positive, or 0 throughout a stratum.

    Returns:
      (T,), with the same mean over each stratum; `means` itself if each stratum is one timestep.

    >>> spread([1.0, 4.0, 4.0], [0, 1, 3], [5.0, 1.0, 3.0]).tolist()
    [1.0, 2.0, 6.0]
    """
    means, like, widths = np.asarray(means, np.float64), np.asarray(like, np.float64), np.diff(np.asarray(edges))
    of_stratum = np.repeat(np.add.reduceat(like, np.asarray(edges)[:-1]) / widths, widths)
    return means * np.divide(like, of_stratum, out=np.ones_like(like), where=of_stratum > 0)


def optimal_log_variances(schedule: Schedule, mean_mse: ArrayLike) -> Array:
    r"""Computes the variance of each step that minimizes the bound, given the network's error.

    .. math:: \sigma_t^2 = \tilde\beta_t + E |\tilde\mu_t - \mu_\theta|^2 / \mathrm{dim}

    Up to terms without :math:`\sigma`, the KL term of a step is elementwise :math:`\frac12(\log\sigma^2 + (\tilde\beta
    + (\tilde\mu - \mu_\theta)^2) / \sigma^2)`; its mean over images and elements is smallest where :math:`\sigma^2` is
    the mean of the inner bracket. This is also the average of the true variance of x_{t-1} given x_t.

    The error of the mean is :math:`c_t = \sqrt{\bar\alpha_{t-1}}\,\beta_t / (1 - \bar\alpha_t)` times that of the
    predicted :math:`\hat x_0`. For the exact predictor :math:`\hat x_0 = E[x_0 | x_t]` this is Analytic-DPM's formula
    with :math:`\lambda_t^2 = \tilde\beta_t`,

    .. math:: \sigma_t^2 = \lambda_t^2 + \left(\sqrt{\tfrac{1 - \bar\alpha_t}{\alpha_t}}
              - \sqrt{1 - \bar\alpha_{t-1} - \lambda_t^2}\right)^2
              \left(1 - E |\hat\epsilon|^2 / \mathrm{dim}\right),

    since then :math:`E|\epsilon - \hat\epsilon|^2 = E|\epsilon|^2 - E|\hat\epsilon|^2`, the error of x_0 is that of
    :math:`\epsilon` times :math:`(1 - \bar\alpha_t) / \bar\alpha_t`, and the bracket is
    :math:`\beta_t / \sqrt{\alpha_t (1 - \bar\alpha_t)}`. The form with the means stays optimal for a network that is
    not exact and for a clipped x_0.

    At t = 0 there is a decoder term instead of a KL term, and the mean squared error does not determine its optimum:
    the bins are about as wide as the errors, and those of black and white are infinite. The entry of the fixed
    variances, which the original code chose for the decoder, is kept.

    Args:
      schedule: tables of T steps.
      mean_mse: (T,) mean over images and elements of the squared error of the mean of x_{t-1}.

    Returns:
      (T,) float32 log-variances, for `bound_terms`.

    Bao et al. 2022 (Analytic-DPM), eq. 8 and theorem 1; Ho et al. 2020, sec. 3.2 for the two extremes.
    """
    mean_mse = jnp.asarray(mean_mse, jnp.float32)
    chex.assert_shape(mean_mse, (schedule.num_steps,))
    # Without the logarithm of 0, whose derivative is not finite.
    variances = (schedule.posterior_variance + mean_mse).at[0].set(1)
    return jnp.log(variances).at[0].set(schedule.fixed_large_log_variance[0])


def estimated_log_variances(schedule: Schedule, mean_mse: ArrayLike, edges: ArrayLike) -> Array:
    r"""Computes the optimal variances from errors that are only known per stratum of timesteps.

    Within a stratum the error is assumed to vary as that of the exact predictor of N(0, I),
    :math:`c_t^2 (1 - \bar\alpha_t)`, which falls by orders of magnitude over the first timesteps.

    Args:
      schedule: tables of T steps.
      mean_mse: (T,) as in `optimal_log_variances`, constant within each stratum.
      edges: (K + 1,) edges of the strata.

    Returns:
      (T,) float32 log-variances; those of `optimal_log_variances` if each stratum is one timestep.
    """
    like = numbers(schedule.posterior_mean_coef_x0) ** 2 * numbers(schedule.one_minus_alphas_bar)
    return optimal_log_variances(schedule, spread(mean_mse, edges, like))
