"""Batches of a set that fits no memory: read by Grain, decoded in threads or in worker processes, ahead of need.

Grain reads the examples of a range of steps, so the step alone determines where a run resumes.
"""

import dataclasses
import multiprocessing
import os
import re
import signal
import threading
import typing
from collections.abc import Iterator

import numpy as np

from ddpm_jax.data.order import example_index
from ddpm_jax.data.source import NUM_THREADS, Source
from ddpm_jax.system.errors import UserError


@dataclasses.dataclass(frozen=True)
class _Read:
    """Reads an image, and its label if requested, by its number among this host's examples."""

    source: Source
    seed: int
    batch_size: int
    places: np.ndarray
    """Which rows of each batch are this host's, (count,)."""
    labeled: bool

    def __call__(self, number: int) -> tuple[np.ndarray, ...]:
        step, row = divmod(int(number), len(self.places))
        position = step * self.batch_size + int(self.places[row])
        index = np.array([example_index(self.seed, position, num_examples=self.source.num_examples)])
        image = self.source.read(index)[0]
        if self.source.read_labels is None or not self.labeled:
            return (image,)
        return image, self.source.read_labels(index)[0]


def stream(
    source: Source,
    seed: int,
    steps: range,
    *,
    batch_size: int,
    rows: slice | np.ndarray,
    labeled: bool,
    workers: int,
    ahead: int,
) -> Iterator[tuple[np.ndarray, ...]]:
    """Reads the images, and labels if requested, of a range of steps.

    Args:
      source: the images.
      seed: of the run.
      steps: which, one after the other.
      batch_size: images a step, over all hosts.
      rows: which rows of each batch to read, a slice or their numbers.
      labeled: whether to read labels as well.
      workers: processes that decode; with 0, threads of this process do.
      ahead: how many batches are kept ready.

    Returns:
      an iterator of (images,) or (images, labels), with `close()`. An error in reading is raised by the `next` whose
      batch it befell, also from another process; a process that was killed is a `UserError`.
    """
    try:
        import grain  # takes a second, which runs that need no streaming do not have to spend
    except ModuleNotFoundError as error:
        raise UserError(
            f"a data set that is streamed from disk needs the package {error.name}, which is not installed: "
            f"pip install {error.name}; or keep the set in memory, with a larger --data.memory-gib"
        ) from error

    places = np.arange(batch_size)[rows]
    count = len(places)
    read = _Read(source, seed, batch_size, places, labeled)
    examples = grain.MapDataset.range(steps.start * count, steps.stop * count).map(read)
    if not workers:
        # Batched last: the threads share out the images of one batch, and do not each make one of their own.
        options = grain.ReadOptions(num_threads=NUM_THREADS, prefetch_buffer_size=max(ahead * count, NUM_THREADS))
        return iter(examples.to_iter_dataset(options).batch(count))
    from absl import flags

    if not flags.FLAGS.is_parsed():  # which a program of absl's would have done, and Grain relies on
        flags.FLAGS.mark_as_parsed()
    # Batched first: each process makes whole batches, or the order would be another one.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=max(1, ahead // workers))
    batches = examples.batch(count).to_iter_dataset(options)
    return _OfProcesses(iter(batches.mp_prefetch(processes, worker_init_fn=_begin_process)))


@dataclasses.dataclass(frozen=True)
class _OfProcesses(Iterator[tuple[np.ndarray, ...]]):
    """What processes read; where one of them was killed, that in one line."""

    batches: typing.Any
    """Grain's iterator."""

    def __next__(self) -> tuple[np.ndarray, ...]:
        try:
            return next(self.batches)
        except RuntimeError as error:
            lost = re.match(r"Worker process was terminated .*exit code (-?\d+)", str(error))
            if lost is None:
                raise
            raise UserError(
                f"a process that decodes images was lost (exit code {lost[1]}; it is -9 where memory ran out): start "
                "again, with fewer --data.workers if it comes back"
            ) from error

    def close(self) -> None:
        self.batches.close()


def _begin_process(index: int, count: int) -> None:
    """Leaves Ctrl-C, which every process of a terminal gets, to the one that saves and then ends the others."""
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Waits for the end of the training process, which does not end its own where it is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is for processes that another one started"
    parent.join()
    os._exit(1)
