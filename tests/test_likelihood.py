import functools
import itertools

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings

from ddpm_jax import likelihood
from ddpm_jax.keys import image_keys
from ddpm_jax.likelihood import (
    Bound,
    bound_at,
    bound_terms,
    draw_timesteps,
    estimated_log_variances,
    fewest_strata,
    optimal_log_variances,
    rate_distortion,
    strata,
    total_bits,
)
from ddpm_jax.pixels import to_float
from ddpm_jax.reverse import from_x0
from ddpm_jax.schedules import make_betas, make_schedule, schedule_from_betas, zero_terminal_snr

SHAPE = (2, 3, 1)
DIM = 6
PAPER = make_schedule("linear", 1000)
SHORT = make_schedule("linear", 20, beta_start=0.005, beta_end=0.5)
KEY = jax.random.key(0)


class GaussianData:
    """Images that are N(mean, covariance), and the predictor that is exact for them."""

    def __init__(self, seed, *, scale=0.5):
        random = np.random.default_rng(seed)
        factor = random.normal(size=(DIM, DIM)) * random.uniform(0.2, 1.5, DIM)
        self.mean = 0.3 * random.normal(size=DIM)
        self.covariance = scale**2 * factor @ factor.T + 1e-3 * np.eye(DIM)

    def gain(self, alphas_bar):
        """(T, d, d): x0_hat = mean + gain (x_t - sqrt(alphas_bar) mean)."""
        noisy = alphas_bar[:, None, None] * self.covariance + (1 - alphas_bar)[:, None, None] * np.eye(DIM)
        return np.sqrt(alphas_bar)[:, None, None] * self.covariance @ np.linalg.inv(noisy)

    def x0_mse(self, alphas_bar):
        """(T,): the trace of cov(x0 | x_t) / d."""
        remaining = self.covariance - self.gain(alphas_bar) @ (np.sqrt(alphas_bar)[:, None, None] * self.covariance)
        return np.trace(remaining, axis1=1, axis2=2) / DIM

    def predict(self, schedule):
        gain = jnp.asarray(self.gain(float64(schedule).alphas_bar), jnp.float32)
        mean = jnp.asarray(self.mean, jnp.float32)

        def predict_x0(x_t, t):
            centred = x_t.reshape(-1, DIM) - schedule.sqrt_alphas_bar[t][:, None] * mean[None]
            return (mean[None] + jnp.einsum("bij,bj->bi", gain[t], centred)).reshape(x_t.shape)

        return predict_x0

    def nodes(self):
        """x0 and eps of 4 d images whose moments, up to the second, are those of the data and of the noise.

        Averages over them of what is quadratic in (x0, eps) are expectations, without sampling.
        """
        points = np.sqrt(2 * DIM) * np.concatenate([np.eye(2 * DIM), -np.eye(2 * DIM)])
        x0 = self.mean + points[:, :DIM] @ np.linalg.cholesky(self.covariance).T
        images = lambda array: jnp.asarray(array.reshape(-1, *SHAPE), jnp.float32)
        return images(x0), images(points[:, DIM:])


def standard_normal():
    data = GaussianData(0)
    data.mean, data.covariance = np.zeros(DIM), np.eye(DIM)
    return data


class float64:
    """The tables that the formulas below need, from the betas alone."""

    def __init__(self, schedule):
        betas = np.asarray(schedule.betas, np.float64)
        self.alphas = 1 - betas
        self.alphas_bar = np.cumprod(self.alphas)
        previous = np.append(1, self.alphas_bar[:-1])
        self.betas, self.previous = betas, previous
        self.posterior_variance = betas * (1 - previous) / (1 - self.alphas_bar)
        self.coef_x0 = np.sqrt(previous) * betas / (1 - self.alphas_bar)


def expected_terms(schedule, x0_mse, variances):
    """(T-1,) E of the KL terms at t >= 1, in bits/dim."""
    tables = float64(schedule)
    small, error = tables.posterior_variance[1:], (tables.coef_x0**2 * x0_mse)[1:]
    return 0.5 * (-1 + np.log(variances[1:] / small) + (small + error) / variances[1:]) / np.log(2)


