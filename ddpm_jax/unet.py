"""The U-Net of the paper in Flax Linen (Ho et al. 2020, app. B), built as in the original code.

Parameter names are those of the released TensorFlow checkpoints, with `_` instead of `/` between a level and its parts.
"""

import itertools
import math
import typing
from collections.abc import Callable, Sequence
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from ddpm_jax import keys as per_image_keys
from ddpm_jax.convolution import conv_general_dilated, convolve_doubled, double
from ddpm_jax.forward import as_floats
from ddpm_jax.guidance import check_labels


def _init(scale: float) -> nn.initializers.Initializer:
    return nn.initializers.variance_scaling(scale, "fan_avg", "uniform")


# The original requests scale 0 for the last layer of each residual branch and of the network, and its initializer
# replaces 0 by 1e-10: the untrained network outputs (almost) 0, and L_simple starts at 1.
_DEFAULT, _NEAR_ZERO = _init(1.0), _init(1e-10)


def time_embedding(
    t: Array, dim: int, *, freq_shift: int = 1, cos_first: bool = False, timestep_scale: float = 1.0
) -> Array:
    r"""Embeds timesteps as sines and cosines of geometrically spaced frequencies.

    .. math:: e = [\sin(r t f_0), .., \sin(r t f_{h-1}), \cos(r t f_0), .., \cos(r t f_{h-1})], \quad
              f_k = 10000^{-k / (h - s)}, \quad h = \lfloor \mathrm{dim} / 2 \rfloor

    Args:
      t: 0-based timesteps, (B,) int32.
      dim: embedding size, >= 4, static.
      freq_shift: s, in [0, h): at 1 the lowest frequency is 1/10000, at 0 it is a little higher.
      cos_first: whether the cosines come before the sines.
      timestep_scale: r, a number; 1000 / T makes the timesteps of any T range over those of T = 1000.

    Returns:
      (B, dim) float32; the last column is 0 if `dim` is odd.

    Ho et al. 2020, app. B; Vaswani et al. 2017, sec. 3.5; the defaults follow the original code. Improved DDPM has the
    cosines first, s = 0 and r = 1000 / T.
    """
    chex.assert_rank(t, 1)
    half = dim // 2
    frequencies = jnp.exp(jnp.arange(half, dtype=jnp.float32) * (-math.log(10000) / (half - freq_shift)))
    t = t.astype(jnp.float32) * timestep_scale
    angles = t[:, None] * frequencies[None, :]
    waves = [jnp.cos(angles), jnp.sin(angles)] if cos_first else [jnp.sin(angles), jnp.cos(angles)]
    embedding = jnp.concatenate(waves, axis=1)
    return jnp.pad(embedding, [(0, 0), (0, dim % 2)])


def dropout(x: Array, keys: Array | None, rate: float) -> Array:
    """Zeroes elements with probability `rate`, using one key per image, and scales the others up.

    Args:
      x: (B, H, W, C).
      keys: (B,) keys, or one for the batch; None outside of training.
      rate: in [0, 1), static.

    Returns:
      An array of the same shape; `x` itself without keys or at rate 0.
    """
    if keys is None or rate == 0:
        return x
    keys = per_image_keys.for_batch(keys, x)
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def _embed(classes: nn.Embed, labels: Array) -> Array:
    # As `classes(labels)`, which does not say where its result lies, as a mesh with explicit axes needs.
    table, sharding = classes.embedding.astype(classes.dtype), jax.typeof(labels).sharding
    out_sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec, None))
    return table.at[labels].get(mode="fill", fill_value=jnp.nan, out_sharding=out_sharding)


