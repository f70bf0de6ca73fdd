"""Files written atomically, files with a checksum of their content, and folders that one process writes at a time.

What is read back was written by `write_json`, `write_npz`, or line by line with `dump_checked`: a changed bit, a file
under another's name, and a file of another job raise `Damage` when it is read, and are never taken for what it was.
"""

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import stat
import sys
import typing
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import numpy as np
from numpy.typing import ArrayLike

from ddpm_jax.system.errors import Damage, UserError
from ddpm_jax.system.hosts import is_primary_host
from ddpm_jax.system.npy import read_npz
from ddpm_jax.system.progress import say

_LARGEST_JSON = 2**24  # parsed, it may take thirty times its size
_LONGEST_NAME = 120  # encrypted file systems take 143 bytes, others 255
_KEY, _ZEROS = b'"checksum": "', b"00000000"
_READ_AT_ONCE = 2**20


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file atomically: a crash, a full disk or a power cut leaves the previous one.

    When it returns, the new one stays, also if the power is cut.

    Args:
      path: where to; its folder is created if missing.
      write: writes the content into an open file.

    Raises:
      UserError: the disk is full, the folder is not writable, and the like.
    """
    # Always the same name: the next process overwrites what a killed one left.
    beside = path.with_name(f".{path.name}.part")
    try:
        make_folder(path.parent)
        with beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        sync(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Creates a folder that is missing, and those above it; when it returns, they stay, also if the power is cut."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in made:
        sync(each.parent)


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk."""
    try:
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
    except OSError as error:
        # Some systems open no folders, and some network disks sync none.
        if not path.is_dir() or error.errno not in (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP):
            raise


def sync_tree(folder: Path) -> None:
    """Waits until a folder and all that is in it are on the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def check_regular(path: Path) -> None:
    """Checks that a file may be opened: a FIFO or a device could have no end, or be waited for forever.

    Raises:
      OSError: it is a FIFO, a device, a socket or a folder, or is not there.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EOPNOTSUPP, "not a regular file", str(path))


def open_file(path: Path) -> BinaryIO:
    """Opens a file for reading in binary; raises as `check_regular`, or if it is not permitted."""
    check_regular(path)
    return path.open("rb")


def parse_json(text: str | bytes) -> Any:
    """Parses JSON that another program may have written.

    Raises:
      ValueError: it is no JSON, is not UTF-8, is nested too deeply, or has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def dump_checked(value: Mapping[str, Any], *, indent: int | None = None) -> bytes:
    """Returns an object as JSON whose last entry, `"checksum"`, is the CRC-32 of the text with zeros in its place."""
    text = json.dumps({**value, "checksum": _ZEROS.decode()}, indent=indent).encode("ascii")
    head, _, tail = text.rpartition(_ZEROS)
    return head + f"{zlib.crc32(text):08x}".encode() + tail


def load_checked(content: bytes) -> dict[str, Any]:
    """Reads what `dump_checked` wrote.

    Raises:
      Damage: it is anything else.

    >>> load_checked(dump_checked({"step": 10, "loss": 0.5}))
    {'step': 10, 'loss': 0.5}
    """
    head, key, tail = content.rpartition(_KEY)
    if not key:
        raise Damage("it has no checksum")
    if f"{zlib.crc32(head + key + _ZEROS + tail[8:]):08x}".encode() != tail[:8]:
        raise Damage("its checksum differs")
    try:
        value = parse_json(content)
    except ValueError as error:
        raise Damage(f"it is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Damage("it is not an object in braces")
    value.pop("checksum", None)
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object as indented JSON with a checksum, atomically; raises as `write_whole`."""
    write_whole(path, lambda file: file.write(dump_checked(value, indent=2) + b"\n"))


