"""The batches of a range of steps, read in the background ahead of need, and what is done to their pixels."""

import collections
import concurrent.futures
import time
import types
import typing
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ddpm_jax.data.order import batch_indices
from ddpm_jax.data.source import Source
from ddpm_jax.data.streaming import stream

Item = typing.TypeVar("Item")
_AHEAD = 2


class Ahead(typing.Generic[Item]):
    """Iterates over what is read for each of a range of steps, in the background and ahead of need.

    Use it in a `with` block, or call `close`: it ends the background thread. An error in reading is raised by the
    `next` whose step it befell.
    """

    def __init__(
        self, read: Callable[[int], Item], steps: range, *, ahead: int = _AHEAD, finish: Callable[[], object] = int
    ) -> None:
        if ahead < 1:
            raise ValueError(f"ahead must be at least 1, not {ahead}")
        self.seconds_waited = 0.0
        """How long `next` has waited, in all."""
        self._read, self._finish = read, finish
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

    def __iter__(self) -> "Ahead[Item]":
        return self

    def __next__(self) -> Item:
        if self._closed or not self._pending:
            self.close()
            raise StopIteration
        begun = time.perf_counter()
        try:
            item = self._pending.popleft().result()
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
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._finish()
        # What they hold goes now: Grain's iterators complain if they are still there when Python ends.
        del self._read, self._finish

    def __enter__(self) -> "Ahead[Item]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: types.TracebackType | None
    ) -> None:
        self.close()


class Batch(typing.NamedTuple):
    """The examples of one step."""

    step: int
    """The step that they belong to."""
    images: np.ndarray
    """(B, H, W, C) uint8."""
    labels: np.ndarray | None
    """(B,) int32, or None where the source has none, or they were not asked for."""


def _as_it_is(batch: Batch) -> typing.Any:
    return batch


def batches(
    source: Source,
    seed: int,
    first_step: int,
    last_step: int,
    *,
    batch_size: int,
    rows: slice | np.ndarray = slice(None),  # noqa: B008
    labelled: bool = True,
    workers: int = 0,
    ahead: int = _AHEAD,
    then: Callable[[Batch], Item] = _as_it_is,
) -> Ahead[Item]:
    """Reads the batches of a range of steps, `ahead` of them in advance in the background.

    Batch s is a function of (seed, s) alone, so a run that goes on at step s asks for `first_step=s`, and there is no
    state to save. A set that is held in memory is indexed there, one that is not is streamed.

    Args:
      source: the images.
      seed: of the run.
      first_step: the first step, >= 0.
      last_step: the step after the last one, as in `range`.
      batch_size: images a step, over all devices and hosts.
      rows: which rows of the batch to read; a host of many reads its own. All by default.
      labelled: whether to read the labels, where there are any.
      workers: processes that decode what is streamed; with 0, threads of this process do.
      ahead: how many batches are kept ready, >= 1.
      then: what is done to each batch in the background; nothing by default.

    Returns:
      An iterator over `then(Batch(step, images, labels))`, to be used in a `with` block; it has `close()` and
      `seconds_waited`.

    Raises:
      ValueError: an argument is out of its range.
    """
    if first_step < 0 or batch_size < 1:
        raise ValueError(f"first_step must be at least 0 and batch_size at least 1, not {first_step} and {batch_size}")
    steps = range(first_step, last_step)

    def index(step: int) -> Item:
        indices = batch_indices(seed, step, batch_size=batch_size, num_examples=source.num_examples)[rows]
        labels = source.read_labels(indices) if labelled and source.read_labels is not None else None
        return then(Batch(step, source.read(indices), labels))

    if source.images is not None or not steps:
        return Ahead(index, steps, ahead=ahead)
    streamed = stream(
        source, seed, steps, batch_size=batch_size, rows=rows, labelled=labelled, workers=workers, ahead=ahead
    )

    def take(step: int) -> Item:
        images, *labels = next(streamed)
        return then(Batch(step, images, labels[0] if labels else None))

    return Ahead(take, steps, ahead=ahead, finish=streamed.close)  # type: ignore[attr-defined]


def flip(keys: Array, images: Array) -> Array:
    """Mirrors each image left to right with probability 0.5, by its own key.

    Args:
      keys: (B,) typed keys.
      images: (B, H, W, C), of any type.

    Returns:
      Images of the same shape and type.

    Ho et al. 2020, appendix B: random horizontal flips in training, for all sets but the bedrooms of LSUN.
    """
    chex.assert_rank(images, 4)
    chex.assert_equal_shape_prefix([keys, images], 1)
    mirrored = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def to_float(images: ArrayLike) -> Array:
    r"""Brings pixels to the range of the network.

    .. math:: x = u / 127.5 - 1 = (2u - 255) / 255

    The second form is computed, as a product with 1/255: its one rounding is the same inside and outside of `jit`
    (XLA turns the division by a constant into a product, and 255 would become 1.0000001).

    Args:
      images: (..., H, W, C) uint8.

    Returns:
      float32 of the same shape, in [-1, 1].

    Ho et al. 2020, section 3.3: "integers in {0, 1, ..., 255} scaled linearly to [-1, 1]".

    >>> to_float(np.array([0, 255], np.uint8))
    Array([-1.,  1.], dtype=float32)
    """
    return (2 * jnp.asarray(images).astype(jnp.float32) - 255) * np.float32(1 / 255)


def to_uint8(images: ArrayLike) -> Array:
    r"""Brings images back to pixels: clipped, and rounded to the nearest.

    .. math:: u = \mathrm{round}(\mathrm{clip}(127.5\,(x + 1), 0, 255))

    It undoes `to_float` exactly. The original code cuts the fraction off instead, which makes every image half a
    level darker on average.

    Args:
      images: (..., H, W, C) floats, nominally in [-1, 1].

    Returns:
      uint8 of the same shape.

    >>> pixels = np.arange(256, dtype=np.uint8)
    >>> bool((to_uint8(to_float(pixels)) == pixels).all())
    True
    """
    return jnp.round(jnp.clip((jnp.asarray(images) + 1) * 127.5, 0, 255)).astype(jnp.uint8)
