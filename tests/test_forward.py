"""The forward process: one step, the jump, and the posterior are one and the same Gaussian chain."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ddpm_jax import keys as per_image_keys
from ddpm_jax.forward import per_image, q_marginal, q_posterior, q_sample, q_step
from ddpm_jax.schedules import make_schedule, schedule_from_betas

T = 12
betas_of_12_steps = st.lists(st.floats(1e-4, 0.9), min_size=T, max_size=T)
pixels = st.floats(-1, 1, width=32)
every_t = jnp.arange(T)
in_every_way = chex.variants(with_jit=True, without_jit=True, with_pmap=True)


def same_pixel(value):
    """One image of one pixel for each of the T times."""
    return jnp.full((T, 1, 1, 1), value, jnp.float32)


def column(images):
    return np.asarray(images, np.float64).reshape(-1)


class ForwardTest(chex.TestCase):
    @in_every_way
    @given(betas=betas_of_12_steps, x0=pixels)
    def test_jump_is_the_composition_of_the_steps(self, betas, x0):
        schedule = schedule_from_betas(betas)
        step, jump, marginal = self.variant(q_step), self.variant(q_sample), self.variant(q_marginal)
        # Both are a x + b eps. The steps' a multiply; the variance goes v -> a^2 v + b^2.
        scale = column(step(schedule, same_pixel(1), every_t, same_pixel(0)))
        sigma = column(step(schedule, same_pixel(0), every_t, same_pixel(1)))
        mean, variance, means, variances = x0, 0.0, [], []
        for a, b in zip(scale, sigma, strict=True):
            mean, variance = a * mean, a**2 * variance + b**2
            means.append(mean)
            variances.append(variance)
        # 12 float32 roundings follow one another.
        at_once = marginal(schedule, same_pixel(x0), every_t)
        np.testing.assert_allclose(column(jump(schedule, same_pixel(x0), every_t, same_pixel(0))), means, rtol=3e-6)
        np.testing.assert_allclose(column(at_once.mean), means, rtol=3e-6)
        np.testing.assert_allclose(
            column(jump(schedule, same_pixel(0), every_t, same_pixel(1))) ** 2, variances, rtol=3e-6
        )
        np.testing.assert_allclose(np.exp(column(at_once.log_variance)), variances, rtol=3e-6)

    @in_every_way
    @given(betas=betas_of_12_steps, x0=pixels, z_prev=st.floats(-3, 3), z=st.floats(-3, 3))
    def test_posterior_satisfies_bayes_rule(self, betas, x0, z_prev, z):
        # q(x_{t-1} | x_t, x_0) q(x_t | x_0) = q(x_t | x_{t-1}) q(x_{t-1} | x_0), for t >= 1.
        schedule = schedule_from_betas(betas)
        marginal, step, posterior = self.variant(q_marginal), self.variant(q_step), self.variant(q_posterior)

        def log_density(gaussian, x):
            return stats.norm.logpdf(x, column(gaussian.mean), np.exp(0.5 * column(gaussian.log_variance)))

        at_t = marginal(schedule, same_pixel(x0), every_t)
        before = marginal(schedule, same_pixel(x0), jnp.maximum(every_t - 1, 0))
        x_prev = column(before.mean) + z_prev * np.exp(0.5 * column(before.log_variance))
        x_prev = jnp.asarray(x_prev.reshape(T, 1, 1, 1), jnp.float32)
        step_mean = column(step(schedule, x_prev, every_t, same_pixel(0)))
        step_sigma = np.sqrt(np.asarray(betas))
        x_t = jnp.asarray((step_mean + z * step_sigma).reshape(T, 1, 1, 1), jnp.float32)
        given_both = posterior(schedule, same_pixel(x0), x_t, every_t)

        left = log_density(given_both, column(x_prev)) + log_density(at_t, column(x_t))
        right = stats.norm.logpdf(column(x_t), step_mean, step_sigma) + log_density(before, column(x_prev))
        # A mean of float32 is off by up to 1e-7 / sigma = 1e-5 standard deviations, a few of them away.
        np.testing.assert_allclose(left[1:], right[1:], atol=1e-3)

    @in_every_way
    @given(betas=betas_of_12_steps, x0=pixels, x_t=st.floats(-3, 3, width=32))
    def test_posterior_is_the_product_of_two_gaussians(self, betas, x0, x_t):
        schedule = schedule_from_betas(betas)
        actual = self.variant(q_posterior)(schedule, same_pixel(x0), same_pixel(x_t), every_t)
        alphas_bar = np.cumprod(1 - np.asarray(betas))[:-1]
        betas = np.asarray(betas)[1:]
        # Two opinions of x_{t-1}, each weighted by its precision: that of x_t and that of x_0.
        precision = (1 - betas) / betas + 1 / (1 - alphas_bar)
        mean = (np.sqrt(1 - betas) / betas * x_t + np.sqrt(alphas_bar) / (1 - alphas_bar) * x0) / precision
        np.testing.assert_allclose(column(actual.mean)[1:], mean, rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(column(actual.log_variance)[1:], -np.log(precision), rtol=1e-5, atol=2e-6)

    @in_every_way
    def test_posterior_at_the_first_time_is_x0(self):
        schedule = make_schedule("linear", 1000)
        x0, x_t = jax.random.normal(jax.random.key(0), (2, 3, 4, 2, 1))
        t = jnp.zeros(3, jnp.int32)
        actual = self.variant(q_posterior)(schedule, x0, x_t, t)
        np.testing.assert_array_equal(actual.mean, x0)
        np.testing.assert_allclose(column(actual.log_variance), -9.8167251, rtol=1e-7)

    @in_every_way
    def test_every_image_has_its_own_time(self):
        schedule = make_schedule("linear", 1000)
        x0, eps = jax.random.normal(jax.random.key(1), (2, 3, 4, 2, 3))
        t = jnp.array([0, 999, 500])
        for function in (q_step, q_sample, q_posterior):
            together = self.variant(function)
            arguments = (x0, eps, t) if function is q_posterior else (x0, t, eps)
            whole = together(schedule, *arguments)
            for i in range(3):
                alone = together(schedule, *(argument[i : i + 1] for argument in arguments))
                chex.assert_trees_all_close(jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], whole), alone, rtol=1e-6)


def test_one_pixel_of_the_paper():
    schedule = make_schedule("linear", 1000)
    x_t = q_sample(schedule, jnp.full((1, 1, 1, 1), 0.5), jnp.array([499]), jnp.full((1, 1, 1, 1), -1.0))
    np.testing.assert_allclose(column(x_t), -0.81973539, rtol=2e-7)


def test_chain_of_steps_has_the_law_of_the_jump():
    # 20 steps, each with its own noise, of 20,000 pixels that start at 0.7. The seed is fixed; of other seeds one in
    # a thousand would fail.
    schedule = make_schedule("linear", 20, beta_start=0.01, beta_end=0.3)
    image = (20_000 // 8, 1, 1)
    keys = per_image_keys.image_keys(jax.random.key(5), jnp.arange(8))
    x = jnp.full((8, *image), 0.7)
    for t in range(20):
        x = q_step(schedule, x, jnp.full(8, t), per_image_keys.normal(per_image_keys.fold(keys, t), image))
    alphas_bar = np.prod(1 - np.linspace(0.01, 0.3, 20))
    law = stats.norm(0.7 * np.sqrt(alphas_bar), np.sqrt(1 - alphas_bar))
    assert stats.kstest(column(x), law.cdf).pvalue > 1e-3


def test_end_of_the_chain_is_noise():
    schedule = make_schedule("linear", 1000)
    last = q_marginal(schedule, jnp.ones((1, 2, 2, 1)), jnp.array([999]))
    assert abs(float(last.mean.max())) < 0.0064
    assert abs(float(last.log_variance.max())) < 1e-4


class TestRefusals:
    images = jnp.zeros((2, 4, 4, 3))
    t = jnp.zeros(2, jnp.int32)
    schedule = make_schedule("linear", 10)

    @pytest.mark.parametrize("shape", [(2, 4, 4, 1), (1, 4, 4, 3), (4, 4, 3), (2, 4, 1, 3)])
    def test_images_of_unequal_shapes(self, shape):
        other = jnp.zeros(shape)
        for function in (q_step, q_sample):
            with pytest.raises(AssertionError):
                function(self.schedule, self.images, self.t, other)
        with pytest.raises(AssertionError):
            q_posterior(self.schedule, self.images, other, self.t)

    @pytest.mark.parametrize("shape", [(1,), (3,), (2, 1)])
    def test_times_of_another_shape(self, shape):
        t = jnp.zeros(shape, jnp.int32)
        for function in (q_step, q_sample):
            with pytest.raises(AssertionError):
                function(self.schedule, self.images, t, self.images)
        with pytest.raises(AssertionError):
            q_posterior(self.schedule, self.images, self.images, t)
        with pytest.raises(AssertionError):
            q_marginal(self.schedule, self.images, t)

    def test_more_than_one_number_an_image(self):
        with pytest.raises(AssertionError):
            per_image(jnp.zeros((2, 1)), self.images)
