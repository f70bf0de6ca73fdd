"""The U-Nets of improved-diffusion and guided-diffusion (Nichol & Dhariwal 2021, Dhariwal & Nichol 2021)."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, LossConfig, ModelConfig, TrainConfig
from ddpm_jax.interop.flags import Flags, merge_flags
from ddpm_jax.interop.layouts import Converter, from_torch
from ddpm_jax.interop.pretrained import Pretrained
from ddpm_jax.networks import Params
from ddpm_jax.system.errors import UserError

_COMMON: Flags = {
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "attention_resolutions": "16,8",
    "dropout": 0.0,
    "class_cond": False,
    "use_scale_shift_norm": True,
    "learn_sigma": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "use_kl": False,
    "predict_xstart": False,
}
IMPROVED: Flags = _COMMON | {"sigma_small": False, "rescale_timesteps": True, "rescale_learned_sigmas": True}
"""Flags of improved-diffusion with their defaults."""
GUIDED: Flags = _COMMON | {
    "num_head_channels": -1,
    "channel_mult": "",
    "resblock_updown": False,
    "use_new_attention_order": False,
    "rescale_timesteps": False,
    "rescale_learned_sigmas": False,
}
"""Flags of guided-diffusion with their defaults."""
IGNORED = frozenset(
    {
        *("data_dir", "lr", "weight_decay", "lr_anneal_steps", "batch_size", "microbatch", "ema_rate"),
        *("log_interval", "save_interval", "resume_checkpoint", "use_fp16", "fp16_scale_growth"),
        *("schedule_sampler", "use_checkpoint", "clip_denoised", "num_samples", "use_ddim", "model_path"),
        *("timestep_respacing", "classifier_scale", "classifier_path", "classifier_depth"),
    }
)
"""Flags of how they train and sample."""

_SIZES = {
    (1, 2, 2, 2): 32,
    (1, 2, 3, 4): 64,
    (1, 1, 2, 3, 4): 128,
    (1, 1, 2, 2, 4, 4): 256,
    (0.5, 1, 1, 2, 2, 4, 4): 512,
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "temb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
}
_MOST_BLOCKS = 1000


def is_openai(arrays: Mapping[str, Any]) -> bool:
    """Returns whether arrays have the names of these programs."""
    return "time_embed.0.weight" in arrays


def read_openai(arrays: Mapping[str, np.ndarray], flags: Flags, *, name: str, guided: bool) -> Pretrained:
    """Converts the weights of a network of improved-diffusion or guided-diffusion.

    Args:
      arrays: its `state_dict`.
      flags: those of its MODEL_FLAGS and DIFFUSION_FLAGS that the weights do not show; they may name the others too.
      name: of the configuration.
      guided: whether guided-diffusion wrote it, whose defaults are different.

    Returns:
      the network.

    Raises:
      UserError: flags that are missing or contradict the weights, or arrays that no such network has.
    """
    if "label_emb.weight" in arrays and "out.2.weight" not in arrays:
        raise UserError("these are the weights of a classifier, not of a diffusion model")
    blocks = _Blocks(arrays)
    shown = blocks.flags(guided=guided)
    size = flags.get("image_size", _SIZES.get(blocks.channel_mult))
    if size is None:
        raise UserError(f"--flags: --image_size is needed for channel multipliers {blocks.channel_mult}")
    levels = ",".join(str(size >> level) for level in blocks.attention_levels)
    if "attention_resolutions" in flags:
        asked = sorted({int(each) for each in re.findall(r"\d+", flags["attention_resolutions"])}, reverse=True)
        # Resolutions that the network does not reach are of no effect, there as here.
        reached = [each for each in asked if each in {size >> level for level in range(len(blocks.channel_mult))}]
        flags = flags | {"attention_resolutions": ",".join(map(str, reached))}
    shown |= {"image_size": size, "attention_resolutions": levels}
    given = dict(flags)
    if given.pop("channel_mult", ""):
        shown["channel_mult"] = given["channel_mult"] = flags["channel_mult"]
        if tuple(float(each) for each in re.findall(r"[\d.]+", flags["channel_mult"])) != blocks.channel_mult:
            raise UserError(
                f"--flags: --channel_mult is {flags['channel_mult']}, but the weights have {blocks.channel_mult}"
            )
    merged = merge_flags(given, shown, GUIDED if guided else IMPROVED)
    if merged["num_heads_upsample"] not in (-1, merged["num_heads"]):
        raise UserError("--flags: --num_heads_upsample differs from --num_heads, which is not supported")
    config = _config(merged, blocks, name)
    return Pretrained(config, blocks.convert(merged))


class _Blocks:
    """The layers of a network, found by the names and shapes of its arrays."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays = arrays
        numbers = {int(found[1]) for name in arrays if (found := re.match(r"output_blocks\.(\d{1,6})\.", name))}
        if not numbers or numbers != set(range(len(numbers))) or len(numbers) > _MOST_BLOCKS:
            raise UserError("the weights lack output_blocks in a row, which these networks have")
        resampled = [n for n in range(len(numbers)) if self._upsample(n)]
        self.num_res_blocks = resampled[0] if resampled else len(numbers) - 1
        self.levels = len(numbers) // (self.num_res_blocks + 1)
        if not self.num_res_blocks or self.levels * (self.num_res_blocks + 1) != len(numbers):
            raise UserError("the weights do not have the same number of blocks at every level")
        self.embed_channels = self._shape("time_embed.0.weight")[-1]
        self.width = self._shape("input_blocks.0.0.weight")[0]
        channels = [self._shape(f"{self._down(level, 0)}.in_layers.2.weight")[0] for level in range(self.levels)]
        if not self.embed_channels or any(not self.width or each % self.width for each in channels):
            raise UserError(f"channels of {channels} are not multiples of those of the first layer, {self.width}")
        self.multiples = tuple(each // self.width for each in channels)
        self.channel_mult = tuple(each / self.embed_channels for each in channels)
        self.attention_levels = [level for level in range(self.levels) if self._attends(self._down(level, 0))]

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._arrays or not self._arrays[name].shape:
            raise UserError(f"the weights lack the array {name}")
        return self._arrays[name].shape

    def _down(self, level: int, block: int) -> str:
        return f"input_blocks.{1 + level * (self.num_res_blocks + 1) + block}.0"

    def _attends(self, block: str) -> bool:
        return f"{block.rpartition('.')[0]}.1.qkv.weight" in self._arrays

    def _upsample(self, number: int) -> str:
        """Returns the layer that doubles the resolution after an output block; "" if there is none."""
        for last in (1, 2):
            layer = f"output_blocks.{number}.{last}"
            if f"{layer}.in_layers.0.weight" in self._arrays or f"{layer}.conv.weight" in self._arrays:
                return layer
        return ""

    def flags(self, *, guided: bool) -> Flags:
        """Returns the flags that the shapes show."""
        inputs, outputs = self._shape("input_blocks.0.0.weight")[1], self._shape("out.2.weight")[0]
        if (inputs, outputs) not in ((3, 3), (3, 6)):
            raise UserError(
                f"the network has {inputs} input and {outputs} output channels: only those of images in color are "
                "supported, 3 and 3 (or 6 with a learned variance), not upsamplers"
            )
        projected = self._shape(f"{self._down(0, 0)}.emb_layers.1.weight")[0]
        shown = {
            "num_channels": self.embed_channels,
            "num_res_blocks": self.num_res_blocks,
            "learn_sigma": outputs == 6,
            "class_cond": "label_emb.weight" in self._arrays,
            "use_scale_shift_norm": projected == 2 * self.width * self.multiples[0],
        }
        if guided:
            shown["resblock_updown"] = self.levels > 1 and f"{self._after(0)}.in_layers.0.weight" in self._arrays
        return shown

    @property
    def num_classes(self) -> int:
        return self._shape("label_emb.weight")[0] if "label_emb.weight" in self._arrays else 0

    def _after(self, level: int) -> str:
        """Returns the layer that halves the resolution after a level."""
        return f"input_blocks.{(level + 1) * (self.num_res_blocks + 1)}.0"

    def convert(self, flags: Flags) -> Params:
        """Returns the parameters under our names."""
        converter = Converter(self._arrays)

        def resnet(ours: str, theirs: str) -> None:
            for layer, their_layer in _RESNET.items():
                converter.move(f"{theirs}.{their_layer}", ours, layer)
            if f"{theirs}.skip_connection.weight" in self._arrays:
                converter.move(f"{theirs}.skip_connection", ours, "nin_shortcut")

        def attention(ours: str, theirs: str) -> None:
            converter.move(f"{theirs}.norm", ours, "norm")
            converter.move(f"{theirs}.proj_out", ours, "proj_out")
            weight, bias = converter.take(f"{theirs}.qkv.weight"), converter.take(f"{theirs}.qkv.bias")
            for name, part, shift in zip("qkv", *(_split_heads(each, flags) for each in (weight, bias)), strict=True):
                converter.put((ours, name, "kernel"), from_torch(part))
                converter.put((ours, name, "bias"), from_torch(shift))

        def block(ours: str, name: str, theirs: str) -> None:
            resnet(f"{ours}_block_{name}", theirs)
            if self._attends(theirs):
                attention(f"{ours}_attn_{name}", f"{theirs.rpartition('.')[0]}.1")

        def resample(ours: str, theirs: str, conv: str) -> None:
            if flags.get("resblock_updown"):
                resnet(ours, theirs)
            else:
                converter.move(f"{theirs}.{conv}", ours)

        for layer, theirs in (("conv_in", "input_blocks.0.0"), ("norm_out", "out.0"), ("conv_out", "out.2")):
            converter.move(theirs, layer)
        for number in range(2):
            converter.move(f"time_embed.{2 * number}", f"temb_dense{number}")
        for level in range(self.levels):
            for number in range(self.num_res_blocks):
                block(f"down_{level}", str(number), self._down(level, number))
            if level < self.levels - 1:
                resample(f"down_{level}_downsample", self._after(level), "op")
            first = (self.levels - 1 - level) * (self.num_res_blocks + 1)
            for number in range(self.num_res_blocks + 1):
                block(f"up_{level}", str(number), f"output_blocks.{first + number}.0")
            if level > 0:
                resample(f"up_{level}_upsample", self._upsample(first + self.num_res_blocks), "conv")
        for number in range(2):
            resnet(f"mid_block_{number + 1}", f"middle_block.{2 * number}")
        attention("mid_attn_1", "middle_block.1")
        if self.num_classes:
            # Their table has no row for "no label", which is never asked for.
            table = np.asarray(converter.take("label_emb.weight"), np.float32)
            converter.put(("class_embedding", "embedding"), np.pad(table, [(0, 1), (0, 0)]))
        return converter.finish()


def _split_heads(qkv: np.ndarray, flags: Flags) -> np.ndarray:
    """Splits the rows of one projection into those of q, k and v, (3, C, ..)."""
    channels = qkv.shape[0] // 3
    head_channels = flags.get("num_head_channels", -1)
    heads = flags["num_heads"] if head_channels == -1 else channels // head_channels if head_channels > 0 else 0
    if heads < 1 or 3 * channels != qkv.shape[0] or channels % heads:
        raise UserError(f"--flags: {channels} channels are not divisible into {heads} attention heads")
    if flags.get("use_new_attention_order"):
        return qkv.reshape(3, channels, *qkv.shape[1:])
    by_head = qkv.reshape(heads, 3, channels // heads, *qkv.shape[1:])
    return by_head.swapaxes(0, 1).reshape(3, channels, *qkv.shape[1:])


def _config(flags: Flags, blocks: _Blocks, name: str) -> Config:
    if flags["noise_schedule"] not in ("linear", "cosine"):
        raise UserError(f"--flags: --noise_schedule must be linear or cosine, not {flags['noise_schedule']}")
    steps, head_channels = flags["diffusion_steps"], flags.get("num_head_channels", -1)
    if steps < 1:
        raise UserError(f"--flags: --diffusion_steps must be at least 1, not {steps}")
    fixed = "fixed_small" if flags.get("sigma_small") else "fixed_large"
    kind = "vlb" if flags["use_kl"] else "hybrid" if flags["learn_sigma"] else "simple"
    return Config(
        name=name,
        data=DataConfig(source="folder", height=flags["image_size"], width=flags["image_size"], channels=3),
        diffusion=DiffusionConfig(
            schedule=flags["noise_schedule"],
            num_steps=steps,
            beta_start=1000 / steps * 0.0001,
            beta_end=1000 / steps * 0.02,
            prediction="x0" if flags["predict_xstart"] else "eps",
            variance="learned_range" if flags["learn_sigma"] else fixed,  # type: ignore[arg-type]
        ),
        model=ModelConfig(
            width=blocks.width,
            channel_mult=blocks.multiples,
            num_res_blocks=blocks.num_res_blocks,
            attention_resolutions=tuple(flags["image_size"] >> level for level in blocks.attention_levels),
            num_heads=flags["num_heads"] if head_channels == -1 else 1,
            num_head_channels=max(head_channels, 0),
            norm_eps=1e-5,
            symmetric_downsampling=True,
            freq_shift=0,
            cos_first=True,
            timestep_scale=1000 / steps if flags["rescale_timesteps"] else 1.0,
            embed_channels=0 if blocks.embed_channels == blocks.width else blocks.embed_channels,
            scale_shift_norm=flags["use_scale_shift_norm"],
            resblock_updown=flags.get("resblock_updown", False),
            dropout=flags["dropout"],
            num_classes=blocks.num_classes,
        ),
        loss=LossConfig(kind=kind, vlb_weight=0.001 if flags["rescale_learned_sigmas"] else 1 / steps),  # type: ignore[arg-type]
        train=TrainConfig(label_dropout=0.0),
    )
