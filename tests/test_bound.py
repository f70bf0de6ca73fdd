"""The bound: its closed forms, and independent float64 NumPy."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, special
from scipy import stats as distributions

from ddpm_jax.bound import bits_per_dim, bound_term, decoder_log_likelihood, gaussian_kl, prior_bits, reverse_bits
from ddpm_jax.forward import Gaussian, per_image, q_sample
from ddpm_jax.reverse import Reverse, p_mean_variance
from ddpm_jax.schedules import make_schedule

T = 1000
LATER = jnp.arange(1, T)  # every time whose term is a divergence

# Four pixels, every pair of signs: a mean over them of anything quadratic in (x0, eps) is its expectation over
# independent standard normals, without error.
SIGNS_X0 = jnp.array([1.0, 1, -1, -1]).reshape(1, 2, 2, 1)
SIGNS_EPS = jnp.array([1.0, -1, 1, -1]).reshape(1, 2, 2, 1)


@pytest.fixture(scope="module")
def schedule():
    return make_schedule("linear", T)


def terms(schedule, predict, x0, eps, t, variance):
    """The bound's terms in bits/dim of one image at the times t."""
    x0, eps = (jnp.broadcast_to(image, (len(t), *image.shape[1:])) for image in (x0, eps))
    x_t = q_sample(schedule, x0, t, eps)
    choices = dict(prediction="eps", variance=variance, clip_x0=False)
    return np.asarray(bound_term(schedule, predict(x_t, eps, t), x0, x_t, t, **choices).bits, np.float64)


def silent(x_t, eps, t):
    return jnp.zeros_like(x_t)


def knowing(x_t, eps, t):
    return eps


class TestDivergence:
    @given(
        means=st.tuples(*[st.floats(-3, 3, width=32)] * 2),
        log_variances=st.tuples(*[st.floats(-4, 4, width=32)] * 2),
    )
    def test_is_the_integral(self, means, log_variances):
        p, q = (
            Gaussian(jnp.full((1, 1, 1, 1), mean), jnp.full((1, 1, 1, 1), log_variance))
            for mean, log_variance in zip(means, log_variances, strict=True)
        )
        of_p, of_q = (
            distributions.norm(mean, math.exp(log_variance / 2))
            for mean, log_variance in zip(means, log_variances, strict=True)
        )
        density = lambda x: of_p.pdf(x) * (of_p.logpdf(x) - of_q.logpdf(x))
        reach = 12 * of_p.std()
        expected, _ = integrate.quad(density, means[0] - reach, means[0] + reach, limit=200)
        np.testing.assert_allclose(gaussian_kl(p, q), expected, rtol=1e-4, atol=1e-5)

    def test_of_equals_is_zero_and_fields_broadcast(self):
        p = Gaussian(jax.random.normal(jax.random.key(0), (3, 4, 2, 1)), jnp.full((3, 1, 1, 1), -2.5))
        kl = gaussian_kl(p, p)
        chex.assert_shape(kl, (3, 4, 2, 1))
        np.testing.assert_array_equal(kl, 0)