@pytest.fixture
def on_nodes(monkeypatch):
    """Runs `bound_terms` with given noise, the same at every time, and returns means over the images, in float64."""

    def run(schedule, predict, x0, eps, **settings):
        with monkeypatch.context() as patch:
            patch.setattr(likelihood.per_image_keys, "normal", lambda keys, shape: eps)
            bound = jax.jit(
                lambda keys, x0: bound_terms(keys, schedule, predict, x0, **{"clip_x0": False, **settings})
            )(image_keys(KEY, jnp.arange(len(x0))), x0)
        return Bound(*(np.asarray(numbers, np.float64).mean(axis=-1) for numbers in bound))

    return run


# Facts: numbers of the paper's schedule


@pytest.mark.parametrize(("variance", "bits"), [("fixed_large", 6.6438271), ("fixed_small", 7.3145249)])
def test_standard_normal_data_cost_what_the_schedule_says(on_nodes, variance, bits):
    data = standard_normal()
    bound = on_nodes(PAPER, data.predict(PAPER), *data.nodes(), prediction="x0", variance=variance)
    assert bound.terms[1:].sum() == pytest.approx(bits, abs=2e-5)
    assert bound.prior == pytest.approx(2.9112945e-05, rel=1e-3)
    assert bound.eps_mse.mean() == pytest.approx(0.27551323, rel=1e-5)
    np.testing.assert_allclose(bound.x0_mse, 1 - float64(PAPER).alphas_bar, rtol=1e-3)
    if variance == "fixed_large":
        assert bound.terms[1:].sum() + bound.prior == pytest.approx(0.5 * np.log2(1 / 1e-4), abs=2e-5)
        assert 0.5 * np.log2(1 / 1e-4) == pytest.approx(6.6438562, abs=1e-7)


def test_standard_normal_data_cost_the_same_on_a_schedule_without_signal_at_its_end(on_nodes):
    schedule, data = schedule_from_betas(zero_terminal_snr(make_betas("linear", 1000))), standard_normal()

    def predict(x_t, t):
        x0 = data.predict(schedule)(x_t, t)
        return from_x0(schedule, x0, x_t, t, target="v")

    bound = on_nodes(schedule, predict, *data.nodes(), prediction="v", variance="fixed_large")
    assert bound.prior == 0
    assert bound.terms[1:].sum() == pytest.approx(0.5 * np.log2(1 / 1e-4), abs=2e-5)


def test_standard_normal_data_cost_it_also_when_drawn():
    number, shape = 16, (8, 8, 2)
    x0 = jax.random.normal(jax.random.key(1), (number, *shape))
    predict = lambda x_t, t: PAPER.sqrt_one_minus_alphas_bar[t][:, None, None, None] * x_t
    compute = jax.jit(lambda keys, x0: bound_terms(keys, PAPER, predict, x0, clip_x0=False))
    bound = compute(image_keys(KEY, jnp.arange(number)), x0)
    bits = np.asarray(bound.terms[1:].sum(axis=0) + bound.prior, np.float64)
    standard_error = bits.std(ddof=1) / np.sqrt(number)
    assert standard_error < 0.04
    assert abs(bits.mean() - 6.6438562) < 4 * standard_error  # |z| < 4


@pytest.mark.parametrize(("variance", "bits"), [("fixed_large", 13.991483), ("fixed_small", 14.67292)])
def test_an_untrained_network_costs_the_same_for_any_data(on_nodes, variance, bits):
    data = GaussianData(3)
    bound = on_nodes(PAPER, lambda x_t, t: jnp.zeros_like(x_t), *data.nodes(), variance=variance)
    assert bound.terms[1:].sum() == pytest.approx(bits, rel=2e-5)
    np.testing.assert_allclose(bound.eps_mse, 1, rtol=1e-5)


@pytest.mark.parametrize(("variance", "bits"), [("fixed_large", 0.48641923), ("fixed_small", 0)])
def test_a_network_that_knows_the_image_costs_the_variance_s_mismatch(on_nodes, variance, bits):
    x0, eps = GaussianData(3).nodes()
    bound = on_nodes(PAPER, lambda x_t, t: x0, x0, eps, prediction="x0", variance=variance)
    assert bound.terms[1:].sum() == pytest.approx(bits, abs=1e-5)
    assert bound.x0_mse.max() == 0


