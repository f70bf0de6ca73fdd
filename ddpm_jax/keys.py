"""One key per image: the randomness of an image comes from its own key, never from its batch or its device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


def make_key(seed: int) -> Array:
    """Returns the key of a seed, of the one generator that all random numbers here come from.

    `jax.random.key(seed)` alone would follow `JAX_DEFAULT_PRNG_IMPL`; with the generator `rbg`, the numbers of an image
    would depend on its batch.

    Args:
      seed: an integer in [0, 2^32).

    Returns:
      a typed scalar key of the generator `threefry2x32`.

    >>> make_key(0) == jax.random.key(0, impl="threefry2x32")
    Array(True, dtype=bool)
    """
    return jax.random.key(seed, impl="threefry2x32")


def image_keys(key: Array, indices: Array) -> Array:
    r"""Returns the key of each image: a function of `key` and of the image's index alone.

    .. math:: k_i = \mathrm{fold\_in}(k, i)

    The index is the image's position in the global batch or in the whole sampling job, so its random numbers are the
    same for any batch size, any number of devices and any number of images.

    Args:
      key: the key of the step or of the sampling job, a typed scalar key.
      indices: (B,) integers >= 0, one per image.

    Returns:
      (B,) typed keys.

    >>> key = jax.random.key(0)
    >>> few, many = image_keys(key, jnp.arange(2)), image_keys(key, jnp.arange(5))
    >>> bool((few == many[:2]).all())
    True
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, indices)


def fold(keys: Array, data: ArrayLike) -> Array:
    r"""Derives a key for one use from each image's key.

    Args:
      keys: (B,) typed keys.
      data: an integer >= 0 that identifies the use (a step of the chain, a block of the network): a scalar for all
        images, or (B,), one per image.

    Returns:
      (B,) typed keys: `fold_in(keys[i], data)`.
    """
    return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(data, keys.shape))


def split(keys: Array, num: int) -> tuple[Array, ...]:
    """Splits each image's key into `num` independent keys.

    Args:
      keys: (B,) typed keys.
      num: the number of keys, static.

    Returns:
      `num` arrays of (B,) typed keys.
    """
    children = jax.vmap(lambda key: jax.random.split(key, num))(keys)
    return tuple(children[:, i] for i in range(num))


def normal(keys: Array, shape: Sequence[int]) -> Array:
    r"""Draws standard normal noise, each image from its own key.

    Args:
      keys: (B,) typed keys.
      shape: the shape of one image, (H, W, C).

    Returns:
      (B, H, W, C) float32, each element N(0, 1).
    """
    return jax.vmap(lambda key: jax.random.normal(key, tuple(shape)))(keys)
