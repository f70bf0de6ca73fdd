"""Folders of diffusers' DDPM pipelines, in and out: a `UNet2DModel` and its scheduler.

diffusers itself writes the nested form, `model_index.json`, `unet/` and `scheduler/`; the first published models are
flat, with everything beside the `config.json` of the network.
"""

import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

import ddpm_jax
from ddpm_jax.config import Config, ModelConfig
from ddpm_jax.interop import diffusers_config
from ddpm_jax.interop.files import Arrays, check_out, check_size, read_arrays, read_metadata, write_safetensors
from ddpm_jax.interop.layouts import from_torch
from ddpm_jax.interop.model_card import model_card
from ddpm_jax.interop.pretrained import Pretrained
from ddpm_jax.networks import Params
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import open_file, parse_json, write_whole

_INDEX, _CONFIG, _SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
# In the order of preference; the half-precision variants are for folders that have nothing else.
_WEIGHTS = tuple(
    f"diffusion_pytorch_model{variant}.{ending}"
    for variant in ("", ".fp16")
    for ending in ("safetensors", "safetensors.index.json", "bin", "bin.index.json")
)
_PARTS_OF = ".index.json"  # ends the name of a file that lists the files of the weights
_LARGEST_JSON = 16 * 2**20
_RECORD = "ddpm_jax"  # in the metadata of the weights

# Kinds of images that a folder may name: none of them runs code of its own.
_SOURCES = ("digits", "folder", "npz", "npy", "idx", "cifar10")

# Our layers of a block, and theirs.
_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "temb_proj": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class _Record(typing.NamedTuple):
    """What `write_folder` records of a run beside its weights."""

    step: int
    source: str
    label_dropout: float
    class_names: tuple[str, ...]
    unspaced: bool
    """Whether the run named no spacing of timesteps, which is written as linspace."""


def is_diffusers_folder(folder: Path) -> bool:
    """Returns whether a folder is that of a diffusers pipeline, or of a network alone."""
    if (folder / _INDEX).is_file() or (folder / "unet" / _CONFIG).is_file():
        return True
    try:
        return "_class_name" in _read_json(folder / _CONFIG)
    except UserError:
        return False


def read_folder(folder: Path) -> Pretrained:
    """Reads a pipeline of a `UNet2DModel` from its folder, flat or nested, as any version of diffusers wrote it.

    Args:
      folder: a copy of a published model, or what `save_pretrained` wrote.

    Returns:
      the network. If `write_folder` wrote it, also the step, the names of the classes and the label dropout.

    Raises:
      UserError: a file is missing or damaged, or describes what this package does not have; the message names it.
    """
    inside, config, described = _read_description(folder)
    file, arrays, metadata = _read_weights(inside)
    params = _to_ours(arrays, config.model, str(file))
    table, classes = params.get("class_embedding", {}).get("embedding", np.zeros((0, 0))), config.model.num_classes
    if table.ndim != 2 or len(table) != classes:
        raise UserError(f"{file} has class embeddings of shape {table.shape}, but num_class_embeds is {classes}")
    record = _read_record(metadata)
    if record is not None:
        config = _with_record(config, record)
        known = record.class_names if len(record.class_names) == config.model.num_classes else ()
        return Pretrained(config, params, record.step, known)
    if classes:  # their table has no row for "no label", which is never asked for
        params = {**params, "class_embedding": {"embedding": np.pad(table, [(0, 1), (0, 0)])}}
    return Pretrained(config, params, class_names=_class_names(described, classes))


def read_folder_config(folder: Path) -> Config:
    """Reads the configuration of a network as `read_folder`, without its weights, which may be missing.

    Args:
      folder: as for `read_folder`.

    Raises:
      UserError: as `read_folder`, where a file other than the weights is missing or damaged.
    """
    inside, config, _ = _read_description(folder)
    file = _find_weights(inside)
    if file is None or file.name.endswith(_PARTS_OF):
        return config
    _check_fetched(file)
    record = _read_record(read_metadata(file))
    return config if record is None else _with_record(config, record)


def _read_description(folder: Path) -> tuple[Path, Config, dict[str, Any]]:
    """Returns the folder of the weights, the configuration, and the fields that describe a pipeline and its network."""
    index = _read_index(folder / _INDEX) if (folder / _INDEX).is_file() else {}
    inside = folder / "unet" if (folder / "unet").is_dir() else folder
    schedulers = [folder / "scheduler" / _SCHEDULER, folder / _SCHEDULER]
    scheduler_file = next((file for file in schedulers if file.is_file()), schedulers[0])
    unet, scheduler = _read_json(inside / _CONFIG), _read_json(scheduler_file)
    config = diffusers_config.read_config(
        unet,
        scheduler,
        name=folder.resolve().name or "pretrained",
        shown=(str(inside / _CONFIG), str(scheduler_file)),
    )
    return inside, config, {**index, **unet}


