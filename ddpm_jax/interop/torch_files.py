"""PyTorch's files (`.bin`, `.pt`, `.pth`, `.ckpt`), read without PyTorch and without running anything in them.

Such a file is a pickle beside the raw bytes of its tensors. A pickle is a program for a small stack machine, which can
call any function of any module; the machine here knows tensors, storages, ordered dictionaries and plain values alone,
and calls nothing else.
"""

import io
import math
import pickletools
import typing
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from ddpm_jax.system.errors import UserError, printable

Tree = Any
"""NumPy arrays, numbers, text and None in nested dictionaries, lists and tuples."""

MAX_BYTES = 2**34
"""Size of the largest file that is read: 16 GiB."""

# A tensor takes about 150 bytes of the pickle: this is room for some 25,000 of them.
_MAX_PICKLE = 2**22
_MAX_DEPTH, _MAX_VALUES = 32, 2**18
# Views may share a storage, so all tensors together may be larger than the file, within reason.
_SHARED, _FREE = 8, 2**26

_ZIP, _LEGACY = b"PK\x03\x04", b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_LEGACY_PROTOCOL = 1001

_TYPES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
_DAMAGE = (OSError, EOFError, ValueError, KeyError, IndexError, OverflowError, RuntimeError, zipfile.BadZipFile)


class _Refused(ValueError):
    """Something that no file of weights contains."""


class _Global(typing.NamedTuple):
    """A name of a module that the pickle asks for, and that the machine knows."""

    name: str


class _Storage(typing.NamedTuple):
    key: str
    dtype: np.dtype
    length: int


