"""Scores of generated images by their features: FID, sFID, Inception Score, KID, precision and recall."""

import math
import typing
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddpm_jax.evaluation.features import INCEPTION
from ddpm_jax.evaluation.frechet import Moments, distance_of_moments, moments
from ddpm_jax.system.errors import UserError

INCEPTION_SCORE_SPLITS = 10
"""Splits of the images whose Inception Scores are averaged."""
KID_SUBSET = 1000
"""Most images in a subset of KID."""
LEAST_SUBSETS = 10
"""Least number of subsets of KID."""
NEIGHBOR = 3
"""Radius of an image in precision and recall: the distance to its k-th neighbor."""
MOST_REFERENCES = 10_000
"""Reference images of precision and recall, evenly spaced."""

# Distances that are computed at once on the device.
_DISTANCES_AT_ONCE = 2**25


class Statistics(typing.NamedTuple):
    """What scores need of the reference images."""

    name: str
    """Of the set, for messages."""
    number: int | None
    """Number of images; None if a file does not tell."""
    pool: Moments
    """Of the pooled features, for FID."""
    spatial: Moments | None = None
    """Of the spatial features, for sFID."""
    features: np.ndarray | None = None
    """Pooled features of all images or of evenly spaced ones, (M, D) float32, for KID, precision and recall."""


def names_of_scores(features: str) -> tuple[str, str]:
    """Returns what the Frechet and the kernel distance in some features are called.

    >>> names_of_scores("Inception"), names_of_scores("EfficientNetLite0")
    (('FID', 'KID'), ('FD-EfficientNetLite0', 'KD-EfficientNetLite0'))
    """
    return ("FID", "KID") if features == INCEPTION else (f"FD-{features}", f"KD-{features}")


def compute_scores(features: Mapping[str, np.ndarray], reference: Statistics, *, name: str) -> dict[str, float]:
    """Computes every score that the features and the reference allow.

    Args:
      features: of N >= 2 generated images, as `Extractor` returns them.
      reference: of the real images, in the same features.
      name: of the features, which decides what the scores are called.

    Returns:
      by name: FID (or FD-NAME); KID (or KD-NAME) with its standard error, precision and recall, if the reference has
      features; sFID, if both have spatial ones; the Inception Score `IS` with `IS_std`, if there are logits.

    Raises:
      UserError: the reference is of features of other dimensions.
    """
    frechet, kernel = names_of_scores(name)
    pool = features["pool"]
    check_width(reference, features, name=name)
    scores = {frechet: distance_of_moments(moments(pool), reference.pool)}
    if "spatial" in features and reference.spatial is not None:
        scores["sFID"] = distance_of_moments(moments(features["spatial"]), reference.spatial)
    if "logits" in features:
        scores["IS"], scores["IS_std"] = inception_score(features["logits"])
    if reference.features is not None and min(len(pool), len(reference.features)) >= 2 * LEAST_SUBSETS:
        scores[kernel], scores[f"{kernel}_standard_error"] = kernel_distance(pool, reference.features)
    if reference.features is not None and min(len(pool), len(reference.features)) > NEIGHBOR:
        real = evenly_spaced(reference.features, MOST_REFERENCES)
        scores["precision"], scores["recall"] = precision_and_recall(pool, real)
    return scores


def check_width(reference: Statistics, features: Mapping[str, np.ndarray], *, name: str) -> None:
    """Checks that a reference has the dimensions of the features that scores are to be computed in.

    Args:
      reference: of the real images.
      features: of any number of images, as `Extractor` returns them.
      name: of the features.

    Raises:
      UserError: it has others.
    """
    for array, known, kind in (("pool", reference.pool, ""), ("spatial", reference.spatial, "spatial ")):
        if array not in features or known is None:
            continue
        found, width = len(known.mean), features[array].shape[1]
        if found != width:
            raise UserError(
                f"{reference.name} contains statistics of {found}-dimensional {kind}features, but --features {name} "
                f"has {width}: they come from another network"
            )


