"""Image files: grids, PNG and GIF. Pixels are uint8 NumPy arrays."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import write_whole

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def grid(images: np.ndarray, *, columns: int | None = None, padding: int = 1, background: int = 255) -> np.ndarray:
    """Lays images out in rows, with lines between and around them.

    Args:
      images: (N, H, W, C) uint8, N >= 1.
      columns: images per row; about as many as rows if None.
      padding: width of the lines in pixels, >= 0.
      background: level of the lines and of empty cells, in [0, 255].

    Returns:
      (R (H + padding) + padding, columns (W + padding) + padding, C) uint8, with R = ceil(N / columns) rows.

    Raises:
      ValueError: there is no image, or the images are not uint8 with four axes.

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
    """Enlarges small images by a whole factor, repeating every pixel.

    Args:
      images: (..., H, W, C).
      side: the largest size of the longer side, in pixels.

    Returns:
      (..., k H, k W, C) with the largest integer k for which k max(H, W) <= side, at least 1.

    >>> enlarge(np.zeros((10, 20, 1), np.uint8), side=65).shape
    (30, 60, 1)
    """
    factor = max(1, side // max(images.shape[-3:-1]))
    return images.repeat(factor, axis=-3).repeat(factor, axis=-2)


def annotate(
    picture: np.ndarray, *, rows: Sequence[str] = (), columns: Sequence[str] = (), title: str = ""
) -> np.ndarray:
    """Writes texts beside a grid, above it, and a title above all; the grid stays in the lower right corner.

    Args:
      picture: (H, W, C) uint8: gray, color, or color with alpha.
      rows: a text for each row, from the top; none if empty.
      columns: a text for each column, from the left; where they are too wide only every other, third, ..
      title: one line.

    Returns:
      (H + top, W + left, C) uint8, black on white in the margins.

    >>> grid = np.zeros((64, 640, 1), np.uint8)
    >>> annotate(grid, title="step 500").shape > grid.shape, annotate(grid) is grid
    (True, True)
    """
    if not (rows or columns or title):
        return picture
    height, width = picture.shape[:2]
    font = ImageFont.load_default(max(12, min(24, width // 64)))
    measure = lambda text: math.ceil(font.getbbox(text)[2])
    line = math.ceil(1.5 * max(font.getbbox(text)[3] for text in ("Ag", *rows, *columns)))
    cell = width / max(1, len(columns))
    every = max([1, *(math.ceil((measure(text) + line // 3) / cell) for text in columns)])
    left = max(measure(title) + line - width, *(measure(text) + line for text in rows), 0)
    top = line * (bool(title) + bool(columns))
    laid_out = Image.new(_MODES[picture.shape[-1]], (left + width, top + height), "white")
    laid_out.paste(_picture(picture), (left, top))
    draw = ImageDraw.Draw(laid_out)
    write = lambda x, y, text, anchor: draw.text((x, y), text, fill="black", font=font, anchor=anchor)
    write(line // 2, line // 2, title, "lm")
    for i, text in enumerate(columns):
        if i % every == 0:
            write(left + (i + 0.5) * cell, top - line // 2, text, "mm")
    for i, text in enumerate(rows):
        write(left - line // 2, top + (i + 0.5) * height / len(rows), text, "rm")
    return np.asarray(laid_out).reshape(*laid_out.size[::-1], -1)


def can_show(channels: int) -> bool:
    """Returns whether images with this many channels can be shown: as gray, color, or color with alpha."""
    return channels in _MODES


def check_channels(channels: int) -> None:
    """Checks that images with this many channels can be shown.

    Raises:
      UserError: they are not gray, color, or color with alpha.
    """
    if not can_show(channels):
        raise UserError(
            f"images of {channels} channels cannot be shown as a picture (1, 3 and 4 can): save them as npz instead"
        )


def save_png(path: Path, image: np.ndarray) -> None:
    """Saves one image as PNG, atomically.

    Args:
      path: where to; its folder is created if missing.
      image: (H, W, C) uint8: gray, color, or color with alpha.

    Raises:
      UserError: it has another number of channels, or the file cannot be written.
    """
    picture = _picture(image)
    write_whole(path, lambda file: picture.save(file, "PNG"))


def save_gif(path: Path, frames: np.ndarray, seconds: float | Sequence[float], *, comment: str = "") -> None:
    """Saves frames as a GIF that loops forever, atomically.

    A GIF has 256 colors per frame and no partial transparency: colors are reduced to the best 256, and alpha is shown
    over white. Consecutive equal frames are stored as one longer frame.

    Args:
      path: where to; its folder is created if missing.
      frames: (F, H, W, C) uint8, F >= 1: gray, color, or color with alpha.
      seconds: duration of each frame, one number for all or one for each, in steps of 1/100.
      comment: a text stored in the file.

    Raises:
      UserError: they have another number of channels, or the file cannot be written.
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
