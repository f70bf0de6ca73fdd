"""Pictures of any kind and size, as arrays: center-cropped to the requested aspect ratio and resized.

Resizing is antialiased and bicubic; gray, color and alpha are converted to the requested channels.
"""

import concurrent.futures
import contextlib
import errno
import functools
import io
import pathlib
import threading
import typing
import warnings
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from ddpm_jax.config import DataConfig
from ddpm_jax.system.errors import UserError, printable
from ddpm_jax.system.files import check_regular, open_file

# What Pillow reads well, and by itself: no format that is a program, as EPS, or a stub.
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "JPEG2000", "PPM", "QOI", "DIB", "TGA", "PCX")
_WITH_SIGNATURE = _FORMATS[:-3]  # as the last ones, anything may begin
_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*", b"RIFF", b"BM", b"\0\0\0\x0cjP")
_CONVERTIBLE = frozenset(["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "I"])
_DEEP = "I"  # begins the modes of 16-bit gray
_LARGEST_FILE = 2**31  # bytes: more than the pixels of any that is decoded
_LARGE = 32.0  # megapixels
_large = threading.Lock()
WHITE = 2**16 - 1
"""The level of 16-bit gray that is white."""

T = typing.TypeVar("T")


class Unreadable(Exception):
    """A file is no picture; the reason in a few words."""


class Facts(typing.NamedTuple):
    """What is known of a picture in its file."""

    size: tuple[int, int]
    """(height, width)."""
    channels: int
    deep: int
    """The highest level of gray with more than 8 bits, once it is decoded; 0: it has 8 bits."""
    several: bool
    """Whether there are more frames or pages than the first, which is read."""


def decode(file: pathlib.Path | io.BytesIO, *, max_megapixels: float = 0.0) -> Image.Image:
    """Decodes a picture, and turns it as its camera was held.

    Args:
      file: a file, or its content.
      max_megapixels: larger pictures are refused; 0: none.

    Raises:
      Unreadable: it is no picture, or damaged.
    """
    with _reasons(file), _open(file, max_megapixels) as image:
        return _in_turn(image, lambda: _loaded(image)[0])


def read_picture(
    file: pathlib.Path | io.BytesIO, shape: tuple[int, int, int], *, max_megapixels: float = 0.0, white: int = WHITE
) -> tuple[np.ndarray, Facts]:
    """Decodes a picture as `decode`, and returns it as `to_array` does, with what is known of it in its file."""

    def read() -> tuple[np.ndarray, Facts]:
        turned, facts = _loaded(image)
        return to_array(turned, shape, white=white), facts

    with _reasons(file), _open(file, max_megapixels) as image:
        return _in_turn(image, read)


def _loaded(image: Image.Image) -> tuple[Image.Image, Facts]:
    facts = _facts(image)
    _scale_transparency(image)
    image.load()
    facts = facts._replace(deep=_check_depth(image))
    try:
        return ImageOps.exif_transpose(image), facts
    except Exception:  # what a camera noted is damaged, and not the picture
        return image.copy(), facts


def _in_turn(image: Image.Image, work: Callable[[], T]) -> T:
    """Does the work on a picture. Large ones take up to a few GiB: many threads decode one at a time.

    That is done in a thread of its own, as the C library keeps the memory of a thread for the same thread.
    """
    if image.width * image.height <= _LARGE * 1e6:
        return work()
    with _large, concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def look_over(path: pathlib.Path, *, max_megapixels: float = 0.0) -> tuple[int, Facts]:
    """Decodes a file as cheaply as can be, and gives the CRC-32 of its bytes.

    Raises:
      Unreadable: it is no picture, or damaged.
    """
    with _reasons(path), _open(path, max_megapixels) as image:
        crc = 0
        with open_file(path) as file:
            while chunk := file.read(2**20):
                crc = zlib.crc32(chunk, crc)
        facts = _facts(image)
        image.draft(None, (1, 1))  # a JPEG is decoded at an eighth of its size
        facts = facts._replace(deep=_in_turn(image, lambda: (image.load(), _check_depth(image))[1]))
    return crc, facts


def header(path: pathlib.Path) -> Facts:
    """Reads what is known of a picture without decoding it.

    Raises:
      Unreadable: it is no picture, or damaged.
    """
    with _reasons(path), _open(path) as image:
        return _facts(image)


def is_picture(path: pathlib.Path) -> bool:
    """Returns whether a file begins as a picture does."""
    try:
        with _open(path, formats=_WITH_SIGNATURE):
            return True
    except Exception:
        return False


@functools.cache
def _quiet_pillow() -> None:
    """Leaves limits and warnings to this module, in the whole process; nothing is said twice."""
    Image.init()  # or the formats below would not be known yet
    Image.MAX_IMAGE_PIXELS = None
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # long notes in a PNG are no damage
    warnings.filterwarnings("ignore", module="PIL")


def _open(
    file: pathlib.Path | io.BytesIO, max_megapixels: float = 0.0, formats: tuple[str, ...] = _FORMATS
) -> Image.Image:
    _quiet_pillow()
    if isinstance(file, pathlib.Path):
        check_regular(file)
        if file.stat().st_size > _LARGEST_FILE:  # some formats are read whole
            raise Unreadable(f"a file of {file.stat().st_size / 2**30:.3g} GiB")
    image = Image.open(file, formats=formats)
    megapixels = image.width * image.height / 1e6
    if 0 < max_megapixels < megapixels:
        image.close()
        raise Unreadable(
            f"too large: {megapixels:.3g} megapixels, allowed by --data.max-megapixels {np.ceil(megapixels):.0f}"
        )
    return image


def _facts(image: Image.Image) -> Facts:
    several = image.format in ("GIF", "TIFF", "WEBP", "PNG", "AVIF") and getattr(image, "is_animated", False)
    return Facts(image.size[::-1], channels_of(image), 0, several)


@contextlib.contextmanager
def _reasons(file: pathlib.Path | io.BytesIO) -> Iterator[None]:
    """Names in a few words why a file cannot be read; damaged files make Pillow raise a dozen kinds."""
    try:
        yield
    except (Unreadable, MemoryError):
        raise
    except Exception as error:
        raise Unreadable(_reason(error, file)) from error


def _reason(error: Exception, file: pathlib.Path | io.BytesIO) -> str:
    match error:
        case PermissionError():
            return "not permitted"
        case FileNotFoundError():
            return "gone"
        case OSError() if error.errno is not None and error.errno != errno.EINVAL:
            return str(error.strerror).lower()
        case Image.UnidentifiedImageError():
            return _what_it_is(file)
        case _:
            return "damaged"


def _what_it_is(file: pathlib.Path | io.BytesIO) -> str:
    """Names what Pillow found to be no picture by the first bytes."""
    if isinstance(file, io.BytesIO):
        start = file.getvalue()[:64]
    else:
        with open_file(file) as opened:
            start = opened.read(64)
    if not start:
        return "empty"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS: run git lfs pull"
    return "damaged, or of a kind that Pillow does not read" if start.startswith(_SIGNATURES) else "no picture"


def _check_depth(image: Image.Image) -> int:
    """Refuses pixels that cannot be converted to 8 bits without a guess; returns the highest level of deeper gray."""
    if image.mode not in _CONVERTIBLE and not image.mode.startswith(_DEEP):
        kind = "floating-point pixels" if image.mode == "F" else f"pixels of the kind {image.mode}"
        raise Unreadable(f"{kind}: save it with 8 or 16 bits")
    if not image.mode.startswith(_DEEP):
        return 0
    levels = np.asarray(image)
    least, most = int(levels.min()), int(levels.max())
    if least < 0 or most > WHITE:
        raise Unreadable(f"levels from {least} to {most}: save it with 8 or 16 bits")
    return most


def channels_of(image: Image.Image) -> int:
    """Counts the channels of a picture as it is in its file; palettes count as color."""
    if image.has_transparency_data:
        return 4
    return 1 if image.mode in ("1", "L", "F") or image.mode.startswith(_DEEP) else 3


def _scale_transparency(image: Image.Image) -> None:
    """Scales the transparent level of a PNG, which Pillow leaves as it is in the file, like its pixels."""
    clear = image.info.get("transparency")
    if not isinstance(image, PngImagePlugin.PngImageFile) or clear is None or not image.tile:
        return
    match image.tile[0].args:
        case "L;2" | "L;4" as raw if isinstance(clear, int):
            image.info["transparency"] = clear * {"L;2": 85, "L;4": 17}[raw]
        case "RGB;16B" if isinstance(clear, tuple):
            image.info["transparency"] = tuple(level >> 8 for level in clear)


def _to_eight_bit(image: Image.Image, white: int) -> Image.Image:
    """Scales 16-bit gray to 8 bits; Pillow's own conversion clips it at 255, and forgets the transparent level."""
    if not image.mode.startswith(_DEEP):
        return image
    values = np.asarray(image).astype(np.float64)
    levels = Image.fromarray(np.round(np.clip(values, 0, white) / (white / 255)).astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is None:
        return levels
    return Image.merge("LA", (levels, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))))


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """Converts to gray, color or color with alpha; what was transparent becomes white where there is no alpha."""
    if channels == 4:
        return image.convert("RGBA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def to_array(image: Image.Image, shape: tuple[int, int, int], *, white: int = WHITE) -> np.ndarray:
    """Crops a picture in the middle to the aspect ratio of a shape, resizes it with antialiasing, and converts it.

    Args:
      image: the picture.
      shape: (H, W, C).
      white: the level of 16-bit gray that becomes 255.

    Returns:
      (H, W, C) uint8.
    """
    height, width, channels = shape
    image = _convert(_to_eight_bit(image, white), channels)
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(shape)


def open_picture(file: str, *, max_megapixels: float = DataConfig.max_megapixels) -> Image.Image:
    """Decodes a picture that a user names.

    Args:
      file: its name.
      max_megapixels: larger pictures are refused; 0: none.

    Raises:
      UserError: it is not there, no picture, or too large.
    """
    path = pathlib.Path(file).expanduser()
    try:
        height, width = header(path).size
        if 0 < max_megapixels < height * width / 1e6:
            raise UserError(
                f"{printable(file)} is {width}x{height}, more than the {max_megapixels:g} megapixels of "
                "data.max_megapixels: make it smaller"
            )
        return decode(path, max_megapixels=max_megapixels)
    except Unreadable as error:
        reason = error if path.is_file() else "there is no such file"
        raise UserError(f"cannot read {printable(file)} as a picture ({reason}): give a PNG or JPEG file") from error
