"""Classifier-free guidance: a combination of two predictions, made in one call."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.forward import per_image
from ddpm_jax.guidance import guided, timesteps_between, with_labels
from ddpm_jax.keys import image_keys
from ddpm_jax.reverse import convert
from ddpm_jax.samplers.by_name import make_sampler
from ddpm_jax.samplers.chain import initial_noise, sample
from ddpm_jax.samplers.respacing import evenly_spaced
from ddpm_jax.schedules import make_betas, make_schedule

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


def test_in_an_interval_it_is_the_conditional_network_outside(inputs):
    x_t, t, labels = inputs
    everywhere, inside = (
        guided(conditional, labels, null_label=NULL, guidance_scale=2.5, timesteps=timesteps)(x_t, t)
        for timesteps in (None, (3, 7))
    )
    np.testing.assert_array_equal(inside[1:3], everywhere[1:3])
    np.testing.assert_array_equal(inside[::3], conditional(x_t, t, labels)[::3])


def test_noise_levels_are_those_of_the_schedule():
    betas = make_betas("linear", 1000)
    first, last = timesteps_between(betas, 0.5, 2.0)
    sigma = np.sqrt(1 / np.cumprod(1 - betas) - 1)
    assert sigma[first - 1] <= 0.5 < sigma[first]
    assert sigma[last] <= 2.0 < sigma[last + 1]
    with pytest.raises(ValueError, match=r"above 3 and up to 2: those of this schedule are 0\.01 to 157"):
        timesteps_between(betas, 3.0, 2.0)


def test_of_a_mixture_is_the_chain_of_the_closed_form_and_moves_less_in_an_interval():
    betas, mean, variance, scale, number = make_betas("linear", 1000), 0.5, 0.04, 4.0, 2000
    labels, interval = np.arange(number) % 2, timesteps_between(betas, 0.1, 0.5)

    def eps_of(module, x, alpha_bar, label):
        """The noise in x, of two Gaussian classes at -mean and mean; of both together where the label is 2."""
        total = alpha_bar * variance + 1 - alpha_bar
        both = module.tanh(alpha_bar**0.5 * mean * x / total)
        sign = module.where(label == 2, both, 2 * label - 1)
        return (1 - alpha_bar) ** 0.5 * (x - alpha_bar**0.5 * mean * sign) / total

    def network(x_t, t, labels):
        alpha_bar = per_image(jnp.asarray(np.cumprod(1 - betas), jnp.float32)[t], x_t)
        return eps_of(jnp, x_t, alpha_bar, per_image(labels.astype(jnp.float32), x_t))

    def draw(timesteps):
        predict = guided(network, jnp.asarray(labels), null_label=2, guidance_scale=scale, timesteps=timesteps)
        sampler = make_sampler("ddim", betas, predict, num_steps=50, spacing="linspace", clip_x0=False)
        images = jax.jit(lambda key: sample(key, sampler, (number, 1, 1, 1)))(jax.random.key(0))
        return np.asarray(images)[:, 0, 0, 0]

    def expected():
        x = np.asarray(initial_noise(image_keys(jax.random.key(0), jnp.arange(number)), (1, 1, 1)), np.float64)[
            :, 0, 0, 0
        ]
        timesteps = evenly_spaced(1000, 50)
        alphas_bar = np.cumprod(1 - betas)[timesteps]
        for k in reversed(range(50)):
            s = scale if interval[0] <= timesteps[k] <= interval[1] else 1
            eps = s * eps_of(np, x, alphas_bar[k], labels) - (s - 1) * eps_of(np, x, alphas_bar[k], 2)
            x0 = (x - np.sqrt(1 - alphas_bar[k]) * eps) / np.sqrt(alphas_bar[k])
            before = alphas_bar[k - 1] if k else 1
            x = np.sqrt(before) * x0 + np.sqrt(1 - before) * eps
        return x

    limited, everywhere = draw(interval), draw(None)
    np.testing.assert_allclose(limited, expected(), rtol=0, atol=1e-4)
    # Guidance at every noise level moves the class away from where its images are, much further than in an interval.
    moved = [images[labels == 1].mean() - mean for images in (limited, everywhere)]
    assert 0 < moved[0] < 0.5 * moved[1]
