"""Whether a set is the one that a run was begun on, wherever it lies now."""

import json
import typing
import zlib
from pathlib import Path

import numpy as np

from ddpm_jax.data.source import Source
from ddpm_jax.errors import UserError
from ddpm_jax.files import write_whole

_LOOKED_AT = 64


def fingerprint(source: Source) -> dict[str, typing.Any]:
    """Tells sets apart by what they hold: two that differ in where they lie alone have the same.

    Args:
      source: the images.

    Returns:
      the count, the shape, the names of the classes, and the CRC-32 of 64 images and their labels, evenly spaced.
    """
    number = min(_LOOKED_AT, source.num_examples)
    indices = np.arange(number) * source.num_examples // number
    crc = zlib.crc32(source.read(indices).tobytes())
    if source.read_labels is not None:
        crc = zlib.crc32(source.read_labels(indices).astype("<i4").tobytes(), crc)
    return {
        "images": source.num_examples,
        "shape": list(source.image_shape),
        "classes": list(source.class_names),
        "crc32": crc,
    }


def check_same_set(file: Path, source: Source, *, write: bool = True) -> None:
    """Writes a set's fingerprint into a run's folder, or holds it against the one that is there.

    Args:
      file: the fingerprint, in the run's folder.
      source: the images.
      write: whether to write the file where it is missing or damaged; of many hosts one does.

    Raises:
      UserError: the run was begun on another set, and in what they differ.
    """
    here = fingerprint(source)
    try:
        there = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError):  # missing, or damaged: no reason not to go on
        there = {}
    if write and not there:
        text = json.dumps(here, indent=2) + "\n"
        write_whole(file, lambda opened: opened.write(text.encode()))
    different = [
        "other pixels or labels" if name == "crc32" else f"{name} {there[name]} there, {here[name]} here"
        for name in here
        if name in there and there[name] != here[name]
    ]
    if different:
        raise UserError(
            f"{file.parent} was begun on other images than {source.name} ({'; '.join(different)}): give it those, or "
            f"another --workdir; to go on with these all the same, remove {file}"
        )
