"""The Frechet distance between two sets of features, on which FID is based."""

import numpy as np


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    r"""Computes the squared Frechet distance between the Gaussians fitted to two sets of features.

    .. math::
      \|\mu_a - \mu_b\|^2 + \mathrm{tr}\,(\Sigma_a + \Sigma_b - 2 (\Sigma_a^{1/2} \Sigma_b \Sigma_a^{1/2})^{1/2})

    The square root is taken in its symmetric form, in float64: it stays real if a covariance is singular. The distance
    falls as sets grow, even between samples of one distribution, so only sets of equal sizes are comparable.

    Args:
      features_a: (N, D), N >= 2, one row per image.
      features_b: (M, D), M >= 2.

    Returns:
      the distance, >= 0 up to rounding, in squared units of the features.

    Raises:
      ValueError: a set is not a matrix or has fewer than two rows, or the widths differ.

    Heusel et al. 2017, eq. 6; covariances with the divisor N - 1.

    >>> features = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> round(frechet_distance(features, features + 3), 6)               # moved by (3, 3)
    18.0
    """
    a, b = np.asarray(features_a, np.float64), np.asarray(features_b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"needs (N, D) and (M, D) with N, M >= 2, not {a.shape} and {b.shape}")
    covariance_a, covariance_b = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    values, vectors = np.linalg.eigh(covariance_a)
    root_a = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    # Rounding makes zero eigenvalues slightly negative.
    trace_of_root = np.sqrt(np.maximum(np.linalg.eigvalsh(root_a @ covariance_b @ root_a), 0)).sum()
    difference = a.mean(axis=0) - b.mean(axis=0)
    return float(difference @ difference + np.trace(covariance_a) + np.trace(covariance_b) - 2 * trace_of_root)
