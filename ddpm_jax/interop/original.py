"""The original code's checkpoints (TensorFlow; Ho et al. 2020), and their conversion to PyTorch by pesser.

Both are the paper's network. Its parameters have the same layout in TensorFlow as in Flax, and almost the same names.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, LossConfig, ModelConfig
from ddpm_jax.interop.files import Arrays
from ddpm_jax.interop.flags import Flags, merge_flags
from ddpm_jax.interop.layouts import Converter
from ddpm_jax.interop.pretrained import Pretrained
from ddpm_jax.names import Prediction, ScheduleName, Variance
from ddpm_jax.networks import Params
from ddpm_jax.system.errors import UserError

FLAGS: Flags = {
    "num_diffusion_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "model_mean_type": "eps",
    "model_var_type": "fixedlarge",
    "dropout": 0.1,
    "randflip": 1,
    "resolution": 32,
}
"""Flags of the original's scripts with the defaults of run_cifar.py; `resolution` is pesser's."""
# run_lsun.py and run_celebahq.py have no flag for the variance, which is fixedsmall.
_AT_256: Flags = {"model_var_type": "fixedsmall", "dropout": 0.0, "resolution": 256}
IGNORED = frozenset(
    {
        *("exp_name", "tpu_name", "bucket_name_prefix", "model_name", "dataset", "optimizer", "total_bs"),
        *("grad_clip", "lr", "warmup", "loss_type", "tfds_data_dir", "tfr_file", "log_dir"),
        *("keep_checkpoint_max", "block_size", "warm_start_model_dir"),
    }
)
"""Flags of how they train."""

_VARIANCES: dict[str, Variance] = {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small", "learned": "learned"}
_PREDICTIONS: dict[str, Prediction] = {"eps": "eps", "xstart": "x0", "xprev": "mean"}
_SCHEDULES: tuple[ScheduleName, ...] = ("linear", "quad", "const", "warmup10", "warmup50", "jsd")

# Fields of a network that the original does not have: it has their defaults.
_OF_THE_PAPER = (
    *("network", "mid_attention", "num_heads", "num_head_channels", "num_groups", "norm_eps", "num_classes"),
    *("symmetric_downsampling", "freq_shift", "cos_first", "timestep_scale", "embed_channels", "scale_shift_norm"),
    "resblock_updown",
)

_SCOPE, _AVERAGE = "model/", "/ExponentialMovingAverage"
# What TensorFlow's optimizers keep beside each variable.
_SLOTS = ("/Adam", "/Adam_1", "/RMSProp", "/RMSProp_1", "/Momentum")
_LEAVES = {"W": "kernel", "b": "bias", "gamma": "scale", "beta": "bias"}
_BLOCK = re.compile(r"(?:(down|up)_(\d{1,3})|mid)_(block|attn)_(\d{1,3})")


def is_original(arrays: Mapping[str, Any]) -> bool:
    """Returns whether arrays have the names of the original's TensorFlow variables."""
    return any(name.removeprefix(_SCOPE).startswith("temb/dense0/W") for name in arrays)


def is_pesser(arrays: Mapping[str, Any]) -> bool:
    """Returns whether arrays have the names of pesser's conversion, which other PyTorch code for DDPM took over."""
    return "temb.dense.0.weight" in arrays


def read_original(variables: Mapping[str, np.ndarray], flags: Flags, *, name: str) -> Pretrained:
    """Converts the variables of an original checkpoint.

    Args:
      variables: by their names in TensorFlow, with or without the scope "model/". Where there are moving averages,
        those are taken; the slots of optimizers are left out.
      flags: those that the weights do not show, as given to the original's scripts.
      name: of the configuration.

    Returns:
      the network; its step is `global_step`, if that is among the variables.

    Raises:
      UserError: flags that contradict the weights, or variables that the paper's network does not have.
    """
    inside = {each.removeprefix(_SCOPE): array for each, array in variables.items() if _is_weight(each)}
    averages = {each.removesuffix(_AVERAGE): array for each, array in inside.items() if each.endswith(_AVERAGE)}
    weights = averages or inside
    params: dict[tuple[str, ...], np.ndarray] = {}
    for variable, array in weights.items():
        *parts, leaf = variable.split("/")
        if leaf not in _LEAVES or not jnp.issubdtype(array.dtype, jnp.floating) or not parts:
            raise UserError(f"the variable {variable[:80]} ({array.dtype}) is not of the paper's network")
        params[(*_layer(parts), _LEAVES[leaf])] = np.ascontiguousarray(array, np.float32)
    step = variables.get("global_step")
    known = step is not None and step.shape == () and step.dtype.kind == "i"
    return _paper(params, flags, name)._replace(step=int(step) if known else 0, averaged=bool(averages))  # type: ignore[arg-type]


def _is_weight(name: str) -> bool:
    outside = ("global_step", "beta1_power", "beta2_power")
    return not name.endswith(_SLOTS) and name not in outside


def _layer(parts: list[str]) -> tuple[str, ...]:
    """Returns our name of a layer: `down_0/block_1/conv1` is `down_0_block_1`, `conv1`."""
    if parts[-1] == "conv" and parts[-2:-1] in (["downsample"], ["upsample"]):
        parts = parts[:-1]
    if parts[0] == "temb" or parts[0] == "mid" or re.fullmatch(r"(down|up)_\d+", parts[0]):
        parts = ["_".join(parts[:2]), *parts[2:]]
    return tuple(parts)


