"""Errors that a user can cause and fix."""

from collections.abc import Iterable

_LONGEST = 2000  # characters of a message


def printable(name: object) -> str:
    r"""Returns a text with everything that a terminal cannot show escaped: control characters, undecodable bytes.

    A name in a data set may contain what a terminal obeys, such as a change of color or of the window's title.

    >>> print(printable("caf\udce9 \n"))
    caf\xe9 \n
    """
    shown = (
        char
        if char.isprintable()
        else f"\\x{ord(char) - 0xDC00:02x}"
        if "\udc80" <= char <= "\udcff"  # how Python keeps a byte that is not UTF-8
        else char.encode("unicode_escape").decode("ascii")
        for char in str(name)
    )
    return "".join(shown)


def few(names: Iterable[object], most: int) -> str:
    """Returns the first of some names, as by `printable` and each of at most 200 characters, and how many there are.

    >>> few("abc", 2)
    'a, b, .. (3)'
    """
    names = list(names)
    shown = ", ".join(printable(name)[:200] for name in names[:most])
    return f"{shown}, .. ({len(names)})" if len(names) > most else shown


class UserError(Exception):
    """One clear line: what is wrong, which value, what to do. The scripts print it and end with status 2."""

    def __init__(self, message: object):
        """Escapes what is not printable, joins several lines to one, and leaves out the middle of a very long one."""
        line = printable(" ".join(str(message).splitlines()))
        super().__init__(line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} .. {line[-_LONGEST // 4 :]}")


class NoSuchSplit(UserError):
    """A data set has no split of that name."""


class Damage(Exception):
    """A file that does not hold what was written, or holds what was written for something else; names no file."""


class Stopped(Exception):
    """A run stopped by a signal after saving a checkpoint; the scripts end with status 128 + the signal."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.signal_number = signal_number
