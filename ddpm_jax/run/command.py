"""What the scripts share: reading the command line, and ending.

The words are checked here, so that a slip is one line that names the nearest right option; tyro then makes the typed
values of them, and writes the help.
"""

import dataclasses
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from ddpm_jax.config import Config
from ddpm_jax.run.experiments import load_config
from ddpm_jax.run.fields import Leaf, describe, leaves, members, nearest
from ddpm_jax.system.errors import UserError

Options = typing.TypeVar("Options")


def parse_options(kind: type[Options], arguments: Sequence[str] | None = None, *, description: str = "") -> Options:
    """Reads a script's options.

    Args:
      kind: a frozen dataclass, a field an option; its docstrings are the help. `tyro.conf.Positional[...]` fields are
        given by place, the others as `--name value` or `--name=value`, with `-` or `_` between words.
      arguments: the words after the script's name; those of this process if not given.
      description: what the script does, for `--help`.

    Returns:
      the options.

    Raises:
      UserError: an unknown option (the nearest is named), a value of the wrong kind, a missing or needless argument.
      SystemExit: `--help` was asked for and printed.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    known, places = leaves(kind), _places(kind)
    if {"-h", "--help"} & set(arguments):
        _tyro(kind, ["--help"], description=description)
    by_place, by_name = _split(arguments, known, places)
    needed = [field.name for field in dataclasses.fields(kind) if _is_needed(field)]  # type: ignore[arg-type]
    for name in needed:
        if name not in by_name and name not in places[: len(by_place)]:
            raise UserError(f"{_shown(name, places)} is missing: see --help")
    return _tyro(kind, [*by_place, *_words(by_name, known)], description=description)


def parse_run(
    kind: type[Options],
    arguments: Sequence[str] | None = None,
    *,
    description: str = "",
    default: str = "configs/digits.py",
) -> tuple[Options, Config]:
    """Reads a command line of the form `[CONFIG_FILE] [options] [--section.field value ...]`.

    Args:
      kind: the script's own options: a frozen dataclass whose fields all have defaults and none a place.
      arguments: the words after the script's name; those of this process if not given.
      description: what the script does, for `--help`.
      default: the config file if none is given.

    Returns:
      the script's options, and the configuration of the file with what the command line says otherwise.

    Raises:
      UserError: as `parse_options` and `load_config`. Whether the values go together `validate` says.
      SystemExit: `--help` was asked for and printed; it shows the defaults of the config file given.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    known, places = {**leaves(kind), **leaves(Config)}, ("config_file",)
    words = [word for word in arguments if word not in ("-h", "--help")]
    asked = len(words) < len(arguments)
    try:
        files, by_name = _split(words, known, places)
    except UserError:
        # A mistake on the line may be what help is asked for.
        if not asked:
            raise
        files = []
    config = load_config(files[0] if files else default)

    meaning = "The experiment: a Python file that sets `config`, or the name of one in configs/."
    run = dataclasses.make_dataclass(
        "Run",
        [
            ("config_file", Annotated[tyro.conf.Positional[str], tyro.conf.arg(help=meaning)], default),
            ("options", Annotated[kind, tyro.conf.arg(name="")], dataclasses.field(default_factory=kind)),
            ("config", Annotated[Config, tyro.conf.arg(name="")], config),
        ],
        frozen=True,
    )
    read: Any = _tyro(run, ["--help"] if asked else _words(by_name, known), description=description)
    return read.options, read.config


Command = Callable[[Sequence[str]], None]
"""One of a script's commands: does what the words after its name say; the first line of its docstring says what."""


def run_command(
    commands: Mapping[str, Command], arguments: Sequence[str] | None = None, *, otherwise: Command | None = None
) -> None:
    """Runs the command that the first word names; prints the list of them for `--help`.

    Args:
      commands: by name.
      arguments: the words after the script's name; those of this process if not given.
      otherwise: what is done where the first word names no command; there must be one if not given.

    Raises:
      UserError: there is no such command; the nearest is named.
    """
    program = Path(sys.argv[0]).name
    name, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ([""] if otherwise else ["--help"])
    if name in commands:
        commands[name](rest)
        return
    if name in ("-h", "--help"):
        print(f"usage: {program} COMMAND RUN [options]      ({program} COMMAND --help lists them)\n")
        for known, command in commands.items():
            print(f"  {known:13}{(command.__doc__ or '').splitlines()[0]}")
        if otherwise is None:
            return
        print("\nWithout a COMMAND:\n", flush=True)
    # Two words in front: the first of them was to be a command.
    elif otherwise is not None and rest and rest[0] in commands:
        raise UserError(f"the command comes first: {program} {rest[0]} {name}")
    elif otherwise is None or (rest and not name.startswith("-") and not rest[0].startswith("-")):
        hint = nearest(name, commands) or f": choose {', '.join(commands)}"
        raise UserError(f"there is no command {name!r}{hint}")
    otherwise([name, *rest] if name else [])


