"""Pictures to look at: grids, PNG, GIF, the curves of the loss and of the bound. Pixels are uint8 NumPy arrays."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import write_whole

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def grid(images: np.ndarray, *, columns: int | None = None, padding: int = 1, background: int = 255) -> np.ndarray:
    """Lays images out in rows, with lines between and around them.

    Args:
      images: (N, H, W, C) uint8, N >= 1.
      columns: how many images a row; about as many as rows if not given.
      padding: the width of the lines in pixels, >= 0.
      background: the level of the lines and of the places left over, in [0, 255].

    Returns:
      (R (H + padding) + padding, columns (W + padding) + padding, C) uint8, with R = ceil(N / columns) rows.

    Raises:
      ValueError: there is no image, or the images are not uint8 of four axes.

    >>> grid(np.zeros((3, 8, 8, 1), np.uint8)).shape
    (19, 19, 1)
    """
    if images.ndim != 4 or images.dtype != np.uint8 or not len(images):
        raise ValueError(f"a grid needs (N, H, W, C) uint8 with N >= 1, not {images.shape} {images.dtype}")
    number, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(number)) if columns is None else columns
    if columns < 1 or padding < 0:
        raise ValueError(f"a grid needs at least 1 column and no negative padding, not {columns} and {padding}")
    rows = math.ceil(number / columns)
    cells = np.full((rows * columns, height + padding, width + padding, channels), background, np.uint8)
    cells[:number, padding:, padding:] = images
    cells = cells.reshape(rows, columns, height + padding, width + padding, channels).swapaxes(1, 2)
    laid_out = cells.reshape(rows * (height + padding), columns * (width + padding), channels)
    return np.pad(laid_out, [(0, padding), (0, padding), (0, 0)], constant_values=background)


def enlarge(images: np.ndarray, *, side: int = 768) -> np.ndarray:
    """Repeats every pixel in both directions, so that small images can be looked at; whole pixels stay whole.

    Args:
      images: (..., H, W, C).
      side: what the longer side may grow to, in pixels.

    Returns:
      (..., k H, k W, C) with the largest whole k >= 1 for which k max(H, W) <= side, else k = 1.

    >>> enlarge(np.zeros((10, 20, 1), np.uint8), side=65).shape
    (30, 60, 1)
    """
    factor = max(1, side // max(images.shape[-3:-1]))
    return images.repeat(factor, axis=-3).repeat(factor, axis=-2)


def can_show(channels: int) -> bool:
    """Says whether images of so many channels are something to look at: gray, color, or color with alpha."""
    return channels in _MODES


def check_channels(channels: int) -> None:
    """Checks that images of so many channels are something to look at.

    Raises:
      UserError: they are not gray, color, or color with alpha.
    """
    if not can_show(channels):
        raise UserError(
            f"images of {channels} channels cannot be shown as a picture (1, 3 and 4 can): save them as npz instead"
        )


def save_png(path: Path, image: np.ndarray) -> None:
    """Saves one image as PNG, whole or not at all.

    Args:
      path: where to; its folder is made if it is not there.
      image: (H, W, C) uint8: gray, color, or color with alpha.

    Raises:
      UserError: the number of channels is another, or the file cannot be written.
    """
    picture = _picture(image)
    write_whole(path, lambda file: picture.save(file, "PNG"))


def save_gif(path: Path, frames: np.ndarray, seconds: float | Sequence[float], *, comment: str = "") -> None:
    """Saves frames as a GIF that plays for ever, whole or not at all.

    A GIF has 256 colors a frame and no half-transparent pixels: color is reduced to the best 256, and alpha shown
    over white. Equal frames that follow each other are stored as one that lasts longer.

    Args:
      path: where to; its folder is made if it is not there.
      frames: (F, H, W, C) uint8, F >= 1: gray, color, or color with alpha.
      seconds: how long each frame is shown, one number for all or one for each; the format counts in 1/100.
      comment: a text to put into the file.

    Raises:
      UserError: the number of channels is another, or the file cannot be written.
    """
    pictures = [_over_white(_picture(frame)) for frame in frames]
    each = [seconds] * len(pictures) if isinstance(seconds, int | float) else list(seconds)
    if len(each) != len(pictures):
        raise ValueError(f"{len(pictures)} frames need as many durations, not {len(each)}")
    write_whole(
        path,
        lambda file: pictures[0].save(
            file,
            "GIF",
            save_all=True,
            append_images=pictures[1:],
            duration=[round(1000 * duration) for duration in each],
            loop=0,
            comment=comment.encode(),
        ),
    )


def _picture(image: np.ndarray) -> Image.Image:
    if image.ndim != 3 or image.dtype != np.uint8:
        raise ValueError(f"a picture needs (H, W, C) uint8, not {image.shape} {image.dtype}")
    check_channels(image.shape[-1])
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _over_white(picture: Image.Image) -> Image.Image:
    if picture.mode != "RGBA":
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
