"""Whether images that count as held out are among those that a run is trained on: by their pixels, or their places."""

import numpy as np

from ddpm_jax.config import DataConfig
from ddpm_jax.data.fingerprint import pixel_hashes
from ddpm_jax.data.source import Source
from ddpm_jax.data.sources import load_source, resolve
from ddpm_jax.system.errors import UserError

_MOST_GIB = 4  # of a training set in memory or mapped, whose pixels are all compared
_MOST_READ = 100_000  # images of a training set on disk that are decoded to compare them: about a minute


def count_shared(
    source: Source, training: Source, indices: np.ndarray | None = None, *, most_read: int = _MOST_READ
) -> int | None:
    """Counts the images of a set that are also in a training set.

    Args:
      source: the set.
      training: the training set. Equal pixels are counted if it is in memory, mapped and up to 4 GiB, or has at most
        `most_read` images on disk; of a larger set of TFDS, equal places in its files are counted.
      indices: (M,) which images of the set; all if None.
      most_read: see `training`.

    Returns:
      the number, 0 to M; None if it is not known, because the training set is too large to be read.
    """
    images = training.images
    small = training.num_examples <= most_read if images is None else images.nbytes <= _MOST_GIB * 2**30
    if small and source.image_shape == training.image_shape:
        known = pixel_hashes(training, label="reading the training images")
        return int(np.isin(pixel_hashes(source, indices, label="comparing with them"), known).sum())
    if not source.places or not training.places:
        return None
    files = {file: number for number, (file, _, _) in enumerate((*source.places, *training.places))}
    places = _places(source, files)
    return int(np.isin(places if indices is None else places[indices], _places(training, files)).sum())


def _places(source: Source, files: dict[str, int]) -> np.ndarray:
    """Returns the place of each image as one number."""
    return np.concatenate([np.arange(first, stop) + (files[file] << 40) for file, first, stop in source.places])


def count_trained_on(config: DataConfig, split: str, source: Source, indices: np.ndarray) -> int | None:
    """Counts the images of a split that are among the training images of a run.

    Args:
      config: the run's images; its `split` is the one that it is trained on.
      split: another split of them.
      source: the images of that split.
      indices: (M,) which images of it.

    Returns:
      as `count_shared`; None also if the training images cannot be read.
    """
    if split == config.split:
        return len(indices)
    if config.holdout and {split, config.split} == {"train", "test"}:
        return 0  # by their pixels, equal images are on the same side
    try:
        return count_shared(source, load_source(resolve(config)), indices)
    except UserError:
        return None
