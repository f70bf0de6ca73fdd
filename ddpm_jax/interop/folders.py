"""Trained networks of other programs, by the folder that they are in."""

from pathlib import Path

from ddpm_jax.interop.diffusers import is_diffusers_folder, read_folder
from ddpm_jax.interop.pretrained import Pretrained

LOOKED_FOR = "config.json of a run; model_index.json, unet/config.json or config.json of a diffusers model"
"""What tells what a folder contains."""


def is_pretrained(folder: Path) -> bool:
    """Returns whether a folder contains another program's trained network."""
    return is_diffusers_folder(folder)


def load_pretrained(folder: Path) -> Pretrained:
    """Reads another program's trained network.

    Args:
      folder: one that `is_pretrained` accepts.

    Raises:
      UserError: as `diffusers.read_folder`.
    """
    return read_folder(folder)