def read_json(path: Path) -> dict[str, Any]:
    """Reads what `write_json` wrote.

    Raises:
      Damage: the file does not hold what was written.
      UserError: it cannot be read now; the message gives the reason.
    """
    with _reading(path), open_file(path) as file:
        content = file.read(_LARGEST_JSON + 1)
    if len(content) > _LARGEST_JSON:
        raise Damage("it is larger than 16 MiB")
    return load_checked(content.removesuffix(b"\n"))


def write_npz(path: Path, write: Callable[[zipfile.ZipFile], object], about: Mapping[str, Any]) -> None:
    """Writes an .npz file, atomically, with a checksum and what it is about in the archive's comment.

    `np.load` reads it. Equal content gives equal bytes if `write` sets no dates.

    Args:
      path: where to; its folder is created if missing.
      write: adds the members to an archive, as `add_array` does.
      about: what was asked for, as JSON values; `open_npz` compares it.

    Raises:
      UserError: as `write_whole`.
    """

    def fill(file: BinaryIO) -> None:
        comment = lambda crc: dump_checked({**about, "crc32": f"{crc:08x}"})
        with zipfile.ZipFile(file, "w") as archive:
            write(archive)
            archive.comment = comment(0)
        file.flush()
        size = file.seek(-len(comment(0)), os.SEEK_END)
        with open(file.name, "rb") as written:
            crc = _crc32_of(written, size)
        file.write(comment(crc))

    write_whole(path, fill)


def add_array(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    """Adds an array to an .npz archive, without a date."""
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
        np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Writes arrays by name; see `write_npz`."""

    def write(archive: zipfile.ZipFile) -> None:
        for name, array in arrays.items():
            add_array(archive, name, array)

    write_npz(path, write, about)


def open_npz(path: Path, about: Mapping[str, Any]) -> tuple[zipfile.ZipFile, dict[str, Any]]:
    """Opens what `write_npz` wrote, after its whole content was compared with its checksum.

    Args:
      path: the file.
      about: what it must be about; what the file says beyond that is not compared.

    Returns:
      the archive, to be closed, and all that the file is about.

    Raises:
      Damage: the file does not hold what was written, or is about something else.
      UserError: it cannot be read now.
    """
    with contextlib.ExitStack() as opened, _reading(path):
        check_regular(path)
        try:
            archive = opened.enter_context(zipfile.ZipFile(path))
        except (OSError, MemoryError):
            raise
        except Exception as error:  # a damaged archive raises half a dozen kinds
            raise Damage(f"it is not a whole .npz archive: {error}") from None
        found = load_checked(archive.comment)
        with open_file(path) as file:
            size = file.seek(-len(archive.comment), os.SEEK_END)
            file.seek(0)
            if found.pop("crc32", None) != f"{_crc32_of(file, size):08x}":
                raise Damage("its checksum differs")
        for name, value in json.loads(json.dumps(about)).items():
            if found.get(name) != value:
                raise Damage(f"it is of {name} {found.get(name)}, not {value}")
        opened.pop_all()
        return archive, found


def read_arrays(path: Path, about: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Reads what `write_arrays` wrote; raises as `open_npz`."""
    archive, _ = open_npz(path, about)
    with archive, _reading(path):
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise Damage("it is compressed, as no file of ours is")
        try:
            return read_npz(archive)
        except ValueError as error:
            raise Damage(f"it holds no arrays: {error}") from None


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _crc32_of(file: BinaryIO, size: int) -> int:
    crc = 0
    while size > 0 and (block := file.read(min(size, _READ_AT_ONCE))):
        crc, size = zlib.crc32(block, crc), size - len(block)
    return crc


def damaged_name(path: Path) -> Path:
    """Returns the path that a damaged file is kept under: `NAME.damaged`, with a number if there is one already."""
    names = (path.with_name(f"{path.name}.damaged{number or ''}") for number in itertools.count())
    return next(name for name in names if not name.exists())


def set_aside(path: Path) -> Path:
    """Renames a damaged file to its `damaged_name`, and returns that.

    Raises:
      UserError: it cannot be renamed.
    """
    try:
        return path.rename(damaged_name(path))
    except OSError as error:
        raise UserError(f"cannot rename {path}, which is damaged: {error.strerror or error}") from error


def short_name(name: str) -> str:
    """Returns a name that any file system takes as that of a folder; long and special ones end in a checksum.

    >>> short_name("seed_0"), short_name("labels_" + "-".join(map(str, range(100))))[-16:]
    ('seed_0', '-36-37-_3e6769f9')
    """
    safe = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)
    if safe == name and len(name) <= _LONGEST_NAME:
        return name
    return f"{safe[: _LONGEST_NAME - 9]}_{zlib.crc32(name.encode(errors='surrogateescape')):08x}"


