"""Compiled programs on disk: a script compiles each of its programs once per machine, not once per start.

JAX finds a program again by its code, its flags and the CPU's instructions. It leaves out the number of cores, among
which XLA divides sums as it compiles, so each kind of machine has a folder of its own here: a program from the cache
computes the bits that compiling it again would.
"""

import os
import re
import warnings
import zlib
from pathlib import Path
from typing import Any

import filelock
import jax

from ddpm_jax.system import environment
from ddpm_jax.system.errors import printable
from ddpm_jax.system.files import cache_folder
from ddpm_jax.system.progress import say

MOST_BYTES = 2**30
"""Of the programs of one kind of machine; those that were not used for the longest time are deleted."""

_ENTRY, _USED = "-cache", "-atime"  # endings of JAX's two files for a program: itself, and when it was used
_DAMAGED = re.compile(r"Error reading persistent compilation cache entry for '([\w.<>-]+)'")


def use_compilation_cache() -> None:
    """Keeps compiled programs in `compiled` of `cache_folder`, for the next process.

    Scripts call it once. `JAX_COMPILATION_CACHE_DIR` names another folder, which is used as it is, or is empty, and
    nothing is kept. A folder that cannot be written costs one line and time.
    """
    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # JAX keeps what took it a second; a start compiles many small programs.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if chosen is not None:
        jax.config.update("jax_enable_compilation_cache", bool(chosen))
        return
    folder = cache_folder() / "compiled" / f"{zlib.crc32(repr(environment.machine()).encode()):08x}"
    try:
        # JAX runs what it finds there, so it is nobody else's to write.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _delete_unfinished(folder)
    except OSError as error:
        say(f"compiled programs are not kept for the next start: {printable(folder)}: {error.strerror}")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
        jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    _delete_damaged(folder)


def _delete_unfinished(folder: Path) -> None:
    """Deletes programs whose process was killed while writing them: JAX would neither read nor replace them."""
    lock = filelock.FileLock(folder / ".lockfile", timeout=0)  # JAX's own
    try:
        with lock:
            names = set(os.listdir(folder))
            for name in names:
                if name.endswith(_ENTRY) and name.removesuffix(_ENTRY) + _USED not in names:
                    (folder / name).unlink(missing_ok=True)
    except filelock.Timeout:  # another process writes; the next start looks again
        pass


def _delete_damaged(folder: Path) -> None:
    """Deletes programs that JAX cannot read, which it compiles anew: it would not replace them, but warn every time."""
    show = warnings.showwarning

    def showwarning(message: Warning | str, *details: Any, **more: Any) -> None:
        found = _DAMAGED.search(str(message))
        if found is None:
            show(message, *details, **more)
            return
        for entry in folder.glob(f"{found[1]}-*"):
            entry.unlink(missing_ok=True)
        say(f"the compiled program {found[1]} in {printable(folder)} is damaged: compiling it again")

    warnings.showwarning = showwarning
