"""What every source of images is: a count, a shape, labels or none, and random access to uint8 images."""

import concurrent.futures
import dataclasses
import functools
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from ddpm_jax.config import DataConfig
from ddpm_jax.system.errors import NoSuchSplit

_NUM_THREADS = min(16, 2 * (os.cpu_count() or 1))
_CHUNK = 1024  # tasks handed to the threads at a time: a set of millions must not become a list of millions
_BAR_FROM = 2000  # images from which loading is long enough for a progress bar


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A set of images with random access."""

    name: str
    """What it is and which split, for people."""
    num_examples: int
    """N."""
    image_shape: tuple[int, int, int]
    """(H, W, C)."""
    read_images: Callable[[np.ndarray], np.ndarray]
    """From (B,) indices to (B, H, W, C) uint8."""
    images: np.ndarray | None = None
    """All of them, (N, H, W, C) uint8, where they are held in memory; else None."""
    read_labels: Callable[[np.ndarray], np.ndarray] | None = None
    """From (B,) indices to (B,) int32, each in [0, len(class_names)); None where the images have no labels."""
    class_names: tuple[str, ...] = ()
    """The names of the classes; empty without labels."""
    unreadable: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Files that were skipped, each with what is wrong with it; none of them is among the N."""
    files_crc32: int | None = None
    """Of images that are on disk: the CRC-32 of the CRC-32s of their N files, where these were read to be checked."""

    @functools.cached_property
    def labels(self) -> np.ndarray | None:
        """(N,) int32, or None where the images have none; of a set on disk all are read when first asked for."""
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
        """Says in one line what there is and where it is kept."""
        height, width, channels = self.image_shape
        classes = f", {len(self.class_names)} classes" if self.class_names else ""
        size = math.prod(self.image_shape) * self.num_examples / 2**20
        kept = "on disk, read batch by batch"
        if self.images is not None:
            kept = "mapped from disk" if isinstance(self.images, np.memmap) else "in memory"
        return f"{self.name}: {self.num_examples} images of {height}x{width}x{channels}{classes}, {size:.1f} MiB {kept}"


def in_memory(
    name: str,
    images: np.ndarray,
    labels: np.ndarray | None = None,
    class_names: Sequence[str] = (),
    unreadable: Mapping[str, str] = types.MappingProxyType({}),
) -> Source:
    """Makes a source of images that are held in memory, (N, H, W, C) uint8, with (N,) int32 labels or None."""
    return Source(
        name=name,
        num_examples=len(images),
        image_shape=typing.cast(tuple[int, int, int], images.shape[1:]),
        read_images=lambda indices: images[indices],
        images=images,
        read_labels=None if labels is None else lambda indices: labels[indices],
        class_names=tuple(class_names),
        unreadable=unreadable,
    )


def fits_memory(config: DataConfig, num_examples: int) -> bool:
    """Says whether so many images may be held in memory."""
    return num_examples * math.prod(shape_of(config)) <= config.memory_gib * 2**30


def shape_of(config: DataConfig) -> tuple[int, int, int]:
    """Gives (H, W, C) of a configuration whose channels are known."""
    assert config.channels is not None, "resolve the configuration first"
    return config.height, config.width, config.channels


def no_split(config: DataConfig, splits: Iterable[str]) -> NoSuchSplit:
    """Makes the error that names the splits there are."""
    return NoSuchSplit(f"data.split: {config.source} has no split {config.split!r}; choose from {', '.join(splits)}")


T = typing.TypeVar("T")
R = typing.TypeVar("R")


def in_threads(
    function: Callable[[T], R], items: Sequence[T], *, label: str = "", unit: str = " images"
) -> Iterator[R]:
    """Maps in threads (decoding releases the interpreter's lock), in order, with a progress bar where it is long."""
    if len(items) == 1:  # as a loader asks that has threads of its own
        yield function(items[0])
        return
    quiet = None if label and len(items) >= _BAR_FROM else True  # None: a bar on terminals alone
    with (
        concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as threads,
        tqdm(total=len(items), desc=label, unit=unit, disable=quiet) as bar,
    ):
        for start in range(0, len(items), _CHUNK):
            for result in threads.map(function, items[start : start + _CHUNK]):
                bar.update()
                yield result
