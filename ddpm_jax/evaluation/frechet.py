"""The Frechet distance between two sets of features, on which FID is based."""

import typing

import numpy as np

# Rows that are summed at once in float64.
_ROWS_AT_ONCE = 4096


class Moments(typing.NamedTuple):
    """Mean and covariance of the features of a set of images."""

    mean: np.ndarray
    """(D,) float64."""
    covariance: np.ndarray
    """(D, D) float64, with the divisor N - 1."""


def moments(features: np.ndarray) -> Moments:
    """Computes the mean and the covariance of features, in float64 whatever their type.

    Args:
      features: (N, D), N >= 2, one row per image.

    Raises:
      ValueError: it is not a matrix, or has fewer than two rows.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"needs (N, D) with N >= 2, not {features.shape}")
    mean = features.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((len(mean), len(mean)))
    for first in range(0, len(features), _ROWS_AT_ONCE):
        rows = features[first : first + _ROWS_AT_ONCE] - mean
        covariance += rows.T @ rows
    return Moments(mean, covariance / (len(features) - 1))


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Computes the squared Frechet distance between the Gaussians fitted to two sets of features.

    The distance falls as sets grow, even between samples of one distribution, so only sets of equal sizes are
    comparable.

    Args:
      features_a: (N, D), N >= 2, one row per image.
      features_b: (M, D), M >= 2.

    Returns:
      the distance as `distance_of_moments` computes it.

    Raises:
      ValueError: a set is not a matrix or has fewer than two rows, or the widths differ.

    >>> features = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> round(frechet_distance(features, features + 3), 6)               # moved by (3, 3)
    18.0
    """
    a, b = np.asarray(features_a, np.float64), np.asarray(features_b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"needs (N, D) and (M, D) with N, M >= 2, not {a.shape} and {b.shape}")
    return distance_of_moments(moments(a), moments(b))


def distance_of_moments(a: Moments, b: Moments) -> float:
    r"""Computes the squared Frechet distance between two Gaussians.

    .. math::
      \|\mu_a - \mu_b\|^2 + \mathrm{tr}\,(\Sigma_a + \Sigma_b - 2 (\Sigma_a^{1/2} \Sigma_b \Sigma_a^{1/2})^{1/2})

    The trace of the root is the sum of the singular values of :math:`\Sigma_a^{1/2} \Sigma_b^{1/2}`, in float64. It is
    real and exact to rounding also if a covariance is singular, as those of fewer images than features are; the root
    of the product itself is neither.

    Args:
      a: moments of D features.
      b: likewise.

    Returns:
      the distance, >= 0 up to rounding, in squared units of the features.

    Raises:
      ValueError: the numbers of features differ.

    Heusel et al. 2017, eq. 6.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"moments of {a.mean.shape} and {b.mean.shape} features")
    trace_of_root = np.linalg.svd(_factor(a.covariance).T @ _factor(b.covariance), compute_uv=False).sum()
    difference = a.mean - b.mean
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * trace_of_root)


def _factor(covariance: np.ndarray) -> np.ndarray:
    """Returns F, of as many columns as the rank, with F F^T equal to a covariance."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0)  # the others are rounding errors
    return vectors[:, kept] * np.sqrt(values[kept])