def decoder_by_hand(x0, mean, log_variance, cdf):
    """Bits, in float64, each mass in the tail where it keeps its digits."""
    normal_cdf = (
        special.ndtr if cdf == "erf" else lambda x: special.expit(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    )
    sigma = np.exp(0.5 * log_variance)
    low, high = (x0 - mean - 1 / 255) / sigma, (x0 - mean + 1 / 255) / sigma
    inner = np.where(low + high > 0, normal_cdf(-low) - normal_cdf(-high), normal_cdf(high) - normal_cdf(low))
    mass = np.where(x0 < -0.999, normal_cdf(high), np.where(x0 > 0.999, normal_cdf(-low), inner))
    return -np.log2(np.maximum(mass, 1e-12))


def decoder_bits(x0, mean, log_variance, cdf="tanh"):
    x0, mean, log_variance = (jnp.full((1, 1, 1, 1), value, jnp.float32) for value in (x0, mean, log_variance))
    return -float(decoder_log_likelihood(x0, mean, log_variance, cdf=cdf).squeeze()) / math.log(2)


class TestDecoder:
    SIGMA, PIXEL = 0.0073845702, 128 / 127.5 - 1

    @pytest.mark.parametrize(
        ("x0", "mean", "sigma", "cdf", "bits"),
        [
            (PIXEL, PIXEL, SIGMA, "tanh", 1.3056651),
            (PIXEL, PIXEL, SIGMA, "erf", 1.3053777),
            (-1, -1, SIGMA, "tanh", 0.50990788),
            (1, 1, SIGMA, "tanh", 0.50990788),
            (-1, -1, SIGMA, "erf", 0.50982507),
            (1, 1, SIGMA, "erf", 0.50982507),
            (-1, -0.99, SIGMA, "tanh", 2.2839893),
            (PIXEL, PIXEL + 0.01, SIGMA, "tanh", 2.5093914),
            (PIXEL, PIXEL - 0.01, SIGMA, "tanh", 2.5093914),
            (PIXEL, PIXEL, 0.01, "tanh", 1.7130145),
            (PIXEL, 1.0, SIGMA, "tanh", 39.863137),
            (PIXEL, -1.0, SIGMA, "erf", 39.863137),
        ],
    )
    def test_known_values(self, x0, mean, sigma, cdf, bits):
        np.testing.assert_allclose(decoder_bits(x0, mean, 2 * math.log(sigma), cdf), bits, rtol=1e-5)

    def test_sigma_is_that_of_the_schedule(self, schedule):
        np.testing.assert_allclose(math.exp(0.5 * schedule.posterior_log_variance_clipped[0]), self.SIGMA, rtol=1e-6)

    @pytest.mark.parametrize("cdf", ["tanh", "erf"])
    @given(mean=st.floats(-1.5, 1.5, width=32), log_variance=st.floats(-12, 2, width=32))
    def test_masses_of_the_256_levels_sum_to_1(self, cdf, mean, log_variance):
        levels = (jnp.arange(256, dtype=jnp.float32) / 127.5 - 1).reshape(1, 16, 16, 1)
        likelihood = decoder_log_likelihood(
            levels, jnp.full_like(levels, mean), jnp.full((1, 1, 1, 1), log_variance), cdf=cdf
        )
        assert likelihood.max() <= 0
        # float32 places an edge to 1e-7, which is 5e-5 of the smallest sigma, and its density is at most 0.4 there.
        np.testing.assert_allclose(np.exp(np.asarray(likelihood, np.float64)).sum(), 1, atol=2e-4)

    @pytest.mark.parametrize("cdf", ["tanh", "erf"])
    def test_is_float64_numpy(self, cdf):
        random = np.random.default_rng(0)
        pixels = random.integers(0, 256, (20_000, 1, 1, 1))
        log_variance = random.uniform(-10, 1, pixels.shape).astype(np.float32)
        x0 = (pixels / 127.5 - 1).astype(np.float32)
        distance = random.uniform(-5, 5, pixels.shape) * np.exp(0.5 * log_variance)
        mean = (x0 + distance).astype(np.float32)
        found = -np.asarray(decoder_log_likelihood(x0, mean, log_variance, cdf=cdf), np.float64) / math.log(2)
        expected = decoder_by_hand(*(each.astype(np.float64) for each in (x0, mean, log_variance)), cdf)
        np.testing.assert_allclose(found, expected, atol=2e-3)

    def test_refuses_other_shapes(self):
        with pytest.raises(AssertionError):
            decoder_log_likelihood(jnp.zeros((2, 4, 4, 1)), jnp.zeros((1, 4, 4, 1)), jnp.zeros((2, 1, 1, 1)))


class TestPrior:
    @pytest.mark.parametrize(
        ("name", "square", "bits", "rtol"),
        [
            # float32 holds alphas_bar to 4e-12, and at x0 = 0 the term is its square.
            ("linear", 0.0, 5.8747839e-10, 1e-2),
            ("linear", 1.0, 2.9112945e-05, 1e-5),
            ("linear", 0.25598515, 7.4529187e-06, 1e-5),
            ("quad", 1.0, 5.2923936e-04, 1e-5),
            ("const", 1.0, 1.2140043e-09, 1e-5),
            ("warmup10", 1.0, 3.3280714e-09, 1e-5),
            ("warmup50", 1.0, 1.8799294e-07, 1e-5),
        ],
    )
    def test_known_values(self, name, square, bits, rtol):
        x0 = jnp.full((2, 2, 3, 1), math.sqrt(square))
        found = prior_bits(make_schedule(name, T), x0)
        chex.assert_shape(found, (2,))
        np.testing.assert_allclose(found, bits, rtol=rtol)


class TestTerms:
    @pytest.mark.parametrize(
        ("variance", "t", "weight"),
        [
            ("fixed_large", 1, 0.27269208),
            ("fixed_large", 9, 0.073717016),
            ("fixed_large", 99, 0.010081264),
            ("fixed_large", 499, 0.0055034319),
            ("fixed_large", 999, 0.010204493),
            ("fixed_small", 1, 0.59967151),
            ("fixed_small", 499, 0.0055081965),
        ],
    )
    def test_an_error_in_eps_costs_the_weight_of_eq_12(self, schedule, variance, t, weight):
        off = lambda x_t, eps, t: eps + 0.5
        times = jnp.array([t])
        cost = terms(schedule, off, SIGNS_X0, SIGNS_EPS, times, variance)
        cost = cost - terms(schedule, knowing, SIGNS_X0, SIGNS_EPS, times, variance)
        np.testing.assert_allclose(cost * math.log(2), weight * 0.25, rtol=3e-4)

    @pytest.mark.parametrize(
        ("predict", "variance", "bits"),
        [
            (silent, "fixed_large", 13.991483),
            (silent, "fixed_small", 14.67292),
            (knowing, "fixed_large", 0.48641923),
            (knowing, "fixed_small", 0.0),
        ],
    )
    def test_sum_for_the_untrained_network_and_for_the_one_that_knows(self, schedule, predict, variance, bits):
        for x0 in (SIGNS_X0, 0.3 * SIGNS_X0):  # any data
            found = terms(schedule, predict, x0, SIGNS_EPS, LATER, variance)
            assert found.min() > -1e-6
            np.testing.assert_allclose(found.sum(), bits, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(("variance", "bits"), [("fixed_large", 6.6438271), ("fixed_small", 7.3145249)])
    def test_end_to_end_for_gaussian_data(self, schedule, variance, bits):
        """For data N(0, I) and its exact network the whole is log2(1 / beta_0) / 2: the identity of the chain."""
        exact = lambda x_t, eps, t: per_image(schedule.sqrt_one_minus_alphas_bar[t], x_t) * x_t
        found = terms(schedule, exact, SIGNS_X0, SIGNS_EPS, LATER, variance)
        np.testing.assert_allclose(found.sum(), bits, rtol=3e-5)
        if variance == "fixed_large":
            whole = found.sum() + float(prior_bits(schedule, SIGNS_X0)[0])
            np.testing.assert_allclose(whole, 0.5 * math.log2(1e4), rtol=3e-5)

    def test_end_to_end_for_draws_of_gaussian_data(self, schedule):
        exact = lambda x_t, t: per_image(schedule.sqrt_one_minus_alphas_bar[t], x_t) * x_t

        @jax.jit
        def bound(key):
            x0_key, eps_key = jax.random.split(key)
            x0 = jnp.broadcast_to(jax.random.normal(x0_key, (1, 4, 4, 1)), (T - 1, 4, 4, 1))
            eps = jax.random.normal(eps_key, x0.shape)
            x_t = q_sample(schedule, x0, LATER, eps)
            choices = dict(prediction="eps", variance="fixed_large", clip_x0=False)
            kl = bound_term(schedule, exact(x_t, LATER), x0, x_t, LATER, **choices).bits
            return kl.sum() + prior_bits(schedule, x0[:1])[0]

        draws = np.array([bound(jax.random.key(seed)) for seed in range(200)], np.float64)
        # 4 standard errors of the mean: one seed in 16,000 would fail, and this one is fixed.
        assert abs(draws.mean() - 6.6438562) < 4 * draws.std() / math.sqrt(200)
        assert draws.std() / math.sqrt(200) < 0.05

    @pytest.mark.parametrize("cdf", ["tanh", "erf"])
    def test_first_term_is_the_decoder(self, schedule, cdf):
        x0 = (jax.random.randint(jax.random.key(0), (2, 4, 4, 3), 0, 256).astype(jnp.float32) * 2 - 255) / 255
        eps = jax.random.normal(jax.random.key(1), x0.shape)
        t = jnp.array([0, 5])
        x_t = q_sample(schedule, x0, t, eps)
        choices = dict(prediction="eps", variance="fixed_large", clip_x0=True)
        term = bound_term(schedule, 0.5 * eps, x0, x_t, t, **choices, cdf=cdf)
        reverse = p_mean_variance(schedule, 0.5 * eps, x_t, t, **choices)
        expected = decoder_by_hand(
            *(np.asarray(each, np.float64)[0] for each in (x0, reverse.mean, reverse.log_variance)), cdf
        )
        np.testing.assert_allclose(term.bits[0], expected.mean(), rtol=1e-4)
        np.testing.assert_array_equal(term.x0, reverse.x0)
        assert abs(float(term.bits[1]) - expected.mean()) > 0.1  # the other image's is a divergence

    def test_bits_are_a_mean_over_the_elements(self):
        nats = jnp.arange(24.0).reshape(2, 2, 3, 2)
        np.testing.assert_allclose(bits_per_dim(nats), np.array([5.5, 17.5]) / np.log(2), rtol=1e-6)

    def test_refuses_other_shapes(self, schedule):
        image, t = jnp.zeros((2, 4, 4, 1)), jnp.array([1, 2])
        other = Reverse(jnp.zeros((1, 4, 4, 1)), jnp.zeros((1, 1, 1, 1)), jnp.zeros((1, 4, 4, 1)))
        with pytest.raises(AssertionError):
            reverse_bits(schedule, other, image, image, t)