@pytest.mark.parametrize(("cdf", "middle", "edge"), [("tanh", 1.3056651, 0.50990788), ("erf", 1.3053777, 0.50982507)])
def test_the_first_term_is_the_decoder_s(on_nodes, cdf, middle, edge):
    _, eps = GaussianData(0).nodes()
    for level, bits in ((128, middle), (0, edge), (255, edge)):
        x0 = to_float(np.full(eps.shape, level, np.uint8))
        bound = on_nodes(
            SHORT, lambda x_t, t, x0=x0: x0, x0, eps, prediction="x0", cdf=cdf, log_variances=(jnp.full(20, -9.8167251))
        )
        assert bound.terms[0] == pytest.approx(bits, rel=1e-5)


# Gaussian data of any covariance


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_term_of_gaussian_data_is_its_expectation(on_nodes, seed, variance):
    data, tables = GaussianData(seed), float64(SHORT)
    bound = on_nodes(SHORT, data.predict(SHORT), *data.nodes(), prediction="x0", variance=variance)
    x0_mse = data.x0_mse(tables.alphas_bar)
    variances = {"fixed_large": tables.betas, "fixed_small": tables.posterior_variance}[variance]
    np.testing.assert_allclose(bound.x0_mse, x0_mse, rtol=1e-4)
    np.testing.assert_allclose(bound.eps_mse, x0_mse * tables.alphas_bar / (1 - tables.alphas_bar), rtol=1e-4)
    np.testing.assert_allclose(bound.terms[1:], expected_terms(SHORT, x0_mse, variances), rtol=1e-4, atol=1e-6)
    last = tables.alphas_bar[-1]
    second_moment = (np.trace(data.covariance) + data.mean @ data.mean) / DIM
    assert bound.prior == pytest.approx(0.5 * (last * second_moment - last - np.log1p(-last)) / np.log(2), rel=1e-4)


def test_every_term_of_gaussian_data_is_its_expectation_when_drawn():
    data, number = GaussianData(2), 4000
    random = np.random.default_rng(0)
    x0 = data.mean + random.normal(size=(number, DIM)) @ np.linalg.cholesky(data.covariance).T
    compute = jax.jit(
        lambda keys, x0: bound_terms(keys, SHORT, data.predict(SHORT), x0, prediction="x0", clip_x0=False)
    )
    bound = compute(image_keys(KEY, jnp.arange(number)), jnp.asarray(x0.reshape(-1, *SHAPE), jnp.float32))
    terms, x0_mse = np.asarray(bound.terms, np.float64), np.asarray(bound.x0_mse, np.float64)
    true_mse = data.x0_mse(float64(SHORT).alphas_bar)
    for drawn, true in ((terms[1:], expected_terms(SHORT, true_mse, float64(SHORT).betas)), (x0_mse, true_mse)):
        z = (drawn.mean(axis=1) - true) / (drawn.std(axis=1, ddof=1) / np.sqrt(number))
        assert abs(z).max() < 4.5


# The optimal variance


@pytest.mark.parametrize("schedule", [SHORT, PAPER], ids=["short", "paper"])
def test_optimal_variances_are_those_of_analytic_dpm_for_the_exact_predictor(schedule):
    data, tables = GaussianData(0), float64(schedule)
    alphas_bar, before = tables.alphas_bar, tables.previous
    gain = data.gain(alphas_bar)
    noisy = alphas_bar[:, None, None] * data.covariance + (1 - alphas_bar)[:, None, None] * np.eye(DIM)
    # eps_hat = (x_t - sqrt(A) x0_hat) / sqrt(1 - A), linear in the centred x_t.
    to_eps = (np.eye(DIM) - np.sqrt(alphas_bar)[:, None, None] * gain) / np.sqrt(1 - alphas_bar)[:, None, None]
    eps_hat = np.trace(to_eps @ noisy @ to_eps.swapaxes(1, 2), axis1=1, axis2=2) / DIM
    smallest = tables.posterior_variance
    bracket = np.sqrt((1 - alphas_bar) / tables.alphas) - np.sqrt(np.maximum(1 - before - smallest, 0))
    analytic = smallest + bracket**2 * (1 - eps_hat)
    ours = np.asarray(optimal_log_variances(schedule, tables.coef_x0**2 * data.x0_mse(alphas_bar)), np.float64)
    np.testing.assert_allclose(np.exp(ours[1:]), analytic[1:], rtol=1e-4)
    assert ours[0] == schedule.fixed_large_log_variance[0] == schedule.posterior_log_variance_clipped[0]


