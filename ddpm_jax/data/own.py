"""Images from a user's own function, `my_data.py:make_source`."""

import dataclasses
from typing import Any

import numpy as np

from ddpm_jax.config import DataConfig
from ddpm_jax.data.source import Source, shape_of
from ddpm_jax.system import user_code
from ddpm_jax.system.errors import NoSuchSplit, UserError


def load(config: DataConfig) -> Source:
    """Calls the user's function and checks what it returns.

    Args:
      config: `source` names the function; its `channels` is known.

    Returns:
      the source.

    Raises:
      NoSuchSplit: the function returned None.
      UserError: the file or function is missing or fails, or what it returned is not a set of images of the size
        `height` x `width` x `channels`.
    """
    source = _make(config)
    if source.image_shape != shape_of(config):
        height, width, channels = source.image_shape
        raise UserError(
            f"data.source: the images of {config.source} are {height}x{width} with {channels} channels, not "
            f"{config.height}x{config.width} with {config.channels}: set --data.height {height} --data.width {width} "
            f"--data.channels {channels}"
        )
    return dataclasses.replace(source, name=source.name or f"{config.source}, {config.split}")


def probe(config: DataConfig) -> int:
    """Returns the number of channels."""
    return _make(config).image_shape[2]


def check_source(source: Source, what: str) -> Source:
    """Checks a source that was given in Python; raises `UserError`, which begins with `what`, if it is none."""
    if fault := _fault(source):
        raise UserError(f"{what}: {fault}")
    return dataclasses.replace(source, name=source.name or f"the {what} given in Python")


def _make(config: DataConfig) -> Source:
    make = user_code.load("data.source", config.source)
    with user_code.clear_errors(f"data.source: {config.source}", user_code.file_of(config.source)):
        source = make(config)
        if source is None:
            raise NoSuchSplit(f"data.split: {config.source} has no split {config.split!r}")
        if not isinstance(source, Source):
            raise UserError(
                f"data.source: {config.source} must return a ddpm_jax.data.source.Source (of arrays, "
                f"in_memory(images, labels)), not {type(source).__name__}"
            )
        fault = _fault(source)
    if fault:
        raise UserError(f"data.source: {config.source}: {fault}")
    return source


def _fault(source: Source) -> str | None:
    """Returns what is wrong with a source, judging by all labels in memory, or by the first and last image."""
    number, shape = source.num_examples, source.image_shape
    if not isinstance(number, int) or number < 1:
        return f"num_examples must be an integer of at least 1, not {number!r}"
    if not (isinstance(shape, tuple) and len(shape) == 3 and all(isinstance(n, int) and n > 0 for n in shape)):
        return f"image_shape must be (H, W, C), not {shape!r}"
    ends = np.array([0, number - 1])
    if source.images is not None:
        fault = _array_fault("images", source.images, (number, *shape))
    else:
        fault = _array_fault("read_images of 2 indices", source.read(ends), (2, *shape))
    if fault or source.read_labels is None:
        return fault
    indices = np.arange(number) if source.images is not None else ends
    labels = source.read_labels(indices)
    if not isinstance(labels, np.ndarray) or labels.dtype != np.int32 or labels.shape != indices.shape:
        return f"labels must be a NumPy array of int32, one per image, not {_described(labels)}"
    if not source.class_names:
        return "class_names must name each class, in the order of the labels"
    if labels.min() < 0 or labels.max() >= len(source.class_names):
        wrong = labels.min() if labels.min() < 0 else labels.max()
        return f"label {wrong} is not one of the {len(source.class_names)} classes, which count from 0"
    return None


def _array_fault(what: str, array: Any, shape: tuple[int, ...]) -> str | None:
    if isinstance(array, np.ndarray) and array.dtype == np.uint8 and array.shape == shape:
        return None
    return f"{what} must be a NumPy array of uint8 and of shape {shape}, not {_described(array)}"


def _described(value: Any) -> str:
    return f"{value.dtype} of shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
