"""The images of a sampling job on disk: written as they are drawn, and packed into one file in the end.

The folder holds `samples.npz`, the images 0 .. N-1 as public evaluators read them (`arr_0`, uint8, NHWC), and
`parts/FIRST-STOP.npy`, ranges of images that are not in it yet. Each file is there whole or not at all, and none is
removed before its images are in another.
"""

import contextlib
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import write_whole

_ARRAY = "arr_0.npy"
_READ_AT_ONCE = 256

Range = tuple[int, int]
"""The images first .. stop-1."""


def missing_ranges(done: Iterable[Range], number: int, *, longest: int) -> list[Range]:
    """Lists what is left to do of 0 .. number-1, cut into ranges that are not too long.

    Args:
      done: the ranges that are done, in any order; they may overlap.
      number: how many there shall be.
      longest: how long a range may be, >= 1.

    Returns:
      ranges in rising order.

    >>> missing_ranges([(0, 4), (6, 8)], 13, longest=3)
    [(4, 6), (8, 11), (11, 13)]
    """
    missing, first = [], 0
    for gap_stop, next_first in [*sorted(done), (number, number)]:
        stop = min(gap_stop, number)
        missing += [(begin, min(begin + longest, stop)) for begin in range(first, stop, longest)]
        first = max(first, next_first)
    return missing


class Parts:
    """Ranges of arrays in a folder, one `.npy` file each."""

    def __init__(self, folder: Path, shape: Sequence[int]):
        """Looks at a folder that need not be there yet; `shape` is that of one image's array."""
        self.folder, self.shape = folder, tuple(shape)

    def files(self) -> dict[Range, Path]:
        """Finds the whole parts of this shape, in rising order; what else is there counts as not drawn."""
        found = {}
        for path in self.folder.glob("*.npy"):
            name = re.fullmatch(r"(\d+)-(\d+)\.npy", path.name)
            if name is None:
                continue
            first, stop = int(name[1]), int(name[2])
            with contextlib.suppress(ValueError, OSError):
                array = np.load(path, mmap_mode="r")
                if array.shape == (stop - first, *self.shape) and array.dtype == np.uint8:
                    found[first, stop] = path
        return dict(sorted(found.items()))

    def save(self, first: int, arrays: np.ndarray) -> None:
        """Saves a range: (B, ...) uint8, the first of index `first`."""
        path = self.folder / f"{first:08d}-{first + len(arrays):08d}.npy"
        write_whole(path, lambda file: np.save(file, arrays))

    def read(self, first: int, stop: int) -> Iterator[np.ndarray]:
        """Reads a range, which must be there, in (B, ...) arrays that follow one another."""
        for (begin, end), path in self.files().items():
            if begin <= first < min(end, stop):
                yield np.load(path, mmap_mode="r")[first - begin : stop - begin]
                first = min(end, stop)
        if first < stop:
            raise UserError(f"images {first} to {stop - 1} have gone from {self.folder}: start the same command again")

    def remove(self, files: Iterable[Path] | None = None) -> None:
        """Removes some of the parts, or all; also the folder once it is empty."""
        for path in self.folder.glob("*.npy") if files is None else files:
            path.unlink(missing_ok=True)
        if not any(self.folder.glob("*.npy")):
            for path in self.folder.glob(".*.part"):  # of a process that was killed
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.folder.rmdir()


class StoredImages:
    """The images of one job."""

    def __init__(self, folder: Path, image_shape: Sequence[int]):
        """Looks at a folder that need not be there yet; `image_shape` is (H, W, C)."""
        self.file = folder / "samples.npz"
        self._parts = Parts(folder / "parts", image_shape)

    def done(self) -> list[Range]:
        """Lists the ranges that are drawn, packed or not; they may overlap."""
        return [(0, self._packed()), *self._parts.files()]

    def save(self, first: int, images: np.ndarray) -> None:
        """Keeps a range: (B, H, W, C) uint8, the first of index `first`."""
        self._parts.save(first, images)

    def pack(self) -> int:
        """Packs what is drawn, from image 0 to the first that is missing, into `samples.npz`, and says how many."""
        packed = self._packed()
        number = packed
        for first, stop in self._parts.files():
            if first <= number:
                number = max(number, stop)
        if number > packed:
            shape = (number, *self._parts.shape)
            write_whole(self.file, lambda file: _write_npz(file, shape, self._all(packed, number)))
        self._parts.remove([path for (_, stop), path in self._parts.files().items() if stop <= number])
        return number

    def read(self, number: int) -> Iterator[np.ndarray]:
        """Reads the packed images 0 .. number-1 in (B, H, W, C) arrays that follow one another."""
        with self._open() as member:
            shape = _read_shape(member)
            size = int(np.prod(shape[1:]))
            for first in range(0, number, _READ_AT_ONCE):
                count = min(_READ_AT_ONCE, number - first)
                yield np.frombuffer(member.read(count * size), np.uint8).reshape(count, *shape[1:])

    def _all(self, packed: int, number: int) -> Iterator[np.ndarray]:
        if packed:
            yield from self.read(packed)
        yield from self._parts.read(packed, number)

    def _packed(self) -> int:
        if not self.file.exists():
            return 0
        with self._open() as member:
            shape = _read_shape(member)
        if shape[1:] != self._parts.shape:
            raise UserError(f"{self.file} holds images of {shape[1:]}, not {self._parts.shape}: move it away")
        return shape[0]

    @contextlib.contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        try:
            with zipfile.ZipFile(self.file) as archive, archive.open(_ARRAY) as member:
                yield member  # type: ignore[misc]
        except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
            raise UserError(f"{self.file} is damaged ({error}): move it away, and its images are drawn anew") from error


def _write_npz(file: BinaryIO, shape: tuple[int, ...], arrays: Iterable[np.ndarray]) -> None:
    """Writes what `np.savez` would, without all of it in memory, and with no date: the same images, the same bytes."""
    member = zipfile.ZipInfo(_ARRAY)
    with zipfile.ZipFile(file, "w") as archive, archive.open(member, "w", force_zip64=True) as array:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(array, header)  # type: ignore[arg-type]
        for part in arrays:
            array.write(np.ascontiguousarray(part).tobytes())


def _read_shape(member: BinaryIO) -> tuple[int, ...]:
    np.lib.format.read_magic(member)
    shape, _, dtype = np.lib.format.read_array_header_1_0(member)
    if dtype != np.uint8:
        raise ValueError(f"{dtype} instead of uint8")
    return shape
