"""Results of jobs on disk: saved batch by batch, so that a job can be resumed, and images packed into one file.

The folder of a sampling job contains `samples.npz`, the images 0 .. N-1 in the format of public evaluators (`arr_0`,
uint8, NHWC; `arr_1`, the class labels, int64, if there are any), and `parts/FIRST-STOP.npz`, ranges of images that are
not packed yet. Files are written atomically, none is removed before its images are in another, and each has a checksum
and says what it is of: a damaged one is set aside, and its images are drawn again.
"""

import contextlib
import json
import math
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from ddpm_jax.run.computed_on import describe_environment, differences
from ddpm_jax.system.errors import Damage, UserError
from ddpm_jax.system.files import (
    add_array,
    check_same_job,
    checksum_of,
    claimed,
    open_npz,
    read_arrays,
    read_json,
    read_or_set_aside,
    write_arrays,
    write_json,
    write_npz,
)
from ddpm_jax.system.hosts import (
    appears,
    check_same,
    check_shared_folder,
    is_primary_host,
    of_primary_host,
    wait_for_all,
)
from ddpm_jax.system.progress import say

_ARRAY = "arr_0.npy"
_READ_AT_ONCE = 256
_BLOCK = 4096  # bytes that a disk gives at least to a file

Range = tuple[int, int]
"""The images first .. stop-1."""


