"""The record of a run: its configuration as JSON, and whether another one continues it."""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

from ddpm_jax.config import Config
from ddpm_jax.run.fields import cast, leaves, nearest, value_of
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import write_json

# Kept beside what it made


def save_config(config: Config, path: str | Path) -> None:
    """Writes a configuration as JSON; the file is there whole or not at all.

    Args:
      config: any configuration.
      path: the file; its folder is made if it is not there.

    Raises:
      UserError: it cannot be written; says why.
    """
    write_json(Path(path), dataclasses.asdict(config))


def read_config(path: str | Path) -> Config:
    """Reads what `save_config` wrote.

    A field that the file does not have (it was added since) takes its default, so that old runs stay readable.

    Args:
      path: the file.

    Returns:
      the `Config`.

    Raises:
      UserError: the file is missing or is no JSON, a key is unknown or a value of the wrong kind; names the file.
    """
    try:
        loaded = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged, it is no whole JSON file: {error}") from None
    try:
        return _from_json(Config, loaded, "")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _from_json(kind: type, loaded: Any, section: str) -> Any:
    if not isinstance(loaded, dict):
        raise UserError(f"{section.rstrip('.') or 'the configuration'} must be an object in braces, not {loaded!r:.40}")
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in loaded.items():
        name = section + key
        if key not in hints:
            raise UserError(f"unknown key {name}{nearest(name, leaves(Config))}")
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _from_json(hints[key], value, f"{name}.")
            continue
        try:
            values[key] = cast(hints[key], value)
        except TypeError as error:
            raise UserError(f"{name} {error}") from None
    return kind(**values)


def differences(old: Config, new: Config) -> list[str]:
    """Lists the fields that keep one run from being continued as the other.

    Args:
      old: the configuration found.
      new: the configuration asked for.

    Returns:
      one line a field; fields that change no number of a step (how many steps, how often to save) are left out.

    >>> from ddpm_jax.config import TrainConfig
    >>> differences(Config(), Config(train=TrainConfig(batch_size=64, steps=10)))
    ['train.batch_size: 128 there, 64 here']
    """
    pairs = {name: (value_of(old, name), value_of(new, name)) for name, leaf in leaves(Config).items() if not leaf.free}
    return [f"{name}: {there!r} there, {here!r} here" for name, (there, here) in pairs.items() if there != here]


def check_same_run(file: Path, config: Config) -> None:
    """Holds a configuration against the one in a run's folder, if there is one.

    Args:
      file: what `save_config` wrote there, or would.
      config: the configuration asked for.

    Raises:
      UserError: the folder holds a run that cannot be continued as this one, and in what they differ.
    """
    different = differences(read_config(file), config) if file.exists() else []
    if different:
        raise UserError(
            f"{file.parent} holds a run of another configuration ({'; '.join(different)}): "
            "use its configuration, or another --workdir"
        )
