"""Pictures of any kind and size, as arrays: center-cropped to the requested aspect ratio and resized.

Resizing is antialiased and bicubic; gray, color and alpha are converted to the requested channels.
"""

import io
import pathlib
import zlib

import numpy as np
from PIL import Image, ImageOps

from ddpm_jax.system.errors import UserError


class Unreadable(Exception):
    """A file is no picture; the reason in a few words."""


def decode(file: pathlib.Path | io.BytesIO) -> Image.Image:
    """Decodes a picture, and turns it as its camera was held.

    Raises:
      Unreadable: it is no picture, or damaged.
    """
    try:
        with Image.open(file) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except Exception as error:  # damaged files make Pillow raise a dozen kinds
        raise Unreadable(_reason(error)) from error


def look_over(path: pathlib.Path) -> int:
    """Decodes a file as cheaply as can be, and gives the CRC-32 of its bytes.

    Raises:
      Unreadable: it is no picture, or damaged.
    """
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.draft(None, (1, 1))  # a JPEG is decoded at an eighth of its size
            image.load()
    except Exception as error:
        raise Unreadable(_reason(error)) from error
    return zlib.crc32(content)


def _reason(error: Exception) -> str:
    match error:
        case PermissionError():
            return "not permitted"
        case FileNotFoundError():
            return "gone"
        case Image.UnidentifiedImageError():
            return "no picture"
        case Image.DecompressionBombError():
            return "too many pixels"
        case _:
            return "damaged"


def channels_of(image: Image.Image) -> int:
    """Counts the channels of a picture as it is in its file; palettes count as color."""
    if image.has_transparency_data:
        return 4
    return 1 if image.mode in ("1", "L") or image.mode.startswith("I") else 3


def _to_eight_bit(image: Image.Image) -> Image.Image:
    """Scales 16-bit gray to 8 bits; Pillow's own conversion clips it at 255."""
    if not image.mode.startswith("I"):
        return image
    values = np.clip(np.asarray(image).astype(np.float64), 0, 65535)
    return Image.fromarray(np.round(values / 257).astype(np.uint8))


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """Converts to gray, color or color with alpha; what was transparent becomes white where there is no alpha."""
    if channels == 4:
        return image.convert("RGBA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def to_array(image: Image.Image, shape: tuple[int, int, int]) -> np.ndarray:
    """Crops a picture in the middle to the aspect ratio of `shape`, resizes it with antialiasing, and converts it."""
    height, width, channels = shape
    image = _convert(_to_eight_bit(image), channels)
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(shape)


def open_picture(file: str) -> Image.Image:
    """Decodes a picture that a user names.

    Raises:
      UserError: it is not there or no picture.
    """
    try:
        return decode(pathlib.Path(file).expanduser())
    except Unreadable as error:
        reason = "there is no such file" if not pathlib.Path(file).expanduser().is_file() else error
        raise UserError(f"cannot read {file} as a picture ({reason}): give a PNG or JPEG file") from error
