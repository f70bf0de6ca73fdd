"""Chains begun in their middle, in batches, of images that are given."""

import jax
import numpy as np
import pytest

from ddpm_jax.chains import Choice
from ddpm_jax.editor import Editor
from ddpm_jax.evaluation.figures import real_images
from ddpm_jax.sampling import run_job


@pytest.fixture(scope="module")
def job(drawing):
    return drawing.make_job(num_classes=10)


@pytest.fixture(scope="module")
def editor(job):
    return Editor(job, batch_size=16)


@pytest.fixture(scope="module")
def real(job):
    return real_images(job, 6)


def test_samples_are_those_of_the_sampling_job(drawing, job, editor, tmp_path):
    images, frames = editor.sample(5, editor.labels([0, 1, 2, 3, 4]), watched=3)
    run_job(job, tmp_path / "job", number=5, batch_size=8, format="npz")
    with np.load(tmp_path / "job" / "samples.npz") as file:
        assert abs(images.astype(int) - file["arr_0"].astype(int)).max() <= 1
    assert frames.shape == (drawing.T + 1, 3, 8, 8, 1)
    np.testing.assert_array_equal(frames[-1], images[:3])


def test_no_image_depends_on_the_batch(job, editor, real):
    key, depth = jax.random.key(5), np.array([12, 3, 0, 7, 7, 1])
    labels = editor.labels(real.labels)
    few = Editor(job, batch_size=8).reconstruct(key, real.images, labels, depth, draws=3)
    many = editor.reconstruct(key, real.images, labels, depth, draws=3)
    assert few.shape == (6, 3, 8, 8, 1)
    assert abs(few.astype(int) - many.astype(int)).max() <= 1
    np.testing.assert_array_equal(many[2], real.images[2][None].repeat(3, axis=0))
    assert abs(many[0, 0].astype(int) - many[0, 1]).max() > 20


def test_labels_are_told(editor, real):
    key, depth = jax.random.key(5), np.full(6, 6)
    told, other, none = (
        editor.reconstruct(key, real.images, editor.labels(labels), depth)
        for labels in (real.labels, [(label + 1) % 10 for label in real.labels], [None] * 6)
    )
    assert min(abs(told.astype(int) - each).max() for each in (other, none)) > 5


def test_times_and_depths_of_a_shorter_chain(drawing):
    editor = Editor(drawing.make_job(choice=Choice(steps=4, spacing="linspace")))
    assert editor.num_steps == 4
    assert [editor.paper_time(depth) for depth in range(5)] == [0, 1, 5, 8, 12]
    assert [editor.depth_of(time) for time in (0, 1, 4, 5, 9, 12)] == [0, 1, 2, 2, 3, 4]
    assert editor.labels([None, None]) is None
