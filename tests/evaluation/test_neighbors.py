"""The nearest images of a set."""

import dataclasses

import numpy as np
import pytest

from ddpm_jax.data.source import in_memory
from ddpm_jax.evaluation import neighbors
from ddpm_jax.evaluation.neighbors import nearest

RANDOM = np.random.default_rng(0)
SET = RANDOM.integers(0, 256, (50, 3, 4, 2), np.uint8)
SOURCE = in_memory(SET)
IMAGES = RANDOM.integers(0, 256, (5, 3, 4, 2), np.uint8)


def by_definition(images, others, number):
    squared = (images.astype(int)[:, None] - others.astype(int)[None]) ** 2
    return np.argsort(squared.sum(axis=(2, 3, 4)), axis=1, kind="stable")[:, :number]


@pytest.mark.parametrize("pixels", [1, 24 * 7, 2**24])
def test_they_are_those_of_the_definition_for_any_batch(monkeypatch, pixels):
    monkeypatch.setattr(neighbors, "_PIXELS_AT_ONCE", pixels)
    read = []

    def watched(indices):
        read.append(len(indices))
        return SET[indices]

    source = dataclasses.replace(SOURCE, images=None, read_images=watched)
    np.testing.assert_array_equal(nearest(IMAGES, source, number=8), by_definition(IMAGES, SET, 8))
    assert max(read) == max(1, min(50, pixels // 24))
    np.testing.assert_array_equal(nearest(IMAGES, source, most=20), by_definition(IMAGES, SET[:20], 8))


def test_an_image_of_the_set_is_its_own_nearest_and_the_first_of_equals_comes_first():
    twice = in_memory(np.concatenate([SET, SET]))
    assert nearest(SET[[4, 7]], twice, number=2).tolist() == [[4, 54], [7, 57]]


def test_a_small_set_has_fewer():
    assert sorted(nearest(IMAGES[:1], in_memory(SET[:2]))[0].tolist()) == [0, 1]


def test_the_largest_images_are_told_apart_by_one_level():
    # Sums of squares of 2^34 and more: float32 would lose the difference.
    white = np.full((2, 512, 512, 1), 255, np.uint8)
    white[0, 0, 0] = 254
    assert nearest(white[:1], in_memory(white[::-1])).tolist() == [[1, 0]]


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="no neighbors among"):
        nearest(IMAGES[:, :2], SOURCE)
