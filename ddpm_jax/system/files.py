"""Files written atomically, and folders that one process writes at a time."""

import contextlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import numpy as np
from numpy.typing import ArrayLike

from ddpm_jax.system.errors import UserError

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


def printable(name: object) -> str:
    r"""Returns a file name with everything that a terminal cannot show escaped: control characters, undecodable bytes.

    >>> print(printable("caf\udce9 \n"))
    caf\xe9 \n
    """
    shown = (
        char
        if char.isprintable()
        else f"\\x{ord(char) - 0xDC00:02x}"
        if "\udc80" <= char <= "\udcff"  # how Python keeps a byte that is not UTF-8
        else char.encode("unicode_escape").decode("ascii")
        for char in str(name)
    )
    return "".join(shown)


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
        there = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged: give another --out, or remove {file.parent}") from error
    different = job_differences(there, description)
    if different:
        raise UserError(f"{file.parent} holds another job ({different}): give another --out, or remove it")


def job_differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """Returns in what two descriptions of jobs differ; empty if they are the same."""
    return "; ".join(
        f"{name} is {there.get(name)} there and {here.get(name)} here"
        for name in dict.fromkeys([*here, *there])
        if there.get(name) != here.get(name)
    )
