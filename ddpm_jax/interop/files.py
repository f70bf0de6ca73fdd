"""Files of arrays under names, whoever wrote them: safetensors or PyTorch's, told apart by their content."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from ddpm_jax.interop.torch_files import MAX_BYTES, is_torch_file, read_torch
from ddpm_jax.system import npy
from ddpm_jax.system.errors import UserError, printable
from ddpm_jax.system.files import open_file, write_whole

# Weights hardly shrink when compressed.
_UNPACKED = 8

Arrays = dict[str, np.ndarray]
"""Arrays by name, as in the file."""


def check_size(num_bytes: int, shown: str) -> None:
    """Checks that files of weights are not larger than any network's, before they are read.

    Args:
      num_bytes: the size of the file, or of all files together.
      shown: its name, for the message.

    Raises:
      UserError: it is larger than `MAX_BYTES`.
    """
    if num_bytes > MAX_BYTES:
        raise UserError(f"{shown} is too large for a file of weights: {num_bytes:,} bytes, at most {MAX_BYTES:,}")


def check_out(folder: Path, is_ours: Callable[[Path], bool], what: str, *, overwrite: bool) -> None:
    """Checks that a folder may be written to: it is new, empty, or has what may be overwritten.

    Args:
      folder: the folder.
      is_ours: whether a folder has what is about to be written.
      what: the words for that.
      overwrite: whether the user agrees to replace it.

    Raises:
      UserError: it contains something else, or `overwrite` is not set.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not is_ours(folder):
        raise UserError(f"{folder} is not empty and contains no {what}: use another --out")
    if not overwrite:
        raise UserError(f"{folder} already contains an {what}: use --overwrite to replace it, or another --out")


def read_arrays(file: Path) -> tuple[Arrays, dict[str, str]]:
    """Reads the arrays in a file of weights: safetensors, or a `state_dict` that PyTorch saved.

    Args:
      file: the file; its content decides its format, whatever its name.

    Returns:
      the arrays by name, and the metadata of a safetensors file. Of several sets of weights in a file of PyTorch's
      these are the averages (EMA); the name of the set that was taken is the metadata "entry".

    Raises:
      UserError: there is no such file, it is too large, damaged or of another format, or it contains several sets of
        weights.
    """
    is_torch = _is_torch(file)
    check_size(file.stat().st_size, printable(file))
    if is_torch:
        return _state_dict(read_torch(file), printable(file))
    with _safetensors(file) as opened:
        arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return arrays, dict(opened.metadata() or {})


def read_metadata(file: Path) -> dict[str, str]:
    """Reads the metadata of a safetensors file without its arrays; {} for a file of PyTorch's.

    Args:
      file: as for `read_arrays`.

    Raises:
      UserError: there is no such file, or its header is damaged or of another format.
    """
    if _is_torch(file):
        return {}
    with _safetensors(file) as opened:
        return dict(opened.metadata() or {})


def _is_torch(file: Path) -> bool:
    if not file.is_file():
        raise UserError(f"there is no file {printable(file)}")
    return is_torch_file(file)


@contextlib.contextmanager
def _safetensors(file: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            yield opened
    except Exception as error:  # safetensors' errors have no common type
        reason = printable(" ".join(str(error).split()))[:200]
        raise UserError(
            f"cannot read {printable(file)} as a file of weights, neither safetensors ({reason}) nor PyTorch's"
        ) from error


def read_npz(file: Path) -> Arrays:
    """Reads all arrays of an .npz file, within the memory that its size allows.

    Args:
      file: the file, as `numpy.savez` or `numpy.savez_compressed` wrote it.

    Returns:
      the arrays by name.

    Raises:
      UserError: there is no such file, it is too large, damaged, or contains anything but arrays of numbers.
    """
    shown = printable(file)
    try:
        with open_file(file) as opened:
            size = file.stat().st_size
            check_size(size, shown)
            return npy.read_npz(opened, most_bytes=_UNPACKED * size + 2**26)
    except FileNotFoundError:
        raise UserError(f"there is no file {shown}") from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot read {shown} as an .npz file of arrays: {reason}") from error


def write_safetensors(file: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a .safetensors file, atomically: the same arrays and metadata give the same bytes.

    Args:
      file: where to; its folder is created if missing.
      arrays: by name, C-contiguous.
      metadata: text by name.

    Raises:
      UserError: the file cannot be written.
    """
    content = safetensors.numpy.save(dict(arrays), dict(metadata))
    # The library orders the metadata anew each time.
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the arrays start at a multiple of 8
    whole = len(header).to_bytes(8, "little") + header + content[8 + size :]
    write_whole(file, lambda opened: opened.write(whole))


def _state_dict(tree: Any, shown: str) -> tuple[Arrays, dict[str, str]]:
    """Finds the one dictionary of arrays: the whole, or an entry of it such as "state_dict"."""
    if _is_state_dict(tree):
        return dict(tree), {}
    entries = dict(tree.items() if isinstance(tree, dict) else enumerate(tree if isinstance(tree, list) else []))
    found = [name for name, entry in entries.items() if _is_state_dict(entry)]
    # ermongroup/ddim saves a list: network, optimizer, epoch, step, averages.
    averages = [4] if found == [0, 4] else [name for name in found if "ema" in str(name).lower()]
    chosen = averages if len(averages) == 1 else found
    if len(chosen) == 1:
        return dict(entries[chosen[0]]), {"entry": "ema" if averages else str(chosen[0])}
    listed = printable(", ".join(map(str, found)))[:200]
    raise UserError(
        f"{shown} contains {f'several sets of weights ({listed})' if found else 'no weights: no arrays under names'}"
        "; save one of a network's state_dict() alone"
    )


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(name, str) and isinstance(array, np.ndarray) for name, array in value.items())
    )
