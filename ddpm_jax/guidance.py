"""Class-conditional networks and classifier-free guidance (Ho & Salimans 2022)."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from ddpm_jax.reverse import Predict, Variance, split_output

PredictLabeled = Callable[[Array, Array, Array], Array]
"""A conditional network: `predict(x_t, timesteps, labels) -> output`."""


def with_labels(predict: PredictLabeled, labels: Array) -> Predict:
    """Binds the labels of the images, (B,) int32, to a conditional network."""
    return lambda x_t, timesteps: predict(x_t, timesteps, labels)


def guided(
    predict: PredictLabeled,
    labels: Array,
    *,
    null_label: int,
    guidance_scale: float,
    variance: Variance = "fixed_large",
) -> Predict:
    r"""Makes a network with classifier-free guidance: extrapolates from its unconditional to its conditional output.

    .. math:: \tilde\epsilon = s\, \epsilon_\theta(x_t, c) - (s - 1)\, \epsilon_\theta(x_t)

    Both are computed in one call on a batch of 2B. x0, v and mean predictions are combined in the same way, which is
    equivalent because each is affine in eps. A learned variance is that of the conditional prediction.

    Args:
      predict: the conditional network.
      labels: c, (B,) int32, each in [0, null_label).
      null_label: the label that means "no label".
      guidance_scale: s >= 0, static, as most papers and diffusers define it: 1 is the conditional network itself,
        0 the unconditional one. The weight w of Ho & Salimans is s - 1.
      variance: whether the output has a second half for the variance.

    Returns:
      the guided network, as samplers take it: `(x_t, timesteps) -> output`.

    Ho & Salimans 2022, eq. 6.
    """
    if guidance_scale == 1:
        return with_labels(predict, labels)
    both_labels = jnp.concatenate([labels, jnp.full_like(labels, null_label)])

    def predict_guided(x_t: Array, timesteps: Array) -> Array:
        both = predict(jnp.concatenate([x_t, x_t]), jnp.concatenate([timesteps, timesteps]), both_labels)
        conditional, unconditional = jnp.split(both, 2)
        conditional_mean, second_half = split_output(conditional, variance=variance)
        unconditional_mean, _ = split_output(unconditional, variance=variance)
        mean = guidance_scale * conditional_mean - (guidance_scale - 1) * unconditional_mean
        return mean if second_half is None else jnp.concatenate([mean, second_half], axis=-1)

    return predict_guided
