"""The reverse process: what the network says, read in every way, and one step of Algorithm 2."""

import functools
import itertools

import chex
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_jax.reverse import (
    DynamicThreshold,
    Reverse,
    clip,
    convert,
    from_x0,
    model_log_variance,
    p_mean_variance,
    p_sample,
    predict_eps,
    predict_mean,
    predict_v,
    predict_x0,
    split_output,
)
from ddpm_jax.schedules import make_schedule, schedule_from_betas

PREDICTIONS = ("eps", "x0", "v", "mean")
T = 12
betas_of_12_steps = st.lists(st.floats(1e-4, 0.9), min_size=T, max_size=T)
every_t = jnp.arange(T)
SMALLEST = 1e-30  # below it, parts of a formula are zero in float32
in_every_way = chex.variants(with_jit=True, without_jit=True, with_pmap=True)


def images(values):
    """One image of one pixel for each of the T times."""
    return jnp.asarray(np.broadcast_to(np.asarray(values, np.float64).reshape(-1, 1, 1, 1), (T, 1, 1, 1)), jnp.float32)


def column(images):
    return np.asarray(images, np.float64).reshape(-1)


def pixel(value):
    return jnp.full((1, 1, 1, 1), value, jnp.float32)


class Truth:
    """x_t, eps, x0, v and the posterior mean of one another, in float64."""

    def __init__(self, betas, x0, eps):
        betas = np.asarray(betas, np.float64)
        alphas_bar = np.cumprod(1 - betas)
        alphas_bar_prev = np.append(1.0, alphas_bar[:-1])
        scale, sigma = np.sqrt(alphas_bar), np.sqrt(1 - alphas_bar)
        coef_x0 = np.sqrt(alphas_bar_prev) * betas / sigma**2
        coef_x_t = np.sqrt(1 - betas) * (1 - alphas_bar_prev) / sigma**2
        self.x_t = scale * x0 + sigma * eps
        self.outputs = {
            "eps": np.full(len(betas), eps),
            "x0": np.full(len(betas), x0),
            "v": scale * eps - sigma * x0,
            "mean": coef_x0 * x0 + coef_x_t * self.x_t,
        }
        # x0 = slope * output + offset * x_t: how much an error of the output, or of x_t, is worth in x0.
        self.slope = {"eps": sigma / scale, "x0": np.ones_like(betas), "v": sigma, "mean": 1 / coef_x0}
        self.offset = {"eps": 1 / scale, "x0": np.zeros_like(betas), "v": scale, "mean": coef_x_t / coef_x0}

    def error(self, prediction, target):
        """The largest error of `target` that float32 explains: 4 roundings of each of the terms."""
        terms = sum(
            abs(self.slope[name] * self.outputs[name]) + self.offset[name] * abs(self.x_t)
            for name in (prediction, target)
        )
        return 5e-7 * ((terms + abs(self.outputs["x0"])) / self.slope[target] + abs(self.outputs[target])) + SMALLEST


def every_pair(schedule, outputs, x_t, t):
    """What each prediction, {name: image}, becomes: {(prediction, target): image}."""
    return {
        (prediction, target): convert(schedule, outputs[prediction], x_t, t, prediction=prediction, target=target)
        for prediction, target in itertools.product(PREDICTIONS, PREDICTIONS)
    }


def there_and_back(schedule, output, x_t, t):
    """One image taken for each prediction, converted to each other and back: {(prediction, target): image}."""
    there = every_pair(schedule, dict.fromkeys(PREDICTIONS, output), x_t, t)
    return {
        (prediction, target): convert(schedule, converted, x_t, t, prediction=target, target=prediction)
        for (prediction, target), converted in there.items()
    }


class ConversionTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @given(betas=betas_of_12_steps, x0=st.floats(-1, 1), eps=st.floats(-3, 3))
    def test_every_prediction_becomes_every_other(self, betas, x0, eps):
        schedule, truth = schedule_from_betas(betas), Truth(betas, x0, eps)
        outputs = {name: images(output) for name, output in truth.outputs.items()}
        actual = jax.device_get(self.variant(every_pair)(schedule, outputs, images(truth.x_t), every_t))
        for (prediction, target), image in actual.items():
            difference, allowed = abs(column(image) - truth.outputs[target]), truth.error(prediction, target)
            assert (difference <= allowed).all(), (prediction, target, difference / allowed)

    @chex.variants(with_jit=True, without_jit=True)
    @given(betas=betas_of_12_steps, output=st.floats(-3, 3), x_t=st.floats(-3, 3))
    def test_conversions_cycle_back(self, betas, output, x_t):
        schedule, tables = schedule_from_betas(betas), Truth(betas, 0.0, 0.0)
        actual = jax.device_get(self.variant(there_and_back)(schedule, images(output), images(x_t), every_t))
        for (prediction, target), image in actual.items():
            x0 = tables.slope[prediction] * abs(output) + tables.offset[prediction] * abs(x_t)
            # On the way back the terms may be larger than x0, if x_t counts for much in the target.
            terms = 2 * (x0 + tables.offset[target] * abs(x_t))
            difference = abs(column(image) - output)
            allowed = 1e-6 * (terms / tables.slope[prediction] + abs(output)) + SMALLEST
            assert (difference <= allowed).all(), (prediction, target, difference / allowed)


def test_named_conversions_are_convert():
    schedule = make_schedule("linear", 10)
    output, x_t = jax.random.normal(jax.random.key(0), (2, 3, 4, 2, 3))
    t = jnp.array([0, 5, 9])
    for function, target in ((predict_x0, "x0"), (predict_eps, "eps"), (predict_v, "v"), (predict_mean, "mean")):
        for prediction in PREDICTIONS:
            expected = convert(schedule, output, x_t, t, prediction=prediction, target=target)
            np.testing.assert_array_equal(function(schedule, output, x_t, t, prediction=prediction), expected)
            if prediction == target:
                assert function(schedule, output, x_t, t, prediction=prediction) is output


def test_jsd_ends_where_x0_cannot_be_read_from_noise_but_from_the_others():
    schedule = make_schedule("jsd", 10)
    x0, x_t, t = pixel(0.5), pixel(-1.5), jnp.array([9])
    for prediction in ("x0", "v", "mean"):
        output = from_x0(schedule, x0, x_t, t, target=prediction)
        if prediction != "v":  # v is x_t here, and says nothing of x0 but by x_t = eps
            np.testing.assert_allclose(
                column(predict_x0(schedule, output, x_t, t, prediction=prediction)), 0.5, rtol=1e-6
            )
    of_eps = functools.partial(predict_x0, schedule, x_t, x_t, prediction="eps")
    for predict in (of_eps, jax.jit(of_eps)):  # at a timestep that is known, and at one that is not
        with pytest.raises(ValueError, match="^prediction 'eps' cannot tell x_0 at the last step .*: use 'v' or 'x0'"):
            predict(t)
    assert np.isfinite(column(of_eps(t - 1))).all()


class TestNumbersOfThePaper:
    """One pixel, t = 499, x_t = 0.3, the network says 0.7; computed elsewhere in float64."""

    schedule = make_schedule("linear", 1000)
    t = jnp.array([499])

    @pytest.mark.parametrize(("clip_x0", "mean", "x0"), [(False, 0.29415880, -1.3267442), (True, 0.29516193, -1)])
    def test_mean(self, clip_x0, mean, x0):
        reverse = p_mean_variance(self.schedule, pixel(0.7), pixel(0.3), self.t, clip_x0=clip_x0)
        np.testing.assert_allclose(column(reverse.x0), x0, rtol=3e-7)
        np.testing.assert_allclose(column(reverse.mean), mean, rtol=3e-7)

    def test_learned_range(self):
        # v = 0 is half way between the two log-variances.
        log_variance = model_log_variance(
            self.schedule, *[jnp.zeros((3, 1, 1, 1))] * 2, jnp.array([0, 1, 500]), variance="learned_range"
        )
        np.testing.assert_allclose(column(log_variance), [-9.5135328, -9.4227058, -4.5996209], rtol=2e-7)

    def test_learned_range_ends_at_both_fixed_variances(self):
        t, x_t = jnp.arange(1000), jnp.zeros((1000, 1, 1, 1))
        for v, variance in ((1.0, "fixed_large"), (-1.0, "fixed_small")):
            actual = model_log_variance(self.schedule, x_t + v, x_t, t, variance="learned_range")
            expected = model_log_variance(self.schedule, None, x_t, t, variance=variance)
            # The original leaves entry 0 of log beta as it is here.
            start = 1 if variance == "fixed_large" else 0
            np.testing.assert_array_equal(actual[start:], expected[start:])

    @pytest.mark.parametrize(
        ("variance", "at_499"),
        [("fixed_small", np.log(0.010031355)), ("fixed_large", np.log(1e-4 + 0.0199 * 499 / 999))],
    )
    def test_fixed(self, variance, at_499):
        log_variance = model_log_variance(
            self.schedule, None, jnp.zeros((2, 1, 1, 1)), jnp.array([0, 499]), variance=variance
        )
        chex.assert_shape(log_variance, (2, 1, 1, 1))
        np.testing.assert_allclose(column(log_variance), [-9.8167251, at_499], rtol=2e-7)


