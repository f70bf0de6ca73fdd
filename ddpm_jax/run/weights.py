"""Weights alone, in one file or of another run: written for others, and what a new run starts from.

A file is safetensors' format: flat names with dots between the parts, the run's configuration as JSON and the
checksums of the arrays in its header.
"""

import dataclasses
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

import ddpm_jax
from ddpm_jax.config import Config
from ddpm_jax.networks import Params
from ddpm_jax.run.checkpoints import load_ema
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import crc32, write_json, write_whole
from ddpm_jax.system.progress import say

_SEPARATOR = "."
# Lines of a table that name single arrays.
_NAMED = 20


def _flat(params: Params) -> dict[str, Any]:
    return traverse_util.flatten_dict(params, sep=_SEPARATOR)


def checksum(params: Params) -> int:
    """Counts one CRC-32 of all arrays and their names."""
    crc = 0
    for name, array in sorted(_flat(params).items()):
        crc = zlib.crc32(f"{name} {array.dtype} {array.shape} {crc32(array)}".encode(), crc)
    return crc


def save_weights(file: Path, params: Params, *, config: Config, step: int) -> None:
    """Writes weights into one file, whole or not at all.

    Args:
      file: where to.
      params: a nested dict of arrays.
      config: of the run that they are from.
      step: how many steps it had done.

    Raises:
      UserError: the file cannot be written.
    """
    arrays = {name: np.asarray(array) for name, array in _flat(params).items()}
    metadata = {
        "format": "ddpm_jax",
        "version": ddpm_jax.__version__,
        "step": str(step),
        "config": json.dumps(dataclasses.asdict(config)),
        "crc32": json.dumps({name: crc32(array) for name, array in arrays.items()}),
    }
    content = _in_order(safetensors.numpy.save(arrays, metadata))
    write_whole(file, lambda opened: opened.write(content))


def _in_order(content: bytes) -> bytes:
    """Sorts the header of a .safetensors file, which the library writes in another order each time."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the arrays begin at a multiple of 8
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def load_weights(file: Path) -> tuple[Params, dict[str, str]]:
    """Reads the weights in a .safetensors file, ours or another program's.

    Args:
      file: the file; the parts of its names are divided by dots.

    Returns:
      a nested dict of NumPy arrays, and the header's metadata: `config`, `step` and more in a file of ours.

    Raises:
      UserError: there is no such file, it is none of weights, or an array's checksum differs.
    """
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = dict(opened.metadata() or {})
        crcs = json.loads(metadata.get("crc32", "{}"))
    except FileNotFoundError as error:
        raise UserError(f"there is no file {file}") from error
    except Exception as error:  # those of safetensors have no common type
        raise UserError(
            f"cannot read {file} as a .safetensors file of weights: {str(error).splitlines()[0]}"
        ) from error
    for name, array in arrays.items():
        if name in crcs and crcs[name] != crc32(array):
            raise UserError(f"{file} is damaged: the checksum of {name} differs; write it again")
    return traverse_util.unflatten_dict(arrays, sep=_SEPARATOR), metadata


class Fitted(NamedTuple):
    """How weights from elsewhere went into a network."""

    loaded: dict[str, Any]
    """Arrays that both have, by their names."""
    new: dict[str, Any]
    """Arrays of the network that are not there, or of another shape or type."""
    left_out: dict[str, Any]
    """Arrays there that the network does not have, or has of another shape or type."""

    def table(self) -> str:
        """Lists how many arrays and parameters were loaded, are new and were left out, and which are not loaded."""
        lines = []
        for what, arrays in (("loaded", self.loaded), ("new", self.new), ("left out", self.left_out)):
            parameters = sum(array.size for array in arrays.values())
            lines.append(f"{what:9}{len(arrays):6} arrays {parameters:14,} parameters")
        for what, arrays in (("new", self.new), ("left out", self.left_out)):
            lines += [f"  {what}: {name} {_kind(array)}" for name, array in list(arrays.items())[:_NAMED]]
            lines += [f"  {what}: and {len(arrays) - _NAMED} more"] if len(arrays) > _NAMED else []
        return "\n".join(lines)


def _kind(array: Any) -> str:
    return f"{tuple(array.shape)} {array.dtype}"


def fit(params: Params, weights: Mapping[str, Any]) -> tuple[Params, Fitted]:
    """Puts weights from elsewhere where a network has arrays of the same name, shape and type.

    Args:
      params: the network's parameters; those that find nothing stay as they are.
      weights: a nested dict of arrays.

    Returns:
      the parameters, and what became of each array.

    Raises:
      UserError: nothing fits.
    """
    here, there = _flat(params), _flat(weights)
    fits = {name for name in here if name in there and _kind(here[name]) == _kind(there[name])}
    fitted = Fitted(
        loaded={name: there[name] for name in here if name in fits},
        new={name: array for name, array in here.items() if name not in fits},
        left_out={name: array for name, array in there.items() if name not in fits},
    )
    if not fits:
        first, other = next(iter(here)), next(iter(there), None)
        found = f"{other} {_kind(there[other])}" if other else "no array at all"
        raise UserError(
            f"none of the weights fit this network: it has arrays such as {first} {_kind(here[first])}, and there is "
            f"{found}; use the configuration of the network that they are from"
        )
    merged = {name: there[name] if name in fits else array for name, array in here.items()}
    return traverse_util.unflatten_dict(merged, sep=_SEPARATOR), fitted


def start_from(init_from: Path, params: Params, ema: Params, *, run: Path) -> tuple[Params, Params]:
    """Replaces a new run's weights, where they fit, by another run's EMA weights or those in a .safetensors file.

    The run's numbers depend on them, so it records which they were: started again (killed before its first
    checkpoint), it refuses others.

    Args:
      init_from: a run's folder, whose newest undamaged EMA weights are taken, or a .safetensors file.
      params: the parameters as initialized, without an axis of devices.
      ema: their EMA, likewise.
      run: the folder of the run that starts; gets a file `init_from.json`.

    Returns:
      the parameters and their EMA.

    Raises:
      UserError: there are no such weights, none fit, or they are others than this run started from.
    """
    step: int | None
    if init_from.is_dir():
        step, average = load_ema(init_from, warn=say)
        weights = jax.tree.map(np.asarray, average)  # from the host they go wherever the state lies, on other hosts too
    elif not init_from.exists():
        raise UserError(f"train.init_from={init_from}: there is no such folder of a run or .safetensors file")
    else:
        weights, metadata = load_weights(init_from)
        step = int(metadata["step"]) if metadata.get("step", "").isdigit() else None
    try:
        params, fitted = fit(params, weights)
        ema, _ = fit(ema, weights)
    except UserError as error:
        raise UserError(f"train.init_from={init_from}: {error}") from None
    _note(run / "init_from.json", {"from": str(init_from), "step": step, "crc32": checksum(weights)})
    say(f"starting from the weights of {init_from}{'' if step is None else f', step {step}'}:\n{fitted.table()}")
    return params, ema


def _note(file: Path, found: dict[str, Any]) -> None:
    if file.exists():
        try:
            noted = dict(json.loads(file.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{file} is damaged: start again with another --workdir") from error
        if noted.get("crc32") != found["crc32"]:
            raise UserError(
                f"the weights of {found['from']} are not those that {file.parent} started from (step "
                f"{noted.get('step')} then, {found['step']} now): put those back, or start with another --workdir"
            )
        return
    if jax.process_index() == 0:
        write_json(file, found)
