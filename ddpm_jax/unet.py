"""The U-Net of the paper in Flax Linen (Ho et al. 2020, app. B), as its code builds it.

Parameters are named as in the released TensorFlow checkpoints, with `_` for the `/` between a level and its parts.
"""

import itertools
import math
import typing
from collections.abc import Sequence

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from ddpm_jax import keys as per_image_keys

Params = typing.Any
"""A pytree of arrays: the parameters of a network."""


def _init(scale: float) -> nn.initializers.Initializer:
    return nn.initializers.variance_scaling(scale, "fan_avg", "uniform")


# The original asks for scale 0 in the last layer of each residual branch and of the network, and its initializer
# makes 1e-10 of it: the untrained network says (almost) 0, and L_simple starts at 1.
_DEFAULT, _NEAR_ZERO = _init(1.0), _init(1e-10)


def time_embedding(t: Array, dim: int) -> Array:
    r"""Embeds times as sines and cosines of geometrically spaced frequencies.

    .. math:: e = [\sin(t f_0), .., \sin(t f_{h-1}), \cos(t f_0), .., \cos(t f_{h-1})], \quad
              f_k = 10000^{-k / (h - 1)}, \quad h = \lfloor \mathrm{dim} / 2 \rfloor

    Args:
      t: 0-based times, (B,) int32.
      dim: the size of the embedding, >= 4, static.

    Returns:
      (B, dim) float32; the last column is 0 if `dim` is odd.

    Ho et al. 2020, app. B; Vaswani et al. 2017, sec. 3.5; the original code's order and its h - 1.
    """
    chex.assert_rank(t, 1)
    half = dim // 2
    frequencies = jnp.exp(jnp.arange(half, dtype=jnp.float32) * (-math.log(10000) / (half - 1)))
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    embedding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
    return jnp.pad(embedding, [(0, 0), (0, dim % 2)])


