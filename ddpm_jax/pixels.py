"""Pixels: conversion between uint8 and [-1, 1], and random flips."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ddpm_jax import keys as per_image_keys
from ddpm_jax.forward import as_floats


def flip(keys: Array, images: Array) -> Array:
    """Flips each image horizontally with probability 0.5, using its own key.

    Args:
      keys: (B,) keys, one per image; or one key for the batch.
      images: (B, H, W, C), of any dtype.

    Returns:
      images of the same shape and dtype.

    Ho et al. 2020, appendix B: random horizontal flips in training, on all data sets except LSUN Bedroom.
    """
    chex.assert_rank(images, 4)
    mirrored = jax.vmap(jax.random.bernoulli)(per_image_keys.for_batch(keys, images))
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def to_float(images: ArrayLike) -> Array:
    r"""Converts uint8 pixels to floats in [-1, 1].

    .. math:: x = u / 127.5 - 1 = (2u - 255) / 255

    The second form is computed, as a product with 1/255, so that the result is the same inside and outside of `jit`
    (XLA turns division by a constant into a product, which would make 1.0000001 of 255).

    Args:
      images: uint8 of any shape.

    Returns:
      float32 of the same shape, in [-1, 1].

    Raises:
      TypeError: they are not integers.

    Ho et al. 2020, section 3.3: "integers in {0, 1, ..., 255} scaled linearly to [-1, 1]".

    >>> to_float(np.array([0, 255], np.uint8))
    Array([-1.,  1.], dtype=float32)
    """
    images = jnp.asarray(images)
    if not jnp.issubdtype(images.dtype, jnp.integer):
        raise TypeError(f"to_float converts uint8 pixels, not {images.dtype}")
    return (2 * images.astype(jnp.float32) - 255) * np.float32(1 / 255)


def to_uint8(images: ArrayLike) -> Array:
    r"""Converts images to uint8 pixels: clipped, and rounded to the nearest integer.

    .. math:: u = \mathrm{round}(\mathrm{clip}(127.5\,(x + 1), 0, 255))

    This inverts `to_float` exactly. The original code truncates instead, which makes images half a level darker on
    average.

    Args:
      images: floats of any shape, nominally in [-1, 1].

    Returns:
      uint8 of the same shape.

    Raises:
      TypeError: they are not floats.

    >>> pixels = np.arange(256, dtype=np.uint8)
    >>> bool((to_uint8(to_float(pixels)) == pixels).all())
    True
    """
    return jnp.round(jnp.clip((as_floats(images, "an image") + 1) * 127.5, 0, 255)).astype(jnp.uint8)
