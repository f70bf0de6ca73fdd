"""What a new run starts from: the weights of another run, of another program's network, or in a file."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from ddpm_jax.config import Config
from ddpm_jax.networks import Params
from ddpm_jax.run.checkpoints import load_ema
from ddpm_jax.run.pretrained import is_pretrained, load_pretrained
from ddpm_jax.run.record import is_run, read_config
from ddpm_jax.run.weights import SEPARATOR, checksum, flat, load_weights
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import parse_json, read_json, read_or_set_aside, write_json
from ddpm_jax.system.hosts import appears, barrier, is_primary_host
from ddpm_jax.system.progress import say

# What a network computes and the shapes of its weights do not show.
_SHAPELESS = (
    *("num_heads", "num_head_channels", "num_groups", "norm_eps", "symmetric_downsampling"),
    *("freq_shift", "cos_first", "timestep_scale"),
)
# Arrays listed by name in a table, at most.
_NAMED = 20


class Fitted(NamedTuple):
    """Which arrays of a network were replaced by given weights."""

    loaded: dict[str, Any]
    """Arrays that both have, by name."""
    new: dict[str, Any]
    """Arrays of the network that the weights lack, or have with another shape or type."""
    left_out: dict[str, Any]
    """Arrays of the weights that the network lacks, or has with another shape or type."""

    def table(self) -> str:
        """Returns a table: how many arrays and parameters were loaded, are new, and were left out, these by name."""
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
    """Replaces a network's parameters by weights of the same name, shape and type.

    Args:
      params: the network's parameters; those without a match are kept.
      weights: a nested dict of arrays.

    Returns:
      the parameters, and which arrays were replaced.

    Raises:
      UserError: nothing fits.
    """
    here, there = flat(params), flat(weights)
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
            f"none of the weights fit this network: it has arrays such as {first} {_kind(here[first])}; the weights "
            f"have {found}; use the configuration of the network that they are from"
        )
    merged = {name: there[name] if name in fits else array for name, array in here.items()}
    return traverse_util.unflatten_dict(merged, sep=SEPARATOR), fitted


def start_from(init_from: Path, params: Params, ema: Params, *, run: Path, config: Config) -> tuple[Params, Params]:
    """Replaces a new run's weights, where they fit, by another run's EMA weights, a model's, or those in a file.

    The run's numbers depend on them, so it records which they were: started again (killed before its first
    checkpoint), it refuses others.

    Args:
      init_from: a run's folder, whose newest undamaged EMA weights are taken; the folder of a diffusers model; or a
        file of weights.
      params: the parameters as initialized, without an axis of devices.
      ema: their EMA, likewise.
      run: the folder of the run that starts; gets a file `init_from.json`.
      config: its configuration. Where the weights were trained for another diffusion or another computation, a warning
        names the difference.

    Returns:
      the parameters and their EMA.

    Raises:
      UserError: there are no such weights, none fit, or they are others than this run started from.
    """
    step: int | None
    if is_pretrained(init_from):
        pretrained = load_pretrained(init_from)
        step, weights = pretrained.step or None, pretrained.params
        trained_by = dataclasses.asdict(pretrained.config)
    elif init_from.is_dir():
        step, average = load_ema(init_from, warn=say)
        weights = jax.tree.map(np.asarray, average)  # from the host they can go to any devices
        trained_by = dataclasses.asdict(read_config(init_from / "config.json")) if is_run(init_from) else {}
    elif not init_from.exists():
        raise UserError(f"train.init_from={init_from}: there is no such folder, nor a file of weights")
    else:
        weights, metadata = load_weights(init_from)
        step = int(metadata["step"]) if re.fullmatch("[0-9]{1,18}", metadata.get("step", "")) else None
        trained_by = _json_of(metadata.get("config", ""))
    try:
        params, fitted = fit(params, weights)
        ema, _ = fit(ema, weights)
    except UserError as error:
        raise UserError(f"train.init_from={init_from}: {error}") from None
    _note(run / "init_from.json", {"from": str(init_from), "step": step, "crc32": checksum(weights)})
    say(f"starting from the weights of {init_from}{'' if step is None else f', step {step}'}:\n{fitted.table()}")
    if different := _other_meaning(trained_by, config):
        say(
            f"warning: these weights were trained with {', '.join(different)}: a different setup, to which "
            "the network must adapt"
        )
    return params, ema


def _json_of(text: str) -> dict[str, Any]:
    """Returns the object in a JSON text; {} if it holds none."""
    try:
        return dict(parse_json(text))
    except (ValueError, TypeError):
        return {}


def _other_meaning(trained_by: Mapping[str, Any], config: Config) -> list[str]:
    """Lists the fields, of those that change what weights mean and not their shapes, that differ from a record's.

    An empty list if the record is no configuration.
    """
    different = []
    for section in ("diffusion", "model"):
        theirs, ours = trained_by.get(section), dataclasses.asdict(getattr(config, section))
        if not isinstance(theirs, dict):
            return []
        names = set(_SHAPELESS if section == "model" else ours) - {"clip_x0", "spacing"}
        if theirs.get("schedule") != ours.get("schedule") or ours.get("schedule") in ("jsd", "cosine"):
            names -= {"beta_start", "beta_end"}  # of one schedule only
        different += [
            f"{section}.{name}={theirs[name]!s:.100} ({ours[name]} here)"
            for name in ours
            if name in names and theirs.get(name, ours[name]) != ours[name]
        ]
    return different


def _note(file: Path, found: dict[str, Any]) -> None:
    noted = None
    if is_primary_host():
        # Damaged, it is made again: before the first checkpoint nothing is lost by another beginning.
        noted = read_or_set_aside(file, read_json) if file.exists() else None
        if noted is None:
            write_json(file, found)
    barrier("the weights are noted")  # the others read no file that is set aside meanwhile
    if not is_primary_host() and appears(file.exists):
        noted = read_json(file)
    if noted is not None and noted.get("crc32") != found["crc32"]:
        raise UserError(
            f"the weights of {found['from']} are not those that {file.parent} started from (step "
            f"{noted.get('step')} then, {found['step']} now): restore those, or use another --workdir"
        )
