"""Trained networks of other programs, by the folder that they are in."""

from pathlib import Path

from ddpm_jax.config import Config
from ddpm_jax.interop.diffusers import is_diffusers_folder, read_folder, read_folder_config
from ddpm_jax.interop.pretrained import Pretrained
from ddpm_jax.run.imported import is_imported, load_imported, load_imported_config

LOOKED_FOR = (
    "config.json of a run; model_index.json, unet/config.json or config.json of a diffusers model; imported.json of a "
    "network that evaluate.py imported"
)
"""What tells what a folder contains."""


def is_pretrained(folder: Path) -> bool:
    """Returns whether a folder contains another program's trained network: imported, or as diffusers writes it."""
    return is_imported(folder) or is_diffusers_folder(folder)


def load_pretrained(folder: Path) -> Pretrained:
    """Reads another program's trained network.

    Args:
      folder: one that `is_pretrained` accepts.

    Raises:
      UserError: as `load_imported` and `diffusers.read_folder`.
    """
    return load_imported(folder) if is_imported(folder) else read_folder(folder)


def load_pretrained_config(folder: Path) -> Config:
    """Reads the configuration of another program's trained network, without its weights.

    Args:
      folder: one that `is_pretrained` accepts.

    Raises:
      UserError: as `load_imported_config` and `diffusers.read_folder_config`.
    """
    return load_imported_config(folder) if is_imported(folder) else read_folder_config(folder)
