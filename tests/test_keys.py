"""An image's randomness comes from its own key, never from its batch or its device."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats

from ddpm_jax import keys as per_image_keys
from ddpm_jax.keys import image_keys

IMAGE = (4, 6, 3)
seeds = st.integers(0, 2**31 - 1)
indices_of_images = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=8, unique=True)


def bits(keys):
    return np.asarray(jax.random.key_data(keys))


def test_key_of_image_is_folded_from_its_index():
    key = jax.random.key(7)
    for i, image_key in enumerate(image_keys(key, jnp.arange(5))):
        assert image_key == jax.random.fold_in(key, i)


@given(seed=seeds, indices=indices_of_images, data=st.data())
def test_keys_do_not_depend_on_the_batch(seed, indices, data):
    key = jax.random.key(seed)
    order = data.draw(st.permutations(range(len(indices))))
    keys = bits(image_keys(key, jnp.array(indices)))
    shuffled = bits(image_keys(key, jnp.array(indices)[np.array(order)]))
    alone = bits(image_keys(key, jnp.array(indices[-1:])))
    np.testing.assert_array_equal(keys[order], shuffled)
    np.testing.assert_array_equal(keys[-1:], alone)


@given(seed=seeds, indices=indices_of_images)
def test_keys_of_different_images_and_uses_differ(seed, indices):
    keys = image_keys(jax.random.key(seed), jnp.array(indices))
    uses = [keys, *(per_image_keys.fold(keys, use) for use in range(3)), *per_image_keys.split(keys, 2)]
    rows = np.concatenate([bits(use) for use in uses])
    # `split` and `fold_in` count from different places, but 0 of one may be 0 of the other: they are never mixed here.
    children, folds = rows[-2 * len(indices) :], rows[: -2 * len(indices)]
    assert len(np.unique(folds, axis=0)) == len(folds)
    assert len(np.unique(children, axis=0)) == len(children)


def test_split_gives_each_image_its_own_children():
    keys = image_keys(jax.random.key(1), jnp.arange(6))
    first, second, third = per_image_keys.split(keys, 3)
    chex.assert_shape([first, second, third], (6,))
    for i in range(6):
        np.testing.assert_array_equal(
            bits(jax.random.split(keys[i], 3)), bits(jnp.stack([first[i], second[i], third[i]]))
        )


def test_noise_of_an_image_is_the_same_in_any_batch_and_on_any_number_of_devices():
    draw = jax.jit(lambda key, indices: per_image_keys.normal(image_keys(key, indices), IMAGE))
    key = jax.random.key(3)
    together = np.asarray(draw(key, jnp.arange(16)))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = draw(key, jax.device_put(jnp.arange(16), NamedSharding(mesh, PartitionSpec("data"))))
    assert len(spread.sharding.device_set) == 8
    np.testing.assert_array_equal(together, spread)
    np.testing.assert_array_equal(together[5:6], draw(key, jnp.array([5])))
    np.testing.assert_array_equal(together[[11, 2]], draw(key, jnp.array([11, 2])))
    np.testing.assert_array_equal(together[9], jax.random.normal(jax.random.fold_in(key, 9), IMAGE))


def test_noise_is_standard_normal_and_uncorrelated_between_images():
    noise = per_image_keys.normal(image_keys(jax.random.key(0), jnp.arange(512)), (8, 8, 1))
    chex.assert_shape(noise, (512, 8, 8, 1))
    chex.assert_type(noise, jnp.float32)
    noise = np.asarray(noise, np.float64)
    # 32,768 draws. The seed is fixed, so this passes or fails for ever; another seed would fail once in a thousand.
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    rows = noise.reshape(512, 64)
    neighbors = (rows[:-1] * rows[1:]).mean()
    assert abs(neighbors) < 4 / np.sqrt(511 * 64)  # 4 standard deviations of a mean of products of normals
