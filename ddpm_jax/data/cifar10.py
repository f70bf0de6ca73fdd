"""CIFAR-10's own archive (its Python version), as downloaded or unpacked."""

import gzip
import pathlib
import pickle
import tarfile
import typing
import zlib
from collections.abc import Mapping

import numpy as np

from ddpm_jax.config import DataConfig
from ddpm_jax.data.source import Source, in_memory, no_split, shape_of
from ddpm_jax.system.errors import UserError, printable
from ddpm_jax.system.files import open_file
from ddpm_jax.system.plain_pickle import read_dictionary

_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
_DEFAULT = pathlib.Path("data")
_ARCHIVE, _FOLDER = "cifar-10-python.tar.gz", "cifar-10-batches-py"
_TRAIN, _TEST = [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]
_PARTS = {"train": _TRAIN, "test": _TEST, "all": _TRAIN + _TEST}
_PIXELS = 3 * 32 * 32
_AT_ONCE = 2**20
_LARGEST_FILE, _LARGEST_ARCHIVE = 2**26, 2**29  # bytes; CIFAR-10's have 31 MB, and 186 MB
# A damaged archive or pickle makes Python raise many kinds.
_DAMAGE = (
    *(OSError, EOFError, zlib.error, tarfile.TarError, pickle.UnpicklingError, ValueError, TypeError, LookupError),
    *(AttributeError, ArithmeticError, RecursionError, MemoryError),
)


def load(config: DataConfig) -> Source:
    """Reads CIFAR-10 from `cifar-10-python.tar.gz` or the folder it unpacks to.

    Args:
      config: which split; `path` is an archive, an unpacked folder, or the folder that holds one of them; ./data if
        empty. Its `channels` is known.

    Returns:
      the source, with the classes' names.

    Raises:
      UserError: it is missing (the message says where to get it) or damaged, or other images are requested.
    """
    if shape_of(config) != (32, 32, 3):
        raise UserError(
            f"data: CIFAR-10 is 32x32 with 3 channels, not {config.height}x{config.width} with {config.channels};"
            " set data.height=32, data.width=32, data.channels=3"
        )
    if config.split not in _PARTS:
        raise no_split(config, _PARTS)
    place = _find(config)
    try:
        files = _read_archive(place) if place.is_file() else _read_folder(place)
        images, labels, names = _read(files, _PARTS[config.split])
    except _DAMAGE as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())[:100]
        reason = reason or type(error).__name__
        raise UserError(f"data.path: {place} is damaged ({reason}); download {_URL} again") from error
    pixels = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return in_memory(np.ascontiguousarray(pixels), labels, names, name=f"CIFAR-10, {config.split}")


def probe(config: DataConfig) -> int:
    """Returns the number of channels: the images are in color."""
    del config
    return 3


def _find(config: DataConfig) -> pathlib.Path:
    base = pathlib.Path(config.path).expanduser() if config.path else _DEFAULT
    if base.is_file() or any((base / name).is_file() for name in ("test_batch", "data_batch_1")):
        return base
    for name in (_FOLDER, _ARCHIVE):
        if (base / name).exists():
            return base / name
    raise UserError(
        f"data.path: there is no CIFAR-10 in {base}; download {_URL} (163 MB) and put it there as it is, or name"
        " where it lies with --data.path"
    )


class _Bounded:
    """What a file unpacks to, up to a size: the headers of an archive may claim any."""

    def __init__(self, file: typing.BinaryIO):
        self._file, self._left = file, _LARGEST_ARCHIVE

    def read(self, size: int) -> bytes:
        content = self._file.read(size)
        self._left -= len(content)
        if self._left < 0:
            raise ValueError(f"it unpacks to more than {_LARGEST_ARCHIVE // 2**20} MiB")
        return content


def _read_archive(archive: pathlib.Path) -> dict[str, bytes]:
    with open_file(archive) as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream = _Bounded(typing.cast(typing.BinaryIO, gzip.GzipFile(fileobj=file)) if packed else file)
        files = {}
        with tarfile.open(fileobj=typing.cast(typing.Any, stream), mode="r|") as members:
            for member in members:
                opened = members.extractfile(member) if member.isreg() and not member.issparse() else None
                if opened is not None and member.size <= _LARGEST_FILE:
                    files[pathlib.PurePath(member.name).name] = opened.read()
        while stream.read(_AT_ONCE):
            pass  # gzip's checksum is at the end, to which tarfile does not read
        return files


def _read_folder(folder: pathlib.Path) -> dict[str, bytes]:
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.stat().st_size <= _LARGEST_FILE]
    return {file.name: file.read_bytes() for file in files}


def _read(files: Mapping[str, bytes], batches: list[str]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Pickles of Python 2: dictionaries of an array and a list."""
    images, labels = [], []
    for name in batches:
        batch = read_dictionary(files[name], encoding="bytes")
        pixels = getattr(batch[b"data"], "value", None)
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (_PIXELS,):
            raise ValueError(f"{name} holds no (N, {_PIXELS}) uint8")
        images.append(pixels)
        labels.append(np.array(batch[b"labels"], np.int64))
        if labels[-1].shape != (len(pixels),) or not len(pixels):
            raise ValueError(f"{name} has labels of shape {labels[-1].shape} for {len(pixels)} images")
    names = [
        printable(name.decode("ascii"))
        for name in read_dictionary(files["batches.meta"], encoding="bytes")[b"label_names"]
    ]
    numbers = np.concatenate(labels)
    if numbers.min() < 0 or numbers.max() >= len(names):
        raise ValueError(f"a label is {numbers.max()} where there are {len(names)} classes")
    return np.concatenate(images), numbers, names
