"""The record of a run: its configuration as JSON, and whether another configuration can resume it."""

import dataclasses
import typing
from pathlib import Path
from typing import Any

from ddpm_jax.config import Config
from ddpm_jax.run import code
from ddpm_jax.run.computed_on import describe
from ddpm_jax.run.fields import cast, leaves, nearest, value_of
from ddpm_jax.run.validation import validate
from ddpm_jax.system import environment
from ddpm_jax.system.errors import Damage, UserError
from ddpm_jax.system.files import parse_json, read_json, write_json

FORMAT = 3
"""Version of the record: raised whenever a field gets another name or meaning. New fields with defaults need none."""


class LearningRate(typing.NamedTuple):
    """The learning rate of a run from a step on."""

    step: int
    """Number of steps done before it applies."""
    learning_rate: float
    """As in `TrainConfig`."""
    warmup_steps: int
    """As in `TrainConfig`: counted from the beginning of the run."""

    def is_of(self, config: Config) -> bool:
        """Returns whether a configuration has the same learning rate."""
        return self[1:] == (config.train.learning_rate, config.train.warmup_steps)


LearningRates = tuple[LearningRate, ...]
"""All learning rates that a run had, in order, the first from step 0; () if it never changed."""


def save_config(config: Config, path: str | Path, rates: LearningRates = ()) -> None:
    """Writes the record of a run, whole or not at all: its sections beside `"format"` and `"environment"`, as JSON.

    If the configuration names the user's own files, their checksums are beside them as `"code"`; if the learning rate
    changed, all of them as `"learning_rates"`.

    Args:
      config: any configuration.
      path: the file; its folder is made if missing.
      rates: the learning rates that the run had.

    Raises:
      UserError: the file cannot be written; the message gives the reason.
    """
    here = {**describe(config), **environment.settings()}
    checksums = code.checksums(config)
    record = {"format": FORMAT, "environment": here, **dataclasses.asdict(config)}
    extra = {"code": checksums, "learning_rates": [rate._asdict() for rate in rates]}
    write_json(Path(path), record | {name: value for name, value in extra.items() if value})


def rates_so_far(file: Path, config: Config) -> LearningRates:
    """Reads the learning rates of a run that is to be resumed.

    Args:
      file: the record of the run; if there is none, its learning rate never changed.
      config: the configuration to resume it with.

    Returns:
      the learning rates up to now: that of its beginning, if the configuration is the first to change it.

    Raises:
      UserError: as `read_config`.
    """
    if not file.exists():
        return ()
    saved, _, rates = _read(file)
    first = LearningRate(0, saved.train.learning_rate, saved.train.warmup_steps)
    return rates if rates or first.is_of(config) else (first,)


def rates_from(so_far: LearningRates, config: Config, step: int) -> LearningRates:
    """Returns the learning rates of a run that is resumed from a step, with those of its past.

    If the configuration asks for the last of them, all of them stay as they are, also those after the step, which
    another start had reached.

    >>> config = Config()
    >>> rates_from((LearningRate(0, 1e-3, 5000),), config, 700)[-1]
    LearningRate(step=700, learning_rate=0.0002, warmup_steps=5000)
    """
    if not so_far or so_far[-1].is_of(config):
        return so_far
    past = [rate for rate in so_far if rate.step < step]
    if not past or not past[-1].is_of(config):
        past.append(LearningRate(step, config.train.learning_rate, config.train.warmup_steps))
    return tuple(past) if len(past) > 1 else ()


def read_run(folder: Path) -> Config:
    """Reads the configuration of a run, with the copies in its folder in place of the user's own files.

    Args:
      folder: the run's folder.

    Returns:
      the `Config`.

    Raises:
      UserError: as `read_config`; also if a copy is missing or has changed.
    """
    config, checksums, _ = _read(folder / "config.json")
    return code.use_copies(checksums, config, folder)


def is_run(folder: Path) -> bool:
    """Returns whether a folder is that of a run: it has a record."""
    return (folder / "config.json").is_file()


def read_to_resume(folder: Path) -> Config:
    """Reads the configuration that resumes a run, with the copies in its folder for those of the user's own files that
    were moved or changed.

    Args:
      folder: the run's folder.

    Returns:
      the `Config`.

    Raises:
      UserError: as `read_run`.
    """
    config, checksums, _ = _read(folder / "config.json")
    return code.use_copies(checksums, config, folder, only_changed=True)


