"""Samplers of times: their distributions, and that no layout shows in them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ddpm_jax.keys import image_keys
from ddpm_jax.time_sampling import LossHistory, antithetic, loss_aware, make_time_sampler, uniform, uniform_times

T = 20
NAMES = ("uniform", "antithetic", "loss_aware")
SAMPLERS = {name: make_time_sampler(name, T) for name in NAMES}
PAIRS = {num_steps: antithetic(num_steps) for num_steps in (1, 2, 1000)}
EVEN = loss_aware(T, uniform_share=0.5)


def keys_from(seed):
    return lambda indices: image_keys(jax.random.key(seed), indices)


@functools.cache
def compiled(sampler):
    return jax.jit(lambda key, indices, memory: sampler.draw(lambda places: image_keys(key, places), indices, memory))


def draws(sampler, number, memory=(), seed=0):
    return compiled(sampler)(jax.random.key(seed), jnp.arange(number), memory)


def looks_like(t, p):
    """Whether times are draws from p: the seed is fixed; of other seeds one in a thousand would fail."""
    return stats.chisquare(np.bincount(t, minlength=len(p)), len(t) * p / p.sum()).pvalue > 1e-3


def seen_history(counts, seed=0, history=10):
    losses = jnp.asarray(np.random.default_rng(seed).uniform(0.1, 4, (T, history)), jnp.float32)
    return LossHistory(losses, jnp.asarray(counts, jnp.int32))


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 2**31 - 1))
def test_no_layout_shows(name, seed):
    draw, key = compiled(SAMPLERS[name]), jax.random.key(seed)
    memory = seen_history(np.full(T, 12)) if name == "loss_aware" else ()
    whole = draw(key, jnp.arange(8), memory)
    chex.assert_shape(whole, (8,))
    chex.assert_type(whole.t, jnp.int32)
    assert ((whole.t >= 0) & (whole.t < T)).all()
    for part in (jnp.arange(4, 8), jnp.array([3]), jnp.array([6, 1])):
        chex.assert_trees_all_equal(draw(key, part, memory), jax.tree.map(lambda each, part=part: each[part], whole))


@pytest.mark.parametrize("name", ["uniform", "antithetic"])
def test_all_times_are_alike(name):
    t, weights = draws(SAMPLERS[name], 20_000)
    for half in (t[::2], t[1::2]):  # independent within a half, for either sampler
        assert looks_like(half, np.ones(T))
    np.testing.assert_array_equal(weights, 1)


def test_uniform_times_are_those_of_the_keys():
    keys = image_keys(jax.random.key(0), jnp.arange(16))
    np.testing.assert_array_equal(uniform_times(keys, T), uniform(T).draw(keys_from(0), jnp.arange(16), ()).t)


@pytest.mark.parametrize("num_steps", [1, 2, 1000])
@given(seed=st.integers(0, 2**31 - 1))
def test_pairs_add_to_the_last_time(num_steps, seed):
    t, _ = draws(PAIRS[num_steps], 16, seed=seed)
    np.testing.assert_array_equal(t[::2] + t[1::2], num_steps - 1)


def test_a_mean_over_pairs_varies_less():
    loss = lambda t: (1 - t / (T - 1)) ** 3
    means = {}
    for name in ("uniform", "antithetic"):
        means[name] = [loss(np.asarray(draws(SAMPLERS[name], 64, seed=seed).t)).mean() for seed in range(60)]
    assert np.std(means["antithetic"]) < 0.8 * np.std(means["uniform"])


def second_moment_p(losses, uniform_share=0.001):
    root = np.sqrt((np.asarray(losses, np.float64) ** 2).mean(axis=1))
    return (1 - uniform_share) * root / root.sum() + uniform_share / T


class TestLossAware:
    @pytest.mark.parametrize("counts", [np.zeros(T), np.where(np.arange(T) == 7, 9, 50)])
    def test_is_uniform_until_every_time_has_been_seen_ten_times(self, counts):
        t, weights = draws(SAMPLERS["loss_aware"], 10_000, seen_history(counts))
        np.testing.assert_allclose(weights, 1, rtol=1e-5)
        assert looks_like(t, np.ones(T))

    def test_then_draws_by_the_second_moment(self):
        memory = seen_history(np.full(T, 10))
        p = second_moment_p(memory.losses)
        t, weights = draws(SAMPLERS["loss_aware"], 20_000, memory)
        assert looks_like(t, p)
        assert not looks_like(t, np.ones(T))
        np.testing.assert_allclose(weights, 1 / (T * p[np.asarray(t)]), rtol=1e-4)

    @given(seed=st.integers(0, 2**31 - 1))
    def test_weights_leave_the_mean_as_it_is(self, seed):
        memory = seen_history(np.full(T, 10), seed)
        t, weights = draws(EVEN, 1_000, memory)
        p = second_moment_p(memory.losses, 0.5)
        weight_of = dict(zip(np.asarray(t).tolist(), np.asarray(weights, np.float64), strict=True))
        assert len(weight_of) == T
        losses = np.random.default_rng(seed).uniform(0, 9, T)
        expectation = sum(p[time] * weight_of[time] * losses[time] for time in range(T))
        np.testing.assert_allclose(expectation, losses.mean(), rtol=1e-4)

    def test_a_time_that_costs_nothing_is_still_drawn(self):
        losses = jnp.ones((T, 10)).at[3].set(0.0)
        t, weights = draws(loss_aware(T, uniform_share=0.2), 5_000, LossHistory(losses, jnp.full(T, 10)))
        np.testing.assert_allclose(weights[t == 3], 1 / 0.2, rtol=1e-4)
        assert (t == 3).sum() > 20  # of 50 expected

    UPDATE = staticmethod(jax.jit(loss_aware(3).update))

    @given(
        batches=st.lists(st.lists(st.integers(0, 2), min_size=32, max_size=32), min_size=1, max_size=4),
        seed=st.integers(0, 2**31 - 1),
    )
    def test_update_is_that_of_one_image_after_the_other(self, batches, seed):
        random = np.random.default_rng(seed)
        memory = loss_aware(3).init()
        ring, counts = np.zeros((3, 10), np.float32), np.zeros(3, int)
        for times in batches:  # 32 images at 3 times: always one with more than ten
            losses = random.uniform(0, 5, 32).astype(np.float32)
            memory = self.UPDATE(memory, jnp.array(times), jnp.array(losses))
            for t, loss in zip(times, losses, strict=True):
                ring[t, counts[t] % 10] = loss
                counts[t] += 1
        np.testing.assert_array_equal(memory.losses, ring)
        np.testing.assert_array_equal(memory.counts, counts)

    def test_becomes_aware_of_the_loss_by_its_own_updates(self):
        sampler = loss_aware(T)
        step = jax.jit(
            lambda memory, key: (
                drawn := sampler.draw(lambda indices: image_keys(key, indices), jnp.arange(64), memory),
                sampler.update(memory, drawn.t, 1 + drawn.t.astype(jnp.float32)),
            )
        )
        memory = sampler.init()
        for number in range(30):
            drawn, memory = step(memory, jax.random.key(number))
        assert memory.counts.sum() == 30 * 64
        p = second_moment_p(np.tile(1.0 + np.arange(T)[:, None], 10))
        np.testing.assert_allclose(drawn.weights, 1 / (T * p[np.asarray(drawn.t)]), rtol=1e-4)


@pytest.mark.parametrize("make", [uniform, antithetic])
def test_nothing_is_remembered_where_nothing_need_be(make):
    sampler = make(T)
    assert sampler.init() == ()
    assert sampler.update((), jnp.zeros(4, jnp.int32), jnp.zeros(4)) == ()


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"unknown timestep sampler 'gaussian': choose one of uniform, antithetic"):
        make_time_sampler("gaussian", T)
