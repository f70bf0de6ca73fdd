"""Compiled programs on disk: a script compiles each of its programs once per machine, not once per start.

JAX finds a program again by its code, its flags and the CPU's instructions. It leaves out the number of cores, among
which XLA divides sums as it compiles, so each kind of machine has a folder of its own here: a program from the cache
computes the bits that compiling it again would.
"""

import contextlib
import os
import re
import stat
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import filelock
import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from ddpm_jax.system import environment
from ddpm_jax.system.errors import UserError, printable
from ddpm_jax.system.files import cache_folder
from ddpm_jax.system.progress import say

MOST_BYTES = 2**30
"""Of the programs of one kind of machine; those that were not used for the longest time are deleted."""

_ENTRY, _USED = "-cache", "-atime"  # endings of JAX's two files for a program: itself, and when it was used
_LOCK = ".lockfile"  # JAX's
_FAILED = re.compile(r"Error (reading|writing) persistent compilation cache entry for '([\w.<>-]+)'")


def use_compilation_cache() -> None:
    """Keeps compiled programs in `compiled` of `cache_folder`, for the next process.

    Scripts call it once. `JAX_COMPILATION_CACHE_DIR` names another folder, which is used as it is, or is empty, and
    nothing is kept. A folder that cannot be written, or that others may write, costs one line and time.
    """
    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # JAX keeps what took it a second; a start compiles many small programs.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if chosen is not None:
        if not chosen:
            jax.config.update("jax_enable_compilation_cache", False)
        return
    not_kept = "compiled programs are not kept for the next start"
    try:
        folder = cache_folder() / "compiled" / f"{zlib.crc32(repr(environment.machine()).encode()):08x}"
        _make_own(folder.parent)
        _make_own(folder)
        if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
            jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
        if jax.config.values["jax_compilation_cache_max_size"] != -1:  # without a limit JAX writes no _USED
            _delete_unfinished(folder)
    except UserError as error:
        say(f"{not_kept}: {error}")
        return
    except OSError as error:
        say(f"{not_kept}: {printable(folder)}: {error.strerror}")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    _handle_failures(folder)


def _make_own(folder: Path) -> None:
    """Makes a folder that only this user may write, for JAX runs what it finds there; refuses any other one."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise UserError(f"{folder} is not a folder that only you may write: remove it, or set DDPM_JAX_CACHE")


def _delete_unfinished(folder: Path) -> None:
    """Deletes programs whose process was killed while writing them: JAX would neither read nor replace them."""
    try:
        with filelock.FileLock(folder / _LOCK, timeout=0):
            names = set(os.listdir(folder))
            for name in names:
                if name.endswith(_ENTRY) and name.removesuffix(_ENTRY) + _USED not in names:
                    (folder / name).unlink(missing_ok=True)
    except filelock.Timeout:  # another process writes; the next start looks again
        pass


def _handle_failures(folder: Path) -> None:
    """Deletes programs that JAX cannot read, which it compiles anew: it would not replace them, but warn every time.

    Where the disk fails or is full, or another process does not release the lock, it turns the cache off instead, for
    this process: JAX would warn of each program.
    """
    show = warnings.showwarning

    def showwarning(message: Warning | str, *details: Any, **more: Any) -> None:
        found, error = _FAILED.search(str(message)), sys.exception()
        if found and isinstance(error, OSError):  # filelock.Timeout is one
            jax.config.update("jax_enable_compilation_cache", False)
            reset_cache()
            reason = error.strerror or str(error)
            say(f"compiled programs are not kept from here on: {printable(folder)}: {printable(reason)}")
        elif found and found[1] == "reading" and error and error.__traceback__:
            _delete(folder, error.__traceback__.tb_frame.f_locals["cache_key"])  # the message has the name alone
            say(f"the compiled program {found[2]} in {printable(folder)} is damaged: compiling it again")
        else:
            show(message, *details, **more)

    warnings.showwarning = showwarning


def _delete(folder: Path, key: str) -> None:
    with contextlib.suppress(OSError), filelock.FileLock(folder / _LOCK, timeout=1):
        for ending in (_ENTRY, _USED):
            (folder / f"{key}{ending}").unlink(missing_ok=True)