def read_config(path: str | Path) -> Config:
    """Reads what `save_config` wrote, and checks it as strictly as a command line.

    A field that is missing in the file (it was added since) takes its default, so that older runs stay readable.

    Args:
      path: the file.

    Returns:
      the `Config`.

    Raises:
      UserError: the file is missing, damaged, was changed by hand or has another format, a key is unknown, or
        `validate` refuses a value; the message names the file.
    """
    return _read(path)[0]


def _read(path: str | Path) -> tuple[Config, dict[str, str], LearningRates]:
    """Returns the configuration in a record, the checksums of the user's files in it, and its learning rates."""
    loaded = _load(path)
    loaded.pop("environment", None)
    try:
        checksums = loaded.pop("code", {})
        if not isinstance(checksums, dict):
            raise UserError(f"code must be an object in braces, not {checksums!r:.40}")
        try:
            rates = tuple(map(_rate, loaded.pop("learning_rates", [])))
        except TypeError as error:
            raise UserError(f"learning_rates: {error}") from None
        config = _from_json(Config, loaded, "")
        validate(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config, checksums, rates


def _rate(loaded: Any) -> LearningRate:
    hints = typing.get_type_hints(LearningRate)
    rate = LearningRate(**loaded)
    return LearningRate(*(cast(hints[name], value) for name, value in rate._asdict().items()))


def _load(path: str | Path) -> dict[str, Any]:
    try:
        loaded = read_json(Path(path))
    except Damage as damage:
        raise UserError(
            f"{path} is damaged, was changed by hand, or is of an older version of ddpm_jax ({damage}): put "
            "the file back that train.py wrote; what may change is changed by train.py RUN --section.field VALUE"
        ) from None
    found = loaded.pop("format", None)
    if found != FORMAT:
        raise UserError(
            f"{path} has format {found}, and this version of ddpm_jax reads format {FORMAT}: train the run "
            "again, or use the version that wrote it"
        )
    return loaded


def check_environment(path: str | Path) -> None:
    """Checks that the settings of JAX that change numbers are those that a run was written with.

    What changes rounding alone is not among them: see `computed_on`.

    Args:
      path: the run's record.

    Raises:
      UserError: a setting differs; the message names it, and both values.
    """
    saved = _load(path).get("environment")
    if not isinstance(saved, dict):
        return
    settings = environment.settings()
    saved = {name: value for name, value in saved.items() if name in environment.names_of_settings()}
    for name in sorted({*settings, *saved}):
        old, new = (found.get(name, "not set") for found in (saved, settings))
        if old != new:
            raise UserError(
                f"{Path(path).parent} contains a run with a different {name} ({old} saved, {new} now), which changes "
                "its numbers: set it as saved, or use another --workdir"
            )


def parse_config(text: str) -> Config:
    """Parses a configuration in JSON, as files of weights have it in their metadata.

    Raises:
      UserError: a key is unknown, or a value has the wrong type.
      ValueError: it is not JSON.
    """
    config: Config = _from_json(Config, parse_json(text), "")
    return config


def _from_json(kind: type, loaded: Any, section: str) -> Any:
    if not isinstance(loaded, dict):
        raise UserError(f"{section.rstrip('.')} must be an object in braces, not {loaded!r:.40}")
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


def differences(saved: Config, requested: Config) -> list[str]:
    """Lists the fields that keep a run from being resumed with another configuration.

    Args:
      saved: the configuration of the run.
      requested: the configuration to resume it with.

    Returns:
      one line per field; those that may change (how many steps, how often to save, the learning rate) are left out.

    >>> from ddpm_jax.config import TrainConfig
    >>> differences(Config(), Config(train=TrainConfig(batch_size=64, steps=10)))
    ['train.batch_size: 128 saved, 64 requested']
    """
    pairs = {
        name: (value_of(saved, name), value_of(requested, name))
        for name, leaf in leaves(Config).items()
        if not leaf.free and not code.is_same_function(name, saved, requested)
    }
    return [f"{name}: {old!r} saved, {new!r} requested" for name, (old, new) in pairs.items() if old != new]


def check_same_run(file: Path, config: Config) -> None:
    """Checks that the run in a folder, if there is one, can be resumed with a configuration.

    Args:
      file: the record of the run.
      config: the requested configuration.

    Raises:
      UserError: it cannot; the message lists the differences.
    """
    if not file.exists():
        return
    saved, checksums, _ = _read(file)
    different = differences(saved, config)
    if different:
        raise UserError(
            f"{file.parent} contains a run with a different configuration ({'; '.join(different)}): use the saved one "
            f"(python train.py {file.parent} resumes with it) or another --workdir"
        )
    code.check_same_code(checksums, config, file.parent)