def copy_file(path: Path, to: Path) -> Path:
    """Copies a file, atomically, and returns where; raises as `write_whole`."""
    with path.open("rb") as file:
        write_whole(to, lambda copy: shutil.copyfileobj(file, copy))
    return to


def checksum_of(value: Mapping[str, Any]) -> str:
    """Returns the CRC-32 of an object of JSON values, whatever the order of its names, as eight hexadecimal digits."""
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def crc32(array: ArrayLike) -> int:
    """Returns the CRC-32 of an array's bytes in C order."""
    # Not `.data` of the array itself: NumPy exports no buffer of bfloat16.
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Locks a folder against other processes; the operating system releases the lock however this one ends.

    Args:
      folder: created if missing; gets a file `.lock`.

    Raises:
      UserError: another process holds the lock, the folder is not writable, or its disk does not support locks.
    """
    file = folder / ".lock"
    try:
        make_folder(folder)
        file.touch()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; give another --out or --workdir") from error
    # No soft lock where the disk has none: it would outlive a killed process.
    lock = filelock.FileLock(file, blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise UserError(f"another process is writing to {folder}: wait for it, or use another folder") from error
    except OSError as error:  # some network disks have none
        raise UserError(
            f"cannot lock {file}, which keeps a second process out: {error.strerror or error}; "
            "use a folder on another disk"
        ) from error
    try:
        yield
    finally:
        lock.release()


Content = typing.TypeVar("Content")


def read_or_set_aside(path: Path, read: Callable[[Path], Content]) -> Content | None:
    """Reads a file that can be made again; returns None for a damaged one, which host 0 sets aside with a line."""
    try:
        return read(path)
    except Damage as damage:
        if is_primary_host():
            say(f"{path} is damaged ({damage}): renamed to {set_aside(path).name} and recreated")
        return None


def check_same_job(file: Path, description: dict[str, Any]) -> None:
    """Writes a job's description into its folder, or checks that the one there is the same.

    A damaged one is set aside and written again: the files of the job say themselves what they are of.

    Args:
      file: the description, in the job's folder.
      description: names and JSON values.

    Raises:
      UserError: the folder holds another job; the message names the differences.
    """
    there = read_or_set_aside(file, read_json) if file.exists() else None
    if there is None:
        write_json(file, description)
        return
    different = job_differences(there, description)
    if different:
        raise UserError(f"{file.parent} holds another job ({different}): give another --out, or remove it")


def job_differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """Returns in what two descriptions of jobs differ; empty if they are the same."""
    return "; ".join(
        f"{name} is {there.get(name)!s:.200} there and {here.get(name)!s:.200} here"
        for name in dict.fromkeys([*here, *there])
        if there.get(name) != here.get(name)
    )


def cache_folder() -> Path:
    """Returns the user's folder of downloaded weights, computed statistics and compiled programs.

    `DDPM_JAX_CACHE`, or else `ddpm_jax` in `XDG_CACHE_HOME` or in `~/.cache` (on macOS in `~/Library/Caches`).

    Raises:
      UserError: there is no home directory.
    """
    usual = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    folder = os.environ.get("DDPM_JAX_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or usual, "ddpm_jax")
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        raise UserError(f"{folder}: no home directory is known: set DDPM_JAX_CACHE to a folder") from None
