"""Which examples a step sees: a function of (seed, step), with no position to lose.

An epoch is a permutation of the set keyed by (seed, epoch); the epochs follow each other as one endless line of
examples, and step s takes the next `batch_size` of it. So a run begins at any step as if it had never stopped, and
two processes that read parts of one batch need not talk to each other.

>>> batch_indices(0, 0, batch_size=4, num_examples=6), batch_indices(0, 1, batch_size=4, num_examples=6)
(array([0, 2, 1, 5]), array([4, 3, 5, 3]))
"""

import functools

import numpy as np

_LARGEST_KEY = 2**64 - 1


@functools.lru_cache(maxsize=4)
def epoch_permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    r"""Returns the order of the examples in one epoch.

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


def example_index(seed: int, position: int, *, num_examples: int) -> int:
    r"""Finds one example by its place in the endless line.

    .. math:: i = \pi_{seed,\, \lfloor p / N \rfloor}(p \bmod N)

    Args:
      seed: of the run, in [0, 2^64).
      position: p >= 0; row j of step s has p = s B + j.
      num_examples: N >= 1.

    Returns:
      i in [0, N).

    Raises:
      ValueError: an argument is out of its range.
    """
    if position < 0:
        raise ValueError(f"position must be at least 0, not {position}")
    epoch, place = divmod(position, max(num_examples, 1))
    return int(epoch_permutation(seed, epoch, num_examples)[place])


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
