"""Saving a run and getting it back whole: Orbax, and a CRC-32 of every array, which Orbax does not have.

A run's folder holds `checkpoints/STEP/` with the items `params`, `ema`, `optimizer`, `notes`, and `times` where the
sampler of times remembers something; the average can be read without the others. Without a checksum of ours one
flipped bit in a file is restored silently as wrong weights.
"""

import contextlib
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from ddpm_jax.errors import UserError
from ddpm_jax.training.state import Params, TrainState

# Orbax warns of what is meant to be so (waiting for a save, opening to read only).
absl.logging.set_verbosity(absl.logging.ERROR)

_FOLDER = "checkpoints"
_ITEMS = ("params", "ema", "optimizer", "times")

Warn = Callable[[str], None]


class Damage(Exception):
    """A saved step whose files do not hold what was saved."""


def _items(state: TrainState) -> dict[str, Any]:
    items = {"params": state.params, "ema": state.ema, "optimizer": state.opt_state, "times": state.times}
    return {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}  # Orbax refuses an empty one


def _leaves(items: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{name}{jax.tree_util.keystr(path)}": leaf
        for name, tree in items.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _crc32(leaf: jax.Array) -> int:
    return zlib.crc32(np.asarray(leaf).tobytes())


def _first_line(error: BaseException) -> str:
    """Says an exception in one short line; those of Orbax go on for a page."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


class Checkpoints:
    """The checkpoints of a run that is being trained."""

    def __init__(self, run: Path, *, keep: int, warn: Warn):
        self._folder = run.absolute() / _FOLDER
        self._warn = warn
        self._unfinished: int | None = None
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        try:
            self._manager = ocp.CheckpointManager(self._folder, options=options, item_names=(*_ITEMS, "notes"))
        except OSError as error:
            raise UserError(f"cannot write to {run}: {_first_line(error)}") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        # A failure while another one is on its way out must not hide that one.
        with contextlib.suppress(Exception) if exception[0] else contextlib.nullcontext():
            self.wait()
        with contextlib.suppress(Exception):
            self._manager.close()

    def steps(self) -> list[int]:
        """Says which steps are saved, in rising order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, *, notes: dict[str, Any]) -> None:
        """Saves a state in the background; `wait` says when it is on disk.

        Args:
          step: how many steps the state has done.
          state: as `Layout.saved_state` gives it.
          notes: what else to remember, JSON.

        Raises:
          UserError: this or the save before could not be written; what was saved earlier is still there.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        items = _items(state)
        leaves = {
            name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "crc32": _crc32(leaf)}
            for name, leaf in _leaves(items).items()
        }
        self._unfinished = step
        saves = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        with self._writing():
            self._manager.save(
                step, args=ocp.args.Composite(**saves, notes=ocp.args.JsonSave({**notes, "leaves": leaves}))
            )

    def wait(self) -> None:
        """Waits until what was saved is on disk; raises as `save`."""
        with self._writing():
            self._manager.wait_until_finished()
        self._unfinished = None

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except Exception as error:  # Orbax has no single type for a disk that is full or gone
            step, self._unfinished = self._unfinished, None
            whole = [saved for saved in self._manager.all_steps() if saved != step]
            last = f"step {max(whole)} is the last good checkpoint" if whole else "there is no checkpoint yet"
            raise UserError(
                f"cannot save step {step} to {self._folder}: {_first_line(error)}; {last}: "
                "make room or mend the folder, then start the same command again"
            ) from error

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Restores the newest step that is whole; damaged ones are named, set aside, and passed over.

        Args:
          abstract: shapes, types and shardings to restore into, as `Layout.abstract_state` gives them.

        Returns:
          the state and the notes saved with it, or None if nothing was ever saved.

        Raises:
          UserError: the saved arrays have other shapes or types, or no step is whole.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                items, notes = _restore(self._manager, step, _items(abstract), of=_ITEMS)
            except Damage as damage:
                aside = self._set_aside(step)
                self._warn(f"checkpoint {step} is damaged ({damage}): set aside as {aside}, using the one before it")
                continue
            # The step counts from the folder's name: one number less that could be damaged or disagree.
            count = jax.device_put(np.int32(step), abstract.step.sharding)
            state = TrainState(count, items["params"], items["ema"], items["optimizer"], items.get("times", ()))
            return state, notes
        if steps:
            raise UserError(
                f"no checkpoint in {self._folder} is whole ({len(steps)} damaged): restore the folder from a copy, "
                "or start again with another --workdir"
            )
        return None

    def _set_aside(self, step: int) -> Path:
        folder = self._folder / str(step)
        number = 0
        while (aside := folder.with_name(f"damaged_{step}_{number}")).exists():
            number += 1
        os.rename(folder, aside)
        self._manager.reload()
        return aside


def _restore(
    manager: ocp.CheckpointManager, step: int, abstract: dict[str, Any], *, of: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Restores the items `of` a step and holds every array against its checksum."""
    try:
        notes = manager.restore(step, args=ocp.args.Composite(notes=ocp.args.JsonRestore()))["notes"]
        saved = notes["leaves"]
    except Exception as error:
        raise Damage(f"its notes cannot be read: {_first_line(error)}") from error
    _check_shapes(step, saved, abstract, of=of)
    try:
        restores = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        restored = manager.restore(step, args=ocp.args.Composite(**restores))
    except Exception as error:  # damage raises half a dozen types
        raise Damage(_first_line(error)) from error
    items = {name: restored[name] for name in abstract}
    for name, leaf in _leaves(items).items():
        if _crc32(leaf) != saved[name]["crc32"]:
            raise Damage(f"the checksum of {name} differs")
    return items, {key: value for key, value in notes.items() if key != "leaves"}