@given(betas=betas_of_12_steps, output=st.floats(-3, 3), x_t=st.floats(-3, 3))
def test_mean_is_that_of_algorithm_2(betas, output, x_t):
    actual = p_mean_variance(schedule_from_betas(betas), images(output), images(x_t), every_t, clip_x0=False).mean
    betas = np.asarray(betas)
    alphas, alphas_bar = 1 - betas, np.cumprod(1 - betas)
    terms = abs(x_t) + betas / np.sqrt(1 - alphas_bar) * abs(output)
    expected = (x_t - betas / np.sqrt(1 - alphas_bar) * output) / np.sqrt(alphas)
    # The way through x0 adds terms larger than the result: 4 roundings of them.
    terms = terms / np.sqrt(alphas) * (1 + betas / (1 - alphas_bar) / np.sqrt(alphas))
    assert (abs(column(actual) - expected) <= 5e-7 * terms + SMALLEST).all()


def test_every_prediction_gives_the_same_reverse_step():
    schedule = make_schedule("linear", 1000)
    x0, x_t = jax.random.uniform(jax.random.key(1), (2, 6, 4, 2, 3), minval=-1, maxval=1)
    t = jnp.array([0, 1, 10, 100, 500, 999])
    expected = p_mean_variance(schedule, x0, x_t, t, prediction="x0")
    for prediction in PREDICTIONS:
        output = from_x0(schedule, x0, x_t, t, target=prediction)
        actual = p_mean_variance(schedule, output, x_t, t, prediction=prediction, clip_x0=False)
        np.testing.assert_allclose(actual.mean, expected.mean, atol=2e-6)
        np.testing.assert_array_equal(actual.log_variance, expected.log_variance)


def test_clipping_holds_x0_and_leaves_a_predicted_mean_alone():
    schedule = make_schedule("linear", 1000)
    output, x_t = 5 * jax.random.normal(jax.random.key(2), (2, 4, 4, 2, 3))
    t = jnp.array([0, 10, 500, 999])
    for prediction in PREDICTIONS:
        free = p_mean_variance(schedule, output, x_t, t, prediction=prediction, clip_x0=False)
        held = p_mean_variance(schedule, output, x_t, t, prediction=prediction, clip_x0=True)
        assert float(jnp.abs(free.x0).max()) > 1
        np.testing.assert_array_equal(held.x0, np.clip(free.x0, -1, 1))
        if prediction == "mean":
            np.testing.assert_array_equal(held.mean, output)
        else:
            changed = np.asarray(free.x0 != held.x0)[1:]
            assert (np.asarray(free.mean != held.mean)[1:] == changed).mean() > 0.99


@given(hnp.arrays(np.float32, (3, 2, 5, 1), elements=st.floats(-4, 4, width=32)), st.floats(0.05, 0.95))
def test_dynamic_thresholding_scales_each_image_by_a_quantile_of_its_own(x0, quantile):
    clipped = np.asarray(clip(jnp.asarray(x0), DynamicThreshold(quantile)))
    for image, actual in zip(x0.astype(np.float64), clipped, strict=True):
        largest = max(1.0, np.quantile(np.abs(image), quantile))
        np.testing.assert_allclose(actual, np.clip(image, -largest, largest) / largest, rtol=1e-5, atol=1e-6)


