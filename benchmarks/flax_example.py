"""The network of the digits example in Flax's documentation, written from its description, for comparisons.

https://flax.readthedocs.io/en/latest/examples/digits_diffusion_model.html: a U-Net of four levels and a bridge, with
flow matching, in NNX. The example has 64 features and generates the digit 2 alone.
"""

import jax
import jax.numpy as jnp
from flax import nnx

_LEVELS, _EMBEDDING = 4, 128


class Block(nnx.Module):
    """Convolution, layer norm, GELU, twice, beside a 1 x 1 convolution."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        self.convolutions = nnx.List([nnx.Conv(each, outputs, (3, 3), rngs=rngs) for each in (inputs, outputs)])
        self.norms = nnx.List([nnx.LayerNorm(outputs, rngs=rngs) for _ in range(2)])
        self.shortcut = nnx.Conv(inputs, outputs, (1, 1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = x
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            h = nnx.gelu(norm(convolution(h)))
        return h + self.shortcut(x)


class Network(nnx.Module):
    """Four levels, attention in the two lower ones and in the bridge; the time is added after each level."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        sizes = [features << level for level in range(_LEVELS)]
        bridge = 2 * sizes[-1]
        self.dense = nnx.List([nnx.Linear(_EMBEDDING, _EMBEDDING, rngs=rngs) for _ in range(2)])
        self.times = nnx.List([nnx.Linear(_EMBEDDING, size, rngs=rngs) for size in sizes])
        self.down = nnx.List([Block(a, b, rngs) for a, b in zip([1, *sizes], sizes, strict=False)])
        attended = [*sizes[2:], bridge]
        self.attention = nnx.List(
            [nnx.MultiHeadAttention(num_heads=1, in_features=size, decode=False, rngs=rngs) for size in attended]
        )
        self.bridge = nnx.List([Block(sizes[-1], bridge, rngs), Block(bridge, bridge, rngs)])
        below = [bridge, *reversed(sizes)]
        self.up = nnx.List([Block(a + b, b, rngs) for a, b in zip(below, below[1:], strict=False)])
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.out = nnx.Conv(features, 1, (3, 3), rngs=rngs)

    def _attend(self, x: jax.Array, number: int) -> jax.Array:
        flat = x.reshape(len(x), -1, x.shape[-1])
        return x + self.attention[number](flat).reshape(x.shape)

    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """Returns the velocity at images (B, 8, 8, 1) and times (B,) in [0, 1]."""
        pool = lambda x: nnx.max_pool(x, (2, 2), strides=(2, 2), padding="SAME")
        rates = 10000.0 ** -(jnp.arange(_EMBEDDING // 2) / (_EMBEDDING // 2 - 1))
        angles = 1000 * t[:, None] * rates[None]
        time = self.dense[1](nnx.gelu(self.dense[0](jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1))))
        skips: list[jax.Array] = []
        for level in range(_LEVELS):
            h = self.down[level](pool(skips[-1]) if skips else x)
            h = self._attend(h, level - 2) if level >= 2 else h
            skips.append(h + self.times[level](time)[:, None, None])
        h = self.bridge[1](self._attend(self.bridge[0](pool(skips[-1])), 2))
        for block in self.up:
            skip = skips.pop()
            h = jax.image.resize(h, (*skip.shape[:3], h.shape[-1]), "nearest")
            h = block(jnp.concatenate([h, skip], axis=-1))
        return self.out(nnx.gelu(self.norm(h)))


def flow_matching_loss(network: Network, x1: jax.Array, t: jax.Array, x0: jax.Array) -> jax.Array:
    """Returns the mean squared error of the velocity from noise x0 to images x1, at times t, (B,), in [0, 1]."""
    mixed = t[:, None, None, None]
    return jnp.mean((network((1 - mixed) * x0 + mixed * x1, t) - (x1 - x0)) ** 2)
