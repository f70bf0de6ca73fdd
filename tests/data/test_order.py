import chex
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from ddpm_jax.data import order

few = hypothesis.settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**64 - 1)


def line(seed, first, last, *, batch_size, num_examples):
    """The examples of several steps, one after the other."""
    return np.concatenate(
        [
            order.batch_indices(seed, step, batch_size=batch_size, num_examples=num_examples)
            for step in range(first, last)
        ]
    )


@few
@hypothesis.given(seeds, st.integers(0, 2**64 - 1), st.integers(1, 3000))
def test_an_epoch_is_a_permutation(seed, epoch, num_examples):
    found = order.epoch_permutation(seed, epoch, num_examples)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(np.sort(found), np.arange(num_examples))


def test_the_order_is_the_same_on_every_version_of_numpy():
    # Changing one of these numbers changes every run that anyone has begun.
    np.testing.assert_array_equal(order.epoch_permutation(0, 0, 10), [0, 2, 9, 1, 8, 5, 4, 3, 6, 7])
    np.testing.assert_array_equal(order.epoch_permutation(0, 1, 10), [5, 3, 7, 8, 2, 4, 1, 0, 6, 9])
    np.testing.assert_array_equal(order.epoch_permutation(7, 0, 10), [8, 4, 1, 6, 3, 2, 7, 5, 9, 0])
    large = order.epoch_permutation(2**64 - 1, 12345, 50_000)
    np.testing.assert_array_equal(large[:8], [31873, 26892, 27342, 5396, 44249, 9553, 28113, 2825])


def test_a_permutation_cannot_be_spoilt_in_the_cache():
    found = order.epoch_permutation(3, 0, 5)
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1


def test_every_order_is_as_likely_as_any_other():
    # 24 orders of 4 examples over 4,800 (seed, epoch) pairs: chi-squared with 23 degrees of freedom, z < 4.
    counts = {}
    for seed in range(60):
        for epoch in range(80):
            found = tuple(order.epoch_permutation(seed, epoch, 4))
            counts[found] = counts.get(found, 0) + 1
    assert len(counts) == 24
    chi_squared = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert abs(chi_squared - 23) / np.sqrt(2 * 23) < 4


def test_epochs_and_seeds_are_independent():
    # Spearman's correlation of two independent orders of N has standard deviation 1 / sqrt(N - 1).
    orders = [order.epoch_permutation(seed, epoch, 10_001) for seed in (0, 1, 2**40) for epoch in (0, 1, 2**40)]
    correlations = np.corrcoef([each.astype(np.float64) for each in orders])
    assert np.abs(correlations - np.eye(len(orders))).max() < 4.5 / 100


@pytest.mark.parametrize(("seed", "epoch", "num_examples"), [(-1, 0, 5), (2**64, 0, 5), (0, -1, 5), (0, 0, 0)])
def test_a_permutation_refuses_what_is_out_of_range(seed, epoch, num_examples):
    with pytest.raises(ValueError, match="must be"):
        order.epoch_permutation(seed, epoch, num_examples)


@few
@hypothesis.given(seeds, st.integers(1, 40), st.integers(1, 60), st.integers(1, 4))
def test_every_epoch_is_complete_whatever_the_batch_size(seed, num_examples, batch_size, epochs):
    steps = -(-epochs * num_examples // batch_size)
    seen = line(seed, 0, steps, batch_size=batch_size, num_examples=num_examples)
    for epoch in range(epochs):
        one = seen[epoch * num_examples : (epoch + 1) * num_examples]
        np.testing.assert_array_equal(one, order.epoch_permutation(seed, epoch, num_examples))


@few
@hypothesis.given(seeds, st.integers(0, 10**15), st.integers(1, 40), st.integers(1, 30), st.integers(1, 5))
def test_the_batch_size_only_cuts_the_line_of_examples(seed, step, num_examples, batch_size, factor):
    large = order.batch_indices(seed, step, batch_size=batch_size * factor, num_examples=num_examples)
    small = line(seed, step * factor, (step + 1) * factor, batch_size=batch_size, num_examples=num_examples)
    chex.assert_shape(large, (batch_size * factor,))
    np.testing.assert_array_equal(large, small)


@few
@hypothesis.given(seeds, st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 30))
def test_one_example_is_found_as_in_its_batch(seed, step, batch_size, num_examples):
    whole = order.batch_indices(seed, step, batch_size=batch_size, num_examples=num_examples)
    positions = range(step * batch_size, (step + 1) * batch_size)
    assert [order.example_index(seed, each, num_examples=num_examples) for each in positions] == list(whole)
    with pytest.raises(ValueError, match="position must be at least 0"):
        order.example_index(seed, -1, num_examples=num_examples)


@pytest.mark.parametrize(("step", "batch_size", "num_examples"), [(-1, 1, 1), (0, 0, 1), (0, 1, 0)])
def test_batch_indices_refuses_what_is_out_of_range(step, batch_size, num_examples):
    with pytest.raises(ValueError, match="must be"):
        order.batch_indices(0, step, batch_size=batch_size, num_examples=num_examples)