def _downsample(x: Array) -> Array:
    """Averages blocks of 2 x 2 pixels."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width, channels).mean(2)
    return x.reshape(batch, height // 2, width // 2, 2, channels).mean(3)


_RESAMPLE = {"": lambda x: x, "down": _downsample, "up": double}


class ResnetBlock(nn.Module):
    """Norm, swish, convolution, twice; the timestep embedding is added in between, and the input at the end.

    Two variants are not the paper's: the embedding can scale and shift the second norm's output (Nichol & Dhariwal
    2021, sec. 3.2), and the block can halve or double the resolution (Dhariwal & Nichol 2021, sec. 3).
    """

    channels: int
    num_groups: int
    dropout: float
    dtype: DTypeLike
    norm_eps: float = 1e-6
    scale_shift_norm: bool = False
    resample: typing.Literal["", "down", "up"] = ""

    @nn.compact
    def __call__(self, x: Array, embedding: Array, dropout_keys: Array | None) -> Array:
        resample, norm2 = _RESAMPLE[self.resample], _norm(self, "norm2")
        h = nn.swish(_norm(self, "norm1")(x))
        h, x = resample(h), resample(x)
        h = _conv(self, self.channels, "conv1")(h)
        features = self.channels * (2 if self.scale_shift_norm else 1)
        projected = nn.Dense(features, kernel_init=_DEFAULT, dtype=self.dtype, name="temb_proj")(nn.swish(embedding))
        projected = projected[:, None, None, :]
        if self.scale_shift_norm:
            scale, shift = jnp.split(projected, 2, axis=-1)
            h = norm2(h) * (1 + scale) + shift
        else:
            h = norm2(h + projected)
        h = nn.swish(h)
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
    norm_eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, height, width, channels = x.shape
        h = _norm(self, "norm")(x).reshape(batch, height * width, channels)
        q, k, v = (
            nn.Dense(channels, kernel_init=_DEFAULT, dtype=self.dtype, name=name)(h)
            .reshape(batch, height * width, self.num_heads, channels // self.num_heads)
            .swapaxes(1, 2)  # heads first: with one head, nothing moves
            for name in "qkv"
        )
        logits = jnp.einsum("bhqc,bhkc->bhqk", q * q.shape[-1] ** -0.5, k).astype(jnp.float32)
        # A softmax whose sum divides the (smaller) result.
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
        h = jnp.einsum("bhqk,bhkc->bhqc", weights.astype(self.dtype), v)
        h = (h.astype(jnp.float32) / weights.sum(-1, keepdims=True)).astype(self.dtype)
        h = h.swapaxes(1, 2).reshape(batch, height * width, channels).reshape(x.shape)
        return x + nn.Dense(channels, kernel_init=_NEAR_ZERO, dtype=self.dtype, name="proj_out")(h)


class GroupNorm(nn.Module):
    """Normalizes each image's groups of channels to mean 0 and variance 1, then scales and shifts every channel."""

    num_groups: int
    epsilon: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        x = x.astype(jnp.float32)
        # Two-pass variance, as in the original; the fast one, E[x^2] - E[x]^2, loses precision.
        x -= self._mean(x)
        multiplier = jax.lax.rsqrt(self._mean(jnp.square(x)) + self.epsilon) * scale.reshape(1, 1, 1, channels)
        return (x * multiplier + bias.reshape(1, 1, 1, channels)).astype(self.dtype)

    def _mean(self, x: Array) -> Array:
        # Over pixels first: XLA transposes images that are reshaped into groups, which takes longer on CPUs.
        batch, height, width, channels = x.shape
        means = x.reshape(batch, height * width, channels).mean(1).reshape(batch, self.num_groups, -1)
        means = jnp.broadcast_to(means.mean(2, keepdims=True), means.shape).reshape(batch, channels)
        return means[:, None, None, :]


def _norm(block: "ResnetBlock | AttentionBlock | UNet", name: str) -> GroupNorm:
    return GroupNorm(block.num_groups, block.norm_eps, block.dtype, name=name)


def _convolve_doubled(x: Array, kernel: Array, *args: Any, **options: Any) -> Array:
    return convolve_doubled(x, kernel)


def _conv(
    block: "ResnetBlock | UNet",
    channels: int,
    name: str,
    *,
    strides: int = 1,
    padding: str | int = "SAME",
    init: nn.initializers.Initializer = _DEFAULT,
    convolution: Callable[..., Array] = conv_general_dilated,
) -> nn.Conv:
    # At stride 2, "SAME" pads one row and column of zeros, at the bottom and right only, as TensorFlow does.
    return nn.Conv(
        channels,
        (3, 3),
        strides=strides,
        padding=padding,
        kernel_init=init,
        dtype=block.dtype,
        conv_general_dilated=convolution,
        name=name,
    )