def _read_index(file: Path) -> dict[str, Any]:
    """Reads the index of a pipeline; refuses one with other parts, such as an autoencoder."""
    index = _read_json(file)
    parts = {name: each for name, each in index.items() if isinstance(each, list)}
    other = sorted(parts.keys() - {"unet", "scheduler"})
    if other:
        raise UserError(
            f"{file}: a {index.get('_class_name')} with {', '.join(other)} is not "
            "supported, only pipelines of a UNet2DModel and a scheduler, such as DDPMPipeline"
        )
    return index


def _read_json(file: Path) -> dict[str, Any]:
    try:
        with open_file(file) as opened:
            content = opened.read(_LARGEST_JSON + 1)
        found = parse_json(content) if len(content) <= _LARGEST_JSON else None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file} is damaged, it is not a complete JSON file: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} must be a JSON object in braces, of at most {_LARGEST_JSON >> 20} MiB")
    return found


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    # Not `write_json`: diffusers would take its checksum for a field.
    content = json.dumps(value, indent=2) + "\n"
    write_whole(file, lambda opened: opened.write(content.encode()))


def _find_weights(folder: Path) -> Path | None:
    return next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)


def _read_weights(folder: Path) -> tuple[Path, Arrays, dict[str, str]]:
    file = _find_weights(folder)
    if file is None:
        raise UserError(f"{folder} has no weights: looked for {', '.join(_WEIGHTS[:4])}")
    if not file.name.endswith(_PARTS_OF):
        return file, *_read_file(file)
    parts = _read_json(file).get("weight_map")
    names = set(parts.values()) if isinstance(parts, dict) and all(map(_is_name, parts.values())) else set()
    if not names:
        raise UserError(f"{file} is damaged: its weight_map does not name files in the same folder")
    shards = [folder / name for name in sorted(names)]
    check_size(sum(shard.stat().st_size for shard in shards if shard.is_file()), str(file))
    arrays: Arrays = {}
    for shard in shards:
        found, _ = _read_file(shard)
        if twice := next(iter(arrays.keys() & found.keys()), None):
            raise UserError(f"{shard} has the array {twice:.80}, which another file of {file.name} has too")
        arrays |= found
    return file, arrays, {}


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value not in ("", "..") and Path(value).name == value


def _read_file(file: Path) -> tuple[Arrays, dict[str, str]]:
    _check_fetched(file)
    return read_arrays(file)


def _check_fetched(file: Path) -> None:
    if file.is_file():
        with file.open("rb") as opened:
            if opened.read(40).startswith(b"version https://git-lfs"):
                raise UserError(f"{file} is a Git LFS pointer, not the weights: run git lfs pull in its folder")


def _parts(model: ModelConfig) -> dict[tuple[str, ...], str]:
    """Maps each layer of our U-Net to diffusers' name of it; also layers that only some networks have."""
    levels = len(model.channel_mult)
    resnets = {f"mid_block_{1 + block}": f"mid_block.resnets.{block}" for block in range(2)}
    attentions = {"mid_attn_1": "mid_block.attentions.0"}
    layers = {
        "temb_dense0": "time_embedding.linear_1",
        "temb_dense1": "time_embedding.linear_2",
        "class_embedding": "class_embedding",
        "conv_in": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    }
    for level in range(levels):
        # Their up blocks count from the lowest resolution.
        for way, index, blocks in (("down", level, 0), ("up", levels - 1 - level, 1)):
            theirs = f"{way}_blocks.{index}"
            for block in range(model.num_res_blocks + blocks):
                resnets[f"{way}_{level}_block_{block}"] = f"{theirs}.resnets.{block}"
                attentions[f"{way}_{level}_attn_{block}"] = f"{theirs}.attentions.{block}"
            layers[f"{way}_{level}_{way}sample"] = f"{theirs}.{way}samplers.0.conv"
    parts: dict[tuple[str, ...], str] = {(ours,): theirs for ours, theirs in layers.items()}
    for blocks_of, inner in ((resnets, _RESNET), (attentions, _ATTENTION)):
        parts |= {(o, layer): f"{t}.{name}" for o, t in blocks_of.items() for layer, name in inner.items()}
    return parts


def _to_ours(arrays: Mapping[str, np.ndarray], model: ModelConfig, shown: str) -> Params:
    ours = {theirs: layer for layer, theirs in _parts(model).items()}
    params: dict[tuple[str, ...], np.ndarray] = {}
    for name, array in arrays.items():
        module, _, kind = name.rpartition(".")
        block, _, last = module.rpartition(".")
        if ".attentions." in module and last in _OLD_ATTENTION:
            module = f"{block}.{_OLD_ATTENTION[last]}"
        if module not in ours or kind not in ("weight", "bias"):
            raise UserError(f"{shown} has an array {name:.80}, which the network in {_CONFIG} does not have")
        path = (*ours[module], "bias" if kind == "bias" else _kind(ours[module]))
        if path in params:
            raise UserError(f"{shown} has the array {name:.80} under its old and its new name")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"{shown}: {name:.80} is of {array.dtype}, not of floating-point numbers")
        params[path] = array.astype(np.float32, copy=False) if path[-1] == "embedding" else from_torch(array)
    return traverse_util.unflatten_dict(params)


