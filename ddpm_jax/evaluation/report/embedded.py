"""Pictures as a page contains them: small, and without a file of their own."""

import base64
import io
import math
import typing
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm_jax.system import pictures
from ddpm_jax.system.errors import Damage
from ddpm_jax.system.files import check_regular

MOST_PIXELS = 1024
"""The longer side of a picture on the page, in pixels; larger ones are downscaled."""

# Lossless up to this size.
_MOST_LOSSLESS = 200_000
_QUALITY = 90
_DAMAGE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)  # Pillow's kinds


class Picture(typing.NamedTuple):
    """A picture as a `data:` URI."""

    uri: str
    width: int
    height: int


def embed(pixels: np.ndarray) -> Picture:
    """Encodes a picture as WebP, at the size it had before `pictures.enlarge`.

    Args:
      pixels: (H, W, C) uint8: gray, color, or color with alpha.

    Returns:
      the picture; lossless unless that takes more than 200 kB, and at most 1024 pixels on its longer side.
    """
    pictures.check_channels(pixels.shape[-1])
    small = _as_before_enlarging(pixels)
    image = Image.fromarray(small[..., 0] if small.shape[-1] == 1 else small)
    image.thumbnail((MOST_PIXELS, MOST_PIXELS), Image.Resampling.LANCZOS)
    content = _webp(image, lossless=True)
    if len(content) > _MOST_LOSSLESS:
        content = _webp(image, quality=_QUALITY)
    return Picture(f"data:image/webp;base64,{base64.b64encode(content).decode()}", *image.size)


def read_frames(path: Path, *, most: int) -> list[np.ndarray]:
    """Reads a PNG, or frames of a GIF, evenly spaced.

    Args:
      path: the file.
      most: the largest number of frames.

    Returns:
      frames, each (H, W, C) uint8.

    Raises:
      Damage: it is no such file.
    """
    try:
        check_regular(path)
        with Image.open(path, formats=("PNG", "GIF")) as picture:
            frames = []
            for at in evenly(getattr(picture, "n_frames", 1), most):
                picture.seek(at)
                frame = picture if picture.mode in ("L", "RGB", "RGBA") else picture.convert("RGB")
                pixels = np.asarray(frame)
                frames.append(pixels.reshape(*pixels.shape[:2], -1))
            return frames
    except _DAMAGE as error:
        raise Damage(f"it is no picture: {error}") from None


def evenly(number: int, most: int) -> list[int]:
    """Returns at most so many indices below a number, evenly spaced, the first and the last among them.

    >>> evenly(5, 3), evenly(2, 9)
    ([0, 2, 4], [0, 1])
    """
    return list(range(number)) if number <= most else [i * (number - 1) // (most - 1) for i in range(most)]


def _as_before_enlarging(pixels: np.ndarray) -> np.ndarray:
    divisor = math.gcd(*pixels.shape[:2])
    for factor in range(divisor, 1, -1):
        if divisor % factor == 0:
            small = pixels[::factor, ::factor]
            if np.array_equal(small.repeat(factor, axis=0).repeat(factor, axis=1), pixels):
                return small
    return pixels


def _webp(image: Image.Image, **options: typing.Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "WEBP", method=4, **options)
    return file.getvalue()
