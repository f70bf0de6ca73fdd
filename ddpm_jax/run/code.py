"""The user's own code in a run's record: which files, their checksums, and a copy of each in the run's folder.

A run whose configuration names `file.py:function` for its network or its images depends on that file. Loading such a
run executes the copy in its folder, so load only runs that you trust.
"""

import dataclasses
import functools
from pathlib import Path
from typing import BinaryIO

from ddpm_jax.config import Config
from ddpm_jax.run.fields import value_of
from ddpm_jax.system import user_code
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import write_whole

_COPIES = {"model.network": "code/network.py", "data.source": "code/source.py"}


def _named(config: Config) -> dict[str, str]:
    names = {field: value_of(config, field) for field in _COPIES}
    return {field: name for field, name in names.items() if user_code.is_named(name)}


def checksums(config: Config) -> dict[str, str]:
    """Returns the SHA-256 of each of the user's files that a configuration names, by field.

    Raises:
      UserError: a file cannot be read.
    """
    return {field: user_code.checksum(field, name) for field, name in _named(config).items()}


def keep_copies(config: Config, run: Path) -> None:
    """Copies the user's files that a configuration names into a run's folder.

    Raises:
      UserError: a file cannot be read or written.
    """
    for field, name in _named(config).items():
        user_code.checksum(field, name)
        write_whole(run / _COPIES[field], functools.partial(_copy, user_code.file_of(name).read_bytes()))


def _copy(content: bytes, opened: BinaryIO) -> None:
    opened.write(content)


def check_same_code(recorded: dict[str, str], config: Config, run: Path) -> None:
    """Checks that the user's files are those that a run was trained with.

    Args:
      recorded: `checksums` in the run's record.
      config: the configuration that is to continue it.
      run: the run's folder.

    Raises:
      UserError: a file has changed.
    """
    for field, checksum in checksums(config).items():
        if recorded.get(field) != checksum:
            raise UserError(
                f"{field}: {user_code.file_of(value_of(config, field))} has changed since {run} was started with it: "
                f"put it back (a copy is {run / _COPIES[field]}), or use another --workdir"
            )


def is_same_function(field: str, saved: Config, requested: Config) -> bool:
    """Returns whether a field names the same function of a file of the user's in both, wherever the file is.

    `check_same_code` compares the files.
    """
    names = [value_of(config, field) for config in (saved, requested)] if field in _COPIES else [""]
    return all(map(user_code.is_named, names)) and len({name.rpartition(":")[2] for name in names}) == 1


def use_copies(recorded: dict[str, str], config: Config, run: Path, *, only_changed: bool = False) -> Config:
    """Returns a run's configuration with the copies in its folder in place of the user's files.

    Args:
      recorded: `checksums` in the run's record.
      config: the configuration in it.
      run: the run's folder.
      only_changed: whether a file that still is what was recorded is used where it is.

    Raises:
      UserError: a copy is missing or not what was recorded.
    """
    for field, name in _named(config).items():
        if only_changed and user_code.checksum_or_none(name) == recorded.get(field):
            continue
        copied = user_code.renamed(name, run / _COPIES[field])
        if user_code.checksum(field, copied) != recorded.get(field):
            raise UserError(f"{run / _COPIES[field]} is not the file that {run} was trained with: put that back")
        section, _, leaf = field.partition(".")
        changed = dataclasses.replace(getattr(config, section), **{leaf: copied})
        config = dataclasses.replace(config, **{section: changed})
    return config
