"""A part of a set held out for evaluation, chosen by the pixels of each image."""

import dataclasses
import math
import typing

import numpy as np

from ddpm_jax.data.fingerprint import pixel_hashes
from ddpm_jax.data.source import Source
from ddpm_jax.system.errors import UserError


def part(source: Source, fraction: float, *, held_out: bool, memory_gib: float) -> Source:
    """Returns the images of a set that are held out, or the others.

    An image is held out if the hash of its pixels, as a number in [0, 1), is below the fraction: whatever is added,
    removed or reordered, no other image changes sides, and equal images are on the same.

    Args:
      source: the whole set.
      fraction: about this many are held out.
      held_out: whether to return these, or the others.
      memory_gib: a set in memory stays there up to this size; see `DataConfig`.

    Returns:
      a source of that part, in the same order.

    Raises:
      UserError: there is none, or no other.
    """
    hashes = pixel_hashes(source, label="choosing what is held out")
    chosen = hashes < np.uint64(math.ceil(fraction * 2**64))
    if not 0 < chosen.sum() < len(chosen):
        raise UserError(
            f"data.holdout={fraction:g} holds out {chosen.sum()} of {len(chosen)} images ({source.name}): use "
            + ("more images, or a larger fraction" if not chosen.any() else "a smaller fraction")
        )
    indices = np.flatnonzero(chosen == held_out)
    read, read_labels = source.read_images, source.read_labels
    images = source.images
    if images is not None and len(indices) * images[:1].nbytes <= memory_gib * 2**30:
        images = images[indices]
        read_images = lambda wanted: typing.cast(np.ndarray, images)[wanted]
    else:
        images = None
        read_images = lambda wanted: read(indices[wanted])
    what = f"{chosen.sum()} held out of {len(chosen)}"
    return dataclasses.replace(
        source,
        num_examples=len(indices),
        read_images=read_images,
        read_labels=None if read_labels is None else lambda wanted: read_labels(indices[wanted]),
        images=images,
        places=(),
        name=f"{source.name} ({what})" if held_out else f"{source.name} (without the {what})",
    )
