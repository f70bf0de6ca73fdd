"""Your own network, in Flax Linen, in Flax NNX, or as plain functions:

    python train.py --model.network examples/own_network.py:make_network --workdir runs/own

Sampling and evaluation need nothing more: the run's folder keeps a copy of this file (`python sample.py runs/own`).
The function gets the run's whole configuration. It returns a Linen module or a `Network`, which maps x_t, (B, H, W, C)
in about [-1, 1], and t, (B,) in 0 .. T-1, to the prediction (by default of the noise), float32 shaped as x_t.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from ddpm_jax import Network, conv_general_dilated, from_nnx, time_embedding

# Its gradients are fast on CPUs in loops too, as with --train.grad-accum-steps.
Conv = functools.partial(nn.Conv, kernel_size=(3, 3), conv_general_dilated=conv_general_dilated)


class ConvNet(nn.Module):
    """Residual convolutions at one resolution."""

    width: int
    num_blocks: int
    channels: int
    num_classes: int = 0

    @nn.compact
    def __call__(self, x_t, t, labels=None):
        embedding = nn.Dense(self.width)(time_embedding(t, self.width))
        if self.num_classes:  # label num_classes stands for "no label", which classifier-free guidance needs
            labels = jnp.full_like(t, self.num_classes) if labels is None else labels
            embedding += nn.Embed(self.num_classes + 1, self.width)(labels)
        h = Conv(self.width)(x_t)
        for _ in range(self.num_blocks):
            update = Conv(self.width)(nn.swish(nn.GroupNorm(4)(h)))
            update += nn.Dense(self.width)(nn.swish(embedding))[:, None, None]
            h += Conv(self.width)(nn.swish(nn.GroupNorm(4)(update)))
        return Conv(self.channels, kernel_init=nn.initializers.zeros)(nn.swish(h))


def make_network(config):
    """Returns a Linen module; the fields of the configuration may mean what you like."""
    return ConvNet(config.model.width, 4, config.data.channels, config.model.num_classes)


class Mlp(nnx.Module):
    """Sees all pixels of a small image at once."""

    def __init__(self, shape, width, rngs):
        size = shape[0] * shape[1] * shape[2]
        self.embed = nnx.Linear(32, width, rngs=rngs)
        self.inside = nnx.Linear(size, width, rngs=rngs)
        self.hidden = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(3)])
        self.outside = nnx.Linear(width, size, rngs=rngs)

    def __call__(self, x_t, t):
        h = self.inside(x_t.reshape(len(x_t), -1)) + self.embed(time_embedding(t, 32))
        for layer in self.hidden:
            h += layer(nnx.swish(h))
        return self.outside(h).reshape(x_t.shape)


def make_nnx_network(config):
    """Returns a network of an NNX model."""
    shape = config.data.height, config.data.width, config.data.channels
    return from_nnx(lambda rngs: Mlp(shape, 8 * config.model.width, rngs))


def make_plain_network(config):
    """Returns a network of two functions: the optimal linear predictor has this form, pixel by pixel."""
    shape = config.diffusion.num_steps, config.data.height, config.data.width, config.data.channels

    def init(key):
        return {"scale": 0.1 * jax.random.normal(key, shape), "offset": jnp.zeros(shape)}

    def apply(params, x_t, t, labels=None, *, dropout_keys=None):
        return params["scale"][t] * x_t + params["offset"][t]

    return Network(init, apply)