def test_optimal_variances_are_the_true_ones_of_standard_normal_data():
    # sec. 3.2 of the paper: beta_t is optimal for N(0, I), the posterior's for a point.
    tables = float64(PAPER)
    ours = np.exp(np.asarray(optimal_log_variances(PAPER, tables.coef_x0**2 * (1 - tables.alphas_bar))))
    np.testing.assert_allclose(ours[1:], PAPER.betas[1:], rtol=1e-4)
    np.testing.assert_allclose(
        np.exp(optimal_log_variances(PAPER, np.zeros(1000)))[1:], PAPER.posterior_variance[1:], rtol=1e-5
    )


@pytest.mark.parametrize("scale", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("number", [2, 3, 5, 20, 1000])
def test_variances_from_a_few_ranges_of_times_are_nearly_the_best(scale, number):
    """The bound of N(0, scale^2 I) under its exact predictor: what a rough estimate of the variances costs of it."""
    tables, edges = float64(PAPER), strata(1000, number)
    x0_mse = 1 / (1 / scale**2 + tables.alphas_bar / (1 - tables.alphas_bar))
    known = np.repeat(np.add.reduceat(tables.coef_x0**2 * x0_mse, edges[:-1]) / np.diff(edges), np.diff(edges))
    estimated = np.exp(np.asarray(estimated_log_variances(PAPER, known, edges), np.float64))
    best = np.exp(np.asarray(optimal_log_variances(PAPER, tables.coef_x0**2 * x0_mse), np.float64))
    bits, least = (expected_terms(PAPER, x0_mse, variances).sum() for variances in (estimated, best))
    assert least - 1e-6 < bits < least * (1.001 if number >= 20 or scale == 1 else 1.12)


def test_with_optimal_variances_the_rate_nears_the_information_in_x_1():
    # With exact means and ever finer steps the reverse process becomes exact, and L_T + sum L_t the mutual
    # information I(x_0; x_1), which for Gaussians is log2 det(1 + SNR covariance) / 2.
    data = GaussianData(0)
    data.mean = np.zeros(DIM)
    ends = np.log(np.array([999.0, 1e-5]))
    information = 0.5 * np.linalg.slogdet(np.eye(DIM) + np.exp(ends[0]) * data.covariance)[1] / np.log(2) / DIM
    gaps = []
    for steps in (50, 100, 200):
        alphas_bar = 1 / (1 + np.exp(-np.linspace(*ends, steps)))
        schedule = schedule_from_betas(1 - alphas_bar / np.append(1, alphas_bar[:-1]))
        x0_mse = data.x0_mse(alphas_bar)
        mean_mse = float64(schedule).coef_x0 ** 2 * x0_mse
        variances = np.exp(np.asarray(optimal_log_variances(schedule, mean_mse), np.float64))
        last = alphas_bar[-1]
        prior = 0.5 * (last * np.trace(data.covariance) / DIM - last - np.log1p(-last)) / np.log(2)
        gaps.append(expected_terms(schedule, x0_mse, variances).sum() + prior - information)
    assert 0 < gaps[2] < gaps[1] < gaps[0] < 0.2
    # Of first order in the length of a step.
    assert 1.7 < gaps[0] / gaps[1] < 2.3
    assert 1.7 < gaps[1] / gaps[2] < 2.3


def wrong_predict(strength):
    """A network that is far from exact and not linear."""
    return lambda x_t, t: jnp.tanh(strength * x_t + 0.1 * t[:, None, None, None].astype(jnp.float32))


@functools.partial(jax.jit, static_argnames=("prediction", "variance", "clip_x0"))
def bits_of(strength, x0, key, log_variances=None, *, prediction="eps", variance="fixed_large", clip_x0=True):
    return bound_terms(
        image_keys(key, jnp.arange(len(x0))),
        SHORT,
        wrong_predict(strength),
        x0,
        prediction=prediction,
        variance=variance,
        clip_x0=clip_x0,
        log_variances=log_variances,
    )


def random_images(number, seed=0, shape=SHAPE):
    return to_float(np.random.default_rng(seed).integers(0, 256, (number, *shape)).astype(np.uint8))


@given(strength=st.floats(0, 3, width=32), seed=st.integers(0, 1000), clip_x0=st.booleans())
@settings(max_examples=15)
def test_no_variance_is_better_than_the_optimal_one_on_its_own_data(strength, seed, clip_x0):
    x0, key = random_images(8, seed), jax.random.key(seed)
    bits = lambda log_variances: np.asarray(
        bits_of(strength, x0, key, log_variances, clip_x0=clip_x0).terms, np.float64
    ).mean(axis=1)
    fixed = bits_of(strength, x0, key, SHORT.log_betas, clip_x0=clip_x0)
    optimal = optimal_log_variances(SHORT, fixed.mean_mse.mean(axis=1))
    best = bits(optimal)
    others = [SHORT.fixed_large_log_variance, SHORT.posterior_log_variance_clipped, optimal + 0.1, optimal - 0.1]
    for other in others:
        assert (best[1:] <= bits(other)[1:] * (1 + 1e-5) + 1e-6).all()
    # Strictly better than its neighbors: KL(s^2 e^a) - KL(s^2) = (e^-a - 1 + a) / 2.
    for shift in (0.1, -0.1):
        loss = (bits(optimal + shift) - best)[1:] * np.log(2)
        np.testing.assert_allclose(loss, 0.5 * np.expm1(-shift) + 0.5 * shift, rtol=0.05, atol=2e-6 * best.max())
    assert best[0] == bits(SHORT.fixed_large_log_variance)[0]


# What depends on what


def test_given_variances_replace_those_of_the_model():
    x0 = random_images(8)
    large = bits_of(0.5, x0, KEY)
    small = bits_of(0.5, x0, KEY, variance="fixed_small")
    replaced = bits_of(0.5, x0, KEY, SHORT.posterior_log_variance_clipped)
    np.testing.assert_allclose(replaced.terms, small.terms, rtol=1e-6)
    np.testing.assert_array_equal(replaced.x0_mse, large.x0_mse)
    assert abs(large.terms - small.terms).max() > 0.1


def test_a_learned_variance_is_counted_and_can_be_replaced():
    x0, keys = random_images(8), image_keys(KEY, jnp.arange(8))
    both = lambda fraction: (
        lambda x_t, t: jnp.concatenate([wrong_predict(0.5)(x_t, t), jnp.full_like(x_t, fraction)], axis=-1)
    )
    for fraction, variance in ((1, "fixed_large"), (-1, "fixed_small")):
        learned = bound_terms(keys, SHORT, both(fraction), x0, variance="learned_range")
        fixed = bits_of(0.5, x0, KEY, variance=variance)
        np.testing.assert_allclose(learned.terms[1:], fixed.terms[1:], rtol=1e-4)
        np.testing.assert_allclose(learned.eps_mse, fixed.eps_mse, rtol=1e-5)
    replaced = bound_terms(
        keys, SHORT, both(0.3), x0, variance="learned_range", log_variances=SHORT.fixed_large_log_variance
    )
    np.testing.assert_allclose(replaced.terms, bits_of(0.5, x0, KEY).terms, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["x0", "v", "mean"])
def test_errors_are_of_the_clean_image_and_of_the_noise(prediction):
    bound = bits_of(0.5, random_images(8), KEY, prediction=prediction, clip_x0=False)
    ratio = float64(SHORT).alphas_bar / (1 - float64(SHORT).alphas_bar)
    np.testing.assert_allclose(bound.eps_mse, ratio[:, None] * bound.x0_mse, rtol=2e-3)


def test_clipping_is_of_the_clean_image_alone():
    x0 = random_images(8)
    clipped, bound = bits_of(0.5, x0, KEY), bits_of(0.5, x0, KEY, clip_x0=False)
    np.testing.assert_allclose(clipped.eps_mse, bound.eps_mse, rtol=1e-5)
    assert (clipped.x0_mse <= bound.x0_mse + 1e-6).all()
    assert (clipped.x0_mse[-1] < 0.9 * bound.x0_mse[-1]).all()


def test_the_error_of_a_predicted_mean_is_that_of_an_unclipped_x0():
    x0 = to_float(jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, *SHAPE)), jnp.uint8))
    predict, keys = lambda x_t, t: jnp.tanh(0.5 * x_t), image_keys(KEY, jnp.arange(4))
    clipped, unclipped = (
        bound_terms(keys, SHORT, predict, x0, prediction="mean", clip_x0=clip_x0) for clip_x0 in (True, False)
    )
    # The mean is used as it is, clipped or not; the x_0 that is reported is not.
    np.testing.assert_allclose(clipped.terms, unclipped.terms, rtol=1e-5)
    coef_x0 = np.asarray(SHORT.posterior_mean_coef_x0)[:, None]
    np.testing.assert_allclose(clipped.mean_mse, coef_x0**2 * unclipped.x0_mse, rtol=1e-3)
    assert (clipped.x0_mse < 0.9 * unclipped.x0_mse).any()