def evenly_spaced(rows: np.ndarray, most: int) -> np.ndarray:
    """Returns at most so many rows, evenly spaced."""
    return rows if len(rows) <= most else rows[np.arange(most) * len(rows) // most]


def inception_score(logits: np.ndarray) -> tuple[float, float]:
    r"""Computes the Inception Score: mean and standard deviation over 10 splits of consecutive images.

    .. math:: \exp E_x\, KL(p(y|x)\, \|\, E_x p(y|x))

    Args:
      logits: (N, K).

    Salimans et al. 2016, sec. 4.
    """
    logs = logits.astype(np.float64)
    logs -= logs.max(axis=1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(axis=1, keepdims=True))
    scores = []
    for part in np.array_split(logs, min(INCEPTION_SCORE_SPLITS, len(logs))):
        share = np.exp(part)
        scores.append(np.exp((share * (part - np.log(share.mean(axis=0)))).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(features_a: np.ndarray, features_b: np.ndarray) -> tuple[float, float]:
    r"""Computes the squared maximum mean discrepancy with the kernel :math:`(x \cdot y / D + 1)^3`, without bias.

    Both sets are shuffled with a fixed seed and cut into equally many disjoint subsets of m images, at least 10 of
    them, m = 1,000 at most. The estimates of the pairs are independent, so their standard error is that of their mean.
    (Others average 100 overlapping random subsets of 1,000: the same expectation, and no standard error.)

    Args:
      features_a: (N, D), N >= 20.
      features_b: (M, D), M >= 20.

    Returns:
      the mean over the pairs of subsets, and its standard error.

    Raises:
      ValueError: a set is too small.

    Binkowski et al. 2018, sec. 4.
    """
    number = min(len(features_a), len(features_b))
    size = min(KID_SUBSET, number // LEAST_SUBSETS)
    if size < 2:
        raise ValueError(f"needs at least {2 * LEAST_SUBSETS} images per set, not {number}")
    random = np.random.default_rng(0)
    order_a, order_b = (random.permutation(len(features)) for features in (features_a, features_b))
    estimates = []
    for first in range(0, number - size + 1, size):
        a, b = (
            features[order[first : first + size]].astype(np.float64)
            for features, order in ((features_a, order_a), (features_b, order_b))
        )
        of_a, of_b, across = ((left @ right.T / a.shape[1] + 1) ** 3 for left, right in ((a, a), (b, b), (a, b)))
        within = (of_a.sum() - np.trace(of_a) + of_b.sum() - np.trace(of_b)) / (size * (size - 1))
        estimates.append(within - 2 * across.mean())
    return float(np.mean(estimates)), float(np.std(estimates, ddof=1) / math.sqrt(len(estimates)))


def precision_and_recall(generated: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """Computes which share of each set lies within the manifold of the other.

    The manifold of a set is the union of balls around its features that reach to the 3rd nearest of the others.

    Args:
      generated: (N, D), N > 3.
      real: (M, D), M > 3.

    Returns:
      precision, the share of generated images in the real manifold, and recall, that of real images in the generated
      one.

    Kynkaanniemi et al. 2019, sec. 2; on the device, in blocks.
    """
    center = real.mean(axis=0, dtype=np.float64)  # distances lose less to rounding near the origin
    a, b = ((features - center).astype(np.float32) for features in (generated, real))
    return _share_within(a, b), _share_within(b, a)


def _share_within(points: np.ndarray, centers: np.ndarray) -> float:
    on_device = jnp.asarray(centers)
    radii = jnp.asarray(_in_blocks(lambda block: _kth_distance(block, on_device), centers, len(centers)))
    return float(_in_blocks(lambda block: _is_within(block, on_device, radii), points, len(centers)).mean())


def _in_blocks(function: typing.Callable[[Array], Array], rows: np.ndarray, width: int) -> np.ndarray:
    size = min(len(rows), max(1, _DISTANCES_AT_ONCE // width))
    results = []
    for first in range(0, len(rows), size):
        block = rows[first : first + size]
        padded = np.concatenate([block, np.repeat(block[-1:], size - len(block), axis=0)])  # one shape, one program
        results.append(np.asarray(function(jnp.asarray(padded)))[: len(block)])
    return np.concatenate(results)


def _distances(a: Array, b: Array) -> Array:
    product = jnp.matmul(a, b.T, precision="highest")
    return jnp.maximum((a**2).sum(axis=1)[:, None] - 2 * product + (b**2).sum(axis=1)[None], 0)


@jax.jit
def _kth_distance(block: Array, centers: Array) -> Array:
    # The nearest of all is the point itself.
    return -jax.lax.top_k(-_distances(block, centers), NEIGHBOR + 1)[0][:, NEIGHBOR]


@jax.jit
def _is_within(block: Array, centers: Array, radii: Array) -> Array:
    return (_distances(block, centers) <= radii[None]).any(axis=1)
