"""Weights alone, exported to one file.

A file has the format of safetensors: names of arrays with dots between the parts; the run's configuration and the
arrays' checksums, as JSON, in its metadata.
"""

import dataclasses
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

import ddpm_jax
from ddpm_jax.config import Config
from ddpm_jax.interop.files import read_arrays, write_safetensors
from ddpm_jax.networks import Params
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import crc32, parse_json

SEPARATOR = "."
"""Between the parts of an array's name."""
_DEEPEST = 64  # parts of a name: JAX walks nested dictionaries by recursion


def flat(params: Params) -> dict[str, Any]:
    """Returns the arrays of nested parameters by their names in a file, with dots between the parts."""
    return traverse_util.flatten_dict(params, sep=SEPARATOR)


def checksum(params: Params) -> int:
    """Computes one CRC-32 of all arrays and their names."""
    crc = 0
    for name, array in sorted(flat(params).items()):
        crc = zlib.crc32(f"{name} {array.dtype} {array.shape} {crc32(array)}".encode(), crc)
    return crc


def save_weights(
    file: Path, params: Params, *, config: Config, step: int, more: Mapping[str, str] | None = None
) -> None:
    """Writes weights to one .safetensors file, atomically.

    Args:
      file: where to.
      params: a nested dict of arrays.
      config: the configuration of the run that they are from.
      step: its number of training steps.
      more: further entries of the metadata.

    Raises:
      UserError: the file cannot be written.
    """
    arrays = {name: np.asarray(array) for name, array in flat(params).items()}
    metadata = {
        "format": "ddpm_jax",
        "version": ddpm_jax.__version__,
        "step": str(step),
        "config": json.dumps(dataclasses.asdict(config)),
        "crc32": json.dumps({name: crc32(array) for name, array in arrays.items()}),
        **(more or {}),
    }
    write_safetensors(file, arrays, metadata)


def load_weights(file: Path) -> tuple[Params, dict[str, str]]:
    """Reads the weights in a file: .safetensors, ours or another program's, or PyTorch's.

    Args:
      file: the file; names in it are split at dots.

    Returns:
      a nested dict of NumPy arrays, and the metadata: `config`, `step` and more if `save_weights` wrote it.

    Raises:
      UserError: there is no such file, it is not a file of weights, or an array's checksum differs.
    """
    arrays, metadata = read_arrays(file)
    try:
        crcs = dict(parse_json(metadata.get("crc32", "{}")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged: its checksums are not JSON; write it again") from error
    for name, array in arrays.items():
        if name in crcs and crcs[name] != crc32(array):
            raise UserError(f"{file} is damaged: the checksum of {name:.100} differs; write it again")
    return _nested(file, arrays), metadata


def _nested(file: Path, arrays: dict[str, Any]) -> Params:
    """Splits the names of arrays at the dots; refuses names of which one is the beginning of another."""
    for name in arrays:
        parts = name.split(SEPARATOR)
        if len(parts) > _DEEPEST:
            raise UserError(f"{file} is no file of weights: it has an array {name:.100} of {len(parts)} parts")
        if clash := next((each for n in range(1, len(parts)) if (each := SEPARATOR.join(parts[:n])) in arrays), None):
            raise UserError(f"{file} is no file of weights: it has an array {clash:.100} and another one {name:.100}")
    return traverse_util.unflatten_dict(arrays, sep=SEPARATOR)
