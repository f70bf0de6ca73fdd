"""Whether held-out images are training images."""

import dataclasses

import numpy as np
import pytest

from ddpm_jax.config import DataConfig
from ddpm_jax.data import sources
from ddpm_jax.data.shared import count_shared, count_trained_on
from ddpm_jax.data.source import Source, in_memory

PIXELS = np.random.default_rng(0).integers(0, 256, (300, 3, 2, 1), np.uint8)


def streamed(source, places=()):
    return dataclasses.replace(source, images=None, places=places)


@pytest.mark.parametrize("change", [lambda source: source, streamed])
def test_equal_pixels_are_counted_wherever_they_are(change):
    training = change(in_memory(PIXELS))
    held_out = in_memory(np.concatenate([PIXELS[290:][::-1], PIXELS[:4] + 1, PIXELS[7:8]]))
    assert count_shared(held_out, training) == 11
    assert count_shared(held_out, training, np.array([0, 11, 12, 14])) == 2
    assert count_shared(streamed(held_out), training) == 11
    assert count_shared(in_memory(PIXELS[:5] + 1), training) == 0


def test_images_of_a_large_set_are_counted_by_their_places():
    def read(indices):
        raise AssertionError("it is too large to be read")

    large = Source(300_000, (3, 2, 1), read)
    training = dataclasses.replace(large, places=(("a", 0, 200_000), ("b", 50, 100_050)))
    held_out = dataclasses.replace(large, num_examples=40, places=(("b", 40, 70), ("c", 0, 10)))
    assert count_shared(held_out, training) == 20
    assert count_shared(held_out, training, np.array([0, 9, 10, 29, 30])) == 2
    assert count_shared(held_out, large) is None
    assert count_shared(in_memory(PIXELS), training) is None


@pytest.mark.parametrize(
    ("own", "split", "shared"), [("train", "test", 0), ("all", "test", 359), ("test", "all", 359), ("all", "all", 1797)]
)
def test_the_digits_are_known_whatever_the_splits_are_called(own, split, shared):
    source = sources.load_source(DataConfig(split=split))
    indices = np.arange(source.num_examples)
    assert count_trained_on(DataConfig(split=own), split, source, indices) == shared


def test_a_holdout_shares_nothing_and_unreadable_training_images_are_not_known(sets, tmp_path):
    np.savez(tmp_path / "a.npz", PIXELS)
    config = sets.config("npz", tmp_path / "a.npz", (3, 2), 1, holdout=0.3)
    held_out = sources.load_source(dataclasses.replace(config, split="test"))
    indices = np.arange(held_out.num_examples)
    assert count_shared(held_out, sources.load_source(config)) == 0
    (tmp_path / "a.npz").unlink()
    assert count_trained_on(config, "test", held_out, indices) == 0
    assert count_trained_on(dataclasses.replace(config, holdout=0.0), "test", held_out, indices) is None
