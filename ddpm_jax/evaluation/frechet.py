"""The Frechet distance between two sets of features, the number behind FID."""

import numpy as np


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    r"""Computes the squared Frechet distance between the Gaussians fitted to two sets of features.

    .. math::
      \|\mu_a - \mu_b\|^2 + \mathrm{tr}\,(\Sigma_a + \Sigma_b - 2 (\Sigma_a^{1/2} \Sigma_b \Sigma_a^{1/2})^{1/2})

    The root is taken in its symmetric form, in float64: it stays real where a covariance has no full rank. The
    distance falls as a set grows, also where nothing differs, so that only sets of like sizes can be compared.

    Args:
      features_a: (N, D), N >= 2, one row an image.
      features_b: (M, D), M >= 2.

    Returns:
      the distance, >= 0 up to rounding, in squared units of the features.

    Raises:
      ValueError: a set is no matrix, has fewer than two rows, or the two have unequal widths.

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
    # Rounding makes eigenvalues that are 0 slightly negative.
    trace_of_root = np.sqrt(np.maximum(np.linalg.eigvalsh(root_a @ covariance_b @ root_a), 0)).sum()
    difference = a.mean(axis=0) - b.mean(axis=0)
    return float(difference @ difference + np.trace(covariance_a) + np.trace(covariance_b) - 2 * trace_of_root)