def missing_ranges(done: Iterable[Range], number: int, *, longest: int) -> list[Range]:
    """Lists the missing ranges of 0 .. number-1, cut to a length.

    Args:
      done: ranges that are done, in any order; they may overlap.
      number: of images in total.
      longest: most images of a range, >= 1.

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


def per_host(batch_size: int) -> int:
    """Returns the share of each host in a batch over all of them, rounded up."""
    return math.ceil(batch_size / jax.process_count())


def own_share(missing: Sequence[Range]) -> list[Range]:
    """Returns the ranges that this host computes: every n-th of n hosts, of those that host 0 finds missing."""
    ranges = of_primary_host(np.reshape(missing, (-1, 2)))[jax.process_index() :: jax.process_count()]
    return [(first, stop) for first, stop in ranges.tolist()]


def wait_for_hosts(done: Callable[[], Iterable[Range]], number: int, *, folder: Path) -> None:
    """Waits until every host has saved its ranges of a job, and this one sees them.

    Args:
      done: returns the ranges that are saved.
      number: of images of the job.
      folder: of the job, for messages.

    Raises:
      UserError: some do not appear here.
    """
    wait_for_all("all hosts have saved their images")
    if jax.process_count() > 1 and not appears(lambda: not missing_ranges(done(), number, longest=number)):
        raise UserError(f"some images of other hosts do not appear in {folder}: run the same command again")
    wait_for_all("all hosts have seen the images")  # host 0 may remove the parts from here on


@contextlib.contextmanager
def job_folder(
    out: Path,
    description: dict[str, Any],
    *,
    kind: str,
    number: int,
    done: Callable[[], Iterable[Range]],
    request: Sequence[object] = (),
    exact: bool = False,
) -> Iterator[None]:
    """Claims the folder of a job that can be resumed; if it is interrupted, reports how much is done.

    Several hosts share the folder: host 0 claims it for all of them.

    Args:
      out: the folder; created if missing.
      description: all that the results depend on, as JSON values.
      kind: of the job, for messages.
      number: of images of the job.
      done: returns the ranges of images that are saved.
      request: what else must be the same on all hosts.
      exact: refuse to resume it on other devices, cores, instructions or versions, which is a warning otherwise.

    Raises:
      UserError: the folder contains something else, another process is writing to it, the hosts do not share it or
        were started with different options; or `exact`.
    """
    description = json.loads(json.dumps(description))
    check_same(f"{out} {description} {number} {request}")
    with _claim(out, description, kind=kind) if is_primary_host() else contextlib.nullcontext():
        if is_primary_host():
            _note_environment(out, done, number, exact=exact)
        check_shared_folder(out)
        try:
            yield
        except KeyboardInterrupt:
            left = sum(stop - first for first, stop in missing_ranges(done(), number, longest=number))
            say(f"{number - left} of {number} images are done; run the same command to resume")
            raise


@contextlib.contextmanager
def _claim(out: Path, description: dict[str, Any], *, kind: str) -> Iterator[None]:
    begun = {out / ".lock", out / ".job.json.part"}  # what a job leaves that was killed as it began
    if out.exists() and not (out / "job.json").exists() and (not out.is_dir() or {*out.iterdir()} - begun):
        raise UserError(f"{out} is not empty and contains no {kind} job: use another --out")
    with claimed(out):
        check_same_job(out / "job.json", description)
        yield


def _note_environment(out: Path, done: Callable[[], Iterable[Range]], number: int, *, exact: bool) -> None:
    """Records what a job is computed on; names or refuses another environment than that of what is done."""
    file, now = out / "computed_on.json", describe_environment()
    there = read_or_set_aside(file, read_json) if file.exists() else None
    if there is not None and there != now:
        ranges = list(done())
        left = sum(stop - first for first, stop in missing_ranges(ranges, number, longest=number))
        if not left:
            return  # nothing is computed here
        if left < number:
            line = f"{differences(there, now)}: what is computed from here on agrees with the rest to rounding only"
            if exact:
                raise UserError(f"--exact: {out}: {line}; resume it as it was begun, or leave out --exact")
            say(f"warning: {out}: {line}")
    if there != now:
        write_json(file, now)


class Parts:
    """Arrays of ranges of images in a folder, one `.npz` file each, which says what range and what job it is of."""

    def __init__(self, folder: Path, asked: Mapping[str, Any]):
        """Reads a folder, which need not exist; `asked` is all that the arrays depend on, as JSON values."""
        self.folder = folder
        self._about = {"part": folder.name, "job": checksum_of(asked)}
        self._intact: dict[Path, tuple[int, int]] = {}

    def ranges(self) -> list[Range]:
        """Returns the ranges that are saved and intact, in rising order; damaged parts are set aside and missing."""
        found = []
        for (first, stop), path in self._files():
            with contextlib.suppress(FileNotFoundError):  # host 0 has packed it
                version = _version(path)
                if self._intact.get(path) == version or self._load(first, stop, path) is not None:
                    self._intact[path] = version
                    found.append((first, stop))
        return found

    def save(self, first: int, stop: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Saves the arrays of a range by name."""
        path = self.folder / f"{first:08d}-{stop:08d}.npz"
        write_arrays(path, arrays, {"images": (first, stop), **self._about})

    def load(self, first: int, stop: int) -> dict[str, np.ndarray]:
        """Loads the arrays of a range that is saved.

        Raises:
          UserError: it is not, or no longer intact.
        """
        for saved, path in self._files():
            if saved == (first, stop) and (found := self._load(first, stop, path)) is not None:
                return found
        raise UserError(f"images {first} to {stop - 1} are missing in {self.folder}: run the same command again")

    def read(self, first: int, stop: int) -> Iterator[np.ndarray]:
        """Reads the images of any range, if they are saved, as consecutive (B, ...) arrays."""
        for begin, end in self.ranges():
            if begin <= first < min(end, stop):
                yield self.load(begin, end)["images"][first - begin : stop - begin]
                first = min(end, stop)
        if first < stop:
            self.load(first, stop)

    def remove(self, ranges: Iterable[Range] | None = None) -> None:
        """Removes the parts of some ranges, or all, and the folder once it is empty."""
        for saved, path in list(self._files()):
            if ranges is None or saved in ranges:
                path.unlink(missing_ok=True)
        if not any(self.folder.glob("*.npz")):
            for path in self.folder.glob(".*.part"):  # of a process that was killed
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def _files(self) -> Iterator[tuple[Range, Path]]:
        for path in sorted(self.folder.glob("*.npz")):
            name = re.fullmatch(r"(\d+)-(\d+)", path.stem)
            if name is not None:
                yield (int(name[1]), int(name[2])), path

    def _load(self, first: int, stop: int, path: Path) -> dict[str, np.ndarray] | None:
        about = {"images": (first, stop), **self._about}
        return read_or_set_aside(path, lambda path: read_arrays(path, about))


