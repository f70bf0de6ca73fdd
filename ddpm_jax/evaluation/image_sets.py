"""Sets of images to be scored or compared with: an .npz file, a folder of image files, or a data set of a config."""

import dataclasses
import json
import math
import typing
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ddpm_jax.config import DataConfig
from ddpm_jax.data.fingerprint import fingerprint
from ddpm_jax.data.folder import sizes
from ddpm_jax.data.source import Source
from ddpm_jax.data.sources import load_source, resolve
from ddpm_jax.system.errors import UserError, printable
from ddpm_jax.system.files import open_file
from ddpm_jax.system.npy import headers_of

ARRAY = "arr_0.npy"
"""The images in an .npz file."""
DAMAGE = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError)
"""What reading a damaged .npz file raises."""
_READ_AT_ONCE = 256  # images
_BYTES_AT_ONCE = 2**20


class ImageSet(typing.NamedTuple):
    """Images by index."""

    number: int
    """N."""
    shape: tuple[int, int, int]
    """(H, W, C)."""
    read: Callable[[np.ndarray], np.ndarray]
    """Maps (B,) rising indices to (B, H, W, C) uint8."""
    name: str
    """For messages and the protocol."""
    identity: str
    """Checksum of the images: the same set in another place has the same."""
    whole: str
    """Checksum of the set that they are part of."""

    def first(self, number: int) -> "ImageSet":
        """Returns the first images."""
        return (
            self._replace(number=number, identity=f"{self.identity}, first {number}") if number < self.number else self
        )

    def by_content(self) -> "ImageSet":
        """Returns the same images with a checksum of their pixels alone, whatever set they are part of."""
        checksum = 0
        for first in range(0, self.number, _READ_AT_ONCE):
            indices = np.arange(first, min(first + _READ_AT_ONCE, self.number))
            checksum = zlib.crc32(self.read(indices).tobytes(), checksum)
        return self._replace(identity=f"{checksum:08x} {'x'.join(map(str, (self.number, *self.shape)))}")

    def spaced(self, number: int) -> "ImageSet":
        """Returns as many images, evenly spaced over the set; all of them if there are no more, or for 0."""
        if not 0 < number < self.number:
            return self
        read, total = self.read, self.number
        return self._replace(
            number=number,
            read=lambda indices: read(indices * total // number),
            name=f"{self.name}, {number} of {total} evenly spaced",
            identity=f"{self.identity}, {number} evenly spaced",
        )


def of_source(source: Source) -> ImageSet:
    """Returns the images of a data set."""
    identity = f"{zlib.crc32(json.dumps(fingerprint(source), sort_keys=True).encode()):08x}"
    return ImageSet(source.num_examples, source.image_shape, source.read, source.name, identity, identity)


def open_folder(folder: Path) -> ImageSet:
    """Opens a folder of image files, which are not resized; of a folder with splits, the training split.

    Raises:
      UserError: there are no images, or they are of several sizes or kinds.
    """
    config = DataConfig(source="folder", path=str(folder), channels=None)
    found = sizes(config)
    if len(found) > 1:
        (size, path), (other, path_of_other) = sorted(found.items())[:: len(found) - 1]
        raise UserError(
            f"{printable(folder)} holds images of {len(found)} sizes ({printable(path)} is {size[0]}x{size[1]}, "
            f"{printable(path_of_other)} {other[0]}x{other[1]}): how they are resized would change the scores; resize "
            "them beforehand, or name a config whose data section does it"
        )
    height, width = next(iter(found))
    return of_source(load_source(resolve(dataclasses.replace(config, height=height, width=width))))


def members_of(file: Path) -> frozenset[str]:
    """Returns the names of what is in an .npz file, such as `arr_0.npy`; none if it is not one."""
    try:
        with open_file(file) as opened, zipfile.ZipFile(opened) as archive:
            return frozenset(archive.namelist())
    except DAMAGE:
        return frozenset()


def open_npz(file: Path) -> ImageSet:
    """Opens the images of an .npz file, `arr_0`, (N, H, W, C) uint8; they are read as they are needed.

    Raises:
      UserError: there is no such file, it is damaged, or contains no such array.
    """
    shown = printable(file)
    if not file.is_file():
        raise UserError(f"there is no file {shown}")
    try:
        with zipfile.ZipFile(file) as archive:
            if ARRAY not in archive.namelist():
                found = ", ".join(name.removesuffix(".npy") for name in archive.namelist())
                raise UserError(f"{shown} contains no images: they must be arr_0, and there are {found or 'no arrays'}")
            checksum = archive.getinfo(ARRAY).CRC
            with archive.open(ARRAY) as member:  # which compares the checksum at the end
                while member.read(_BYTES_AT_ONCE):
                    pass
            shape, dtype, fortran, start = headers_of(archive)[ARRAY.removesuffix(".npy")]
    except DAMAGE as error:
        raise UserError(f"{shown} contains no readable arr_0 ({str(error) or type(error).__name__})") from error
    if len(shape) != 4 or dtype != np.uint8 or not all(shape):
        raise UserError(f"{shown}: arr_0 must be (N, H, W, C) uint8 of the values 0 to 255, not {shape} {dtype}")
    if shape[1] in (1, 3) and shape[3] > 4:
        raise UserError(f"{shown}: arr_0 is {shape}, which has the channels first: save arr_0.transpose(0, 2, 3, 1)")
    if fortran:
        raise UserError(f"{shown}: arr_0 is in Fortran order: save np.ascontiguousarray(images)")
    read = _Reader(file, start, shape[1:])
    identity = f"{checksum:08x} {'x'.join(map(str, shape))}"
    return ImageSet(shape[0], (shape[1], shape[2], shape[3]), read, shown, identity, identity)


class _Reader:
    """Reads images of an array in an archive, which stays open: a compressed one is unpacked once from end to end."""

    def __init__(self, file: Path, start: int, shape: tuple[int, ...]):
        self._file, self._start, self._shape, self._size = file, start, shape, math.prod(shape)
        self._member: typing.IO[bytes] | None = None

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        try:
            if self._member is None:
                self._member = zipfile.ZipFile(self._file).open(ARRAY)  # noqa: SIM115
            images = np.empty((len(indices), self._size), np.uint8)
            for i, index in enumerate(indices.tolist()):
                self._member.seek(self._start + index * self._size)
                images[i] = np.frombuffer(self._member.read(self._size), np.uint8)
            return images.reshape(-1, *self._shape)
        except DAMAGE as error:
            raise UserError(f"{printable(self._file)} is damaged ({str(error) or type(error).__name__})") from error
