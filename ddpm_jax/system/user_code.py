"""Functions in a user's own files, named `file.py:function`."""

import contextlib
import difflib
import hashlib
import runpy
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ddpm_jax.system.errors import UserError

_loaded: dict[tuple[str, str], dict[str, Any]] = {}


def is_named(name: str) -> bool:
    """Returns whether a name has the form `file.py:function`."""
    return ".py:" in name


def file_of(name: str) -> Path:
    """Returns the file of `file.py:function`."""
    return Path(name.rpartition(":")[0]).expanduser()


def renamed(name: str, file: Path) -> str:
    """Returns the name of the same function in another file."""
    return f"{file}:{name.rpartition(':')[2]}"


def checksum(field: str, name: str) -> str:
    """Returns the SHA-256 of the file of `file.py:function`, in hexadecimal.

    Raises:
      UserError: the file cannot be read; the message begins with the name of the field.
    """
    try:
        return _checksum(name)
    except OSError as error:
        raise UserError(f"{field}: cannot read {file_of(name)} ({error.strerror}); use file.py:function") from error


def checksum_or_none(name: str) -> str | None:
    """Returns the checksum of the file of `file.py:function`; None if it cannot be read."""
    try:
        return _checksum(name)
    except OSError:
        return None


def _checksum(name: str) -> str:
    return hashlib.sha256(file_of(name).read_bytes()).hexdigest()


def load(field: str, name: str) -> Callable[..., Any]:
    """Runs a user's file, once for each content of it, and returns the function that is named.

    Args:
      field: the field of the configuration, for messages.
      name: `file.py:function`.

    Raises:
      UserError: the file is missing or fails, or has no such function.
    """
    file, _, function = name.rpartition(":")
    if not is_named(name) or not function:
        raise UserError(f"{field}={name!r} must be file.py:function")
    key = str(file_of(name).resolve()), checksum(field, name)
    if key not in _loaded:
        with clear_errors(f"{field}: {file}", file_of(name)):
            _loaded[key] = runpy.run_path(str(file_of(name)), run_name=file_of(name).stem)
    names = _loaded[key]
    if not callable(names.get(function)):
        near = difflib.get_close_matches(function, [each for each, value in names.items() if callable(value)], n=1)
        raise UserError(f"{field}: {file} has no function {function}" + (f"; did you mean {near[0]}?" if near else ""))
    return names[function]


@contextlib.contextmanager
def clear_errors(what: str, file: Path) -> Iterator[None]:
    """Raises what a user's file raises inside the `with` block as one line: where, which kind, and its words.

    Raises:
      UserError: instead of any other exception.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, SyntaxError) and error.filename == str(file):
            line, words = error.lineno, error.msg
        else:
            frames = traceback.extract_tb(error.__traceback__)
            line = next((frame.lineno for frame in reversed(frames) if frame.filename == str(file)), None)
            words = " ".join(str(error).split())[:300]
        where = f", line {line}" if line else ""
        raise UserError(f"{what}{where}: {type(error).__name__}: {words}") from error
