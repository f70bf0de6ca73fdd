"""Features of a whole set of images, saved part by part: interrupted, it resumes where it was."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.evaluation.features import Extractor
from ddpm_jax.evaluation.image_sets import ImageSet
from ddpm_jax.generation.store import Range, missing_ranges, part_file, part_files
from ddpm_jax.system.files import write_whole
from ddpm_jax.system.npy import read_npz
from ddpm_jax.system.progress import Progress

_IMAGES_PER_PART = 1024
_MOST_BYTES = 2**32  # of a part


def write_npz(file: Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays as an .npz file, atomically; raises as `write_whole`."""
    write_whole(file, lambda opened: np.savez(opened, **arrays))


class FeatureParts:
    """Features of ranges of images in a folder, one `.npz` file each, whose checksums are those of the archive."""

    def __init__(self, folder: Path):
        """Reads a folder, which need not exist."""
        self.folder = folder

    def done(self) -> list[Range]:
        """Returns the ranges that are saved."""
        return [saved for saved, _ in part_files(self.folder, ".npz")]

    def save(self, first: int, features: dict[str, np.ndarray]) -> None:
        """Saves the features of images from `first` on."""
        stop = first + len(next(iter(features.values())))
        write_npz(part_file(self.folder, first, stop, ".npz"), features)

    def load(self, number: int) -> tuple[dict[str, np.ndarray], list[Range]]:
        """Loads the features of the images 0 .. number-1, as far as they are saved and intact; removes damaged parts.

        Returns:
          the arrays, of all images, and the ranges that are missing in them.
        """
        arrays: dict[str, np.ndarray] = {}
        loaded: list[Range] = []
        for (first, stop), path in part_files(self.folder, ".npz"):
            try:
                found = read_npz(path, most_bytes=_MOST_BYTES)
            except (OSError, ValueError):
                path.unlink()
                continue
            end = min(stop, number)
            for name, rows in found.items():
                array = arrays.setdefault(name, np.empty((number, *rows.shape[1:]), rows.dtype))
                array[first:end] = rows[: max(0, end - first)]
            loaded.append((first, stop))
        return arrays, missing_ranges(loaded, number, longest=number)

    def remove(self) -> None:
        """Removes all parts, and the folder once it is empty."""
        for _, path in part_files(self.folder, ".npz"):
            path.unlink(missing_ok=True)
        for path in self.folder.glob(".*.part"):  # of a process that was killed
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def extract(
    images: ImageSet, extractor: Extractor, parts: FeatureParts, *, names: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Computes the features of a set of images, those that are saved excepted.

    Args:
      images: the set.
      extractor: of the features.
      parts: where they are saved; another set or other features need another folder.
      names: of the features to keep; all if not given.

    Returns:
      the features of all images by name, (N, ...) float32.

    Raises:
      UserError: an image cannot be read, or as `Extractor`.
    """
    longest = extractor.batch_size * max(1, _IMAGES_PER_PART // extractor.batch_size)
    while True:
        features, missing = parts.load(images.number)
        if not missing:
            return features
        todo = missing_ranges(parts.done(), images.number, longest=longest)
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
                parts.save(first, {name: np.concatenate([each[name] for each in found]) for name in kept})
