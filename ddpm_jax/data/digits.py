"""scikit-learn's 1,797 handwritten digits, 8x8, gray: every fifth is held out."""

import numpy as np

from ddpm_jax.config import DataConfig
from ddpm_jax.data.source import Source, in_memory, no_split, shape_of
from ddpm_jax.system.errors import UserError, printable


def load(config: DataConfig) -> Source:
    """Returns the digits.

    Args:
      config: which images; its `channels` is known.

    Returns:
      the source.

    Raises:
      UserError: another shape or split is requested than they have.
    """
    if config.path:
        raise UserError(
            f"data.path: the digits are scikit-learn's own, and {printable(config.path)} would not be looked at: give"
            " --data.source (folder, npz, npy, idx, ..) as well, or a config such as configs/image_folder.py"
        )
    from sklearn.datasets import load_digits

    if shape_of(config) != (8, 8, 1):
        raise UserError(
            f"data: the digits are 8x8 with 1 channel, not {config.height}x{config.width} with {config.channels};"
            " set data.height=8, data.width=8, data.channels=1"
        )
    images, labels = load_digits(return_X_y=True)
    held_out = np.arange(len(images)) % 5 == 4
    splits = {"train": ~held_out, "test": held_out, "all": np.ones_like(held_out)}
    if config.split not in splits:
        raise no_split(config, splits)
    chosen = splits[config.split]
    pixels = np.round(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    return in_memory(pixels[chosen], labels[chosen], name=f"digits, {config.split}")


def probe(config: DataConfig) -> int:
    """Returns the number of channels: the digits are gray."""
    del config
    return 1
