"""The state of a run and its optimizer: the paper's learning rate, clipping and Adam."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_jax.config import TrainConfig
from ddpm_jax.training.state import learning_rate, make_optimizer

PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[0.5]])}


def steps_of(optimizer, gradients):
    """The updates that an optimizer makes of a row of gradients."""
    state, updates = optimizer.init(PARAMS), []
    for gradient in gradients:
        update, state = optimizer.update(gradient, state, PARAMS)
        updates.append(update)
    return updates


def scaled(factor):
    return jax.tree.map(lambda leaf: factor * leaf, {"a": jnp.array([0.48, -0.36]), "b": jnp.array([[0.8]])})


class TestLearningRate:
    @pytest.mark.parametrize(
        ("update", "rate"), [(0, 0.0), (1, 4e-8), (2500, 1e-4), (5000, 2e-4), (5001, 2e-4), (800_000, 2e-4)]
    )
    def test_is_the_papers(self, update, rate):
        np.testing.assert_allclose(learning_rate(TrainConfig())(update), rate, atol=2e-11)  # an ulp of 2e-4

    def test_without_warmup_is_whole_from_the_start(self):
        assert learning_rate(TrainConfig(warmup_steps=0))(0) == 2e-4

    @given(warmup=st.integers(1, 10_000), update=st.integers(0, 20_000))
    def test_rises_evenly_then_stays(self, warmup, update):
        rate = learning_rate(TrainConfig(warmup_steps=warmup, learning_rate=1e-3))(update)
        np.testing.assert_allclose(rate, 1e-3 * min(update / warmup, 1), rtol=1e-5, atol=1e-12)

    @pytest.mark.parametrize("warmup", [0, 10])
    @pytest.mark.parametrize(
        ("decay", "factors"),
        [
            ("cosine", {10: 1.0, 100: None, 200: 0.0, 300: 0.0}),
            ("inverse_sqrt", {10: 1.0, 200: 1.0, 800: 0.5, 20_000: 0.1}),
        ],
    )
    def test_falls_after_the_warmup(self, training, warmup, decay, factors):
        config = TrainConfig(learning_rate=1e-3, warmup_steps=warmup, lr_decay=decay, decay_steps=200)
        with jax.numpy_dtype_promotion("standard"):
            rate = learning_rate(config)
            assert float(rate(0)) == (0 if warmup else pytest.approx(1e-3))
            for count, factor in factors.items():
                if factor is None or (decay, warmup) == ("cosine", 0):
                    factor = (1 + np.cos(np.pi * min((count - warmup) / (200 - warmup), 1))) / 2
                assert float(rate(count)) == pytest.approx(1e-3 * factor, rel=1e-5, abs=1e-10)


class TestOptimizer:
    def test_adamw_also_takes_off_a_share_of_the_parameters(self, training):
        choices = dict(warmup_steps=0, learning_rate=1e-2, grad_clip=0)
        (adam,), (adamw,) = (
            steps_of(training.paper_optimizer(**choices, **decayed), [scaled(1.0)])
            for decayed in ({}, dict(optimizer="adamw", weight_decay=0.1))
        )
        chex.assert_trees_all_close(adamw, jax.tree.map(lambda a, p: a - 1e-2 * 0.1 * p, adam, PARAMS), rtol=1e-5)

    def test_muon_turns_kernels_by_even_steps_and_leaves_the_rest_to_adam(self, training):
        random = np.random.default_rng(0)
        arrays = {"kernel": (3, 3, 4, 8), "bias": (8,), "embedding": (5, 6)}
        params, gradient = (
            {"layer": {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in arrays.items()}}
            for _ in range(2)
        )
        choices = dict(warmup_steps=0, learning_rate=1e-2, grad_clip=0)

        def first(optimizer):
            return optimizer.update(gradient, optimizer.init(params), params)[0]["layer"]

        muon = first(training.paper_optimizer(**choices, optimizer="muon"))
        adam = first(training.lenient(optax.adam(1e-2, nesterov=True)))
        for name in ("bias", "embedding"):
            np.testing.assert_allclose(muon[name], adam[name], rtol=1e-5)
        update = np.asarray(muon["kernel"]).reshape(36, 8)
        # Five Newton-Schulz steps leave singular values in about [0.7, 1.2]; then the update is as large as Adam's.
        values = np.linalg.svd(update / (1e-2 * 0.2 * 6), compute_uv=False)
        assert values.min() > 0.6
        assert values.max() < 1.3
        aligned = (
            -np.linalg.svd(np.asarray(gradient["layer"]["kernel"]).reshape(36, 8), full_matrices=False)[0].T @ update
        )
        assert np.linalg.svd(aligned, compute_uv=False).min() > 0.6 * 1e-2 * 0.2 * 6

    def test_is_adam_by_hand(self, training):
        config = TrainConfig(learning_rate=1e-2, warmup_steps=4, grad_clip=0)
        values = [0.7, -0.2, 0.4, 0.1, 0.9, -0.3]
        updates = steps_of(training.lenient(make_optimizer(config)), [scaled(value) for value in values])
        mean = variance = 0.0
        for k, (value, update) in enumerate(zip(values, updates, strict=True)):
            gradient = 0.48 * value
            mean, variance = 0.9 * mean + 0.1 * gradient, 0.999 * variance + 0.001 * gradient**2
            corrected = mean / (1 - 0.9 ** (k + 1)), variance / (1 - 0.999 ** (k + 1))
            expected = -1e-2 * min(k / 4, 1) * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
            np.testing.assert_allclose(update["a"][0], expected, rtol=1e-4, atol=1e-12)

    def test_first_update_changes_nothing(self, training):
        (update,) = steps_of(training.paper_optimizer(), [scaled(1.0)])
        chex.assert_trees_all_equal(update, jax.tree.map(jnp.zeros_like, PARAMS))

    @pytest.mark.parametrize(("clip", "size", "left"), [(1.0, 10.0, 1.0), (1.0, 0.5, 0.5), (0.25, 1.0, 0.25)])
    def test_clips_the_norm_of_all_together(self, training, clip, size, left):
        assert np.isclose(optax.tree.norm(scaled(size)), size)
        sizes, expected = [size, 0.1], [left, 0.1]  # Adam forgets the size of a single gradient, not of two
        config = TrainConfig(warmup_steps=0, grad_clip=clip)
        clipped = steps_of(training.lenient(make_optimizer(config)), [scaled(value) for value in sizes])
        adam = steps_of(training.adam(2e-4), [scaled(value) for value in expected])
        chex.assert_trees_all_close(clipped, adam, rtol=1e-5)

    def test_does_not_clip_at_0(self, training):
        config = TrainConfig(warmup_steps=0, grad_clip=0)
        free = steps_of(training.lenient(make_optimizer(config)), [scaled(100.0), scaled(0.1)])
        adam = steps_of(training.adam(2e-4), [scaled(100.0), scaled(0.1)])
        chex.assert_trees_all_close(free, adam, rtol=1e-6)


class TestFirstState:
    def test_average_is_the_parameters_and_its_own_copy(self, training):
        state = training.state_of(jax.random.key(0), training.Linear(), optax.adam(1e-3))
        chex.assert_trees_all_equal(state.ema, state.params)
        assert state.step == 0
        assert state.step.dtype == jnp.int32
        buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state.params, state.ema))]
        assert len(set(buffers)) == len(buffers)  # or the state could not be donated
