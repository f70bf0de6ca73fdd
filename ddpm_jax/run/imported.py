"""The folder of a network that was imported from another program's checkpoint: its weights, and where they are from."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import jax

from ddpm_jax.config import Config, DataConfig, TrainConfig
from ddpm_jax.interop.files import check_out, read_metadata
from ddpm_jax.interop.pretrained import Pretrained
from ddpm_jax.run.build import build_network, check_params
from ddpm_jax.run.record import is_run, parse_config
from ddpm_jax.run.validation import validate
from ddpm_jax.run.weights import load_weights, save_weights
from ddpm_jax.system.errors import Damage, UserError
from ddpm_jax.system.files import read_json, write_json

_WEIGHTS, _RECORD = "weights.safetensors", "imported.json"


def is_imported(folder: Path) -> bool:
    """Returns whether a folder is one that `save_imported` wrote."""
    return (folder / _RECORD).is_file() and (folder / _WEIGHTS).is_file()


def save_imported(folder: Path, found: Pretrained, *, file: Path, flags: str | None, overwrite: bool = False) -> None:
    """Writes a network and the record of its origin into a folder that stands for a run's.

    Args:
      folder: created if missing.
      found: the network.
      file: the checkpoint that it is from.
      flags: of the program that wrote it, as the user gave them.
      overwrite: whether to replace another imported network.

    Raises:
      UserError: the weights are not those of a whole network; the folder contains the checkpoint itself or anything
        but an imported network, or one of these and `overwrite` is not set; or it cannot be written.
    """
    validate(found.config)
    check_params(build_network(found.config), found.params, str(file), "its own shapes and flags", "check the flags")
    if is_run(folder):
        raise UserError(f"{folder} contains a run: use another --out")
    check_out(folder, lambda folder: (folder / _RECORD).is_file(), "imported network", overwrite=overwrite)
    if (folder / _WEIGHTS).exists() and (folder / _WEIGHTS).samefile(file):
        raise UserError(f"{file} would be overwritten by its own import: use another --out")
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    record = {"file": file.name, "sha256": digest, "flags": flags, "step": found.step, "averaged": found.averaged}
    write_json(folder / _RECORD, record)  # first: an import that was interrupted may be repeated
    save_weights(folder / _WEIGHTS, found.params, config=found.config, step=found.step)


def imported_summary(found: Pretrained) -> str:
    """Returns what was imported, in words: the network, its diffusion, and whether the weights are averages."""
    data, diffusion, model = found.config.data, found.config.diffusion, found.config.model
    parameters = sum(leaf.size for leaf in jax.tree.leaves(found.params))
    averaged = {True: "averages (EMA)", False: "not averages", None: "unknown whether EMA"}[found.averaged]
    heads = f"heads of {model.num_head_channels} channels" if model.num_head_channels else f"heads: {model.num_heads}"
    classes = f"{model.num_classes} classes" if model.num_classes else "unconditional"
    return "\n".join(
        [
            f"network: {parameters:,} parameters, {data.height}x{data.width}x{data.channels}, {classes}, {heads}",
            f"diffusion: {diffusion.schedule}, T={diffusion.num_steps}, predicts {diffusion.prediction}, variance "
            f"{diffusion.variance}, timestep scale {model.timestep_scale:g}",
            f"weights: {averaged}, step {found.step or 'not recorded'}",
        ]
    )


def load_imported(folder: Path) -> Pretrained:
    """Reads what `save_imported` wrote.

    Raises:
      UserError: it is damaged, or written by another version with other fields.
    """
    params, metadata = load_weights(folder / _WEIGHTS)
    config, step = _config_in(folder, metadata)
    try:
        averaged = read_json(folder / _RECORD).get("averaged")
    except (OSError, Damage) as error:
        raise UserError(f"{folder} is damaged, its record cannot be read ({error}): import it again") from error
    return Pretrained(config, params, step, averaged=averaged if isinstance(averaged, bool) else None)


def load_imported_config(folder: Path) -> Config:
    """Reads the configuration of what `save_imported` wrote, without the weights.

    Raises:
      UserError: as `load_imported`.
    """
    return _config_in(folder, read_metadata(folder / _WEIGHTS))[0]


def _config_in(folder: Path, metadata: Mapping[str, str]) -> tuple[Config, int]:
    try:
        config, step = _described(parse_config(metadata["config"])), int(metadata["step"])
        validate(config)
    except (KeyError, ValueError, UserError) as error:
        raise UserError(f"{folder} is damaged, its configuration cannot be read ({error}): import it again") from error
    if config.model.network or (config.data.source, config.data.path) != ("folder", ""):
        # Such a folder may come from anywhere, and these fields can name code to run.
        raise UserError(f"{folder / _WEIGHTS} names a network or images of its own, which no imported network does")
    return config, step


def _described(config: Config) -> Config:
    """Returns what an imported network says of itself; a file from elsewhere has no say in how a run trains here."""
    data = config.data
    return Config(
        name=config.name,
        data=DataConfig(
            source=data.source,
            path=data.path,
            height=data.height,
            width=data.width,
            channels=data.channels,
            flip=data.flip,
        ),
        diffusion=config.diffusion,
        model=config.model,
        loss=config.loss,
        train=TrainConfig(label_dropout=config.train.label_dropout),
    )
