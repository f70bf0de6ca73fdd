"""Sets that fit no memory: the same examples in the same order as from memory, wherever they begin."""

import threading
import time

import numpy as np
import pytest

from ddpm_jax.data import pipeline, sources
from ddpm_jax.errors import UserError


@pytest.fixture(scope="module")
def folder(sets, tmp_path_factory):
    """Eleven pictures in two classes, no two alike."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(11):
        sets.save(folder / "ab"[i % 2] / f"{i}.png", sets.noise(6, 5, 3, i))
    return folder


@pytest.fixture(scope="module")
def arrays(sets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("arrays")
    np.savez(folder / "train.npz", images=sets.noise(11 * 6, 5, 3).reshape(11, 6, 5, 3), labels=np.arange(11))
    return folder / "train.npz"


def both(sets, kind, path):
    """The same set held in memory, and on disk."""
    return [sources.load_source(sets.config(kind, path, (6, 5), memory_gib=gib)) for gib in (1.0, 0.0)]


def same(found, wanted):
    assert [batch.step for batch in found] == [batch.step for batch in wanted]
    for here, there in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(here.images, there.images)
        assert here.images.dtype == np.uint8
        np.testing.assert_array_equal(here.labels, there.labels)


def read(source, first, last, **options):
    with pipeline.batches(source, 7, first, last, batch_size=4, **options) as found:
        return list(found)


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_what_is_streamed_is_what_is_held_in_memory(sets, folder, arrays, kind):
    held, streamed = both(sets, kind, {"folder": folder, "npz": arrays}[kind])
    assert streamed.images is None
    whole = read(held, 0, 9)  # three epochs, the batch size does not divide their length
    same(read(streamed, 0, 9), whole)
    same(read(streamed, 4, 9), whole[4:])
    for rows in (slice(0, 2), slice(2, 4), np.array([0, 3]), np.array([1, 2])):  # two hosts, neighbours or not
        same(read(streamed, 3, 6, rows=rows), read(held, 3, 6, rows=rows))
    assert read(streamed, 5, 5) == []


def test_labels_are_read_only_when_asked_for(sets, folder):
    _, streamed = both(sets, "folder", folder)
    assert [batch.labels for batch in read(streamed, 0, 2, labelled=False)] == [None, None]


def test_worker_processes_give_the_same(sets, arrays):
    """Without TensorFlow, whatever the number of workers; the memory map is opened anew in each."""
    held, streamed = both(sets, "npz", arrays)
    same(read(streamed, 2, 9, workers=2), read(held, 2, 9))


def test_a_file_that_is_gone_is_named_by_the_batch_that_needs_it(sets, tmp_path):
    for i in range(8):
        sets.save(tmp_path / f"{i}.png", sets.noise(6, 5, 3, i))
    streamed = sources.load_source(sets.config("folder", tmp_path, (6, 5), memory_gib=0.0))
    (tmp_path / "3.png").unlink()
    with (
        pytest.raises(UserError, match=r"3.png can no longer be read \(gone\)"),
        pipeline.batches(streamed, 7, 0, 5, batch_size=4) as found,
    ):
        list(found)


def test_closing_ends_the_threads(sets, folder):
    before = threading.active_count()
    _, streamed = both(sets, "folder", folder)
    found = pipeline.batches(streamed, 0, 0, 1000, batch_size=4)
    next(found)
    found.close()
    found.close()
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
    assert list(found) == []
