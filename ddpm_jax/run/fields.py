"""The fields of a configuration by their dotted names: types, ranges, values, and the nearest to an unknown name."""

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ddpm_jax.config import Config, Range
from ddpm_jax.system.errors import UserError


class Leaf(typing.NamedTuple):
    """A field that holds a value, not a section."""

    kind: Any
    """Its type."""
    free: bool = False
    """Whether it may change when a run is resumed."""
    range: Range | None = None
    """Its allowed values; None: every value of the type."""


def leaves(kind: Any) -> Mapping[str, Leaf]:
    """Lists the fields of a dataclass, and of the dataclasses in it, in order, by their dotted names.

    >>> leaves(Config)["train.batch_size"]
    Leaf(kind=<class 'int'>, free=False, range=Range(at_least=1, above=-inf, below=2147483648, at_most=inf))
    """
    hints, annotated = typing.get_type_hints(kind), typing.get_type_hints(kind, include_extras=True)
    found: dict[str, Leaf] = {}
    for each in dataclasses.fields(kind):
        hint = hints[each.name]
        if dataclasses.is_dataclass(hint):
            found |= {f"{each.name}.{name}": leaf for name, leaf in leaves(hint).items()}
            continue
        outer = annotated[each.name]
        entry = typing.get_args(outer)[0] if typing.get_origin(outer) is tuple else outer
        ranges = [extra for extra in getattr(entry, "__metadata__", ()) if isinstance(extra, Range)]
        found[each.name] = Leaf(hint, each.metadata.get("free", False), next(iter(ranges), None))
    return found


def value_of(config: object, name: str) -> Any:
    """Returns the value of the field with a dotted name.

    >>> value_of(Config(), "diffusion.num_steps")
    1000
    """
    return functools.reduce(getattr, name.split("."), config)


def members(kind: Any) -> tuple[Any, ...]:
    """Lists the members of a union type; any other type is its own only member.

    >>> members(int | None)
    (<class 'int'>, <class 'NoneType'>)
    """
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def describe(kind: Any) -> str:
    """Returns the name of a type in words.

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
        types.NoneType: "None",
    }
    return words[kind]


def cast(kind: Any, value: Any) -> Any:
    """Checks the type of a value, and casts what JSON cannot express: a list to a tuple, 1 to 1.0.

    Args:
      kind: str, int, float, bool, None, a Literal, `tuple[x, ...]`, or a union of them.
      value: any value.

    Returns:
      the value, of that type.

    Raises:
      TypeError: the value is of another type; a bool is not a number, and 1.0 is not an integer.

    >>> cast(tuple[int, ...], [1, 2])
    (1, 2)
    """
    for member in members(kind):
        match typing.get_origin(member):
            case typing.Literal if isinstance(value, str) and value in typing.get_args(member):
                return value
            case origin if origin is tuple and isinstance(value, list | tuple):
                return tuple(cast(typing.get_args(member)[0], entry) for entry in value)
        if member is float and type(value) is int and value.bit_length() < 1024:  # or it is larger than any float
            return float(value)
        if type(value) is member:
            return value
    raise TypeError(f"needs {describe(kind)}, not {value!r}")


def nearest(name: str, names: Iterable[str], *, form: Callable[[str], str] = str) -> str:
    """Returns the end of an error message that suggests the nearest known name.

    Args:
      name: the unknown name.
      names: the known names.
      form: formats a known name for the message.

    Returns:
      `: did you mean NAME?`, or nothing if no name is near.

    >>> nearest("train.batchsize", leaves(Config))
    ': did you mean train.batch_size?'
    """
    names = list(names)
    last = name.rpartition(".")[2]
    # The most common mistake is to leave out the section, and no edit distance finds it.
    found = [known for known in names if known.rpartition(".")[2] == last]
    found = found or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    found = found or [
        known for known in names if difflib.get_close_matches(last, [known.rpartition(".")[2]], cutoff=0.7)
    ]
    return f": did you mean {' or '.join(map(form, found[:3]))}?" if found else ""


def with_kinds(config: Config) -> Config:
    """Returns a configuration with each field cast to its declared type; raises `UserError` if one has another."""
    found: dict[str, dict[str, Any]] = {}
    for name, leaf in leaves(Config).items():
        section, _, last = name.rpartition(".")
        owner = value_of(config, section) if section else config
        if not hasattr(owner, last):
            raise UserError(f"{section} must be a {sections()[section].__name__}, not {owner!r:.40}")
        try:
            found.setdefault(section, {})[last] = cast(leaf.kind, getattr(owner, last))
        except TypeError as error:
            raise UserError(f"{name} {error}") from None
    whole = found.pop("")
    parts = {name: dataclasses.replace(value_of(config, name), **values) for name, values in found.items()}
    return dataclasses.replace(config, **whole, **parts)


def sections() -> dict[str, Any]:
    """Returns the sections of `Config`: the dataclass of each by its name."""
    return {name: kind for name, kind in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(kind)}
