"""One key per image: the randomness of an image comes from its own key, never from its batch or its device.

Keys are typed (`jax.random.key`); those of `jax.random.PRNGKey` are wrapped wherever a key is taken.
"""

import typing
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from ddpm_jax.schedules import concrete


def typed(keys: ArrayLike, *, one_per_image: bool = False) -> Array:
    """Returns typed keys, also from the uint32 arrays of `jax.random.PRNGKey`.

    Args:
      keys: keys of any shape, in either form.
      one_per_image: whether their shape must be (B,).

    Returns:
      the typed keys.

    Raises:
      TypeError: these are not keys.
      ValueError: there is not one per image.
    """
    dtype = getattr(keys, "dtype", None)
    if dtype == np.uint32:
        # Two words are threefry2x32's, whatever generator the environment names.
        impl = "threefry2x32" if jnp.shape(keys)[-1:] == (2,) else None
        try:
            keys = jax.random.wrap_key_data(jnp.asarray(keys), impl=impl)
        except TypeError:
            raise TypeError(f"uint32 of shape {jnp.shape(keys)} is no random key: use jax.random.key(0)") from None
    elif dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise TypeError(f"a random key such as jax.random.key(0) is needed, not {dtype or repr(keys)}")
    keys = typing.cast(Array, keys)
    if one_per_image and keys.ndim != 1:
        raise ValueError(f"one key per image is needed, not keys of shape {keys.shape}: use image_keys")
    return keys


def beside(images: Array, values: ArrayLike) -> Array:
    """Shards (B,) values as the images are on a mesh with explicit axes, where JAX does not do so by itself."""
    sharding, values = jax.typeof(images).sharding, jnp.asarray(values)
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return values
    return jax.sharding.reshard(values, NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1])))


def for_batch(keys: ArrayLike, images: Array) -> Array:
    """Returns one key per image, also from a single key.

    Args:
      keys: (B,) keys, or one key, which is folded with the images' indices 0..B-1.
      images: a batch of B images.

    Returns:
      (B,) typed keys.

    Raises:
      TypeError: these are not keys.
      ValueError: there are neither one nor B of them.
    """
    keys, batch_size = typed(keys), images.shape[0]
    if keys.ndim == 0:
        return image_keys(keys, beside(images, jnp.arange(batch_size)))
    if keys.shape != (batch_size,):
        raise ValueError(f"a batch of {batch_size} needs one key or {batch_size} keys, not keys of shape {keys.shape}")
    return keys


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

    Raises:
      TypeError: `key` is not a key.
      ValueError: an index is negative (checked outside of `jit`).

    >>> key = jax.random.key(0)
    >>> few, many = image_keys(key, jnp.arange(2)), image_keys(key, jnp.arange(5))
    >>> bool((few == many[:2]).all())
    True
    """
    known = concrete(indices)
    if known is not None and known.size and known.min() < 0:
        raise ValueError(f"the index of an image is at least 0, not {known.min()}")
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(typed(key), indices)


def fold(keys: Array, data: ArrayLike) -> Array:
    r"""Derives a key for one use from each image's key.

    Args:
      keys: (B,) typed keys.
      data: an integer >= 0 that identifies the use (a step of the chain, a block of the network): a scalar for all
        images, or (B,), one per image.

    Returns:
      (B,) typed keys: `fold_in(keys[i], data)`.
    """
    keys = typed(keys, one_per_image=True)
    if jnp.ndim(data) == 0:
        return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)
    return jax.vmap(jax.random.fold_in)(keys, beside(keys, data))


def split(keys: Array, num: int) -> tuple[Array, ...]:
    """Splits each image's key into `num` independent keys.

    Args:
      keys: (B,) typed keys.
      num: the number of keys, static.

    Returns:
      `num` arrays of (B,) typed keys.
    """
    children = jax.vmap(lambda key: jax.random.split(key, num))(typed(keys, one_per_image=True))
    return tuple(children[:, i] for i in range(num))


def normal(keys: Array, shape: Sequence[int]) -> Array:
    r"""Draws standard normal noise, each image from its own key.

    Args:
      keys: (B,) typed keys.
      shape: the shape of one image, (H, W, C) or any other.

    Returns:
      (B, *shape) float32, each element N(0, 1).
    """
    return jax.vmap(lambda key: jax.random.normal(key, tuple(shape)))(typed(keys, one_per_image=True))
