"""The command line of the scripts: tyro reads it, and every mistake in it becomes one line."""

import contextlib
import dataclasses
import inspect
import io
import itertools
import operator
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from ddpm_jax.config import Config
from ddpm_jax.run.experiments import load_config
from ddpm_jax.run.fields import Leaf, describe, leaves, nearest
from ddpm_jax.system import interrupts
from ddpm_jax.system.errors import UserError

Options = typing.TypeVar("Options")

# What other programs call our options, where the nearest name would be another one.
_MEANT = {
    "lr": ("train.learning_rate",),
    "ema": ("train.ema_decay",),
    "resolution": ("data.height", "data.width"),
    "image_size": ("data.height", "data.width"),
    "num_samples": ("num",),
    "guidance": ("guidance_scale",),
    "cfg": ("guidance_scale",),
}


def parse_options(
    kind: type[Options], arguments: Sequence[str] | None = None, *, description: str = "", program: str | None = None
) -> Options:
    """Parses the options of a script.

    Args:
      kind: a frozen dataclass with one field per option, whose docstrings are the help.
      arguments: the words after the script's name; those of this process if None.
      description: what the script does, for `--help`.
      program: the name of the script, for `--help`; that of this process if None.

    Returns:
      the options.

    Raises:
      UserError: an unknown option (the message names the nearest), a value of the wrong type, a missing or unexpected
        argument.
      SystemExit: `--help` was given and has been printed.
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    positional = (tyro.conf.Positional[str], tyro.conf.Positional[tuple[str, ...]])
    known = {name: leaf for name, leaf in leaves(kind).items() if hints.get(name) not in positional}
    read: Options = _parse(kind, _words(arguments), known, description=description, program=program)
    return read


class RunCommand(typing.NamedTuple, typing.Generic[Options]):
    """A command line that trains a run."""

    options: Options
    """The script's own options."""
    config: Config
    """The configuration, with the fields that the command line sets."""
    folder: Path | None
    """The folder of an existing run, if the command names one in place of a config file."""


def parse_run(
    kind: type[Options],
    arguments: Sequence[str] | None = None,
    *,
    description: str = "",
    default: str = "configs/digits.py",
) -> RunCommand[Options]:
    """Parses a command line of the form `[CONFIG_FILE or RUN] [options] [--section.field value ...]`.

    The folder of a run stands for the configuration that is recorded in it; that of another program's network, for one
    that starts from its weights.

    Args:
      kind: the script's own options: a frozen dataclass whose fields all have defaults.
      arguments: the words after the script's name; those of this process if None.
      description: what the script does, for `--help`.
      default: the config file if none is given.

    Returns:
      the `RunCommand`. `validate` checks the values of its configuration.

    Raises:
      UserError: as `parse_options`, `load_config` and `read_to_resume`.
      SystemExit: `--help` was given and has been printed, with the defaults of the config file.
    """
    given = _words(arguments)
    words = [word for word in given if word not in ("-h", "--help")]
    known = {**leaves(kind), **leaves(Config)}
    run = dataclasses.make_dataclass(
        "Run",
        [
            ("config_or_run", Annotated[tyro.conf.Positional[str], tyro.conf.arg(help=_CONFIG_OR_RUN)], default),
            ("options", Annotated[kind, tyro.conf.arg(name="")], dataclasses.field(default_factory=kind)),
            ("config", Annotated[Config, tyro.conf.arg(name="")], Config()),
        ],
        frozen=True,
    )
    file = default
    try:
        file = _parse(run, words, known).config_or_run
    except UserError:
        # A mistake may be why help is asked for.
        if words == given:
            raise
    _refuse_value_of_flag(file)
    config, folder = _load(file) if Path(file).is_dir() else (load_config(file), None)
    defaults = run(config_or_run=file, config=config)
    read = _parse(run, given, known, description=description, default=defaults)
    return RunCommand(read.options, read.config, folder)


def _load(folder: str) -> tuple[Config, Path | None]:
    """Returns the configuration that a folder stands for, and the folder if it is that of a run."""
    # They need JAX: --help and most mistakes come before it is imported.
    with interrupts.ending_at_once():
        from ddpm_jax.run.pretrained import is_pretrained, load_pretrained_config
        from ddpm_jax.run.record import is_run, read_to_resume

    if is_pretrained(Path(folder)):
        found = load_pretrained_config(Path(folder))
        return dataclasses.replace(found, train=dataclasses.replace(found.train, init_from=folder)), None
    if is_run(Path(folder)):
        return read_to_resume(Path(folder)), Path(folder)
    return load_config(folder), None


_CONFIG_OR_RUN = (
    "The experiment: a Python file that sets `config`, or the name of one in configs/; or the folder of a run, to "
    "resume it with its own configuration; or of a model of another program, to fine-tune it."
)

Command = Callable[[Any], None]
"""A command of a script: its parameter `options` is annotated with their dataclass, its docstring is the help."""


