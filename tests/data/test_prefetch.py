import threading
import time

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from ddpm_jax import keys as per_image_keys
from ddpm_jax.config import DataConfig
from ddpm_jax.data import order, prefetch
from ddpm_jax.data.source import Source
from ddpm_jax.data.sources import load_source
from ddpm_jax.pixels import flip, to_float, to_uint8
from ddpm_jax.system.errors import UserError

few = hypothesis.settings(max_examples=50, deadline=None)


def counting_source(num_examples, *, read=None):
    """A source whose image i is filled with i."""
    images = np.broadcast_to(np.arange(num_examples, dtype=np.uint8)[:, None, None, None], (num_examples, 2, 3, 1))
    return Source(
        name="counting",
        num_examples=num_examples,
        image_shape=(2, 3, 1),
        read_images=read or (lambda indices: images[indices]),
        images=images,
        read_labels=lambda indices: indices.astype(np.int32),
    )


# --- reading ahead ---


def test_batches_hold_the_images_and_the_labels_of_their_step():
    source = counting_source(7)
    with prefetch.batches(source, 5, 0, 6, batch_size=3) as found:
        for step, batch in enumerate(found):
            indices = order.batch_indices(5, step, batch_size=3, num_examples=7)
            assert batch.step == step
            chex.assert_shape(batch.images, (3, 2, 3, 1))
            assert batch.images.dtype == np.uint8
            np.testing.assert_array_equal(batch.images[:, 1, 2, 0], indices)
            np.testing.assert_array_equal(batch.labels, indices)
        assert step == 5


def test_a_source_without_labels_gives_none():
    source = Source(2, (1, 1, 1), lambda indices: np.zeros((len(indices), 1, 1, 1), np.uint8))
    with prefetch.batches(source, 0, 0, 1, batch_size=2) as found:
        assert next(found).labels is None


@few
@hypothesis.given(st.integers(0, 20), st.integers(1, 5), st.integers(1, 9))
def test_batches_begin_anywhere(first, ahead, batch_size):
    source = load_source(DataConfig())
    with prefetch.batches(source, 1, 0, 24, batch_size=batch_size) as found:
        whole = list(found)
    with prefetch.batches(source, 1, first, 24, batch_size=batch_size, ahead=ahead) as found:
        part = list(found)
    chex.assert_trees_all_equal(whole[first:], part)


def test_hosts_read_their_rows():
    source = counting_source(10)
    with prefetch.batches(source, 1, 3, 4, batch_size=8) as found:
        whole = next(found)
    halves = []
    for rows in (slice(0, 4), slice(4, 8)):
        with prefetch.batches(source, 1, 3, 4, batch_size=8, rows=rows) as found:
            halves.append(next(found).images)
    np.testing.assert_array_equal(np.concatenate(halves), whole.images)


def test_reading_is_ahead_by_as_many_batches_as_asked_for():
    read = []
    enough = threading.Event()

    def read_images(indices):
        read.append(len(indices))
        if len(read) == 4:
            enough.set()
        return np.zeros((len(indices), 2, 3, 1), np.uint8)

    with prefetch.batches(counting_source(9, read=read_images), 0, 0, 100, batch_size=2, ahead=3) as found:
        next(found)
        assert enough.wait(30)  # the one taken and the three after it
        time.sleep(0.05)
        assert len(read) == 4
    with pytest.raises(StopIteration):
        next(found)
    assert len(read) == 4


def test_an_error_is_raised_where_its_batch_is_taken():
    error = UserError("the disk is gone")

    def read_images(indices):
        if 4 in indices:
            raise error
        return np.zeros((len(indices), 2, 3, 1), np.uint8)

    befallen = int(np.flatnonzero(order.epoch_permutation(0, 0, 9) == 4)[0])
    with prefetch.batches(counting_source(9, read=read_images), 0, 0, 9, batch_size=1) as found:
        for step in range(befallen):
            assert next(found).step == step
        with pytest.raises(UserError) as raised:
            next(found)
        assert raised.value is error
        with pytest.raises(StopIteration):
            next(found)


def test_closing_ends_the_thread():
    before = threading.active_count()
    found = prefetch.batches(counting_source(9), 0, 0, 100, batch_size=2)
    next(found)
    found.close()
    found.close()
    assert threading.active_count() == before
    assert list(found) == []


def test_data_that_ends_before_the_steps_is_an_error():
    left = iter([1, 2])
    with prefetch.Prefetch(lambda step: next(left), range(3)) as found:
        assert [next(found), next(found)] == [1, 2]
        with pytest.raises(RuntimeError, match="ended before the steps"):
            next(found)


def test_waiting_is_measured():
    go = threading.Event()

    def read_images(indices):
        go.wait(30)
        return np.zeros((len(indices), 2, 3, 1), np.uint8)

    with prefetch.batches(counting_source(9, read=read_images), 0, 0, 1, batch_size=2) as found:
        assert found.seconds_waited == 0
        threading.Timer(0.1, go.set).start()
        next(found)
        assert found.seconds_waited > 0


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"batch_size": 1, "ahead": 0}])
def test_batches_refuses_what_is_out_of_range(wrong):
    with pytest.raises(ValueError, match="must be at least"):
        prefetch.batches(counting_source(3), 0, 0, 1, **wrong)


# --- pixels ---


def test_a_flip_mirrors_some_images_and_leaves_the_others():
    keys = per_image_keys.image_keys(jax.random.key(0), jnp.arange(400))
    images = jnp.arange(400 * 2 * 3 * 2, dtype=jnp.float32).reshape(400, 2, 3, 2)
    flipped = jax.jit(flip)(keys, images)
    chex.assert_equal_shape([flipped, images])
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    same = (flipped == images).all((1, 2, 3))
    assert bool((mirrored ^ same).all())
    assert abs(int(mirrored.sum()) - 200) < 4 * 10  # binomial with standard deviation 10


def test_a_flip_comes_from_the_key_of_the_image_alone():
    keys = per_image_keys.image_keys(jax.random.key(1), jnp.arange(16))
    images = jax.random.randint(jax.random.key(2), (16, 2, 4, 1), 0, 256).astype(jnp.uint8)
    whole = flip(keys, images)
    assert whole.dtype == jnp.uint8
    alone = jnp.concatenate([flip(keys[i : i + 1], images[i : i + 1]) for i in range(16)])
    chex.assert_trees_all_equal(whole, alone)


def test_a_flip_refuses_a_wrong_number_of_keys():
    with pytest.raises(ValueError, match="a batch of 3 needs one key or 3 keys"):
        flip(jax.random.split(jax.random.key(0), 2), jnp.zeros((3, 2, 2, 1)))


def test_every_pixel_comes_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    for change in (lambda f: f, jax.jit):
        images = change(to_float)(pixels)
        assert images.dtype == jnp.float32
        np.testing.assert_allclose(images, pixels.astype(np.float64) / 127.5 - 1, atol=1e-7)
        assert float(images.min()) == -1
        assert float(images.max()) == 1
        np.testing.assert_array_equal(images, to_float(pixels))
        np.testing.assert_array_equal(change(to_uint8)(images), pixels)


def test_pixels_are_rounded_to_the_nearest_and_clipped():
    images = jnp.array([-7.0, -1.001, -1 + 0.9 / 127.5, -1 + 1.4 / 127.5, 0.999, 1.0, 9.0])
    np.testing.assert_array_equal(to_uint8(images), [0, 0, 1, 1, 255, 255, 255])
