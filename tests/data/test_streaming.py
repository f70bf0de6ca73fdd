"""Sets that fit no memory: the same examples in the same order as from memory, wherever they begin."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ddpm_jax.data import prefetch, sources
from ddpm_jax.system.errors import UserError


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
    np.save(folder / "train.npy", sets.noise(11 * 6, 5, 3).reshape(11, 6, 5, 3))
    np.save(folder / "train_labels.npy", np.arange(11))
    return folder / "train.npy"


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
    with prefetch.batches(source, 7, first, last, batch_size=4, **options) as found:
        return list(found)


@pytest.mark.parametrize("kind", ["folder", "npy"])
def test_what_is_streamed_is_what_is_held_in_memory(sets, folder, arrays, kind):
    held, streamed = both(sets, kind, {"folder": folder, "npy": arrays}[kind])
    assert streamed.images is None
    whole = read(held, 0, 9)  # three epochs, the batch size does not divide their length
    same(read(streamed, 0, 9), whole)
    same(read(streamed, 4, 9), whole[4:])
    for rows in (slice(0, 2), slice(2, 4), np.array([0, 3]), np.array([1, 2])):  # two hosts, neighbors or not
        same(read(streamed, 3, 6, rows=rows), read(held, 3, 6, rows=rows))
    assert read(streamed, 5, 5) == []


def test_labels_are_read_only_when_asked_for(sets, folder):
    _, streamed = both(sets, "folder", folder)
    assert [batch.labels for batch in read(streamed, 0, 2, labeled=False)] == [None, None]


def test_worker_processes_give_the_same(sets, arrays):
    """Without TensorFlow, whatever the number of workers; the memory map is opened anew in each."""
    held, streamed = both(sets, "npy", arrays)
    same(read(streamed, 2, 9, workers=2), read(held, 2, 9))


def test_a_process_that_is_killed_is_one_line(sets, arrays):
    _, streamed = both(sets, "npy", arrays)
    with prefetch.batches(streamed, 7, 0, 10**6, batch_size=4, workers=1) as found:
        next(found)
        (worker,) = multiprocessing.active_children()
        worker.kill()
        with pytest.raises(UserError, match=r"exit code -9.* fewer --data.workers") as raised:
            list(found)
    assert "\n" not in str(raised.value)


PROGRAM = """
import multiprocessing, sys, time
from ddpm_jax.config import DataConfig
from ddpm_jax.data import prefetch, sources

source = sources.load_source(DataConfig(source="npy", path=sys.argv[1], height=6, width=5, channels=3, memory_gib=0.0))
with prefetch.batches(source, 7, 0, 10**6, batch_size=4, workers=2) as found:
    next(found)
    next(found)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are looked up in /proc")
def test_processes_end_with_the_one_that_they_decode_for(arrays):
    repository = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": f"{repository}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", PROGRAM, str(arrays)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as program:
        children = [Path("/proc", pid) for pid in program.stdout.readline().split()]
        program.kill()
    assert len(children) == 2
    deadline = time.monotonic() + 20

    def alive(child):
        try:
            return (child / "cmdline").read_bytes() != b""  # that of a zombie is empty
        except OSError:
            return False

    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.01)
    left = [child.name for child in children if alive(child)]
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    assert not left


def test_a_file_that_is_gone_is_named_by_the_batch_that_needs_it(sets, tmp_path):
    for i in range(8):
        sets.save(tmp_path / f"{i}.png", sets.noise(6, 5, 3, i))
    streamed = sources.load_source(sets.config("folder", tmp_path, (6, 5), memory_gib=0.0))
    (tmp_path / "3.png").unlink()
    with (
        pytest.raises(UserError, match=r"3.png can no longer be read \(gone\)"),
        prefetch.batches(streamed, 7, 0, 5, batch_size=4) as found,
    ):
        list(found)


def test_closing_ends_the_threads(sets, folder):
    before = threading.active_count()
    _, streamed = both(sets, "folder", folder)
    found = prefetch.batches(streamed, 0, 0, 1000, batch_size=4)
    next(found)
    found.close()
    found.close()
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
    assert list(found) == []