def dropout(x: Array, keys: Array | None, rate: float) -> Array:
    """Drops elements with probability `rate`, each image from its own key, and scales up the others.

    Args:
      x: (B, H, W, C).
      keys: (B,) typed keys; None for a network that is not being trained.
      rate: in [0, 1), static.

    Returns:
      shaped as `x`; `x` itself without keys or at rate 0.
    """
    if keys is None or rate == 0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def _upsample(x: Array) -> Array:
    """Repeats every pixel twice in both directions."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


class ResnetBlock(nn.Module):
    """Norm, swish, convolution, twice, with the time added between and the input added at the end."""

    channels: int
    num_groups: int
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, embedding: Array, dropout_keys: Array | None) -> Array:
        h = nn.swish(_norm(self, "norm1")(x))
        h = _conv(self, self.channels, "conv1")(h)
        h += nn.Dense(self.channels, kernel_init=_DEFAULT, dtype=self.dtype, name="temb_proj")(nn.swish(embedding))[
            :, None, None, :
        ]
        h = nn.swish(_norm(self, "norm2")(h))
        h = dropout(h, dropout_keys, self.dropout)
        h = _conv(self, self.channels, "conv2", init=_NEAR_ZERO)(h)
        if x.shape[-1] != self.channels:
            x = nn.Dense(self.channels, kernel_init=_DEFAULT, dtype=self.dtype, name="nin_shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Self-attention over all pixels, added to its input."""

    num_heads: int
    num_groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, height, width, channels = x.shape
        h = _norm(self, "norm")(x).reshape(batch, height * width, channels)
        shape = (batch, height * width, self.num_heads, channels // self.num_heads)
        q, k, v = (
            nn.Dense(channels, kernel_init=_DEFAULT, dtype=self.dtype, name=name)(h).reshape(shape) for name in "qkv"
        )
        logits = jnp.einsum("bqhc,bkhc->bhqk", q, k) * shape[-1] ** -0.5
        weights = nn.softmax(logits.astype(jnp.float32), axis=-1).astype(self.dtype)
        h = jnp.einsum("bhqk,bkhc->bqhc", weights, v).reshape(x.shape)
        return x + nn.Dense(channels, kernel_init=_NEAR_ZERO, dtype=self.dtype, name="proj_out")(h)


def _norm(block: "ResnetBlock | AttentionBlock | UNet", name: str) -> nn.GroupNorm:
    # The two-pass variance is the original's; the fast one, E[x^2] - E[x]^2, loses digits.
    return nn.GroupNorm(block.num_groups, epsilon=1e-6, use_fast_variance=False, dtype=block.dtype, name=name)


def _conv(
    block: "ResnetBlock | UNet",
    channels: int,
    name: str,
    *,
    strides: int = 1,
    init: nn.initializers.Initializer = _DEFAULT,
) -> nn.Conv:
    # At stride 2 "SAME" pads nothing at the top and left and one zero at the bottom and right, as TensorFlow does.
    return nn.Conv(channels, (3, 3), strides=strides, padding="SAME", kernel_init=init, dtype=block.dtype, name=name)


class UNet(nn.Module):
    """The network of the paper: x_t and t to what it predicts of them.

    Apply it as `unet.apply({"params": params}, x_t, t)`; with `dropout_keys` when it is being trained. Level l has
    the resolution H / 2^l x W / 2^l and `width * channel_mult[l]` channels.
    """

    width: int = 128
    """Channels of the first level; also the size of the sinusoidal embedding."""
    channel_mult: Sequence[int] = (1, 2, 2, 2)
    """Channels of each level, in units of `width`."""
    num_res_blocks: int = 2
    """Residual blocks of each level on the way down; one more on the way up."""
    attention_resolutions: Sequence[int] = (16,)
    """Heights of the levels whose blocks are followed by attention; the middle always has it."""
    num_heads: int = 1
    """Attention heads."""
    dropout: float = 0.1
    """Rate of the dropout in each residual block."""
    out_channels: int = 3
    """Channels of the output: those of the image, or twice as many for a learned variance."""
    num_groups: int = 32
    """Groups of each group normalization; must divide every level's channels."""
    num_classes: int = 0
    """Classes that the network can be told of; 0: none."""
    dtype: DTypeLike = jnp.float32
    """Type of the computation; parameters, statistics, softmax and output stay float32."""
    remat: bool = False
    """Whether each block is computed a second time for its gradient, instead of what is in it kept."""

    @nn.compact
    def __call__(self, x: Array, t: Array, labels: Array | None = None, *, dropout_keys: Array | None = None) -> Array:
        r"""Predicts.

        Args:
          x: x_t, (B, H, W, C), H and W divisible by 2^(levels - 1).
          t: 0-based times, (B,) int32.
          labels: (B,) int32, each in [0, num_classes], where num_classes itself says "not told"; None for an
            unconditional network, and for a conditional one that is told nothing.
          dropout_keys: (B,) typed keys, one an image; None to sample or evaluate, without dropout.

        Returns:
          (B, H, W, out_channels) float32.

        Raises:
          ValueError: H or W, the groups or the heads do not divide what they must; labels for an unconditional network.

        Ho et al. 2020, app. B, and its code (`models/unet.py`); labels: Nichol & Dhariwal 2021, its code.
        """
        chex.assert_rank(x, 4)
        chex.assert_shape(t, x.shape[:1])
        check_unet(self, x.shape[1:3])
        levels = len(self.channel_mult)
        block_indices = itertools.count()
        resnet_block, attention_block = ResnetBlock, AttentionBlock
        if self.remat:
            resnet_block, attention_block = nn.remat(ResnetBlock), nn.remat(AttentionBlock)

        def resnet(h: Array, channels: int, name: str) -> Array:
            index = next(block_indices)
            keys = None if dropout_keys is None else per_image_keys.fold(dropout_keys, index)
            return resnet_block(channels, self.num_groups, self.dropout, self.dtype, name=name)(h, embedding, keys)

        def attention(h: Array, name: str) -> Array:
            return attention_block(self.num_heads, self.num_groups, self.dtype, name=name)(h)

        embedding = time_embedding(t, self.width)
        embedding = nn.Dense(4 * self.width, kernel_init=_DEFAULT, dtype=self.dtype, name="temb_dense0")(embedding)
        embedding = nn.Dense(4 * self.width, kernel_init=_DEFAULT, dtype=self.dtype, name="temb_dense1")(
            nn.swish(embedding)
        )
        if self.num_classes:
            told = jnp.full_like(t, self.num_classes) if labels is None else labels
            classes = nn.Embed(self.num_classes + 1, 4 * self.width, dtype=self.dtype, name="class_embedding")
            embedding += classes(told)
        elif labels is not None:
            raise ValueError("labels were given to an unconditional network (num_classes is 0)")

        h = _conv(self, self.width, "conv_in")(x)
        skips = [h]
        for level, multiplier in enumerate(self.channel_mult):
            for block in range(self.num_res_blocks):
                h = resnet(h, self.width * multiplier, f"down_{level}_block_{block}")
                if h.shape[1] in self.attention_resolutions:
                    h = attention(h, f"down_{level}_attn_{block}")
                skips.append(h)
            if level < levels - 1:
                h = _conv(self, self.width * multiplier, f"down_{level}_downsample", strides=2)(h)
                skips.append(h)

        h = resnet(h, h.shape[-1], "mid_block_1")
        h = attention(h, "mid_attn_1")
        h = resnet(h, h.shape[-1], "mid_block_2")

        for level, multiplier in reversed(list(enumerate(self.channel_mult))):
            for block in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = resnet(h, self.width * multiplier, f"up_{level}_block_{block}")
                if h.shape[1] in self.attention_resolutions:
                    h = attention(h, f"up_{level}_attn_{block}")
            if level > 0:
                h = _conv(self, self.width * multiplier, f"up_{level}_upsample")(_upsample(h))

        h = nn.swish(_norm(self, "norm_out")(h))
        return _conv(self, self.out_channels, "conv_out", init=_NEAR_ZERO)(h).astype(jnp.float32)


def check_unet(unet: UNet, image_size: Sequence[int]) -> None:
    """Checks that a U-Net fits images of (H, W).

    Raises:
      ValueError: H or W, the groups or the heads do not divide what they must; says which, and what would.
    """
    if unet.width < 4:
        raise ValueError(f"model width {unet.width} is too small: the time embedding needs at least 4")
    stride = 2 ** (len(unet.channel_mult) - 1)
    for side, size in zip(("height", "width"), image_size, strict=True):
        if size % stride:
            below = size // stride * stride
            nearest = f"{below} or {below + stride}" if below else f"{stride}"
            raise ValueError(
                f"image {side} {size} is not divisible by {stride}, as {len(unet.channel_mult)} levels need: "
                f"use {nearest}, or fewer model channel_mult"
            )
    for multiplier in unet.channel_mult:
        channels = unet.width * multiplier
        for what, divisor in (("groups", unet.num_groups), ("heads", unet.num_heads)):
            if channels % divisor:
                raise ValueError(
                    f"{channels} channels (width {unet.width} x multiplier {multiplier}) are not divisible by "
                    f"{divisor} {what}: use model {what} {math.gcd(channels, divisor)}, or another width"
                )
