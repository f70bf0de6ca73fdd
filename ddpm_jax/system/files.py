"""Files written atomically, and folders that one process writes at a time."""

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import numpy as np
from numpy.typing import ArrayLike

from ddpm_jax.system.errors import UserError, printable  # noqa: F401

_LARGEST_JSON = 2**24  # parsed, it may take thirty times its size
_LONGEST_NAME = 120  # encrypted file systems take 143 bytes, others 255


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file atomically: a crash or a full disk leaves the previous one.

    Args:
      path: where to; its folder is created if missing.
      write: writes the content into an open file.

    Raises:
      UserError: the disk is full, the folder is not writable, and the like.
    """
    # Always the same name: the next process overwrites what a killed one left.
    beside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


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


def read_json(path: Path) -> Any:
    """Reads a file of JSON, which another program may have written.

    Raises:
      OSError: it cannot be read, or is no regular file.
      ValueError: it is no JSON, is not UTF-8, is nested too deeply, or is larger than 16 MiB.
    """
    with open_file(path) as file:
        content = file.read(_LARGEST_JSON + 1)
    if len(content) > _LARGEST_JSON:
        raise ValueError("it is larger than 16 MiB")
    return parse_json(content)


def parse_json(text: str | bytes) -> Any:
    """Parses JSON that another program may have written.

    Raises:
      ValueError: it is no JSON, is not UTF-8, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically; raises as `write_whole`."""
    write_whole(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode("ascii")))


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
        folder.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
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


def check_same_job(file: Path, description: dict[str, Any]) -> None:
    """Writes a job's description into its folder, or checks that the one there is the same.

    Args:
      file: the description, in the job's folder.
      description: names and JSON values.

    Raises:
      UserError: the folder holds another job; the message names the differences.
    """
    if not file.exists():
        write_json(file, description)
        return
    try:
        there = dict(read_json(file))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged: give another --out, or remove {file.parent}") from error
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
