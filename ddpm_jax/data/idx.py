"""idx files, the format of MNIST and of Fashion-MNIST."""

import gzip
import math
import pathlib
import struct
import typing
import zlib

import numpy as np

from ddpm_jax.config import DataConfig
from ddpm_jax.data.source import Source, fits_memory, in_memory, no_split
from ddpm_jax.system.errors import NoSuchSplit, UserError, few, printable
from ddpm_jax.system.files import open_file

_DEBIAN_FASHION_MNIST = pathlib.Path("/usr/share/datasets/fashion-mnist")
_PARTS = {"train": ("train",), "test": ("t10k",), "all": ("train", "t10k")}


def load(config: DataConfig) -> Source:
    """Reads idx files; images smaller than requested are padded with black.

    Args:
      config: which images; its `channels` is known.

    Returns:
      the source.

    Raises:
      UserError: a file is missing or damaged, or does not fit the configuration.
    """
    folder = _folder(config)
    if config.channels != 1:
        raise UserError(f"data.channels: idx files hold gray images; set it to 1, not {config.channels}")
    images, labels = list[np.ndarray](), list[np.ndarray]()
    fault, used = "", set[pathlib.Path | None]()
    for part, images_file in _images_of(folder, config).items():
        pixels = _read(images_file, 3, config)
        if not fits_memory(config, len(pixels) + sum(len(part) for part in images)):
            raise _too_large(config, images_file)
        images.append(_pad(config, pixels))
        labels_file = _find(folder, part, "labels", 1)
        if labels_file is not None:
            try:
                labels.append(_read(labels_file, 1, config))
            except UserError as error:  # which an unconditional run need not know
                fault = str(error)
                continue
            if len(labels[-1]) != len(pixels):
                fault = f"{labels_file} has {len(labels[-1])} labels for {len(pixels)} images"
        used |= {images_file, labels_file}
    usable = len(labels) == len(images) and not fault
    unused = sorted(
        entry.name for entry in folder.iterdir() if entry not in used and not entry.name.startswith(("t10k", "train"))
    )
    return in_memory(
        images[0] if len(images) == 1 else np.concatenate(images),
        np.concatenate(labels) if usable else None,
        name=f"idx {printable(folder)}, {config.split}",
        label_fault=fault,
        notes=(f"not used in {printable(folder)}: {few(unused, 20)}",) if unused else (),
    )


_WHERE_FROM = (
    "apt-get install dataset-fashion-mnist puts such files into"
    f" {_DEBIAN_FASHION_MNIST}, MNIST's own are at https://ossci-datasets.s3.amazonaws.com/mnist"
)


def _images_of(folder: pathlib.Path, config: DataConfig) -> dict[str, pathlib.Path]:
    """Finds the files of images of a split, by part."""
    if config.split not in _PARTS:
        raise no_split(config, _PARTS)
    found = {}
    for part in _PARTS[config.split]:
        file = _find(folder, part, "images", 3)
        if file is None:
            raise NoSuchSplit(f"data.path: {folder} holds no {part}-images-idx3-ubyte or .gz; {_WHERE_FROM}")
        found[part] = file
    return found


def _folder(config: DataConfig) -> pathlib.Path:
    if not config.path:
        if _DEBIAN_FASHION_MNIST.is_dir():
            return _DEBIAN_FASHION_MNIST
        raise UserError(f"data.path: name the folder of idx files; {_WHERE_FROM}")
    folder = pathlib.Path(config.path).expanduser()
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"data.path: {config.path} {what}; {_WHERE_FROM}")
    return folder


def _find(folder: pathlib.Path, part: str, what: str, rank: int) -> pathlib.Path | None:
    names = [f"{part}-{what}{dot}idx{rank}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read(path: pathlib.Path, rank: int, config: DataConfig) -> np.ndarray:
    """Reads one file: two zero bytes, the type (8: uint8), the rank, the big-endian shape, the data; gzipped or not.

    A few MB may unpack to many GiB: no more is unpacked than the header says, and than fits the memory.
    """
    begin = 4 + 4 * rank
    try:
        with open_file(path) as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream = typing.cast(typing.BinaryIO, gzip.GzipFile(fileobj=file)) if packed else file
            header = stream.read(begin)
            if header[:4] != bytes([0, 0, 8, rank]) or len(header) < begin:
                raise UserError(f"data.path: {path} is no idx file of {rank} dimensions of bytes; fetch it again")
            shape = struct.unpack(f">{rank}I", header[4:])
            size = math.prod(shape)
            if size == 0:
                raise UserError(f"data.path: {path} is empty; fetch it again")
            if size > config.memory_gib * 2**30:
                raise _too_large(config, path)
            content = stream.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data.path: {path} cannot be read ({error}); fetch it again") from error
    if len(content) != size:
        found = f"{len(content)} bytes" if len(content) < size else "more"
        raise UserError(f"data.path: {path} has {found} of data where its header says {size}; fetch it again")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _too_large(config: DataConfig, path: pathlib.Path) -> UserError:
    return UserError(
        f"data.path: {path} unpacks to more than data.memory_gib={config.memory_gib:g}, and idx files are kept in"
        " memory: use a larger --data.memory-gib"
    )


def _pad(config: DataConfig, images: np.ndarray) -> np.ndarray:
    """Surrounds (N, h, w) images with black to the configuration's size; an odd row or column goes below or right."""
    height, width = images.shape[1:]
    rows, columns = config.height - height, config.width - width
    if rows < 0 or columns < 0:
        raise UserError(
            f"data: the images of {config.source} are {height}x{width}, larger than {config.height}x{config.width};"
            f" set data.height={height} and data.width={width}, or more: what is more is padded with black"
        )
    if not rows and not columns:
        return images[..., None]
    sides = ((0, 0), (rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2))
    return np.pad(images, sides)[..., None]


def probe(config: DataConfig) -> int:
    """Returns the number of channels: the images are gray."""
    _images_of(_folder(config), config)
    return 1