class UNet(nn.Module):
    """The network of the paper: maps x_t and t to its prediction.

    Apply it as `unet.apply({"params": params}, x_t, t)`, with `dropout_keys` during training. Level l has
    resolution H / 2^l x W / 2^l and `width * channel_mult[l]` channels.
    """

    width: int = 128
    """Channels of the first level; also the size of the sinusoidal embedding, if `embed_channels` is 0."""
    channel_mult: Sequence[int] = (1, 2, 2, 2)
    """Channels of each level, in units of `width`."""
    num_res_blocks: int = 2
    """Residual blocks per level on the way down; one more on the way up."""
    attention_resolutions: Sequence[int] = (16,)
    """Heights of the levels whose blocks are followed by attention."""
    mid_attention: bool = True
    """Whether the middle block has attention."""
    num_heads: int = 1
    """Attention heads, the same number at every level."""
    num_head_channels: int = 0
    """Channels of each attention head, so that wider levels have more heads; 0: `num_heads` heads."""
    dropout: float = 0.1
    """Dropout rate in each residual block."""
    out_channels: int = 3
    """Output channels: as many as the image has, or twice as many for a learned variance."""
    num_groups: int = 32
    """Groups of each group normalization; must divide the channels of every level."""
    norm_eps: float = 1e-6
    """Added to the variance in each group normalization."""
    symmetric_downsampling: bool = False
    """Whether a downsampling convolution pads its input by a row and column of zeros on every side, as in PyTorch; else
    at the bottom and right only, as in TensorFlow."""
    freq_shift: int = 1
    """Shift of the frequencies of the timestep embedding, see `time_embedding`."""
    cos_first: bool = False
    """Whether the cosines of the timestep embedding come before the sines."""
    timestep_scale: float = 1.0
    """Factor of the timesteps before their embedding."""
    embed_channels: int = 0
    """Size of the sinusoidal embedding; 0: `width`."""
    scale_shift_norm: bool = False
    """Whether the timestep embedding scales and shifts the second norm's output in each residual block; else it is
    added before that norm."""
    resblock_updown: bool = False
    """Whether residual blocks change the resolution between levels, instead of convolutions."""
    num_classes: int = 0
    """Number of classes of a class-conditional network; 0: unconditional."""
    dtype: DTypeLike = jnp.float32
    """Type of the computation; parameters, statistics, softmax and output stay float32."""
    remat: bool = False
    """Whether to recompute each block in the backward pass instead of storing its activations."""

    @nn.compact
    def __call__(self, x: Array, t: Array, labels: Array | None = None, *, dropout_keys: Array | None = None) -> Array:
        r"""Computes the prediction for a batch.

        Args:
          x: x_t, (B, H, W, C), H and W divisible by 2^(levels - 1).
          t: 0-based timesteps, (B,) int32.
          labels: (B,) int32 class labels in [0, num_classes], where num_classes itself means "no label"; None for an
            unconditional network, or for unconditional predictions of a conditional one.
          dropout_keys: (B,) keys, one per image, or one key for the batch, which can also be given to `apply` as
            `rngs={"dropout": key}`. Without keys there is no dropout, for sampling and evaluation.

        Returns:
          (B, H, W, out_channels) float32.

        Raises:
          TypeError: `x` is not of floats, or labels not of integers.
          ValueError: H or W is not divisible by the strides, or a channel count by the groups or heads; labels were
            passed to an unconditional network; dropout keys were given in both ways; or a label is outside
            [0, num_classes] (checked outside of `jit`; inside, -1 is read as "no label" and larger ones give NaN).

        Ho et al. 2020, app. B, and its code (`models/unet.py`); labels as in the code of Nichol & Dhariwal 2021.
        """
        if x.ndim != 4:
            raise ValueError(f"the U-Net takes images (B, H, W, C), not an array of shape {x.shape}")
        as_floats(x, "x")  # refuses pixels; what is computed in is `dtype`
        chex.assert_shape(t, x.shape[:1])
        check_unet(self, x.shape[1:3])
        if self.has_rng("dropout"):
            if dropout_keys is not None:
                raise ValueError('dropout keys were given twice: as dropout_keys and as rngs={"dropout": key}')
            dropout_keys = self.make_rng("dropout")
        if dropout_keys is not None:
            dropout_keys = per_image_keys.for_batch(dropout_keys, x)
        levels = len(self.channel_mult)
        block_indices = itertools.count()
        resnet_block, attention_block = ResnetBlock, AttentionBlock
        if self.remat:
            resnet_block, attention_block = nn.remat(ResnetBlock), nn.remat(AttentionBlock)

        def resnet(h: Array, channels: int, name: str, resample: typing.Literal["", "down", "up"] = "") -> Array:
            index = next(block_indices)
            keys = None if dropout_keys is None else per_image_keys.fold(dropout_keys, index)
            block = resnet_block(
                channels,
                self.num_groups,
                self.dropout,
                self.dtype,
                self.norm_eps,
                self.scale_shift_norm,
                resample,
                name=name,
            )
            return block(h, embedding, keys)

        def attention(h: Array, name: str) -> Array:
            num_heads = h.shape[-1] // self.num_head_channels if self.num_head_channels else self.num_heads
            return attention_block(num_heads, self.num_groups, self.dtype, self.norm_eps, name=name)(h)

        embed_channels = self.embed_channels or self.width
        embedding = time_embedding(
            t,
            embed_channels,
            freq_shift=self.freq_shift,
            cos_first=self.cos_first,
            timestep_scale=self.timestep_scale,
        )
        embedding = nn.Dense(4 * embed_channels, kernel_init=_DEFAULT, dtype=self.dtype, name="temb_dense0")(embedding)
        embedding = nn.Dense(4 * embed_channels, kernel_init=_DEFAULT, dtype=self.dtype, name="temb_dense1")(
            nn.swish(embedding)
        )
        if self.num_classes:
            labels = jnp.full_like(t, self.num_classes) if labels is None else labels
            check_labels(labels, self.num_classes)
            classes = nn.Embed(self.num_classes + 1, 4 * embed_channels, dtype=self.dtype, name="class_embedding")
            embedding += _embed(classes, labels)
        elif labels is not None:
            raise ValueError("labels were passed to an unconditional network (num_classes is 0)")

        h = _conv(self, self.width, "conv_in")(x)
        skips = [h]
        for level, multiplier in enumerate(self.channel_mult):
            for block in range(self.num_res_blocks):
                h = resnet(h, self.width * multiplier, f"down_{level}_block_{block}")
                if h.shape[1] in self.attention_resolutions:
                    h = attention(h, f"down_{level}_attn_{block}")
                skips.append(h)
            if level < levels - 1:
                channels, name = self.width * multiplier, f"down_{level}_downsample"
                padding = 1 if self.symmetric_downsampling else "SAME"
                if self.resblock_updown:
                    h = resnet(h, channels, name, "down")
                else:
                    h = _conv(self, channels, name, strides=2, padding=padding)(h)
                skips.append(h)

        h = resnet(h, h.shape[-1], "mid_block_1")
        if self.mid_attention:
            h = attention(h, "mid_attn_1")
        h = resnet(h, h.shape[-1], "mid_block_2")

        for level, multiplier in reversed(list(enumerate(self.channel_mult))):
            for block in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = resnet(h, self.width * multiplier, f"up_{level}_block_{block}")
                if h.shape[1] in self.attention_resolutions:
                    h = attention(h, f"up_{level}_attn_{block}")
            if level > 0:
                channels, name = self.width * multiplier, f"up_{level}_upsample"
                h = (
                    resnet(h, channels, name, "up")
                    if self.resblock_updown
                    else _conv(self, channels, name, convolution=_convolve_doubled)(h)
                )

        h = nn.swish(_norm(self, "norm_out")(h))
        return _conv(self, self.out_channels, "conv_out", init=_NEAR_ZERO)(h).astype(jnp.float32)


