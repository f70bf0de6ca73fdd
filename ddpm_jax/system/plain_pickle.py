"""Pickles of arrays and plain values, read without running what they name: a pickle could otherwise be any program."""

import io
import pickle
import pickletools
import re
import typing

import numpy as np

# Of fixed size; NumPy's own types include those that hold objects.
_TYPE = re.compile(r"[fiub][1248]")


class PickledArray:
    """An array of numbers in a pickle; NumPy's own way from a pickle to an array believes any shape and type."""

    value = np.empty(0, np.uint8)
    """The array; it cannot be written to."""

    def __setstate__(self, state: typing.Any) -> None:
        _, shape, kind, fortran, content = state
        self.value = np.frombuffer(content, kind.dtype).reshape(shape, order="F" if fortran else "C")


class _Type:
    """The type of an array in a pickle, or of a number."""

    def __init__(self, name: str | bytes, *_: typing.Any):
        name = _text(name)
        if not _TYPE.fullmatch(name):
            raise pickle.UnpicklingError(f"it holds an array of {name!r}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: typing.Any) -> None:
        self.dtype = self.dtype.newbyteorder(">" if _text(state[1]) == ">" else "<")


def _text(name: str | bytes) -> str:
    return name.decode("latin1") if isinstance(name, bytes) else name  # as encoding="bytes" leaves it


def _scalar(kind: _Type, content: bytes) -> typing.Any:
    return np.frombuffer(content, kind.dtype)[0]


class _Unpickler(pickle.Unpickler):
    _ADMITTED: typing.ClassVar[dict[tuple[str, str], typing.Any]] = {
        ("numpy", "ndarray"): None,
        ("numpy", "dtype"): _Type,
        # The functions that make an array and a number; NumPy 2 moved them.
        ("numpy.core.multiarray", "_reconstruct"): lambda *_: PickledArray(),
        ("numpy._core.multiarray", "_reconstruct"): lambda *_: PickledArray(),
        ("numpy.core.multiarray", "scalar"): _scalar,
        ("numpy._core.multiarray", "scalar"): _scalar,
        ("_codecs", "encode"): lambda text, coding="latin1": text.encode("latin1"),
    }

    def find_class(self, module: str, name: str) -> typing.Any:
        """Admits what an array is made of."""
        try:
            return self._ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def read_dictionary(content: bytes, *, encoding: str = "ASCII") -> dict[typing.Any, typing.Any]:
    """Reads a dictionary of arrays, lists, dictionaries, numbers and text from a pickle.

    No instruction of it may claim more memory than it has bytes.

    Args:
      content: the pickle, of a protocol up to 4.
      encoding: of the text of Python 2, as in `pickle.loads`.

    Returns:
      the dictionary, whose arrays are `PickledArray`.

    Raises:
      pickle.UnpicklingError: it contains something else; the message names it. Damage also raises other kinds.
    """
    for number, (instruction, argument, _) in enumerate(pickletools.genops(content)):
        if instruction.name in ("BYTEARRAY8", "NEXT_BUFFER", "EXT1", "EXT2", "EXT4") or (
            instruction.name in ("PUT", "BINPUT", "LONG_BINPUT") and typing.cast(int, argument) > number
        ):
            raise pickle.UnpicklingError(f"it has {instruction.name} {argument}")
    found = _Unpickler(io.BytesIO(content), encoding=encoding).load()
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__} where a dictionary belongs")
    return found
