"""What a network is to everything around it."""

import typing
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from ddpm_jax.guidance import guided
from ddpm_jax.reverse import Predict, Variance
from ddpm_jax.unet import Params, UNet


def network(
    unet: UNet, params: Params, labels: Array | None, *, guidance_scale: float = 1.0, variance: Variance = "fixed_large"
) -> Predict:
    """Makes the network as the samplers see it, from parameters, and labels where it is conditional."""

    def predict(x_t: Array, t: Array, labels: Array | None = None) -> Array:
        return typing.cast(Array, unet.apply({"params": params}, x_t, t, labels))

    if labels is None:
        return predict
    return guided(predict, labels, null_label=unet.num_classes, guidance_scale=guidance_scale, variance=variance)


def init_params(key: Array, unet: UNet, image_shape: Sequence[int]) -> Params:
    """Draws the first parameters of a network for images of (H, W, C)."""
    return unet.init(key, jnp.zeros((1, *image_shape)), jnp.zeros((1,), jnp.int32))["params"]
