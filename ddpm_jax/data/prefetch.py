"""The batches of a range of steps, read in the background ahead of need, and what is done to their pixels."""

import collections
import concurrent.futures
import time
import types
import typing
from collections.abc import Callable, Iterable

import numpy as np

from ddpm_jax.data.order import batch_indices
from ddpm_jax.data.source import Source
from ddpm_jax.data.streaming import stream

Item = typing.TypeVar("Item")
_AHEAD = 2


class Prefetch(typing.Generic[Item]):
    """Iterates over what is read for each of a sequence of steps or calls, in the background and ahead of need.

    Use it in a `with` block, or call `close`: it ends the background thread. An error in reading is raised by the
    `next` that would have returned what was read.
    """

    def __init__(
        self,
        read: Callable[[typing.Any], Item],
        steps: Iterable[typing.Any],
        *,
        ahead: int = _AHEAD,
        hurry: Callable[[], object] = int,
        finish: Callable[[], object] = int,
    ) -> None:
        if ahead < 1:
            raise ValueError(f"ahead must be at least 1, not {ahead}")
        self.seconds_waited = 0.0
        """How long `next` has waited, in all."""
        self._read, self._hurry, self._finish = read, hurry, finish  # before and after the thread ends
        self._steps = iter(steps)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._pending: collections.deque[concurrent.futures.Future[Item]] = collections.deque()
        self._closed = False
        for _ in range(ahead):
            self._read_one_more()

    def _read_one_more(self) -> None:
        step = next(self._steps, None)
        if step is not None:
            self._pending.append(self._thread.submit(self._read, step))

    def __iter__(self) -> "Prefetch[Item]":
        return self

    def __next__(self) -> Item:
        if self._closed or not self._pending:
            self.close()
            raise StopIteration
        begun = time.perf_counter()
        try:
            item = self._pending.popleft().result()
        except StopIteration as error:  # of `read`, with steps left: passed on, it would be taken for the end of them
            self.close()
            raise RuntimeError("the data ended before the steps") from error
        except BaseException:
            self.close()
            raise
        finally:
            self.seconds_waited += time.perf_counter() - begun
        self._read_one_more()
        return item

    def close(self) -> None:
        """Stops reading and ends the thread; may be called more than once."""
        if self._closed:
            return
        self._closed = True
        self._pending.clear()
        self._hurry()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._finish()
        # What they hold goes now: Grain's iterators complain if they are still there when Python ends.
        del self._read, self._hurry, self._finish

    def __enter__(self) -> "Prefetch[Item]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: types.TracebackType | None
    ) -> None:
        self.close()


class Examples(typing.NamedTuple):
    """The examples of one step, on the host."""

    step: int
    """The step that they belong to."""
    images: np.ndarray
    """(B, H, W, C) uint8."""
    labels: np.ndarray | None
    """(B,) int32, or None if the source has none or they were not requested."""


def _as_it_is(examples: Examples) -> typing.Any:
    return examples


def batches(
    source: Source,
    seed: int,
    first_step: int,
    last_step: int,
    *,
    batch_size: int,
    rows: slice | np.ndarray = slice(None),  # noqa: B008
    labeled: bool = True,
    workers: int = 0,
    ahead: int = _AHEAD,
    then: Callable[[Examples], Item] = _as_it_is,
) -> Prefetch[Item]:
    """Reads the batches of a range of steps, `ahead` of them in advance in the background.

    Batch s is a function of (seed, s) alone, so a run that resumes from step s asks for `first_step=s`, and there is no
    state to save. A set that is held in memory is indexed there, one that is not is streamed.

    Args:
      source: the images.
      seed: of the run.
      first_step: the first step, >= 0.
      last_step: the step after the last one, as in `range`.
      batch_size: images a step, over all devices and hosts.
      rows: which rows of the batch to read; a host of many reads its own. All by default.
      labeled: whether to read the labels, where there are any.
      workers: processes that decode what is streamed; with 0, threads of this process do.
      ahead: how many batches are kept ready, >= 1.
      then: what is done to each batch in the background; nothing by default.

    Returns:
      An iterator over `then(Examples(step, images, labels))`, to be used in a `with` block; it has `close()` and
      `seconds_waited`.

    Raises:
      ValueError: an argument is out of its range.
    """
    if first_step < 0 or batch_size < 1:
        raise ValueError(f"first_step must be at least 0 and batch_size at least 1, not {first_step} and {batch_size}")
    steps = range(first_step, last_step)

    def index(step: int) -> Item:
        indices = batch_indices(seed, step, batch_size=batch_size, num_examples=source.num_examples)[rows]
        labels = source.read_labels(indices) if labeled and source.read_labels is not None else None
        return then(Examples(step, source.read(indices), labels))

    if source.images is not None or not steps:
        return Prefetch(index, steps, ahead=ahead)
    streamed = stream(
        source, seed, steps, batch_size=batch_size, rows=rows, labeled=labeled, workers=workers, ahead=ahead
    )

    def take(step: int) -> Item:
        images, *labels = next(streamed)
        return then(Examples(step, images, labels[0] if labels else None))

    return Prefetch(take, steps, ahead=ahead, finish=streamed.close)  # type: ignore[attr-defined]