class _Tensor(typing.NamedTuple):
    """A tensor before its storage is read; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def is_torch_file(file: Path) -> bool:
    """Returns whether a file begins as those that PyTorch writes, in the form of a zip archive or the one before."""
    with file.open("rb") as opened:
        return opened.read(len(_LEGACY)).startswith((_ZIP, _LEGACY))


def read_torch(file: Path, *, max_bytes: int = MAX_BYTES) -> Tree:
    """Reads a file that `torch.save` wrote, in its zip form or its legacy form.

    Args:
      file: the file. Tensors in it may be views: with strides, an offset, or a storage in common.
      max_bytes: size of the largest file to read.

    Returns:
      what was saved, with read-only NumPy arrays for the tensors (ml_dtypes' bfloat16 among their types); ordered
      dictionaries become dictionaries.

    Raises:
      UserError: there is no such file, it is larger than `max_bytes`, is damaged, is not PyTorch's, or contains
        anything but tensors and plain values; the message names what it contains.
    """
    shown = printable(file)
    if not file.is_file():
        raise UserError(f"there is no file {shown}")
    try:
        size = file.stat().st_size
        if size > max_bytes:
            raise UserError(f"{shown} is too large for a file of weights: {size:,} bytes, at most {max_bytes:,}")
        with file.open("rb") as opened:
            start = opened.read(len(_LEGACY))
            opened.seek(0)
            if start.startswith(_ZIP):
                return _read_zip(opened, size)
            if start == _LEGACY:
                return _read_legacy(opened, size)
    except _Refused as error:
        raise UserError(f"cannot read {shown} as weights: {error}") from None
    except _DAMAGE as error:
        reason = printable(" ".join(str(error).split()))[:100]
        raise UserError(f"cannot read {shown}: it is damaged or incomplete ({reason})") from None
    raise UserError(f"cannot read {shown}: it is not a file of PyTorch's (.bin, .pt, .pth or .ckpt)")


def _read_zip(opened: BinaryIO, size: int) -> Tree:
    with zipfile.ZipFile(opened) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise _Refused("two entries of the archive have the same name")
        for entry in entries.values():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise _Refused(f"the entry {_quote(entry.filename)} is compressed, which PyTorch never does")
        if sum(entry.file_size for entry in entries.values()) > size:
            raise _Refused("the entries of the archive overlap")
        roots = [name.removesuffix("data.pkl") for name in entries if name.split("/")[1:] == ["data.pkl"]]
        if len(roots) != 1:
            raise _Refused("the archive has no data.pkl in its only folder, as PyTorch writes it")
        root = roots[0]
        if f"{root}constants.pkl" in entries:
            raise _Refused("it is a TorchScript program; export its state_dict()")
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
            raise _Refused("its numbers are not little-endian")
        if entries[f"{root}data.pkl"].file_size > _MAX_PICKLE:
            raise _Refused("its pickle is larger than that of any weights")

        def read(storage: _Storage) -> bytes:
            name = f"{root}data/{storage.key}"
            if name not in entries or entries[name].file_size != storage.length * storage.dtype.itemsize:
                raise _Refused(f"the storage {_quote(storage.key)} does not have the size that the pickle gives")
            return archive.read(name)

        ops = pickletools.genops(archive.read(f"{root}data.pkl"))
        return _resolve(_run(ops), read, _FREE + _SHARED * size)


def _read_legacy(opened: BinaryIO, size: int) -> Tree:
    pickles = io.BytesIO(opened.read(_MAX_PICKLE))
    _run(pickletools.genops(pickles))  # the magic number
    protocol, system, tree, keys = (_run(pickletools.genops(pickles)) for _ in range(4))
    if protocol != _LEGACY_PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise _Refused("it has another protocol than PyTorch's, or its numbers are not little-endian")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        raise _Refused("its list of storages is not one of distinct names")
    storages: dict[str, bytes] = {}
    position = pickles.tell()
    needed = {tensor.storage.key: tensor.storage for tensor in _tensors(tree)}
    for key in keys:
        if key not in needed:
            raise _Refused(f"no tensor uses the storage {_quote(key)}")
        opened.seek(position)
        count = opened.read(8)
        num_bytes = needed[key].length * needed[key].dtype.itemsize
        if position + 8 + num_bytes > size:
            raise EOFError("it ends within a tensor")
        if int.from_bytes(count, "little") != needed[key].length:
            raise _Refused(f"the storage {_quote(key)} does not have the size that the pickle gives")
        storages[key] = opened.read(num_bytes)
        position += 8 + num_bytes
    return _resolve(tree, lambda storage: storages[storage.key], _FREE + _SHARED * size)


_Ops = Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]
_VALUES = {"BINFLOAT", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINUNICODE", "SHORT_BINUNICODE"}
_VALUES |= {"BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"}
_MAKES: dict[str, Callable[[], Any]] = {
    **{"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False},
    **{"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple},
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _run(ops: _Ops) -> Any:
    """Runs a pickle and returns its value, with a `_Tensor` for each tensor."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        found = stack[start:]
        del stack[start:]
        return found

    for op, arg, _ in ops:
        name = op.name
        if name in _VALUES:
            stack.append(arg)
        elif name in _MAKES:
            stack.append(_MAKES[name]())
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in _TUPLES:
            count = _TUPLES[name]
            if len(stack) < count:
                raise IndexError("its pickle takes more values than it has")
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("APPEND", "APPENDS"):
            items = since_mark() if name == "APPENDS" else [stack.pop()]
            _of(list, stack[-1]).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _set_items(_of(dict, stack[-1]), items)
        elif name == "GLOBAL":
            stack.append(_known(arg.replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = _of(str, stack.pop()), _of(str, stack.pop())
            stack.append(_known(f"{module}.{attribute}"))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name in ("REDUCE", "NEWOBJ"):
            args, function = _of(tuple, stack.pop()), _of(_Global, stack.pop())
            stack.append(_call(function.name, args))
        elif name == "BUILD":
            # The attributes of a dictionary (`_metadata` of a state_dict) are of no use here.
            state, target = stack.pop(), stack[-1]
            _of(dict, state), _of(dict, target)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise _Refused(f"its pickle has the instruction {name}, which no tensor needs")
    if len(stack) != 1 or marks:
        raise _Refused("its pickle does not end with one value")
    return stack[0]


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind and not (kind is dict and isinstance(value, dict)):
        raise _Refused(f"its pickle has a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _set_items(target: dict[Any, Any], items: list[Any]) -> None:
    if len(items) % 2:
        raise _Refused("its pickle has a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Numbers are kept small: large ones could be chosen to have the same hash.
        if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < 2**31):
            raise _Refused(f"it has a dictionary with a {type(key).__name__} or a large number as a key")
        if key in target:
            raise _Refused(f"it has the key {_quote(key)} twice in one dictionary")
        target[key] = value


def _known(name: str) -> _Global:
    module, _, attribute = name.rpartition(".")
    if name in _FUNCTIONS or (module == "torch" and attribute in _TYPES):
        return _Global(name)
    raise _Refused(f"it asks for {_quote(name)}, which is neither a tensor nor a plain value")


def _storage(identity: Any) -> _Storage:
    identity = _of(tuple, identity)
    if len(identity) not in (5, 6) or identity[0] != "storage":
        raise _Refused("it refers to something that is not a storage")
    kind, key, _, count = identity[1:5]
    dtype = _TYPES.get(_of(_Global, kind).name.removeprefix("torch."))
    if dtype is None or not isinstance(key, str) or not _is_size(count):
        raise _Refused("it has a storage without type, name or size")
    if identity[5:] not in ((), (None,)):
        raise _Refused("it has a storage that is a view of another, as PyTorch wrote before 0.4")
    return _Storage(key, dtype, count)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    shape, strides = _of(tuple, shape), _of(tuple, strides)
    storage = _of(_Storage, storage)
    if len(shape) != len(strides) or len(shape) > _MAX_DEPTH or not all(map(_is_size, (offset, *shape, *strides))):
        raise _Refused(f"it has a tensor of shape {_quote(shape)} with strides {_quote(strides)}")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if (offset > storage.length) if 0 in shape else (last >= storage.length):
        raise _Refused(
            f"it has a tensor that reaches to element {last} of a storage of {storage.length} (shape {_quote(shape)})"
        )
    return _Tensor(storage, offset, shape, strides)


def _rebuild_parameter(data: Any, *_: Any) -> _Tensor:
    return typing.cast(_Tensor, _of(_Tensor, data))


def _ordered(*args: Any) -> dict[Any, Any]:
    made: dict[Any, Any] = OrderedDict()
    if args and (len(args) > 1 or type(args[0]) is not list):
        raise _Refused("it has an ordered dictionary of something else than pairs")
    for pair in args[0] if args else []:
        if type(pair) not in (list, tuple) or len(pair) != 2:
            raise _Refused("it has an ordered dictionary of something else than pairs")
        _set_items(made, list(pair))
    return made


_FUNCTIONS: dict[str, tuple[Callable[..., Any], int, int]] = {  # each with the least and largest number of arguments
    "collections.OrderedDict": (_ordered, 0, 1),
    "torch._utils._rebuild_tensor": (_rebuild_tensor, 4, 4),
    "torch._utils._rebuild_tensor_v2": (_rebuild_tensor, 6, 7),
    "torch._utils._rebuild_parameter": (_rebuild_parameter, 3, 3),
    "torch.Size": (lambda shape: _of(tuple, shape), 1, 1),
}


def _call(name: str, args: tuple[Any, ...]) -> Any:
    function, least, most = _FUNCTIONS.get(name, (None, 0, 0))
    if function is None or not least <= len(args) <= most:
        raise _Refused(f"it calls {name} with {len(args)} arguments")
    return function(*args)


def _tensors(tree: Any) -> Iterator[_Tensor]:
    """Lists all tensors; of parts that are shared or contain themselves, once."""
    waiting, seen = [tree], set()
    while waiting:
        value = waiting.pop()
        if type(value) is _Tensor:
            yield value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)


def _resolve(tree: Any, read: Callable[[_Storage], bytes], budget: int) -> Tree:
    """Puts arrays in the place of tensors, and plain dictionaries in that of ordered ones."""
    storages: dict[str, tuple[_Storage, np.ndarray]] = {}
    left, values = budget, 0

    def array(tensor: _Tensor) -> np.ndarray:
        nonlocal left
        storage, itemsize = tensor.storage, tensor.storage.dtype.itemsize
        left -= math.prod(tensor.shape) * itemsize
        if left < 0:
            raise _Refused("its tensors together are many times larger than the file")
        if storage.key not in storages:
            data = np.frombuffer(read(storage), np.uint8)
            if storage.dtype == np.bool_ and data.size and data.max() > 1:
                raise _Refused(f"the storage {_quote(storage.key)} of truth values has others than 0 and 1")
            storages[storage.key] = storage, data.view(storage.dtype)
        known, data = storages[storage.key]
        if known != storage:
            raise _Refused(f"the storage {_quote(storage.key)} has two types or sizes")
        if 0 in tensor.shape:
            return np.empty(tensor.shape, storage.dtype)
        strides = [itemsize * stride for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(data[tensor.offset :], tensor.shape, strides, writeable=False)

    def copy(value: Any, depth: int) -> Any:
        nonlocal values
        values += 1  # a shared part counts as often as it is met: parts of parts could grow without end
        if depth > _MAX_DEPTH or values > _MAX_VALUES:
            raise _Refused(f"it is nested more than {_MAX_DEPTH} deep, contains itself, or has too many values")
        if type(value) is _Tensor:
            return array(value)
        if isinstance(value, dict):
            return {key: copy(item, depth + 1) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(copy(item, depth + 1) for item in value)
        if isinstance(value, _Storage | _Global):
            raise _Refused(f"it has a {type(value).__name__[1:].lower()} where a value belongs")
        return value

    return copy(tree, 0)


def _quote(value: Any) -> str:
    if isinstance(value, tuple) and not all(type(each) is int for each in value):
        return "of other things than numbers"  # tuples of tuples could be of more text than fits the memory
    return printable(f"{value}"[:100])
