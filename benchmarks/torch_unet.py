"""The paper's U-Net in PyTorch, with the parameters of ours: what accelerators are compared on without diffusers.

Its modules are named as the parameters of `ddpm_jax.UNet` are, so that weights carry over by name.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ddpm_jax.unet import UNet


def embed(t: Tensor, dim: int) -> Tensor:
    """Embeds timesteps, (B,), as sines and cosines, (B, dim)."""
    half = dim // 2
    rates = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-np.log(10000) / (half - 1)))
    angles = t[:, None].float() * rates
    return functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


class Resnet(nn.Module):
    """Norm, swish, convolution, twice; the time comes in between, the input at the end."""

    def __init__(self, unet: UNet, inputs: int, outputs: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(unet.num_groups, inputs, eps=unet.norm_eps)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.temb_proj = nn.Linear(4 * unet.width, outputs)
        self.norm2 = nn.GroupNorm(unet.num_groups, outputs, eps=unet.norm_eps)
        self.dropout = nn.Dropout(unet.dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        # A 1 x 1 convolution; ours is a dense layer over the channels.
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        h = h + self.temb_proj(functional.silu(embedding))[:, :, None, None]
        h = self.conv2(self.dropout(functional.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class Attention(nn.Module):
    """Self-attention over all pixels, added to its input."""

    def __init__(self, unet: UNet, channels: int):
        super().__init__()
        self.heads = channels // unet.num_head_channels if unet.num_head_channels else unet.num_heads
        self.norm = nn.GroupNorm(unet.num_groups, channels, eps=unet.norm_eps)
        self.q, self.k, self.v, self.proj_out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        h = self.norm(x).flatten(2).transpose(1, 2)
        by_head = lambda y: y.reshape(batch, height * width, self.heads, -1).transpose(1, 2)
        h = functional.scaled_dot_product_attention(by_head(self.q(h)), by_head(self.k(h)), by_head(self.v(h)))
        h = self.proj_out(h.transpose(1, 2).reshape(batch, height * width, channels))
        return x + h.transpose(1, 2).reshape(x.shape)


class Downsample(nn.Conv2d):
    """A convolution of stride 2, which pads at the bottom and right, as TensorFlow does."""

    def __init__(self, channels: int, *, symmetric: bool):
        super().__init__(channels, channels, 3, stride=2)
        self.around = (1, 1, 1, 1) if symmetric else (0, 1, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.pad(x, self.around))


class TorchUNet(nn.Module):
    """The network that an unconditional `UNet` without scale-shift norms and residual resampling describes."""

    def __init__(self, unet: UNet, *, image_size: int, channels: int):
        super().__init__()
        odd = ("scale_shift_norm", "resblock_updown", "num_classes", "cos_first", "embed_channels")
        if any(getattr(unet, name) for name in odd) or unet.freq_shift != 1 or unet.timestep_scale != 1:
            raise ValueError(f"only the paper's network is written here, none with {', '.join(odd)}")
        self.unet, parts = unet, nn.ModuleDict()
        attended = lambda level: image_size >> level in unet.attention_resolutions
        sizes = [unet.width * multiplier for multiplier in unet.channel_mult]
        parts["temb_dense0"] = nn.Linear(unet.width, 4 * unet.width)
        parts["temb_dense1"] = nn.Linear(4 * unet.width, 4 * unet.width)
        parts["conv_in"] = nn.Conv2d(channels, unet.width, 3, padding=1)
        now, skips = unet.width, [unet.width]
        for level, size in enumerate(sizes):
            for block in range(unet.num_res_blocks):
                parts[f"down_{level}_block_{block}"], now = Resnet(unet, now, size), size
                if attended(level):
                    parts[f"down_{level}_attn_{block}"] = Attention(unet, size)
                skips.append(size)
            if level < len(sizes) - 1:
                parts[f"down_{level}_downsample"] = Downsample(size, symmetric=unet.symmetric_downsampling)
                skips.append(size)
        parts["mid_block_1"], parts["mid_block_2"] = Resnet(unet, now, now), Resnet(unet, now, now)
        if unet.mid_attention:
            parts["mid_attn_1"] = Attention(unet, now)
        for level, size in reversed(list(enumerate(sizes))):
            for block in range(unet.num_res_blocks + 1):
                parts[f"up_{level}_block_{block}"], now = Resnet(unet, now + skips.pop(), size), size
                if attended(level):
                    parts[f"up_{level}_attn_{block}"] = Attention(unet, size)
            if level > 0:
                parts[f"up_{level}_upsample"] = nn.Conv2d(size, size, 3, padding=1)
        parts["norm_out"] = nn.GroupNorm(unet.num_groups, now, eps=unet.norm_eps)
        parts["conv_out"] = nn.Conv2d(now, unet.out_channels, 3, padding=1)
        self.parts = parts

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Computes the prediction for a batch, (B, C, H, W) and (B,)."""
        unet, parts = self.unet, self.parts
        embedding = parts["temb_dense0"](embed(t, unet.width))
        embedding = parts["temb_dense1"](functional.silu(embedding))

        def block(h: Tensor, name: str, number: int) -> Tensor:
            h, attention = parts[f"{name}_block_{number}"](h, embedding), f"{name}_attn_{number}"
            return parts[attention](h) if attention in parts else h

        h = parts["conv_in"](x)
        skips = [h]
        for level in range(len(unet.channel_mult)):
            for number in range(unet.num_res_blocks):
                h = block(h, f"down_{level}", number)
                skips.append(h)
            if level < len(unet.channel_mult) - 1:
                h = parts[f"down_{level}_downsample"](h)
                skips.append(h)
        h = parts["mid_block_2"](block(h, "mid", 1), embedding)
        for level in reversed(range(len(unet.channel_mult))):
            for number in range(unet.num_res_blocks + 1):
                h = block(torch.cat([h, skips.pop()], dim=1), f"up_{level}", number)
            if level > 0:
                h = parts[f"up_{level}_upsample"](functional.interpolate(h, scale_factor=2, mode="nearest"))
        return parts["conv_out"](functional.silu(parts["norm_out"](h)))

    @torch.no_grad()
    def load(self, params: Mapping[str, Any]) -> None:
        """Copies the parameters of our network, which must be the same ones."""
        given = dict(_flat(params))
        for name, tensor in self.parts.named_parameters():
            path, _, last = name.rpartition(".")
            ours = (
                f"{path}.bias" if last == "bias" else next(n for n in (f"{path}.kernel", f"{path}.scale") if n in given)
            )
            array = given.pop(ours)
            if array.ndim == 4:
                array = array.transpose(3, 2, 0, 1)
            elif array.ndim == 2:
                array = array.T.reshape(tensor.shape)
            tensor.copy_(torch.from_numpy(np.array(array)))
        if given:
            raise ValueError(f"PyTorch's network has no {', '.join(given)}")


def _flat(params: Mapping[str, Any], prefix: str = "") -> Any:
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", np.asarray(value, np.float32)