def _kind(layer: tuple[str, ...]) -> str:
    """Returns our name of what they call a layer's weight."""
    return "embedding" if layer == ("class_embedding",) else "scale" if layer[-1].startswith("norm") else "kernel"


def _to_theirs(params: Params, model: ModelConfig) -> Arrays:
    parts, arrays = _parts(model), {}
    for (*layer, kind), array in traverse_util.flatten_dict(params).items():
        theirs, array = parts[tuple(layer)], np.asarray(array)
        if kind == "kernel":
            array = np.ascontiguousarray(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T)
            array = array[:, :, None, None] if theirs.endswith("conv_shortcut") else array
        arrays[f"{theirs}.{'bias' if kind == 'bias' else 'weight'}"] = array
    return arrays


def _class_names(fields: Mapping[str, Any], num_classes: int) -> tuple[str, ...]:
    names, numbers = fields.get("id2label"), [str(number) for number in range(num_classes)]
    if not isinstance(names, dict) or names.keys() != set(numbers):
        return ()
    return tuple(str(names[number]) for number in numbers)


def _read_record(metadata: Mapping[str, str]) -> _Record | None:
    """Returns what `write_folder` recorded; None if it is absent, as once diffusers saved the weights again."""
    try:
        record = dict(parse_json(metadata.get(_RECORD, "")))
    except (ValueError, TypeError):
        return None
    match record:
        case {
            "step": int(step),
            "source": str(source),
            "label_dropout": float(label_dropout),
            "class_names": list(names),
        }:
            unspaced = record.get("spacing", "") is None
            return _Record(step, source, label_dropout, tuple(map(str, names)), unspaced)
    return None


def _with_record(config: Config, record: _Record) -> Config:
    # The last row of the table is that of "no label".
    model = dataclasses.replace(config.model, num_classes=max(config.model.num_classes - 1, 0))
    source = record.source if record.source in _SOURCES else config.data.source
    data = dataclasses.replace(config.data, source=source)
    train = dataclasses.replace(config.train, label_dropout=record.label_dropout)
    diffusion = config.diffusion
    if diffusion.spacing == "linspace" and record.unspaced:
        diffusion = dataclasses.replace(diffusion, spacing=None)
    return dataclasses.replace(config, model=model, data=data, train=train, diffusion=diffusion)


def write_folder(
    folder: Path,
    params: Params,
    *,
    config: Config,
    step: int,
    class_names: Sequence[str] = (),
    license: str = "unknown",
    trained_here: bool = True,
    overwrite: bool = False,
) -> None:
    """Writes a network as the folder of a `DDPMPipeline`, with a model card: ready to be uploaded.

    Args:
      folder: where to; created if missing.
      params: the weights.
      config: the configuration of the run that they are from.
      step: its number of training steps.
      class_names: names of its classes, if they are known.
      license: of the weights, for the model card: an identifier of the Hugging Face Hub, such as mit.
      trained_here: whether the configuration tells how the weights were trained, and that they are EMA weights.
      overwrite: whether to replace what was exported to the folder before.

    Raises:
      UserError: diffusers cannot express the network or its diffusion (the message names the field), the folder is not
        empty, or it cannot be written.
    """
    unet, scheduler = diffusers_config.write_unet(config), diffusers_config.write_scheduler(config)
    check_out(folder, is_diffusers_folder, "exported model", overwrite=overwrite)
    record = {
        "step": step,
        "source": config.data.source if config.data.source in _SOURCES else "",
        "label_dropout": config.train.label_dropout,
        "spacing": config.diffusion.spacing,
        "class_names": list(class_names),
    }
    # The loaders of PyTorch want to be told the format; the weights are written first, the index last.
    metadata = {"format": "pt", "version": ddpm_jax.__version__, _RECORD: json.dumps(record)}
    write_safetensors(folder / "unet" / _WEIGHTS[0], _to_theirs(params, config.model), metadata)
    _write_json(folder / "unet" / _CONFIG, unet)
    _write_json(folder / "scheduler" / _SCHEDULER, scheduler)
    card = model_card(config, step=step if trained_here else None, class_names=class_names, license=license)
    write_whole(folder / "README.md", lambda file: file.write(card.encode()))
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": diffusers_config.VERSION,
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    _write_json(folder / _INDEX, index)
