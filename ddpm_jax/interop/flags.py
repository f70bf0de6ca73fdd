"""The flags of other programs' scripts: what their weights do not show, in the words in which it is written down."""

import difflib
import shlex
from collections.abc import Mapping
from typing import Any

from ddpm_jax.system.errors import UserError

Flags = dict[str, Any]
"""Values by the name of the flag, without dashes."""


def parse_flags(text: str, known: Mapping[str, Any], ignored: frozenset[str]) -> Flags:
    """Parses flags as their scripts do: `--name value`, or `--name=value`.

    Args:
      text: the flags, as on a command line.
      known: each flag's default, whose type is that of its values.
      ignored: flags that are accepted and dropped: they have no bearing on what the network computes.

    Returns:
      the values of the known flags that were given.

    Raises:
      UserError: an unknown flag, a missing value, or one of another type.

    >>> parse_flags("--image_size 64 --learn_sigma=True --lr 1e-4", {"image_size": 0, "learn_sigma": False},
    ...             frozenset(["lr"]))
    {'image_size': 64, 'learn_sigma': True}
    """
    try:
        words = [part for word in shlex.split(text) for part in (word.split("=", 1) if word[:2] == "--" else [word])]
    except ValueError as error:
        raise UserError(f"--flags {text[:80]!r}: {error}") from None
    if len(words) % 2:
        raise UserError(f"--flags: {words[-1]} has no value")
    found: Flags = {}
    for word, value in zip(words[::2], words[1::2], strict=True):
        name = word.removeprefix("--")
        if name == word or (name not in known and name not in ignored):
            near = difflib.get_close_matches(name, [*known, *ignored], n=1)
            hint = f"did you mean --{near[0]}?" if near else f"known are {', '.join(known)}"
            raise UserError(f"--flags: unknown flag {word}; {hint}")
        if name in known:
            found[name] = _cast(name, value, type(known[name]))
    return found


def _cast(name: str, value: str, kind: type) -> Any:
    truth = {"yes": True, "true": True, "t": True, "y": True, "1": True}
    truth |= {"no": False, "false": False, "f": False, "n": False, "0": False}
    try:
        return truth[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        words = {bool: "true or false", int: "an integer", float: "a number"}
        raise UserError(f"--flags: --{name} must be {words.get(kind, 'a word')}, not {value!r:.40}") from None


def merge_flags(given: Flags, shown: Flags, defaults: Flags) -> Flags:
    """Returns all flags: those that the weights show, those that were given, and defaults for the rest.

    Args:
      given: by the user, or with the published weights.
      shown: what the shapes of the weights show.
      defaults: of the script.

    Raises:
      UserError: a flag that was given contradicts the weights.
    """
    for name in given:
        if name in shown and given[name] != shown[name]:
            raise UserError(f"--flags: --{name} is {given[name]}, but the weights have {shown[name]}")
    return {**defaults, **given, **shown}
