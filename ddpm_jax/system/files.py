"""Writing files so that each is there whole or not at all, and folders that one process writes at a time."""

import contextlib
import fcntl
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike

from ddpm_jax.system.errors import UserError


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file beside its place and moves it there: a crash or a full disk leaves what was there before.

    Args:
      path: where to; its folder is made if it is not there.
      write: writes the content into an open file.

    Raises:
      UserError: the disk is full, the folder may not be written to, and the like.
    """
    # Always the same name: what a killed process left is written over by the next.
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
    """Writes a value as indented JSON, whole or not at all; raises as `write_whole`."""
    write_whole(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode("ascii")))


def crc32(array: ArrayLike) -> int:
    """Returns the CRC-32 of an array's bytes in C order."""
    # Not `.data` of the array itself: NumPy exports no buffer of bfloat16.
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keeps a second process out of a folder; the lock goes with the process, however that ends.

    Args:
      folder: made if it is not there; gets a file `.lock`.

    Raises:
      UserError: another process has it, it cannot be written to, or its disk has no locks.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is writing to {folder}: wait for it, or use another folder") from error
        except OSError as error:  # some network disks have none
            raise UserError(
                f"cannot lock {lock.name}, which keeps a second process out: {error.strerror or error}; "
                "use a folder on another disk"
            ) from error
        yield


def check_same_job(file: Path, description: dict[str, Any]) -> None:
    """Writes what a job is into its folder, or holds it against what is there.

    Args:
      file: the job's description, in its folder.
      description: names and values, of the kinds that JSON has.

    Raises:
      UserError: the folder holds another job, and in what they differ.
    """
    if not file.exists():
        write_json(file, description)
        return
    try:
        there = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged: give another --out, or remove {file.parent}") from error
    different = [
        f"{name} is {there.get(name)} there and {description.get(name)} here"
        for name in dict.fromkeys([*description, *there])
        if there.get(name) != description.get(name)
    ]
    if different:
        raise UserError(f"{file.parent} holds another job ({'; '.join(different)}): give another --out, or remove it")