def run_command(
    commands: Mapping[str, Command],
    arguments: Sequence[str] | None = None,
    *,
    default: Command | None = None,
    before: Callable[[], None] = lambda: None,
) -> None:
    """Runs the command that the first word names; prints the list of commands for `--help`.

    Args:
      commands: by name.
      arguments: the words after the script's name; those of this process if None.
      default: runs if the first word names no command; if None, there must be a command.
      before: runs before the command, once its options are parsed.

    Raises:
      UserError: as `parse_options`; or there is no such command, and the message names the nearest.
      SystemExit: `--help` of a command was given and has been printed.
    """
    words, program = _words(arguments), Path(sys.argv[0]).name
    if not words and default is None:
        words = ["--help"]
    name, second = [*words, "", ""][:2]
    if name in commands:
        _run(commands[name], words[1:], before, program=f"{program} {name}")
        return
    if name in ("-h", "--help"):
        print(f"usage: {program} COMMAND RUN [options]      ({program} COMMAND --help lists them)\n")
        for known, command in commands.items():
            print(f"  {known:13}{(command.__doc__ or '').splitlines()[0]}")
        if default is None:
            return
        print("\nWithout a COMMAND:\n", flush=True)
    elif default is not None and second in commands:
        raise UserError(f"the command comes first: {program} {second} {name}")
    elif default is None or (second and not name.startswith("-") and not second.startswith("-")):
        hint = nearest(name, commands) or f": choose {', '.join(commands)}"
        raise UserError(f"there is no command {name!r}{hint}")
    _run(default, words, before, program=program)


def _run(command: Command, words: Sequence[str], before: Callable[[], None], *, program: str) -> None:
    kind = typing.get_type_hints(command)["options"]
    options = parse_options(kind, words, description=inspect.getdoc(command) or "", program=program)
    before()
    command(options)


def _words(arguments: Sequence[str] | None) -> list[str]:
    return list(sys.argv[1:] if arguments is None else arguments)


def _parse(
    kind: Any,
    words: Sequence[str],
    known: Mapping[str, Leaf],
    *,
    description: str = "",
    program: str | None = None,
    default: Any = tyro.MISSING_NONPROP,
) -> Any:
    words = _with_values(words)
    if {"-h", "--help"} & set(words):
        words = ["--help"]
    else:
        _check_names(words, known)
    framed = io.StringIO()
    try:
        with contextlib.redirect_stderr(framed):
            read, unknown = tyro.cli(
                kind,
                args=words,
                prog=program or Path(sys.argv[0]).name,
                description=description,
                default=default,
                return_unknown_args=True,
                config=(tyro.conf.HelptextFromCommentsOff, tyro.conf.PositionalMetavarFromFieldName),
            )
    except SystemExit as ending:
        if not ending.code:
            raise
        raise UserError(_in_one_line(framed.getvalue(), known)) from None
    if unknown:
        _refuse_value_of_flag(unknown[0])
        raise UserError(f"unexpected argument {unknown[0]!r}: see --help")
    return read


def _with_values(words: Sequence[str]) -> list[str]:
    """Joins an option and a value that begins with dashes: other programs' flags in quotes. No option has a space."""
    joined: list[str] = []
    for word in words:
        value = word.startswith("--") and " " in word.partition("=")[0]
        if value and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _option(name: str) -> str:
    """`train.batch_size` as it is written on a command line."""
    return "--" + name.replace("_", "-")


def _check_names(words: Sequence[str], known: Mapping[str, Leaf]) -> None:
    """Refuses unknown options, before tyro takes them for a missing positional argument."""
    flags = [name.rpartition(".") for name, leaf in known.items() if leaf.kind is bool]
    names = {*known, *(f"{section}{dot}no_{last}" for section, dot, last in flags)}
    for word in words:
        given = word.partition("=")[0]
        name = given.lstrip("-").replace("-", "_")
        if not re.match(r"-+[a-zA-Z]", word) or (word.startswith("--") and name in names):
            continue
        last = name.rpartition(".")[2]
        if last == "resume":
            raise UserError(f"unknown option {given}: run the same command again, or train.py RUN, to resume")
        meant = [each for each in _MEANT.get(last, ()) if each in known]
        hint = f": did you mean {' and '.join(map(_option, meant))}?" if meant else nearest(name, known, form=_option)
        raise UserError(f"unknown option {given}{hint or ': see --help'}")


def _refuse_value_of_flag(word: str) -> None:
    """Refuses `--data.flip true`, where tyro takes `true` for the next argument."""
    if word.lower() in ("", "true", "false"):
        raise UserError(f"a flag takes no value: write --data.flip or --data.no-flip, without {word!r}")


def _in_one_line(framed: str, known: Mapping[str, Leaf]) -> str:
    """Returns the message in the frame that tyro draws, between its title and its first rule or empty line."""
    lines = ["" if set(line) <= set("│╰╯─- ") else line.strip("│ ") for line in framed.splitlines()[1:]]
    text = " ".join(itertools.takewhile(bool, itertools.dropwhile(operator.not_, lines)))
    if text.startswith("Missing from"):
        missing = [line.split()[0] for line in lines if re.match(r"--\w|[A-Z]+$", line)]
        return f"missing {', '.join(missing)}: see --help"
    option = re.search(r"--[\w.-]*\w", text)
    leaf = known.get(option[0].lstrip("-").replace("-", "_")) if option else None
    if option is None or leaf is None:
        return text
    if text.startswith("Missing value"):
        return f"{option[0]} needs {describe(leaf.kind)}, but no value follows it"
    value = re.search(r"\[.*,.*\]|'.*?'|\".*?\"", text)
    return f"{option[0]} needs {describe(leaf.kind)}, not {value[0]}" if value else text