def _places(kind: Any) -> tuple[str, ...]:
    """The fields given by place, in their order."""
    (mark,) = typing.get_args(tyro.conf.Positional[str])[1:]
    hints = typing.get_type_hints(kind, include_extras=True)
    return tuple(name for name, hint in hints.items() if mark in getattr(hint, "__metadata__", ()))


def _is_needed(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _option(name: str) -> str:
    """`train.batch_size` as it is written on a command line."""
    return "--" + name.replace("_", "-")


def _shown(name: str, places: Sequence[str]) -> str:
    return name.upper() if name in places else _option(name)


def _flag(name: str, known: Mapping[str, Leaf]) -> tuple[str, bool] | None:
    """Reads `data.flip` as (data.flip, True) and `data.no_flip` as (data.flip, False)."""
    section, dot, last = name.rpartition(".")
    positive = section + dot + last.removeprefix("no_")
    for candidate in (name, positive):
        if candidate in known and known[candidate].kind is bool:
            return candidate, candidate == name
    return None


def _split(
    arguments: Sequence[str], known: Mapping[str, Leaf], places: Sequence[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """Splits a command line into the words given by place, and those of each option; checks both."""
    by_place: list[str] = []
    by_name: dict[str, list[str]] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            if len(by_place) == len(places):
                raise UserError(f"needless argument {word!r}: see --help")
            _check(_shown(places[len(by_place)], places), known.get(places[len(by_place)], Leaf(str, False)).kind, word)
            by_place.append(word)
            continue
        given, equals, value = word.partition("=")
        name = given.removeprefix("--").replace("-", "_") if given.startswith("--") else ""
        if flag := _flag(name, known):
            name, on = flag
            section, dot, last = name.rpartition(".")
            if equals or (rest and rest[0].lower() in ("true", "false")):
                off = f"{_option(section)}.no-{last.replace('_', '-')}" if dot else _option("no_" + last)
                raise UserError(f"{given} takes no value: write {_option(name)} or {off}")
            by_name[name] = [str(on)]
            continue
        if name not in known or name in places:
            named = [each for each in known if each not in places]
            hint = nearest(given.lstrip("-").replace("-", "_"), named, form=_option)
            raise UserError(f"unknown option {given}{hint or ': see --help'}")
        if typing.get_origin(known[name].kind) is tuple:
            by_name[name] = value.split() if equals else []
            while rest and not rest[0].startswith("--"):
                by_name[name].append(rest.pop(0))
            (entry, _) = typing.get_args(known[name].kind)
        else:
            entry = known[name].kind
            if not equals and (not rest or rest[0].startswith("--")):
                raise UserError(f"{given} needs {describe(entry)}, but no value follows it")
            by_name[name] = [value if equals else rest.pop(0)]
        for each in by_name[name]:
            _check(_option(name), entry, each, needs=describe(known[name].kind))
    return by_place, by_name


def _check(shown: str, kind: Any, word: str, *, needs: str | None = None) -> None:
    """Checks that a word can be read as a value of a kind."""
    if not any(_reads(option, word) for option in members(kind)):
        raise UserError(f"{shown} needs {needs or describe(kind)}, not {word!r}")


def _reads(kind: Any, word: str) -> bool:
    if kind is type(None):
        return word == "None"
    if typing.get_origin(kind) is typing.Literal:
        return word in typing.get_args(kind)
    try:
        kind(word)
    except ValueError:
        return False
    return True


def _words(by_name: Mapping[str, Sequence[str]], known: Mapping[str, Leaf]) -> list[str]:
    """Writes checked options in the one form that tyro cannot misread."""
    words = []
    for name, values in by_name.items():
        if known[name].kind is bool:
            section, dot, last = name.rpartition(".")
            words.append(_option(name if values == ["True"] else f"{section}{dot}no_{last}"))
        elif typing.get_origin(known[name].kind) is tuple:
            words += [_option(name), *values]
        else:
            words.append(f"{_option(name)}={values[0]}")
    return words


def _tyro(kind: Any, words: Sequence[str], *, description: str) -> Any:
    program = Path(sys.argv[0]).name
    try:
        return tyro.cli(
            kind,
            args=words,
            prog=program,
            description=description,
            config=(tyro.conf.HelptextFromCommentsOff, tyro.conf.PositionalMetavarFromFieldName),
            console_outputs=words == ["--help"],
        )
    except SystemExit as ending:
        if ending.code:
            raise UserError(f"cannot read the options {' '.join(words)}: see {program} --help") from None
        raise
