"""L_vlb, L_hybrid and the weightings: equal to the bound's terms, and gradients that go where they should."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.bound import bound_term
from ddpm_jax.forward import q_sample
from ddpm_jax.keys import image_keys
from ddpm_jax.losses import l_hybrid, l_simple, l_vlb, regression_target, snr, snr_weights
from ddpm_jax.reverse import predict_x0
from ddpm_jax.schedules import make_schedule

T = 100
X0 = jnp.round(jax.random.uniform(jax.random.key(0), (6, 4, 4, 1)) * 255) / 127.5 - 1
TIMES = jnp.array([0, 1, 5, 30, 70, 99])
KEYS = image_keys(jax.random.key(1), jnp.arange(6))


@pytest.fixture(scope="module")
def schedule():
    return make_schedule("linear", T, beta_start=1e-3, beta_end=0.2)


def network(weights):
    """Two halves with a weight each: what is said of the mean, and of the variance."""
    mean_weight, variance_weight = weights

    def predict(x_t, t):
        del t
        return jnp.concatenate([mean_weight * x_t, variance_weight * jnp.tanh(x_t)], axis=-1)

    return predict


def test_vlb_is_t_times_the_term(schedule):
    losses, info = l_vlb(KEYS, schedule, lambda x_t, t: 0.4 * x_t, X0, TIMES, variance="fixed_small")
    for clip in (False,):  # in training x0 is not clipped
        term = bound_term(
            schedule, info.output, X0, info.x_t, TIMES, prediction="eps", variance="fixed_small", clip_x0=clip
        )
        np.testing.assert_allclose(losses, T * term.bits, rtol=1e-6)
    chex.assert_shape(losses, (6,))


def test_hybrid_is_the_sum_of_its_parts(schedule):
    predict = network((0.4, 0.3))
    weights = jnp.arange(1.0, 7.0)
    hybrid, _ = l_hybrid(KEYS, schedule, predict, X0, TIMES, vlb_weight=0.01, weights=weights)
    simple, _ = l_simple(KEYS, schedule, predict, X0, TIMES, variance="learned_range")
    vlb, _ = l_vlb(KEYS, schedule, predict, X0, TIMES, variance="learned_range")
    np.testing.assert_allclose(hybrid, weights * simple + 0.01 * vlb, rtol=1e-5)


def test_the_bound_of_hybrid_trains_the_variance_alone(schedule):
    def means(loss, **options):
        return jax.grad(
            lambda w: loss(KEYS, schedule, network(w), X0, TIMES, variance="learned_range", **options)[0].sum()
        )((jnp.float32(0.4), jnp.float32(0.3)))

    of_simple, of_vlb, of_hybrid = means(l_simple), means(l_vlb), means(l_hybrid, vlb_weight=1.0)
    np.testing.assert_allclose(of_hybrid[0], of_simple[0], rtol=1e-5)
    np.testing.assert_allclose(of_hybrid[1], of_vlb[1], rtol=1e-5)
    assert of_simple[1] == 0
    assert abs(of_vlb[0]) > 1
    assert abs(of_vlb[1]) > 1


def test_hybrid_without_a_learned_variance_is_refused(schedule):
    with pytest.raises(ValueError, match="nothing to train"):
        l_hybrid(KEYS, schedule, lambda x_t, t: x_t, X0, TIMES, variance="fixed_small")


def test_snr_is_that_of_the_marginal(schedule):
    alphas_bar = np.cumprod(1 - np.linspace(1e-3, 0.2, T))
    np.testing.assert_allclose(snr(schedule, jnp.arange(T)), alphas_bar / (1 - alphas_bar), rtol=2e-6)


@pytest.mark.parametrize("weighting", ["min_snr", "truncated_snr"])
@pytest.mark.parametrize("prediction", ["eps", "v", "mean"])
def test_a_weighted_error_is_the_same_in_every_parameterisation(schedule, weighting, prediction):
    """A prediction that is off by d in x0 loses w(t) d^2, whatever it is a prediction of."""
    t = jnp.array([1, 5, 20, 50, 80, 95])
    eps = jax.random.normal(jax.random.key(2), X0.shape)
    right = regression_target(schedule, X0, t, eps, prediction=prediction)
    x_t = q_sample(schedule, X0, t, eps)
    wrong = right + 0.3
    off = predict_x0(schedule, wrong, x_t, t, prediction=prediction) - X0
    weights = snr_weights(schedule, t, weighting=weighting, prediction=prediction)
    of_x0 = snr_weights(schedule, t, weighting=weighting, prediction="x0")
    np.testing.assert_allclose(weights * 0.09, of_x0 * jnp.mean(off**2, axis=(1, 2, 3)), rtol=2e-3)
    ratio = np.asarray(snr(schedule, t))
    expected = np.minimum(ratio, 5) if weighting == "min_snr" else np.maximum(ratio, 1)
    np.testing.assert_allclose(of_x0, expected, rtol=1e-6)


def test_no_weighting_is_one(schedule):
    weights = snr_weights(schedule, TIMES, weighting="none", prediction="eps")
    np.testing.assert_array_equal(weights, np.ones(6))


def test_an_unknown_weighting_is_named(schedule):
    with pytest.raises(ValueError, match="unknown weighting 'p2'"):
        snr_weights(schedule, TIMES, weighting="p2", prediction="eps")