def check_unet(unet: UNet, image_size: Sequence[int]) -> None:
    """Checks that a U-Net fits images of size (H, W).

    Raises:
      ValueError: H or W is not divisible by the strides, or a channel count by the groups or heads; the message
        names a value that works.
    """
    size, field = (unet.embed_channels, "model.embed_channels") if unet.embed_channels else (unet.width, "model width")
    if size < 4:
        raise ValueError(f"{field} {size} is too small: the time embedding needs at least 4")
    if unet.freq_shift >= size // 2:
        raise ValueError(
            f"model.freq_shift {unet.freq_shift} must be less than {size // 2}, the number of frequencies of the time "
            f"embedding, half of {field}"
        )
    if unet.num_head_channels and unet.num_heads != 1:
        raise ValueError(
            f"model.num_heads {unet.num_heads} and model.num_head_channels {unet.num_head_channels} both set how many "
            "heads there are: leave the first at 1, or the second at 0"
        )
    levels = len(unet.channel_mult)
    stride = 2 ** (levels - 1)
    for side, size in zip(("height", "width"), image_size, strict=True):
        if size % stride:
            below = size // stride * stride
            nearest = f"{below} or {below + stride}" if below else f"{stride}"
            raise ValueError(
                f"image {side} {size} is not divisible by {stride}, as {levels} levels need: "
                f"use {nearest}, or fewer levels (model.channel_mult)"
            )
    for level, multiplier in enumerate(unet.channel_mult):
        channels = unet.width * multiplier
        divisors = [("groups", "num_groups", unet.num_groups), ("heads", "num_heads", unet.num_heads)]
        if image_size[0] >> level in unet.attention_resolutions or (unet.mid_attention and level == levels - 1):
            divisors.append(("channels per head", "num_head_channels", unet.num_head_channels or 1))
        for what, field, divisor in divisors:
            if channels % divisor:
                raise ValueError(
                    f"{channels} channels (width {unet.width} x multiplier {multiplier}) are not divisible by "
                    f"{divisor} {what}: use model.{field} {math.gcd(channels, divisor)}, or another width"
                )