def _check_shapes(step: int, saved: dict[str, Any], abstract: dict[str, Any], *, of: Sequence[str]) -> None:
    # Before Orbax looks: it would cast another type silently.
    wanted = _leaves(abstract)
    saved = {name: leaf for name, leaf in saved.items() if name.startswith(tuple(of))}
    for name in sorted({*wanted, *saved}):
        here = f"{tuple(wanted[name].shape)} {wanted[name].dtype}" if name in wanted else "absent"
        there = f"{tuple(saved[name]['shape'])} {saved[name]['dtype']}" if name in saved else "absent"
        if here != there:
            raise UserError(
                f"checkpoint {step} does not fit this configuration: {name} is {there} there and {here} here; "
                "use the run's own configuration, or another --workdir"
            )


def load_ema(run: Path, *, step: int | None = None, warn: Warn) -> tuple[int, Params]:
    """Loads the averaged parameters of a run, and nothing else, onto the first device.

    Args:
      run: the run's folder.
      step: which checkpoint; the newest that is whole if None.
      warn: told of damaged checkpoints that are passed over.

    Returns:
      the step and the parameters.

    Raises:
      UserError: the folder is no run, has no (whole) checkpoint, or not that of `step`.
    """
    folder = run.absolute() / _FOLDER
    if not folder.is_dir():
        raise UserError(f"no checkpoints in {run}: it is not the folder of a run, or the run has not saved yet")
    handlers = {name: ocp.StandardCheckpointHandler() for name in _ITEMS}
    with ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(read_only=True),
        item_handlers={**handlers, "notes": ocp.JsonCheckpointHandler()},
    ) as manager:
        steps = sorted(manager.all_steps(), reverse=True)
        if not steps:
            raise UserError(f"no checkpoints in {run}: the run has not saved yet")
        if step is not None and step not in steps:
            raise UserError(f"{run} has no checkpoint of step {step}: there are {', '.join(map(str, sorted(steps)))}")
        for candidate in steps if step is None else [step]:
            try:
                items, _ = _restore(manager, candidate, {"ema": _abstract_ema(manager, candidate)}, of=["ema"])
            except Damage as damage:
                warn(f"checkpoint {candidate} is damaged ({damage})")
                continue
            return candidate, items["ema"]
    raise UserError(f"no checkpoint in {folder} is whole ({len(steps)} damaged): restore the folder from a copy")


def _abstract_ema(manager: ocp.CheckpointManager, step: int) -> Params:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    try:
        metadata = manager.item_metadata(step)["ema"]
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), metadata.tree)
    except Exception as error:
        raise Damage(f"its description cannot be read: {_first_line(error)}") from error