def write_original(params: Params, config: Config, *, step: int) -> Arrays:
    """Returns EMA weights under the names of the original's variables, for `numpy.savez`.

    Args:
      params: the weights.
      config: the configuration of the run that they are from.
      step: its number of training steps, as `global_step`.

    Raises:
      UserError: the network is not the paper's; the message names the field or the layer in which it differs.
    """
    paper, model = ModelConfig(), config.model
    for field in _OF_THE_PAPER:
        if getattr(model, field) != getattr(paper, field):
            raise UserError(f"the original's network has no model.{field}={getattr(model, field)}")
    leaves = {"kernel": "W", "scale": "gamma"}
    arrays: Arrays = {"global_step": np.asarray(step, np.int64)}
    for path, array in traverse_util.flatten_dict(params).items():
        part, *layer, leaf = path
        parts = _parts(part)
        if parts is None or leaf not in ("kernel", "scale", "bias"):
            raise UserError(
                f"the original has no layer {'.'.join(path)[:80]}: only the paper's network can be exported"
            )
        last = (layer or [part])[-1]
        ours = ("beta" if last.startswith("norm") else "b") if leaf == "bias" else leaves[leaf]
        arrays[f"{_SCOPE}{'/'.join([*parts, *layer, ours])}{_AVERAGE}"] = np.asarray(array)
    return arrays


def _parts(part: str) -> list[str] | None:
    if part in ("conv_in", "conv_out", "norm_out"):
        return [part]
    if part in ("temb_dense0", "temb_dense1"):
        return part.split("_")
    if found := re.fullmatch(r"((?:down|up)_\d+|mid)_((?:block|attn)_\d+)", part):
        return list(found.groups())
    if found := re.fullmatch(r"((?:down|up)_\d+)_((?:down|up)sample)", part):
        return [*found.groups(), "conv"]
    return None


def read_pesser(arrays: Mapping[str, np.ndarray], flags: Flags, *, name: str) -> Pretrained:
    """Converts a `state_dict` of pesser's PyTorch network, or of one with the same names.

    Args:
      arrays: by name.
      flags: those of the original that the weights do not show.
      name: of the configuration.

    Raises:
      UserError: flags that contradict the weights, or arrays that the paper's network does not have.
    """
    converter = Converter(arrays)
    for weight in [each for each in arrays if each.endswith(".weight")]:
        theirs = weight.removesuffix(".weight")
        parts = re.sub(r"^temb\.dense\.(\d+)$", r"temb.dense\1", theirs)
        parts = re.sub(r"^(down|up)\.(\d+)\.", r"\1_\2.", parts)
        parts = re.sub(r"\.(block|attn)\.(\d+)\.", r".\1_\2.", parts)
        converter.move(theirs, *_layer(parts.split(".")))
    return _paper(traverse_util.flatten_dict(converter.finish()), flags, name)


def _paper(params: dict[tuple[str, ...], np.ndarray], flags: Flags, name: str) -> Pretrained:
    """Returns the paper's network with the configuration that the shapes of its parameters show."""

    def shape(*path: str, rank: int) -> tuple[int, ...]:
        if path not in params or params[path].ndim != rank:
            raise UserError(f"the weights lack the layer {'.'.join(path)} of the paper's network")
        return params[path].shape

    blocks = {found.groups() for path in params if (found := _BLOCK.fullmatch(path[0]))}
    levels = 1 + max((int(level) for way, level, _, _ in blocks if way == "down"), default=-1)
    num_res_blocks = sum(each[:3] == ("down", "0", "block") for each in blocks)
    _, _, channels, width = shape("conv_in", "kernel", rank=4)
    outputs = shape("conv_out", "kernel", rank=4)[-1]
    wide = [shape(f"down_{level}_block_0", "conv1", "kernel", rank=4)[-1] for level in range(levels)]
    if not width or any(each % width for each in wide) or outputs not in (channels, 2 * channels) or not wide:
        raise UserError(f"channels {channels}, {width}, {wide}, {outputs} are not those of the paper's network")
    channel_mult = tuple(each // width for each in wide)
    attention = [level for level in range(levels) if ("down", str(level), "attn", "0") in blocks]
    # The original attends at 16 x 16 alone, which shows the size of the images.
    sizes = {"resolution": 16 << attention[0]} if len(attention) == 1 else {}
    defaults = FLAGS | sizes | (_AT_256 if channel_mult == (1, 1, 2, 2, 4, 4) else {})
    shown = {"model_var_type": "learned"} if outputs == 2 * channels else {}
    merged = merge_flags(flags, shown, defaults)
    for flag, known in (
        ("model_var_type", _VARIANCES),
        ("model_mean_type", _PREDICTIONS),
        ("beta_schedule", _SCHEDULES),
    ):
        if merged[flag] not in known:
            raise UserError(f"--flags: --{flag} must be one of {', '.join(known)}, not {merged[flag]}")
    size = merged["resolution"]
    config = Config(
        name=name,
        data=DataConfig(source="folder", height=size, width=size, channels=channels, flip=bool(merged["randflip"])),
        diffusion=DiffusionConfig(
            schedule=merged["beta_schedule"],
            num_steps=merged["num_diffusion_timesteps"],
            beta_start=merged["beta_start"],
            beta_end=merged["beta_end"],
            prediction=_PREDICTIONS[merged["model_mean_type"]],
            variance=_VARIANCES[merged["model_var_type"]],
        ),
        model=ModelConfig(
            width=width,
            channel_mult=channel_mult,
            num_res_blocks=num_res_blocks,
            attention_resolutions=tuple(size >> level for level in attention),
            dropout=merged["dropout"],
        ),
        loss=LossConfig(kind="vlb" if shown else "simple"),
    )
    return Pretrained(config, traverse_util.unflatten_dict(params))
