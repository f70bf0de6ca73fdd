"""A set of images: its size and shape, random access to uint8 images, and labels or none."""

import concurrent.futures
import dataclasses
import functools
import math
import os
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike
from tqdm import tqdm

from ddpm_jax.config import DataConfig
from ddpm_jax.system.errors import NoSuchSplit

NUM_THREADS = min(16, 2 * (os.cpu_count() or 1))
"""Threads that read and decode images."""
_CHUNK = 1024  # items given to the threads at a time: a set of millions must not become a list of millions
_BAR_FROM = 2000  # images from which on loading takes long enough for a progress bar


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A set of images with random access; of arrays in memory, `in_memory` makes it.

    Your own function behind `data.source=my_data.py:function` takes the `DataConfig` and returns one, or None if there
    are no images of that `split`. Index i must be the same image each time: a run reads images by index alone, in an
    order that follows from its seed.
    """

    num_examples: int
    """N."""
    image_shape: tuple[int, int, int]
    """(H, W, C)."""
    read_images: Callable[[np.ndarray], np.ndarray]
    """Maps (B,) indices to (B, H, W, C) uint8; called from several threads, or (data.workers) processes."""
    read_labels: Callable[[np.ndarray], np.ndarray] | None = None
    """Maps (B,) indices to (B,) int32, each in [0, len(class_names)); None if the images have no labels."""
    class_names: tuple[str, ...] = ()
    """Names of the classes; empty without labels."""
    name: str = ""
    """What it is and which split, for messages; the source and split of the configuration if empty."""
    images: np.ndarray | None = None
    """All images, (N, H, W, C) uint8, if they are in memory."""
    unreadable: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Files that were skipped, each with what is wrong with it; none of them is among the N."""
    label_fault: str = ""
    """Why there are no labels, where something looks like labels and cannot be used."""
    notes: tuple[str, ...] = ()
    """Lines about what of the data is not used, or not as it is."""
    deep: int = 0
    """The highest level of gray files with more than 8 bits; 0: there are none."""
    files_crc32: int | None = None
    """Of images that are on disk: the CRC-32 of the CRC-32s of their N files, where these were read to be checked."""
    places: tuple[tuple[str, int, int], ...] = ()
    """Where the N images lie, in their order: (file, first, stop) each; (): not known."""

    @functools.cached_property
    def labels(self) -> np.ndarray | None:
        """(N,) int32, or None without labels; those of a set on disk are all read on first use."""
        if self.read_labels is None:
            return None
        chunks = [range(first, min(first + _CHUNK, self.num_examples)) for first in range(0, self.num_examples, _CHUNK)]
        read = lambda chunk: self.read_labels(np.array(chunk))  # type: ignore[misc]
        return np.concatenate(list(in_threads(read, chunks, label="reading labels", unit=f" x{_CHUNK}")))

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Reads images.

        Args:
          indices: (B,) integers in [0, N), in any order, repeats allowed.

        Returns:
          (B, H, W, C) uint8.
        """
        return self.read_images(np.asarray(indices))

    def describe(self) -> str:
        """Returns one line: number, shape and size of the images, and where they are kept."""
        height, width, channels = self.image_shape
        classes = f", {len(self.class_names)} classes" if self.class_names else ""
        size = math.prod(self.image_shape) * self.num_examples / 2**20
        kept = "on disk, read batch by batch"
        if self.images is not None:
            kept = "mapped from disk" if isinstance(self.images, np.memmap) else "in memory"
        return f"{self.name}: {self.num_examples} images of {height}x{width}x{channels}{classes}, {size:.1f} MiB {kept}"


def in_memory(
    images: np.ndarray,
    labels: ArrayLike | None = None,
    class_names: Sequence[str] = (),
    *,
    name: str = "",
    **others: typing.Any,
) -> Source:
    """Makes a source of arrays.

    Args:
      images: (N, H, W, C) uint8.
      labels: (N,) integers, each in [0, number of classes); None if there are none.
      class_names: names of the classes; "0", "1", .. up to the largest label if not given.
      name: see `Source`.
      others: other fields of `Source`.

    Raises:
      ValueError: there is another number of labels than of images.
    """
    numbers = None if labels is None else np.asarray(labels, np.int32)
    if numbers is not None and numbers.shape != (len(images),):
        raise ValueError(f"{len(images)} images need labels of shape ({len(images)},), not {numbers.shape}")
    if numbers is not None and not class_names:
        class_names = [str(i) for i in range(int(numbers.max()) + 1)]
    return Source(
        num_examples=len(images),
        image_shape=typing.cast(tuple[int, int, int], images.shape[1:]),
        read_images=lambda indices: images[indices],
        read_labels=None if numbers is None else lambda indices: numbers[indices],
        class_names=tuple(class_names),
        name=name,
        images=images,
        **others,
    )


def fits_memory(config: DataConfig, num_examples: int) -> bool:
    """Returns whether this many images may be kept in memory."""
    return num_examples * math.prod(shape_of(config)) <= config.memory_gib * 2**30


def shape_of(config: DataConfig) -> tuple[int, int, int]:
    """Returns (H, W, C) of a configuration whose `channels` is known.

    Raises:
      ValueError: `channels` is None.
    """
    if config.channels is None:
        raise ValueError("data.channels is None: take it from the images before the network is made")
    return config.height, config.width, config.channels


def no_split(config: DataConfig, splits: Iterable[str]) -> NoSuchSplit:
    """Returns the error that names the existing splits."""
    return NoSuchSplit(f"data.split: {config.source} has no split {config.split!r}; choose from {', '.join(splits)}")


T = typing.TypeVar("T")
R = typing.TypeVar("R")


def in_threads(
    function: Callable[[T], R], items: Sequence[T], *, label: str = "", unit: str = " images"
) -> Iterator[R]:
    """Maps in threads (decoding releases the interpreter's lock), in order; with a progress bar if there are many."""
    if len(items) == 1:  # from a loader with threads of its own
        yield function(items[0])
        return
    quiet = None if label and len(items) >= _BAR_FROM else True  # None: a bar on terminals alone
    with (
        concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as threads,
        tqdm(total=len(items), desc=label, unit=unit, disable=quiet) as bar,
    ):
        for start in range(0, len(items), _CHUNK):
            for result in threads.map(function, items[start : start + _CHUNK]):
                bar.update()
                yield result
