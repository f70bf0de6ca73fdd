"""Classifier-free guidance: a combination of two predictions, made in one call."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.forward import per_image
from ddpm_jax.guidance import guided, with_labels
from ddpm_jax.reverse import convert
from ddpm_jax.schedules import make_schedule

NULL = 3
SHAPE = (4, 2, 2, 1)


def conditional(x_t, times, labels):
    """A network whose answer names the label and the time."""
    return 0.5 * x_t + per_image(labels.astype(jnp.float32), x_t) - 0.01 * per_image(times.astype(jnp.float32), x_t)


@pytest.fixture(scope="module")
def inputs():
    x_t = jax.random.normal(jax.random.key(0), SHAPE)
    return x_t, jnp.array([0, 3, 7, 9]), jnp.array([0, 2, 1, 2])


def test_without_guidance_it_is_the_conditional_network(inputs):
    x_t, t, labels = inputs
    expected = conditional(x_t, t, labels)
    np.testing.assert_array_equal(with_labels(conditional, labels)(x_t, t), expected)
    np.testing.assert_array_equal(guided(conditional, labels, null_label=NULL, guidance_scale=1.0)(x_t, t), expected)


@pytest.mark.parametrize("w", [0.1, 1.0, 4.0])
def test_is_the_formula_of_the_paper(inputs, w):
    x_t, t, labels = inputs
    told, not_told = conditional(x_t, t, labels), conditional(x_t, t, jnp.full_like(labels, NULL))
    predicted = guided(conditional, labels, null_label=NULL, guidance_scale=1 + w)(x_t, t)
    np.testing.assert_allclose(predicted, (1 + w) * told - w * not_told, rtol=1e-5, atol=1e-5)


def test_asks_the_network_once(inputs):
    x_t, t, labels = inputs
    calls = []

    def network(x_t, times, labels):
        calls.append(x_t.shape)
        return conditional(x_t, times, labels)

    guided(network, labels, null_label=NULL, guidance_scale=3.0)(x_t, t)
    assert calls == [(2 * SHAPE[0], *SHAPE[1:])]


def test_a_learned_variance_is_that_of_the_told_network(inputs):
    x_t, t, labels = inputs

    def network(x_t, times, labels):
        mean = conditional(x_t, times, labels)
        return jnp.concatenate([mean, -mean], axis=-1)

    output = guided(network, labels, null_label=NULL, guidance_scale=2.5, variance="learned_range")(x_t, t)
    chex.assert_shape(output, (*SHAPE[:-1], 2))
    np.testing.assert_allclose(output[..., 1:], -conditional(x_t, t, labels), rtol=1e-6)


@pytest.mark.parametrize("prediction", ["x0", "v", "mean"])
def test_is_the_same_whatever_is_predicted(inputs, prediction):
    x_t, _, labels = inputs
    schedule, t = make_schedule("linear", 1000), jnp.array([1, 50, 300, 700])
    as_eps = guided(conditional, labels, null_label=NULL, guidance_scale=2.5)(x_t, t)

    def network(x_t, times, labels):
        eps = conditional(x_t, times, labels)
        # The doubled batch has its times twice.
        return convert(schedule, eps, x_t, times, prediction="eps", target=prediction)

    other = guided(network, labels, null_label=NULL, guidance_scale=2.5)(x_t, t)
    back = convert(schedule, other, x_t, t, prediction=prediction, target="eps")
    # Reading eps out of the mean at t = 1 enlarges roundings some thousand times.
    np.testing.assert_allclose(back, as_eps, atol=5e-3 if prediction == "mean" else 1e-3)
