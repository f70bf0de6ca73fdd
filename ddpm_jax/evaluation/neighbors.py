"""Nearest neighbors in a set of images: whether samples are new, or copies of training images."""

import math

import numpy as np

from ddpm_jax.data.source import Source
from ddpm_jax.system.progress import Progress

# Pixels of a set that are compared at once.
_PIXELS_AT_ONCE = 2**24


def nearest(images: np.ndarray, source: Source, *, number: int = 8, most: int | None = None) -> np.ndarray:
    r"""Finds the images of a set that are nearest to each of some images, pixel by pixel.

    .. math:: d(a, b) = \sum_j (a_j - b_j)^2 = |a|^2 - 2\, a \cdot b + |b|^2

    The set is read in batches, so it may be larger than memory.

    Args:
      images: (B, H, W, C) uint8.
      source: the set, of N images of the same shape.
      number: of neighbors.
      most: most images of the set that are searched, the first ones; all if not given.

    Returns:
      (B, min(number, N)) int64 indices, the nearest first; of equally near images, the first comes first.

    Raises:
      ValueError: the shapes differ.

    Ho et al. 2020, Figs. 12 and 15 (in pixel space).
    """
    if images.shape[1:] != source.image_shape:
        raise ValueError(f"images of {images.shape[1:]} have no neighbors among those of {source.image_shape}")
    dimensions = math.prod(source.image_shape)
    total = source.num_examples if most is None else min(most, source.num_examples)
    at_once = max(1, _PIXELS_AT_ONCE // dimensions)
    # Integers far below 2^53: all sums are exact in float64.
    flat = images.reshape(len(images), -1).astype(np.float64)
    best, indices = np.empty((len(images), 0)), np.empty((len(images), 0), np.int64)
    with Progress(total, unit="image", description="searching neighbors") as progress:
        for first in range(0, total, at_once):
            chosen = np.arange(first, min(first + at_once, total))
            others = source.read(chosen).reshape(len(chosen), -1).astype(np.float64)
            distances = (others**2).sum(axis=1)[None] - 2 * flat @ others.T  # without |a|^2, which is constant in a row
            best = np.concatenate([best, distances], axis=1)
            indices = np.concatenate([indices, np.tile(chosen, (len(images), 1))], axis=1)
            order = np.argsort(best, axis=1, kind="stable")[:, :number]
            best, indices = np.take_along_axis(best, order, axis=1), np.take_along_axis(indices, order, axis=1)
            progress.update(len(chosen))
    return indices
