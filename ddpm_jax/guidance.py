"""Class-conditional networks and classifier-free guidance (Ho & Salimans 2022)."""

import typing
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ddpm_jax.forward import per_image
from ddpm_jax.names import Variance
from ddpm_jax.reverse import Predict, split_output
from ddpm_jax.schedules import concrete, numbers

PredictLabeled = Callable[[Array, Array, Array], Array]
"""A conditional network: `predict(x_t, timesteps, labels) -> output`."""


def check_labels(labels: ArrayLike, num_classes: int) -> None:
    """Checks class labels: integers, and in [0, num_classes] where their values are known.

    Raises:
      TypeError: they are not integers.
      ValueError: one is outside; num_classes itself means "no label".
    """
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise TypeError(f"labels are integers in [0, {num_classes}], not {jnp.result_type(labels)}")
    known = concrete(labels)
    if known is None:
        return
    outside = known[(known < 0) | (known > num_classes)]
    if outside.size:
        raise ValueError(
            f"label {outside[0]} is outside [0, {num_classes}]: there are {num_classes} classes, numbered from 0, and "
            f'{num_classes} means "no label"'
        )


def with_labels(predict: PredictLabeled, labels: Array) -> Predict:
    """Binds the labels of the images, (B,) int32, to a conditional network."""
    return lambda x_t, timesteps: predict(x_t, timesteps, labels)


def guided(
    predict: PredictLabeled,
    labels: Array,
    *,
    null_label: int,
    guidance_scale: ArrayLike,
    timesteps: tuple[int, int] | None = None,
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
      guidance_scale: s >= 0, as most papers and diffusers define it: 1 is the conditional network itself, 0 the
        unconditional one. The weight w of Ho & Salimans is s - 1. A number, or an array, possibly traced: a scalar or
        (B,), one per image.
      timesteps: the first and last 0-based timestep at which to guide, see `timesteps_between`; all if None. At the
        others the conditional network is used as it is.
      variance: whether the output has a second half for the variance.

    Returns:
      the guided network, as samplers take it: `(x_t, timesteps) -> output`.

    Raises:
      ValueError: a label is outside [0, null_label], or s below 0 (both checked where their values are known).

    Ho & Salimans 2022, eq. 6; in an interval: Kynkaanniemi et al. 2024, eq. 6.
    """
    check_labels(labels, null_label)
    known = concrete(guidance_scale)
    if known is not None and not (known >= 0).all():
        raise ValueError(f"guidance_scale={guidance_scale} must be at least 0: 1 is no guidance")
    # Known to be 1 when the network is made: half the work.
    if known is not None and known.ndim == 0 and known == 1:
        return with_labels(predict, labels)
    # Not `full_like`, which does not lie where the labels lie on a mesh with explicit axes.
    both_labels = jnp.concatenate([labels, labels - labels + null_label])

    def predict_guided(x_t: Array, t: Array) -> Array:
        both = predict(jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]), both_labels)
        conditional, unconditional = jnp.split(both, 2)
        conditional_mean, second_half = split_output(conditional, variance=variance)
        unconditional_mean, _ = split_output(unconditional, variance=variance)
        scale = typing.cast(Array, guidance_scale)
        if timesteps is not None:
            first, last = timesteps
            scale = jnp.where((first <= t) & (t <= last), jnp.asarray(scale, jnp.float32), jnp.float32(1))
        if jnp.ndim(scale):
            scale = per_image(jnp.asarray(scale), conditional_mean)
        mean = scale * conditional_mean - (scale - 1) * unconditional_mean
        return mean if second_half is None else jnp.concatenate([mean, second_half], axis=-1)

    return predict_guided


def timesteps_between(betas: ArrayLike, low: float, high: float) -> tuple[int, int]:
    r"""Returns the first and last timestep whose noise level is in an interval.

    .. math:: \mathrm{low} < \sigma_t \le \mathrm{high}, \quad
              \sigma_t = \sqrt{(1 - \bar\alpha_t) / \bar\alpha_t}

    Args:
      betas: (T,), of the schedule that the network was trained with.
      low: the lower noise level, >= 0, in units of the images ([-1, 1]).
      high: the upper one.

    Raises:
      ValueError: no timestep is in the interval.

    Kynkaanniemi et al. 2024 (Applying guidance in a limited interval), sec. 3.

    >>> from ddpm_jax.schedules import make_betas
    >>> timesteps_between(make_betas("linear", 1000), 0.3, 5.0)
    (88, 565)
    """
    alphas_bar = np.cumprod(1 - numbers(betas))
    with np.errstate(divide="ignore"):
        sigma = np.sqrt((1 - alphas_bar) / alphas_bar)
    inside = np.flatnonzero((low < sigma) & (sigma <= high))
    if not inside.size:
        raise ValueError(
            f"no timestep has a noise level above {low:g} and up to {high:g}: those of this schedule are "
            f"{sigma[0]:.3g} to {sigma[-1]:.3g}"
        )
    return int(inside[0]), int(inside[-1])
