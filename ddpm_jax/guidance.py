"""Telling a network what to draw: labels, and classifier-free guidance."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from ddpm_jax.reverse import Predict, Variance, split_output

PredictLabeled = Callable[[Array, Array, Array], Array]
"""A conditional network: `predict(x_t, times, labels) -> output`."""


def with_labels(predict: PredictLabeled, labels: Array) -> Predict:
    """Tells a conditional network the labels of the images, (B,) int32: a network as the samplers see it."""
    return lambda x_t, times: predict(x_t, times, labels)


def guided(
    predict: PredictLabeled,
    labels: Array,
    *,
    null_label: int,
    guidance_scale: float,
    variance: Variance = "fixed_large",
) -> Predict:
    r"""Pushes a conditional network away from what it would say without labels.

    .. math:: \tilde\epsilon = s\, \epsilon_\theta(x_t, c) - (s - 1)\, \epsilon_\theta(x_t)

    Both are computed in one call on a batch of 2B. The same combination of x0, v or mean predictions is the same
    thing, for each is affine in eps. A learned variance is that of the conditional prediction.

    Args:
      predict: the conditional network.
      labels: c, (B,) int32, each in [0, null_label).
      null_label: the label that says "not told".
      guidance_scale: s >= 0, static, as papers and diffusers mean it: 1 is the conditional network itself, 0 the
        unconditional one. The weight w of Ho & Salimans is s - 1.
      variance: whether the output has a second half for the variance.

    Returns:
      a network as the samplers see it: `(x_t, times) -> output`.

    Ho & Salimans 2022, eq. 6.
    """
    if guidance_scale == 1:
        return with_labels(predict, labels)
    both_labels = jnp.concatenate([labels, jnp.full_like(labels, null_label)])

    def predict_guided(x_t: Array, times: Array) -> Array:
        both = predict(jnp.concatenate([x_t, x_t]), jnp.concatenate([times, times]), both_labels)
        told, not_told = jnp.split(both, 2)
        told_mean, told_variance = split_output(told, variance=variance)
        not_told_mean, _ = split_output(not_told, variance=variance)
        mean = guidance_scale * told_mean - (guidance_scale - 1) * not_told_mean
        return mean if told_variance is None else jnp.concatenate([mean, told_variance], axis=-1)

    return predict_guided
