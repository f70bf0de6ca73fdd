"""Features of a whole set of images, saved part by part: interrupted, it resumes where it was."""

from collections.abc import Sequence

import numpy as np

from ddpm_jax.evaluation.features import Extractor
from ddpm_jax.evaluation.image_sets import ImageSet
from ddpm_jax.generation.store import Parts, missing_ranges, own_share, wait_for_hosts
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.hosts import is_primary_host
from ddpm_jax.system.progress import Progress

_IMAGES_PER_PART = 1024


def extract(
    images: ImageSet,
    extractor: Extractor,
    parts: Parts,
    *,
    names: Sequence[str] | None = None,
    by_all_hosts: bool = False,
) -> dict[str, np.ndarray]:
    """Computes the features of a set of images, those that are saved excepted.

    Args:
      images: the set.
      extractor: of the features.
      parts: where they are saved; made for this set and these features.
      names: of the features to keep; all if not given.
      by_all_hosts: whether all hosts call it, with a folder that they share, and each computes its part.

    Returns:
      the features of all images by name, (N, ...) float32; {} on other hosts than host 0.

    Raises:
      UserError: an image cannot be read, a part was damaged after it was saved, or as `Extractor`.
    """
    longest = extractor.batch_size * max(1, _IMAGES_PER_PART // extractor.batch_size)
    todo = missing_ranges(parts.ranges(), images.number, longest=longest)
    if by_all_hosts:
        todo = own_share(todo)
    with Progress(
        images.number,
        initial=images.number - sum(stop - first for first, stop in todo),
        unit="image",
        description=f"{extractor.features.name} features of {images.name}",
    ) as progress:
        for first, stop in todo:
            found: list[dict[str, np.ndarray]] = []
            for begin in range(first, stop, extractor.batch_size):
                indices = np.arange(begin, min(begin + extractor.batch_size, stop))
                found.append(extractor(images.read(indices)))
                progress.update(len(indices))
            kept = [name for name in found[0] if names is None or name in names]
            parts.save(first, stop, {name: np.concatenate([each[name] for each in found]) for name in kept})
    if by_all_hosts:
        wait_for_hosts(parts.ranges, images.number, folder=parts.folder)
        if not is_primary_host():
            return {}
    saved = parts.ranges()
    if missing_ranges(saved, images.number, longest=images.number):
        raise UserError(f"some features are missing in {parts.folder}: run the same command again")
    features: dict[str, np.ndarray] = {}
    for first, stop in saved:
        for name, rows in parts.load(first, stop).items():
            array = features.setdefault(name, np.empty((images.number, *rows.shape[1:]), rows.dtype))
            array[first:stop] = rows
    return features