def test_learned_variance_is_the_second_half():
    schedule = make_schedule("linear", 10)
    x_t = jax.random.normal(jax.random.key(3), (2, 4, 2, 3))
    mean_output, variance_output = jax.random.normal(jax.random.key(4), (2, 2, 4, 2, 3))
    output = jnp.concatenate([mean_output, variance_output], axis=-1)
    t = jnp.array([3, 9])
    learned = p_mean_variance(schedule, output, x_t, t, variance="learned")
    np.testing.assert_array_equal(learned.log_variance, variance_output)
    np.testing.assert_array_equal(learned.mean, p_mean_variance(schedule, mean_output, x_t, t).mean)
    ranged = p_mean_variance(schedule, output, x_t, t, variance="learned_range").log_variance
    small, large = np.log(np.asarray(schedule.posterior_variance)[[3, 9]]), np.log(np.asarray(schedule.betas)[[3, 9]])
    fraction = (np.asarray(variance_output) + 1) / 2
    expected = fraction * large.reshape(2, 1, 1, 1) + (1 - fraction) * small.reshape(2, 1, 1, 1)
    np.testing.assert_allclose(ranged, expected, rtol=1e-5)


class StepTest(chex.TestCase):
    @in_every_way
    def test_noise_is_added_but_at_the_last_step(self):
        mean, z = jax.random.normal(jax.random.key(5), (2, 3, 4, 2, 3))
        log_variance = jnp.log(jnp.array([0.5, 0.04, 0.09])).reshape(3, 1, 1, 1)
        t = jnp.array([0, 1, 7])
        x = self.variant(p_sample)(Reverse(mean, log_variance, mean), t, z)
        np.testing.assert_array_equal(x[0], mean[0])
        np.testing.assert_allclose(x[1:] - mean[1:], z[1:] * np.array([0.2, 0.3]).reshape(2, 1, 1, 1), atol=1e-6)

    @in_every_way
    def test_a_learned_variance_has_its_own_sigma_in_every_pixel(self):
        mean, z, log_variance = jax.random.normal(jax.random.key(6), (3, 2, 4, 2, 3))
        x = self.variant(p_sample)(Reverse(mean, log_variance, mean), jnp.array([1, 2]), z)
        np.testing.assert_allclose(x, np.asarray(mean) + np.exp(np.asarray(log_variance) / 2) * z, rtol=1e-5, atol=1e-6)


class TestRefusals:
    schedule = make_schedule("linear", 10)
    x_t = jnp.zeros((2, 4, 4, 3))
    t = jnp.zeros(2, jnp.int32)

    def test_unknown_prediction(self):
        for function in (predict_x0, predict_eps, p_mean_variance):
            with pytest.raises(ValueError, match="unknown prediction 'noise': choose eps, x0, v or mean"):
                function(self.schedule, self.x_t, self.x_t, self.t, prediction="noise")
        with pytest.raises(ValueError, match="unknown prediction 'noise'"):
            from_x0(self.schedule, self.x_t, self.x_t, self.t, target="noise")

    def test_unknown_variance(self):
        with pytest.raises(ValueError, match="unknown variance 'large': choose fixed_small"):
            p_mean_variance(self.schedule, self.x_t, self.x_t, self.t, variance="large")

    @pytest.mark.parametrize("variance", ["learned", "learned_range"])
    def test_learned_variance_without_its_half(self, variance):
        with pytest.raises(ValueError, match=f"{variance} variance needs 2C output channels, not 3"):
            split_output(self.x_t, variance=variance)
        with pytest.raises(ValueError, match="second half"):
            model_log_variance(self.schedule, None, self.x_t, self.t, variance=variance)

    def test_shapes(self):
        twice = jnp.zeros((2, 4, 4, 6))
        with pytest.raises(AssertionError):  # an output for a learned variance, read as one for a fixed variance
            p_mean_variance(self.schedule, twice, self.x_t, self.t)
        with pytest.raises(AssertionError):
            predict_x0(self.schedule, self.x_t[:1], self.x_t, self.t, prediction="eps")
        with pytest.raises(AssertionError):
            predict_x0(self.schedule, self.x_t, self.x_t, self.t[:, None], prediction="eps")
        with pytest.raises(AssertionError):
            from_x0(self.schedule, self.x_t[..., :1], self.x_t, self.t, target="eps")
        with pytest.raises(AssertionError):
            p_sample(Reverse(self.x_t, self.x_t, self.x_t), self.t, self.x_t[..., :1])
        with pytest.raises(AssertionError):
            p_sample(Reverse(self.x_t, self.x_t, self.x_t), self.t[:1], self.x_t)
