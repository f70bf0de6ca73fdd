"""The fields of a configuration by their dotted names: their kinds, their values, and what a slip probably meant."""

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ddpm_jax.config import Config
from ddpm_jax.system.errors import UserError

# Fields and the kinds of their values


class Leaf(typing.NamedTuple):
    """A field that holds a value, not a section."""

    kind: Any
    """Its type."""
    free: bool
    """Whether it may differ between a run and its continuation."""


def leaves(kind: Any) -> Mapping[str, Leaf]:
    """Lists the fields of a dataclass and of the dataclasses in it by their dotted names, in their order.

    >>> leaves(Config)["train.batch_size"]
    Leaf(kind=<class 'int'>, free=False)
    """
    hints = typing.get_type_hints(kind)
    found: dict[str, Leaf] = {}
    for each in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[each.name]):
            found |= {f"{each.name}.{name}": leaf for name, leaf in leaves(hints[each.name]).items()}
        else:
            found[each.name] = Leaf(hints[each.name], each.metadata.get("free", False))
    return found


def value_of(config: object, name: str) -> Any:
    """Reads the field with a dotted name.

    >>> value_of(Config(), "diffusion.num_steps")
    1000
    """
    return functools.reduce(getattr, name.split("."), config)


def members(kind: Any) -> tuple[Any, ...]:
    """Lists the members of a union; of another kind, itself.

    >>> members(int | None)
    (<class 'int'>, <class 'NoneType'>)
    """
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def describe(kind: Any) -> str:
    """Names a kind of value in words.

    >>> describe(int | None)
    'an integer or None'
    """
    if len(members(kind)) > 1:
        return " or ".join(map(describe, members(kind)))
    match typing.get_origin(kind):
        case typing.Literal:
            return f"one of {', '.join(map(str, typing.get_args(kind)))}"
        case origin if origin is tuple:
            return {int: "integers", float: "numbers"}.get(typing.get_args(kind)[0], "a list of words")
    words = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "text",
        Path: "a path",
        types.NoneType: "None",
    }
    return words[kind]


def cast(kind: Any, value: Any) -> Any:
    """Checks that a value is of a kind; what JSON has no word for is cast: a list to a tuple, 1 to 1.0.

    Args:
      kind: str, int, float, bool, None, a Literal, `tuple[x, ...]`, or a union of such.
      value: any value.

    Returns:
      the value, of that kind.

    Raises:
      TypeError: it is of another kind; a bool is no number, and 1.0 is no integer.

    >>> cast(tuple[int, ...], [1, 2])
    (1, 2)
    """
    for member in members(kind):
        match typing.get_origin(member):
            case typing.Literal if isinstance(value, str) and value in typing.get_args(member):
                return value
            case origin if origin is tuple and isinstance(value, list | tuple):
                return tuple(cast(typing.get_args(member)[0], entry) for entry in value)
        if member is float and type(value) is int:
            return float(value)
        if type(value) is member:
            return value
    raise TypeError(f"needs {describe(kind)}, not {value!r}")


def nearest(name: str, names: Iterable[str], *, form: Callable[[str], str] = str) -> str:
    """Gives the known name that was probably meant, as the end of an error line; empty if none is near.

    Args:
      name: what was written.
      names: what is known.
      form: how a known name is written in the line.

    Returns:
      `: did you mean NAME?`, or nothing.

    >>> nearest("train.batchsize", leaves(Config))
    ': did you mean train.batch_size?'
    """
    names = list(names)
    last = name.rpartition(".")[2]
    # A forgotten section is the commonest slip, and no spelling distance finds it.
    found = [known for known in names if known.rpartition(".")[2] == last]
    found = found or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    found = found or [
        known for known in names if difflib.get_close_matches(last, [known.rpartition(".")[2]], cutoff=0.7)
    ]
    return f": did you mean {' or '.join(map(form, found[:3]))}?" if found else ""


def check_kinds(config: Config) -> None:
    """Checks that every field of a configuration is of its declared kind; raises `UserError`."""
    for name, leaf in leaves(Config).items():
        section, _, last = name.rpartition(".")
        owner = value_of(config, section) if section else config
        if not hasattr(owner, last):
            raise UserError(f"{section} must be a {sections()[section].__name__}, not {owner!r:.40}")
        try:
            cast(leaf.kind, getattr(owner, last))
        except TypeError as error:
            raise UserError(f"{name} {error}") from None


def sections() -> dict[str, Any]:
    """Returns the sections of `Config`: the dataclass of each by its name."""
    return {name: kind for name, kind in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(kind)}