def test_ranges_of_times_and_single_images_give_what_all_together_give():
    x0 = random_images(8)
    whole = bits_of(0.5, x0, KEY)

    @functools.partial(jax.jit, static_argnames="num_steps")
    def part(first, indices, x0, *, num_steps):
        return bound_terms(image_keys(KEY, indices), SHORT, wrong_predict(0.5), x0, first, num_steps=num_steps)

    ranges = [part(first, jnp.arange(8), x0, num_steps=5) for first in range(0, 20, 5)]
    for numbers, expected in ((0, whole.terms), (2, whole.x0_mse), (3, whole.eps_mse)):
        np.testing.assert_allclose(np.concatenate([each[numbers] for each in ranges]), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(ranges[1].prior, whole.prior, rtol=1e-6)
    some = np.array([6, 1])
    few = part(0, jnp.asarray(some), x0[some], num_steps=20)
    np.testing.assert_allclose(few.terms, whole.terms[:, some], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(
        total_bits(few), np.asarray(whole.terms).sum(axis=0)[some] + whole.prior[some], rtol=1e-5
    )


def test_every_image_and_time_has_noise_of_its_own():
    x0 = random_images(100)
    # Of a network that sees no noise the error is the noise itself.
    errors = bound_terms(image_keys(KEY, jnp.arange(100)), SHORT, lambda x_t, t: jnp.zeros_like(x_t), x0).eps_mse
    squares = DIM * np.asarray(errors, np.float64).ravel()
    assert len(np.unique(squares)) > 1990
    assert scipy.stats.kstest(squares, scipy.stats.chi2(DIM).cdf).pvalue > 1e-3
    between_times = np.corrcoef(errors) - np.eye(20)
    assert abs(between_times).max() < 4.5 / np.sqrt(100)  # |z| < 4.5 for 190 pairs


# A part of the times


@given(num_steps=st.integers(1, 1000), data=st.data())
def test_strata_are_all_times_once(num_steps, data):
    number = data.draw(st.integers(min(2, num_steps), num_steps))
    edges = strata(num_steps, number)
    assert len(edges) == number + 1
    assert (edges[0], edges[1], edges[-1]) == (0, 1, num_steps)
    assert (np.diff(edges) >= 1).all()


@pytest.mark.parametrize(("num_steps", "number"), [(10, 1), (10, 11), (10, 0), (1, 2)])
def test_strata_that_cannot_be_are_refused(num_steps, number):
    with pytest.raises(ValueError, match=rf"must be in \[.*\], not {number}"):
        strata(num_steps, number)


def test_the_fewest_strata_have_a_standard_error_that_can_be_trusted():
    # Terms like those of a trained network: 1/t, with a spread from image to image.
    images, repeats, number = 300, 4000, 32
    random = np.random.default_rng(0)
    terms = random.lognormal(0, 0.3, (1, images)) / (1 + np.arange(1000.0))[:, None]

    def missed(num_strata):
        edges, image = strata(1000, num_strata), random.integers(0, images, (repeats, number))
        total = sum(
            (stop - first) * terms[random.integers(first, stop, image.shape), image]
            for first, stop in itertools.pairwise(edges)
        )
        error = total.std(axis=1, ddof=1) / np.sqrt(number)
        return np.mean(np.abs(total.mean(axis=1) - terms.sum(axis=0).mean()) > 1.96 * error)

    fewest = fewest_strata(1000)
    assert missed(fewest) < 0.08 < missed(fewest - 2)


def test_times_are_drawn_uniformly_from_their_ranges_for_each_image():
    edges, number = strata(1000, 8), 4000
    times = np.asarray(jax.jit(lambda keys: draw_timesteps(keys, edges))(image_keys(KEY, jnp.arange(number))))
    assert times.shape == (8, number)
    for drawn, first, stop in zip(times, edges[:-1], edges[1:], strict=True):
        assert ((first <= drawn) & (drawn < stop)).all()
        width = int(stop - first)
        if width > 1:
            counts = np.bincount((drawn - first) * min(width, 20) // width)
            widths = np.bincount(np.arange(width) * min(width, 20) // width)
            assert scipy.stats.chisquare(counts, number * widths / width).pvalue > 1e-3
    assert abs(np.corrcoef(times[2:]) - np.eye(6)).max() < 4.5 / np.sqrt(number)
    some = draw_timesteps(image_keys(KEY, jnp.array([7, 3])), edges)
    np.testing.assert_array_equal(some, times[:, [7, 3]])


def test_terms_at_drawn_times_are_those_of_the_whole_bound():
    x0, keys = random_images(8), image_keys(KEY, jnp.arange(8))
    whole = bits_of(0.5, x0, KEY)
    times = draw_timesteps(keys, strata(20, 5))
    some = jax.jit(lambda x0, times: bound_at(keys, SHORT, wrong_predict(0.5), x0, times))(x0, times)
    for ours, all_times in ((some.terms, whole.terms), (some.x0_mse, whole.x0_mse), (some.eps_mse, whole.eps_mse)):
        np.testing.assert_allclose(ours, np.take_along_axis(all_times, times, axis=0), rtol=1e-5, atol=1e-7)


def test_shapes_are_checked():
    x0 = random_images(4)
    with pytest.raises(ValueError, match="needs one key or 4"):
        bound_terms(image_keys(KEY, jnp.arange(3)), SHORT, wrong_predict(1), x0)
    with pytest.raises(AssertionError):
        bound_terms(image_keys(KEY, jnp.arange(4)), SHORT, wrong_predict(1), x0, log_variances=jnp.zeros(19))
    with pytest.raises(AssertionError):
        rate_distortion(np.zeros(3), 0, np.zeros(2))


# Rate and distortion

finite = st.floats(0, 10, allow_nan=False)


@given(terms=hnp.arrays(np.float64, 12, elements=finite), mse=hnp.arrays(np.float64, 12, elements=finite), prior=finite)
def test_rate_and_the_decoder_s_bits_are_the_whole_bound(terms, mse, prior):
    curve = rate_distortion(terms, prior, mse)
    assert curve.rate[-1] + terms[0] == pytest.approx(terms.sum() + prior, abs=1e-9)
    assert curve.rate[0] == prior
    assert (np.diff(curve.rate) >= 0).all()
    assert curve.reverse_time.tolist() == list(range(1, 13))
    for t in range(12):  # the sum of section 4.3, with the paper's t + 1
        assert curve.rate[12 - (t + 1)] == pytest.approx(prior + terms[t + 1 :].sum(), abs=1e-9)
        assert curve.distortion[12 - (t + 1)] == pytest.approx(255 / 2 * np.sqrt(mse[t]))