class StoredImages:
    """The images of one job."""

    def __init__(
        self, folder: Path, image_shape: Sequence[int], *, asked: Mapping[str, Any], labels: Sequence[int] = ()
    ):
        """Reads the folder of a job, which need not exist.

        Args:
          folder: of the job.
          image_shape: (H, W, C).
          asked: all that the images depend on, as JSON values.
          labels: class labels that the images have in turn; none if they have no labels.
        """
        self.file, self._labels, self._shape = folder / "samples.npz", labels, tuple(image_shape)
        self._about = {"job": checksum_of(asked)}
        self._parts = Parts(folder / "parts", asked)
        self._checked: tuple[tuple[int, int], int] | None = None

    def done(self) -> list[Range]:
        """Returns the ranges of saved images, packed or not; they may overlap. What is damaged is set aside."""
        return [(0, self._packed()), *self._parts.ranges()]

    def save(self, first: int, images: np.ndarray) -> None:
        """Saves a range: (B, H, W, C) uint8, the first of index `first`."""
        self._parts.save(first, first + len(images), {"images": images})

    def check_space(self, missing: Sequence[Range], *, copies: int = 1) -> None:
        """Checks that the disk has room for images that are to be drawn, and for all of them once more to be packed.

        Args:
          missing: their ranges.
          copies: arrays of an image's size that are saved for each of them.

        Raises:
          UserError: it has not; the message names the number of images that fit.
        """
        number, done = (sum(stop - first for first, stop in ranges) for ranges in (missing, self.done()))
        if not number and not self._parts.ranges():
            return
        size = math.prod(self._shape)
        in_file = size + 8 * bool(self._labels)
        overhead = len(missing) * _BLOCK + done * in_file
        needed = number * (size * copies + in_file) + overhead
        there = next(folder for folder in (self.file.parent, *self.file.parent.absolute().parents) if folder.exists())
        disk = shutil.disk_usage(there)
        if disk.total and needed > disk.free:
            fit = (disk.free - overhead) // (size * copies + in_file)
            fewer = f", or draw {fit} or fewer" if fit > 0 else ""
            raise UserError(
                f"the disk of {self.file.parent} has {disk.free / 1e6:,.1f} MB free, and {number} more images need "
                f"{needed / 1e6:,.1f} MB until they are packed in one file: free some, use --out on another disk{fewer}"
            )

    def pack(self) -> int:
        """Packs the images from 0 to the first missing one into `samples.npz`, and returns their number."""
        packed = self._packed()
        number = packed
        for first, stop in self._parts.ranges():
            if first <= number:
                number = max(number, stop)
        if number > packed:
            self._write(self.file, number, self._all(packed, number))
        self._parts.remove([(first, stop) for first, stop in self._parts.ranges() if stop <= number])
        return number

    def read(self, number: int) -> Iterator[np.ndarray]:
        """Reads the packed images 0 .. number-1 as consecutive (B, H, W, C) arrays."""
        with self._open() as member:
            shape = _read_shape(member)
            size = int(np.prod(shape[1:]))
            for first in range(0, number, _READ_AT_ONCE):
                count = min(_READ_AT_ONCE, number - first)
                yield np.frombuffer(member.read(count * size), np.uint8).reshape(count, *shape[1:])

    def export(self, path: Path, number: int) -> None:
        """Writes the packed images 0 .. number-1 into another file of the same form."""
        self._write(path, number, self.read(number))

    def _write(self, path: Path, number: int, images: Iterable[np.ndarray]) -> None:
        def write(archive: zipfile.ZipFile) -> None:  # as `np.savez` would, but not from memory
            with archive.open(zipfile.ZipInfo(_ARRAY), "w", force_zip64=True) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": (number, *self._shape)}
                np.lib.format.write_array_header_1_0(member, header)  # type: ignore[arg-type]
                for part in images:
                    member.write(np.ascontiguousarray(part).tobytes())
            if self._labels:
                add_array(archive, "arr_1", np.resize(np.asarray(self._labels, "<i8"), number))

        write_npz(path, write, {"images": (0, number), **self._about})

    def _all(self, packed: int, number: int) -> Iterator[np.ndarray]:
        if packed:
            yield from self.read(packed)
        yield from self._parts.read(packed, number)

    def _packed(self) -> int:
        if not self.file.exists():
            return 0
        version = _version(self.file)
        if self._checked is None or self._checked[0] != version:
            opened = read_or_set_aside(self.file, lambda path: open_npz(path, self._about))
            if opened is None:
                return 0
            opened[0].close()
            self._checked = version, opened[1]["images"][1]
        return self._checked[1]

    @contextlib.contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        try:
            archive, _ = open_npz(self.file, self._about)
        except Damage as damage:
            raise UserError(f"{self.file} is damaged ({damage}): run the same command again") from None
        with archive, archive.open(_ARRAY) as member:
            yield member  # type: ignore[misc]


def _version(path: Path) -> tuple[int, int]:
    """Returns what changes with the content of a file."""
    found = path.stat()
    return found.st_mtime_ns, found.st_size


def _read_shape(member: BinaryIO) -> tuple[int, ...]:
    np.lib.format.read_magic(member)
    return np.lib.format.read_array_header_1_0(member)[0]
