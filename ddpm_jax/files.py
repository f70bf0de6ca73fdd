"""Writing files so that each is there whole or not at all, and folders that one process writes at a time."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from ddpm_jax.errors import UserError


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


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keeps a second process out of a folder; the lock goes with the process, however that ends.

    Args:
      folder: made if it is not there; gets a file `.lock`.

    Raises:
      UserError: another process has it, or it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process is writing to {folder}: wait for it, or use another folder") from error
        yield
