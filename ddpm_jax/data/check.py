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
from ddpm_jax.system.errors import UserError, few
from ddpm_jax.system.progress import say

_GRID = 64
_CHUNK = 64  # images read at a time
_FEW_LEVELS = 64  # a picture of fewer levels is hardly meant
_MOST_LABELS = 200_000
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


def for_training(config: Config, source: Source) -> Source:
    """Prints what there is to know of a set before it is trained on, and returns it as the run sees it.

    Args:
      config: the whole configuration.
      source: the images.

    Returns:
      the source, without its labels if the network is unconditional.

    Raises:
      UserError: the set has no part that is held out from training.
    """
    if config.data.holdout and config.data.split == "all":
        raise UserError(
            f"data.holdout={config.data.holdout:g} holds images out, and data.split=all trains on all of them: use"
            " --data.split train, or --data.holdout 0"
        )
    say(source.describe())
    for line in (*source.notes, *_warnings(config, source)):
        say(line)
    return source if config.model.num_classes else dataclasses.replace(source, read_labels=None, class_names=())


def _warnings(config: Config, source: Source) -> Iterator[str]:
    """Finds what is allowed and rarely meant, in evenly spaced images and in the labels if they are wanted."""
    indices = np.arange(number := min(_GRID, source.num_examples)) * source.num_examples // number
    images = source.read(indices)
    least, most = int(images.min()), int(images.max())
    if most - least < _FEW_LEVELS:
        yield f"warning: only levels {least} to {most} of 0 to 255 are used{_scaled(config, source, least, most)}"
    # The labels of a streamed set of millions would take minutes to read.
    if config.model.num_classes and (source.images is not None or source.num_examples <= _MOST_LABELS):
        yield from _missing_classes(source)


def _scaled(config: Config, source: Source, least: int, most: int) -> str:
    """Returns the end of a warning: how to use the other levels."""
    bits = source.deep.bit_length()
    if 0 < 2**bits - 1 < config.data.white:
        return f": the files have {bits} bits in 16; use --data.white {2**bits - 1}"
    if least == most:
        return ": the images are of one color"
    images = "images" if not least else f"(images - {least})"
    return (
        f": scale the pixels, as by np.round({images} * (255 / {most - least})).astype(np.uint8), if that is not meant"
    )


def _missing_classes(source: Source) -> Iterator[str]:
    labels = source.labels
    if labels is None:
        return
    missing = np.setdiff1d(np.arange(len(source.class_names)), labels)
    if len(missing):
        yield (
            f"warning: no image of class {few((source.class_names[i] for i in missing), 8)}, which the network would be"
            f" given and never see{_numbered_from(labels)}"
        )


def _numbered_from(labels: np.ndarray) -> str:
    """Returns the advice for labels that begin later than at 0."""
    least, most = int(labels.min()), int(labels.max())
    if not least:
        return ""
    return f": the labels are {least} to {most}; save them as labels - {least}, for {most - least + 1} classes"


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
            f"model.num_classes={num_classes}, but the images have no labels"
            f" ({source.label_fault or source.describe()}): use labeled images"
            + (", or train an unconditional network with --model.num-classes 0" if training else "")
        )
    if found > num_classes or (training and found < num_classes):
        labels = source.labels if source.images is not None or source.num_examples <= _MOST_LABELS else None
        later = _numbered_from(labels) if labels is not None else ""
        raise UserError(
            f"model.num_classes={num_classes}, but the images have {found} classes ({source.name}){later}"
            + (
                (f"; or use --model.num-classes {found}" if later else f": use --model.num-classes {found}")
                if training
                else ""
            )
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
    yield from source.notes
    counts = histogram(source)
    least, most = np.flatnonzero(counts.sum(0))[[0, -1]]
    shares = counts / counts.sum(1, keepdims=True)
    mean = shares @ np.arange(256)
    deviation = np.sqrt(np.maximum(shares @ np.arange(256) ** 2 - mean**2, 0))
    spread = ", ".join(f"{m:.1f} +- {d:.1f}" for m, d in zip(mean, deviation, strict=True))
    yield f"pixels: uint8 from {least} to {most}; mean and deviation of each channel: {spread}"
    labels = source.labels
    if labels is None:
        yield f"classes: none{source.label_fault and f' ({source.label_fault})'}"
    else:
        each = np.bincount(labels, minlength=len(source.class_names))
        named = ", ".join(f"{name} {count}" for name, count in zip(source.class_names, each, strict=True))
        yield f"classes: {len(source.class_names)} ({named})"
    yield from _warnings(config, source)
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
