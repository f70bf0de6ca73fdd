"""Batches of a set that fits no memory: read by Grain, decoded in threads or in worker processes, ahead of need.

Grain is asked for the examples of a range of steps and nothing else, so where a run goes on is told by its step alone.
"""

import dataclasses
import os
import signal
from collections.abc import Iterator

import numpy as np

from ddpm_jax.data.order import example_index
from ddpm_jax.data.source import Source

_NUM_THREADS = min(16, 2 * (os.cpu_count() or 1))


@dataclasses.dataclass(frozen=True)
class _Read:
    """From the number of an image in this host's line of examples to the image, and its label where asked for."""

    source: Source
    seed: int
    batch_size: int
    places: np.ndarray
    """Which rows of each batch are this host's, (count,)."""
    labelled: bool

    def __call__(self, number: int) -> tuple[np.ndarray, ...]:
        step, row = divmod(int(number), len(self.places))
        position = step * self.batch_size + int(self.places[row])
        index = np.array([example_index(self.seed, position, num_examples=self.source.num_examples)])
        image = self.source.read(index)[0]
        if self.source.read_labels is None or not self.labelled:
            return (image,)
        return image, self.source.read_labels(index)[0]


def stream(
    source: Source,
    seed: int,
    steps: range,
    *,
    batch_size: int,
    rows: slice | np.ndarray,
    labelled: bool,
    workers: int,
    ahead: int,
) -> Iterator[tuple[np.ndarray, ...]]:
    """Reads the images, and labels where asked for, of a range of steps.

    Args:
      source: the images.
      seed: of the run.
      steps: which, one after the other.
      batch_size: images a step, over all hosts.
      rows: which rows of each batch to read, a slice or their numbers.
      labelled: whether to read labels as well.
      workers: processes that decode; with 0, threads of this process do.
      ahead: how many batches are kept ready.

    Returns:
      an iterator of (images,) or (images, labels), with `close()`. An error in reading is raised by the `next` whose
      batch it befell, also from another process.
    """
    import grain  # takes a second, which runs that need no streaming do not have to spend

    places = np.arange(batch_size)[rows]
    count = len(places)
    read = _Read(source, seed, batch_size, places, labelled)
    examples = grain.MapDataset.range(steps.start * count, steps.stop * count).map(read)
    if not workers:
        # Batched last: the threads share out the images of one batch, and do not each make one of their own.
        options = grain.ReadOptions(num_threads=_NUM_THREADS, prefetch_buffer_size=max(ahead * count, _NUM_THREADS))
        return iter(examples.to_iter_dataset(options).batch(count))
    from absl import flags

    if not flags.FLAGS.is_parsed():  # which a program of absl's would have done, and Grain relies on
        flags.FLAGS.mark_as_parsed()
    # Batched first: each process makes whole batches, or the order would be another one.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=max(1, ahead // workers))
    batches = examples.batch(count).to_iter_dataset(options)
    return iter(batches.mp_prefetch(processes, worker_init_fn=_ignore_interrupts))


def _ignore_interrupts(index: int, count: int) -> None:
    """Leaves Ctrl-C, which every process of a terminal gets, to the one that saves and then ends the others."""
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
