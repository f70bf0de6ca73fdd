"""Which images a step sees, and what is done to them: functions of (seed, step), with no position to lose.

An epoch is a permutation of the set keyed by (seed, epoch); the epochs follow each other as one endless line of
examples, and step s takes the next `batch_size` of it. So a run begins at any step as if it had never stopped, and
two processes that read parts of one batch need not talk to each other.

>>> batch_indices(0, 0, batch_size=4, num_examples=6), batch_indices(0, 1, batch_size=4, num_examples=6)
(array([0, 2, 1, 5]), array([4, 3, 5, 3]))
"""

import collections
import concurrent.futures
import functools
import time
import types
import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ddpm_jax.data.source import Source

_LARGEST_KEY = 2**64 - 1


@functools.lru_cache(maxsize=4)
def epoch_permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    r"""Gives the order of the examples in one epoch.

    .. math:: \pi = \mathrm{argsort}(u_0, \dots, u_{N-1}), \quad u = \mathrm{Philox}_{(seed, epoch)}

    The raw 64-bit words of Philox are sorted, not `Generator.permutation` called: NumPy promises that the words stay
    the same from version to version, and does not promise it of what a `Generator` makes of them.

    Args:
      seed: of the run, in [0, 2^64).
      epoch: 0-based, in [0, 2^64).
      num_examples: N >= 1.

    Returns:
      (N,) int64, read-only: each of 0 .. N-1 once. Other seeds and other epochs give independent orders.

    Raises:
      ValueError: an argument is out of its range.
    """
    if not (0 <= seed <= _LARGEST_KEY and 0 <= epoch <= _LARGEST_KEY):
        raise ValueError(f"seed and epoch must be in [0, 2^64), not {seed} and {epoch}")
    if num_examples < 1:
        raise ValueError(f"num_examples must be at least 1, not {num_examples}")
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_examples)
    permutation = np.argsort(words, kind="stable").astype(np.int64)
    permutation.flags.writeable = False
    return permutation


def batch_indices(seed: int, step: int, *, batch_size: int, num_examples: int) -> np.ndarray:
    r"""Finds the examples of one step.

    .. math:: p_j = s B + j, \quad i_j = \pi_{seed,\, \lfloor p_j / N \rfloor}(p_j \bmod N)

    Every N examples in a row that begin at a multiple of N are one exact permutation, whether or not the batch size
    divides N, and also where a batch holds more than the whole set.

    Args:
      seed: of the run, in [0, 2^64).
      step: s >= 0.
      batch_size: B >= 1, the whole (global) batch's.
      num_examples: N >= 1.

    Returns:
      (B,) int64, each in [0, N).

    Raises:
      ValueError: an argument is out of its range.
    """
    if step < 0 or batch_size < 1 or num_examples < 1:
        raise ValueError(
            f"step must be at least 0, batch_size and num_examples at least 1, not {step}, {batch_size}, {num_examples}"
        )
    first, last = step * batch_size, (step + 1) * batch_size
    parts = []
    for epoch in range(first // num_examples, (last - 1) // num_examples + 1):
        start = epoch * num_examples
        order = epoch_permutation(seed, epoch, num_examples)
        parts.append(order[max(first - start, 0) : last - start])
    return np.concatenate(parts)


class Batch(typing.NamedTuple):
    """The examples of one step."""

    step: int
    """The step that they belong to."""
    images: np.ndarray
    """(B, H, W, C) uint8."""
    labels: np.ndarray | None
    """(B,) int32, or None where the source has none."""


class Batches:
    """Iterates over the batches of a range of steps, read in the background ahead of need.

    Use it in a `with` block, or call `close`: it ends the background thread. An error in reading is raised by the
    `next` whose batch it befell.
    """

    def __init__(self, read: typing.Callable[[int], Batch], steps: range, ahead: int) -> None:
        if ahead < 1:
            raise ValueError(f"ahead must be at least 1, not {ahead}")
        self.seconds_waited = 0.0
        """How long `next` has waited for a batch, in all."""
        self._read = read
        self._steps = iter(steps)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._pending: collections.deque[concurrent.futures.Future[Batch]] = collections.deque()
        self._closed = False
        for _ in range(ahead):
            self._read_one_more()

    def _read_one_more(self) -> None:
        step = next(self._steps, None)
        if step is not None:
            self._pending.append(self._thread.submit(self._read, step))

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        if self._closed or not self._pending:
            self.close()
            raise StopIteration
        begun = time.perf_counter()
        try:
            batch = self._pending.popleft().result()
        except BaseException:
            self.close()
            raise
        finally:
            self.seconds_waited += time.perf_counter() - begun
        self._read_one_more()
        return batch

    def close(self) -> None:
        """Stops reading and ends the thread; may be called more than once."""
        self._closed = True
        self._pending.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Batches":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: types.TracebackType | None
    ) -> None:
        self.close()


def batches(
    source: Source,
    seed: int,
    first_step: int,
    last_step: int,
    *,
    batch_size: int,
    rows: slice = slice(None),  # noqa: B008
    ahead: int = 2,
) -> Batches:
    """Reads the batches of a range of steps, `ahead` of them in advance in a background thread.

    Batch s is a function of (seed, s) alone, so a run that goes on at step s asks for `first_step=s`, and there is no
    state to save.

    Args:
      source: the images.
      seed: of the run, in [0, 2^64).
      first_step: the first step, >= 0.
      last_step: the step after the last one, as in `range`.
      batch_size: images a step, over all devices and hosts.
      rows: which rows of the batch to read; a host of many reads its own. All by default.
      ahead: how many batches are kept ready, >= 1.

    Returns:
      An iterator over `Batch(step, images, labels)`, to be used in a `with` block; it has `close()` and
      `seconds_waited`.

    Raises:
      ValueError: an argument is out of its range.
    """
    if first_step < 0 or batch_size < 1:
        raise ValueError(f"first_step must be at least 0 and batch_size at least 1, not {first_step} and {batch_size}")

    def read(step: int) -> Batch:
        indices = batch_indices(seed, step, batch_size=batch_size, num_examples=source.num_examples)[rows]
        labels = None if source.read_labels is None else source.read_labels(indices)
        return Batch(step, source.read(indices), labels)

    return Batches(read, range(first_step, last_step), ahead)


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
