"""L_simple: what it is for networks whose loss is known."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.forward import per_image, q_sample
from ddpm_jax.keys import image_keys
from ddpm_jax.losses import l_simple, mean_squared_error, regression_target
from ddpm_jax.reverse import convert
from ddpm_jax.schedules import make_schedule, schedule_from_betas

PREDICTIONS = ("eps", "x0", "v", "mean")
T = 1000


@pytest.fixture(scope="module")
def schedule():
    return make_schedule("linear", T)


def nothing(x_t, t):
    return jnp.zeros_like(x_t)


class TestTarget:
    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_is_what_the_true_noise_converts_to(self, schedule, prediction):
        x0 = jax.random.uniform(jax.random.key(0), (5, 4, 2, 3), minval=-1, maxval=1)
        eps = jax.random.normal(jax.random.key(1), x0.shape)
        t = jnp.array([0, 1, 10, 100, 500])
        target = regression_target(schedule, x0, t, eps, prediction=prediction)
        x_t = q_sample(schedule, x0, t, eps)
        converted = convert(schedule, eps, x_t, t, prediction="eps", target=prediction)
        # Reading x0 out of x_t and eps at t = 500 enlarges roundings 3.6 times, reading v at t = 0 100 times.
        np.testing.assert_allclose(target, converted, atol=3e-5)

    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_loss_of_the_network_that_knows_is_zero(self, schedule, prediction):
        x0 = jax.random.uniform(jax.random.key(2), (4, 4, 2, 3), minval=-1, maxval=1)
        keys, t = image_keys(jax.random.key(3), jnp.arange(4)), jnp.array([0, 3, 400, 999])
        _, info = l_simple(keys, schedule, nothing, x0, t)
        knows = lambda x_t, t: regression_target(schedule, x0, t, info.eps, prediction=prediction)
        loss, _ = l_simple(keys, schedule, knows, x0, t, prediction=prediction)
        np.testing.assert_array_equal(loss, np.zeros(4))
        wrong = lambda x_t, t: knows(x_t, t) + 0.5
        loss, _ = l_simple(keys, schedule, wrong, x0, t, prediction=prediction)
        np.testing.assert_allclose(loss, 0.25, rtol=1e-5)


class TestKnownLosses:
    def test_is_one_for_a_network_that_sees_no_noise(self, schedule):
        x0 = jnp.ones((4000, 4, 4, 1))
        keys = image_keys(jax.random.key(0), jnp.arange(4000))
        loss, info = jax.jit(lambda keys, t: l_simple(keys, schedule, nothing, x0, t))(keys, jnp.arange(4000) % T)
        chex.assert_shape(loss, (4000,))
        np.testing.assert_allclose(loss, (np.asarray(info.eps) ** 2).mean((1, 2, 3)), rtol=1e-5)
        # The square of a normal has variance 2: 4 standard deviations of the mean of 64,000.
        assert abs(float(loss.mean()) - 1) < 4 * np.sqrt(2 / 64_000)

    def test_is_the_mean_of_alphas_bar_for_the_best_network_of_normal_data(self, schedule):
        # Data N(0, I): the best guess of the noise is sqrt(1 - alphas_bar) x_t, its error alphas_bar.
        best = lambda x_t, t: per_image(schedule.sqrt_one_minus_alphas_bar[t], x_t) * x_t
        times = jnp.arange(T)

        # Exactly: the error is linear in x0 and eps, so its mean square is that of the two coefficients.
        one, zero = jnp.ones((T, 1, 1, 1)), jnp.zeros((T, 1, 1, 1))
        of_x0 = np.asarray(zero - best(q_sample(schedule, one, times, zero), times), np.float64)
        of_eps = np.asarray(one - best(q_sample(schedule, zero, times, one), times), np.float64)
        np.testing.assert_allclose((of_x0**2 + of_eps**2).mean(), 0.27551323, rtol=1e-6)

        # By drawing: 8 images of 64 pixels at every time.
        t = jnp.tile(times, 8)
        x0 = jax.random.normal(jax.random.key(1), (8 * T, 8, 8, 1))
        loss, _ = jax.jit(lambda keys: l_simple(keys, schedule, best, x0, t))(
            image_keys(jax.random.key(2), jnp.arange(8 * T))
        )
        loss = np.asarray(loss, np.float64).reshape(8, T)
        alphas_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, T))
        # A pixel's error is N(0, alphas_bar), so its square has standard deviation sqrt(2) alphas_bar.
        standard_error = np.sqrt(2 * (alphas_bar**2).mean() / (8 * T * 64))
        assert abs(loss.mean() - 0.27551323) < 4 * standard_error
        z = (loss.mean(0) - alphas_bar) / (alphas_bar * np.sqrt(2 / (8 * 64)))
        assert abs(z).max() < 5.5  # the largest of 1000; a chi-square of 512 has a heavier tail than a normal

    def test_network_is_told_the_times_of_the_schedule(self):
        respaced = schedule_from_betas([0.1, 0.2, 0.3], timesteps=[0, 500, 999])
        echo = lambda x_t, t: jnp.zeros_like(x_t) + per_image(t.astype(jnp.float32), x_t)
        _, info = l_simple(
            image_keys(jax.random.key(0), jnp.arange(3)), respaced, echo, jnp.zeros((3, 2, 2, 1)), jnp.array([2, 0, 1])
        )
        np.testing.assert_array_equal(info.output[:, 0, 0, 0], [999, 0, 500])


def test_info_is_what_the_loss_was_computed_from(schedule):
    x0 = jax.random.normal(jax.random.key(0), (3, 4, 2, 3))
    t = jnp.array([0, 500, 999])
    network = lambda x_t, t: 0.3 * x_t
    loss, info = l_simple(image_keys(jax.random.key(1), jnp.arange(3)), schedule, network, x0, t)
    np.testing.assert_array_equal(info.x_t, q_sample(schedule, x0, t, info.eps))
    np.testing.assert_array_equal(info.output, network(info.x_t, t))
    np.testing.assert_allclose(loss, np.mean((np.asarray(info.output) - info.eps) ** 2, axis=(1, 2, 3)), rtol=1e-6)


class LossTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_of_an_image_does_not_depend_on_the_batch(self):
        schedule = make_schedule("linear", T)
        x0 = jax.random.normal(jax.random.key(0), (8, 4, 2, 3))
        keys, t = image_keys(jax.random.key(1), jnp.arange(8)), jnp.arange(8) * 100
        loss_of = self.variant(lambda keys, x0, t: l_simple(keys, schedule, lambda x_t, t: jnp.tanh(x_t), x0, t))
        loss, info = loss_of(keys, x0, t)
        alone, info_alone = loss_of(keys[5:6], x0[5:6], t[5:6])
        np.testing.assert_array_equal(info.eps[5:6], info_alone.eps)
        np.testing.assert_allclose(loss[5:6], alone, rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_gradient_of_a_scale(self):
        # eps_hat = c x_t: d/dc mean((c x_t - eps)^2) = 2 mean(x_t (c x_t - eps)).
        schedule = make_schedule("linear", T)
        x0 = jax.random.normal(jax.random.key(0), (4, 4, 2, 3))
        keys, t = image_keys(jax.random.key(1), jnp.arange(4)), jnp.array([0, 100, 500, 999])

        def loss_of(scale):
            loss, info = l_simple(keys, schedule, lambda x_t, t: scale * x_t, x0, t)
            return loss.mean(), info

        gradient, info = self.variant(jax.grad(loss_of, has_aux=True))(jnp.float32(0.7))
        x_t, eps = np.asarray(info.x_t, np.float64), np.asarray(info.eps, np.float64)
        np.testing.assert_allclose(gradient, 2 * np.mean(x_t * (0.7 * x_t - eps)), rtol=1e-4)


class TestRefusals:
    schedule = make_schedule("linear", 10)
    x0 = jnp.zeros((2, 4, 4, 3))
    t = jnp.zeros(2, jnp.int32)
    keys = image_keys(jax.random.key(0), jnp.arange(2))

    @pytest.mark.parametrize("shape", [(2, 4, 4, 1), (1, 4, 4, 3), (2, 1, 1, 3), (4, 4, 3)])
    def test_unequal_shapes(self, shape):
        with pytest.raises(AssertionError):
            mean_squared_error(self.x0, jnp.zeros(shape))
        with pytest.raises(AssertionError):
            l_simple(self.keys, self.schedule, lambda x_t, t: jnp.zeros(shape), self.x0, self.t)
        with pytest.raises(AssertionError):
            regression_target(self.schedule, self.x0, self.t, jnp.zeros(shape), prediction="eps")

    def test_keys_and_times_that_are_not_one_an_image(self):
        with pytest.raises(ValueError, match="needs one key or"):
            l_simple(self.keys[:1], self.schedule, nothing, self.x0, self.t)
        with pytest.raises(AssertionError):
            l_simple(self.keys, self.schedule, nothing, self.x0, self.t[:1])
        with pytest.raises(AssertionError):
            l_simple(self.keys, self.schedule, nothing, self.x0, self.t[:, None])
        with pytest.raises(AssertionError):
            l_simple(self.keys, self.schedule, nothing, self.x0[0], self.t)

    def test_unknown_prediction(self):
        with pytest.raises(ValueError, match="unknown prediction 'noise'"):
            l_simple(self.keys, self.schedule, nothing, self.x0, self.t, prediction="noise")
