"""What there is to know of a set before it is trained on, and whether it can be."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ddpm_jax.config import Config
from ddpm_jax.data.folder import UnreadableFiles
from ddpm_jax.data.order import batch_indices
from ddpm_jax.data.source import Source
from ddpm_jax.data.sources import load_source
from ddpm_jax.system import pictures
from ddpm_jax.system.errors import UserError

_GRID = 64
_CHUNK = 64  # images read at a time
_BAR_FROM = 32  # chunks from which a progress bar is worth it


def histogram(source: Source) -> np.ndarray:
    """Counts the levels of the pixels; reads every image once.

    Args:
      source: N images of C channels.

    Returns:
      (C, 256) int64: how many pixels of each channel have each level.
    """
    channels = source.image_shape[-1]
    counts = np.zeros((channels, 256), np.int64)
    starts = range(0, source.num_examples, _CHUNK)
    for start in tqdm(starts, desc="looking at the images", disable=None if len(starts) > _BAR_FROM else True):
        images = source.read(np.arange(start, min(start + _CHUNK, source.num_examples)))
        for channel in range(channels):
            counts[channel] += np.bincount(images[..., channel].ravel(), minlength=256)
    return counts


def check_classes(config: Config, source: Source, *, training: bool = True) -> None:
    """Checks that images have the class labels that a class-conditional network needs.

    Args:
      config: the whole configuration.
      source: the images.
      training: whether every class of the network must be one of the images'; of a held-out set some may be missing.

    Raises:
      UserError: the images have no labels, or other classes.
    """
    num_classes, found = config.model.num_classes, len(source.class_names)
    if not num_classes:
        return
    if source.read_labels is None:
        raise UserError(
            f"model.num_classes={num_classes}, but the images have no labels ({source.describe()}): use labeled images"
            + (", or train an unconditional network with --model.num-classes 0" if training else "")
        )
    if found > num_classes or (training and found < num_classes):
        raise UserError(
            f"model.num_classes={num_classes}, but the images have {found} classes ({source.name})"
            + (f": use --model.num-classes {found}" if training else "")
        )


def check_data(config: Config, grid: Path) -> Iterator[str]:
    """Looks at every image that a run would be trained on, and draws the first ones that it would see.

    Args:
      config: the whole configuration, valid.
      grid: where to write the picture of 64 images.

    Yields:
      what it finds, a line each: count, shape, range, classes with their counts, each unreadable file, the picture.

    Raises:
      UserError: training would refuse the set, and why; raised after what was found.
    """
    try:
        source = load_source(dataclasses.replace(config.data, on_unreadable="skip"))
    except UnreadableFiles as error:
        yield from _unreadable(error.files)
        raise
    yield source.describe()
    counts = histogram(source)
    least, most = np.flatnonzero(counts.sum(0))[[0, -1]]
    shares = counts / counts.sum(1, keepdims=True)
    mean = shares @ np.arange(256)
    deviation = np.sqrt(np.maximum(shares @ np.arange(256) ** 2 - mean**2, 0))
    spread = ", ".join(f"{m:.1f} +- {d:.1f}" for m, d in zip(mean, deviation, strict=True))
    yield f"pixels: uint8 from {least} to {most}; mean and deviation of each channel: {spread}"
    labels = source.labels
    if labels is None:
        yield "classes: none"
    else:
        each = np.bincount(labels, minlength=len(source.class_names))
        named = ", ".join(f"{name} {count}" for name, count in zip(source.class_names, each, strict=True))
        yield f"classes: {len(source.class_names)} ({named})"
    yield from _unreadable(source.unreadable)
    number = min(_GRID, source.num_examples)
    first = batch_indices(config.train.seed, 0, batch_size=number, num_examples=source.num_examples)
    images = source.read(first)
    shown = images if images.shape[-1] in (1, 3, 4) else images[..., :1]
    pictures.save_png(grid, pictures.enlarge(pictures.grid(shown)))
    yield f"the first {number} images of training: {grid}"
    check_classes(config, source)
    if source.unreadable and config.data.on_unreadable == "refuse":
        raise UserError(
            f"data.path: {len(source.unreadable)} of {len(source.unreadable) + source.num_examples} files in"
            f" {config.data.path} cannot be read as images; mend or remove them, or set data.on_unreadable=skip"
        )


def _unreadable(files: Mapping[str, str]) -> Iterator[str]:
    if files:
        yield f"unreadable: {len(files)} files"
    for name, reason in files.items():
        yield f"  {name} ({reason})"
