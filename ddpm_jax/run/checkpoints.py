"""Checkpoints of a run: Orbax's, plus what Orbax lacks, a CRC-32 of every array.

A run's folder holds `checkpoints/STEP/` with the items `params`, `ema`, `optimizer`, `notes`, and, where the state has
them, `time_sampling` and `power_averages`; the EMA weights can be read without the others. Without checksums, one
flipped bit in a file restores silently as wrong weights. A checksum covers a whole array, wherever its shards lie, so a
state saved on many devices or hosts is checked on any other number of them.
"""

import asyncio
import contextlib
import copy
import dataclasses
import errno
import functools
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from ddpm_jax.networks import Params
from ddpm_jax.system.errors import Damage, UserError
from ddpm_jax.system.files import crc32, dump_checked, load_checked, sync, sync_tree
from ddpm_jax.system.hosts import barrier, first_line, is_primary_host, of_primary_host
from ddpm_jax.system.mesh import to_this_host

_FOLDER = "checkpoints"
# Old steps are moved here at once and then deleted: a kill leaves no half-deleted step under its number.
_DELETED = "deleted"
_ITEMS = ("params", "ema", "optimizer", "time_sampling", "power_averages")

# How long a reader tries to be faster than a run that trains and keeps a single checkpoint.
_SECONDS_OF_TRIES = 60

Warn = Callable[[str], None]


def silence_orbax() -> None:
    """Silences Orbax's warnings, and its late errors after a failed save: this module reports what matters.

    For scripts: it changes log levels and `sys.unraisablehook` of the process.
    """
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    report = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        # TensorStore's threads call event loops that are closed; other arrays of the same step fail unobserved.
        closed = isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"
        code = getattr(unraisable.object, "cr_code", None)
        if not closed and not (code and "orbax" in code.co_filename):
            report(unraisable)

    sys.unraisablehook = hook


class CannotRead(Exception):
    """A checkpoint that cannot be read now, though its files may be intact: permissions, memory, the machine."""


# Errors of the machine, not of the files: these may be readable once it is fixed.
_OF_THE_MACHINE = {
    *(errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT)
}


def _failure(error: BaseException, what: str = "") -> Damage | CannotRead:
    """Distinguishes damage, of `what`, from errors of the machine; Orbax raises both as half a dozen types."""
    line = _first_line(error)
    cause: BaseException | None = error
    while cause is not None:
        code = re.search(r"\[os_error_code='(\d+)'", str(cause))
        number = int(code[1]) if code else cause.errno if isinstance(cause, OSError) else None
        if isinstance(cause, MemoryError) or number in _OF_THE_MACHINE or "RESOURCE_EXHAUSTED" in str(cause):
            return CannotRead(line)
        cause = cause.__cause__ or cause.__context__
    return Damage(what + line)


def _not_empty(items: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}  # Orbax refuses an empty one


def _leaves(items: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{name}{jax.tree_util.keystr(path)}": leaf
        for name, tree in items.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _empty(items: Mapping[str, Any]) -> list[str]:
    """Returns the names of the nodes that hold no arrays."""
    nodes = jax.tree_util.tree_leaves_with_path(items, is_leaf=lambda node: not jax.tree.leaves(node))
    return [f"{path[0].key}{jax.tree_util.keystr(path[1:])}" for path, node in nodes if not jax.tree.leaves(node)]


def _on_host(leaf: jax.Array) -> np.ndarray:
    """Copies a whole array to this host, wherever its shards lie; every host must call it."""
    return np.asarray(to_this_host(leaf))


def _describer(leaves: Mapping[str, jax.Array]) -> Callable[[], dict[str, Any]]:
    """Returns a function that returns shapes, types and checksums of the arrays as they are now."""

    def take(leaf: jax.Array) -> np.ndarray | int:
        # Shards on other hosts are gathered now, one array at a time: in the background, hosts would not gather in
        # the same order. Otherwise a NumPy view on this host keeps jax from donating the memory to the next step.
        here = leaf.is_fully_addressable or leaf.is_fully_replicated
        return _on_host(leaf) if here else crc32(_on_host(leaf))

    taken = {name: take(leaf) for name, leaf in leaves.items()}
    kinds = {name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for name, leaf in leaves.items()}

    def describe() -> dict[str, Any]:
        crcs = {name: value if isinstance(value, int) else crc32(value) for name, value in taken.items()}
        return {name: {**kinds[name], "crc32": crc} for name, crc in crcs.items()}

    return describe


class _NotesHandler(ocp.JsonCheckpointHandler):
    """Writes the notes; their checksums are computed in the background, so that training does not wait for them."""

    async def async_save(self, directory, item=None, args=None):
        async def write() -> None:
            if jax.process_index() == 0:
                (directory / "metadata").write_bytes(dump_checked(args.make()))

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="notes")]

    def restore(self, directory, item=None, args=None):
        return load_checked((directory / "metadata").read_bytes())


class _Failed(NamedTuple):
    error: Exception


class _ArraysHandler(ocp.StandardCheckpointHandler):
    """Restores arrays; returns a failure, so that a host that has one still meets the others at their barriers."""

    def restore(self, *arguments, **choices):
        try:
            return super().restore(*arguments, **choices)
        except Exception as error:
            return _Failed(error)


@ocp.args.register_with_handler(_ArraysHandler, for_save=True)
@dataclasses.dataclass
class _SaveArrays(ocp.args.StandardSave):
    pass


@ocp.args.register_with_handler(_ArraysHandler, for_restore=True)
@dataclasses.dataclass
class _RestoreArrays(ocp.args.StandardRestore):
    pass


def _handlers() -> dict[str, Any]:
    return {**{name: _ArraysHandler() for name in _ITEMS}, "notes": _NotesHandler()}


@ocp.args.register_with_handler(_NotesHandler, for_save=True)
@dataclasses.dataclass
class _SaveNotes(ocp.args.CheckpointArgs):
    make: Callable[[], dict[str, Any]]


@ocp.args.register_with_handler(_NotesHandler, for_restore=True)
@dataclasses.dataclass
class _RestoreNotes(ocp.args.CheckpointArgs):
    item: None = None


class _SyncedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A step that gets its name when all of it is on the disk, and only then counts as saved.

    Orbax and TensorStore sync some of their files. In the background, as the rest of a save.
    """

    async def finalize(self):
        folder = self.get_final().parent

        def sync_before() -> None:
            for lines in folder.parent.glob("*.jsonl"):  # those up to this step are not written again
                sync(Path(lines))
            sync(Path(folder.parent))
            sync_tree(Path(self.get()))

        await asyncio.to_thread(sync_before)
        await super().finalize()  # writes two more files, which nobody needs, and renames the folder
        # Before older steps are deleted.
        await asyncio.to_thread(sync, Path(folder))


class _Best:
    """Orbax's policy for the checkpoints of lowest loss, of the losses in our notes.

    Not of Orbax's own metrics: those have no checksum, and one damaged file of them keeps its manager from opening.
    """

    def __init__(self, losses: Mapping[int, float | None], n: int):
        self._losses = losses
        self._policy = managers.BestN(
            get_metric_fn=lambda loss: loss, reverse=True, n=n, keep_checkpoints_without_metrics=False
        )

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        with_losses = [dataclasses.replace(info, metrics=self._losses.get(info.step)) for info in checkpoints]
        return self._policy.should_preserve(with_losses, context=context)


def _first_line(error: BaseException) -> str:
    """Returns an exception as one short line; Orbax's fill a page, with what matters at the end of a line."""
    if code := re.search(r"\[os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def has_saved(run: Path) -> bool:
    """Returns whether a run's folder holds any checkpoint, intact or damaged."""
    return any(re.fullmatch(r"\d+|damaged_\d+_\d+", path.name) for path in (run / _FOLDER).glob("*"))


class Restored(NamedTuple):
    """A checkpoint that was read."""

    step: int
    """Its step: the folder's name, and in its notes."""
    items: dict[str, Any]
    """The pytrees, by the names they were saved under."""
    notes: dict[str, Any]
    """The notes saved with them."""


class Checkpoints:
    """The checkpoints of a run in training. Use it in a `with` block."""

    def __init__(self, run: Path, *, keep: int, keep_every: int = 0, keep_best: int = 0, warn: Warn):
        """Opens a run's checkpoints for writing.

        Args:
          run: the run's folder.
          keep: number of the newest checkpoints to keep.
          keep_every: also keep steps that are multiples of it; 0 for none.
          keep_best: also keep this many with the lowest loss, the newer of equals.
          warn: called with a line about each damaged checkpoint.

        Raises:
          UserError: the folder cannot be written to.
        """
        self._folder = run.absolute() / _FOLDER
        self._warn = warn
        self._unfinished: int | None = None
        self._losses: dict[int, float | None] = {}
        policies: list[managers.PreservationPolicy] = [managers.LatestN(keep), _Best(self._losses, keep_best)]
        if keep_every:
            policies.append(managers.EveryNSteps(keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(policies),
            todelete_subdir=_DELETED,
            cleanup_tmp_directories=True,
            temporary_path_class=_SyncedPath,
        )
        try:
            self._sweep()
            self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=_handlers())
        except OSError as error:
            raise UserError(f"cannot write to {run}: {_first_line(error)}") from error
        for step in self.steps() if keep_best else []:
            with contextlib.suppress(Exception):  # damage is found when the step is restored
                self._losses[step] = _read_notes(self._manager, step)["loss"]

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        # A failure here must not hide the exception that is on its way out.
        with contextlib.suppress(Exception) if exception[0] else contextlib.nullcontext():
            self.wait()
        with contextlib.suppress(Exception):
            self._manager.close()

    def steps(self) -> list[int]:
        """Returns the saved steps in ascending order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, items: Mapping[str, Any], *, notes: dict[str, Any], loss: float | None = None) -> None:
        """Saves pytrees in the background; `wait` returns when they are on disk.

        Their arrays may be donated to the next step at once.

        Args:
          step: the number of training steps done.
          items: "params", "ema", "optimizer", "time_sampling" and "power_averages"; a pytree without arrays is not
        written.
          notes: what else to remember, JSON.
          loss: what `keep_best` compares; a checkpoint without one is never among the best.

        Raises:
          UserError: this or the previous save could not be written; earlier checkpoints are intact.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        items = _not_empty(items)
        describe, empty = _describer(_leaves(items)), _empty(items)
        self._unfinished = step
        self._losses[step] = loss
        saves = {name: _SaveArrays(tree) for name, tree in items.items()}
        as_now = copy.deepcopy({**notes, "loss": loss})  # the caller may change it while this is saved
        written = _SaveNotes(lambda: {"step": step, **as_now, "leaves": describe(), "empty": empty})
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**saves, notes=written))

    def poll(self) -> None:
        """Raises as `save` if a save has ended and failed; does not wait."""
        if self._unfinished is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is on disk; raises as `save`."""
        with self._writing():
            self._manager.wait_until_finished()
            if self._unfinished is not None:
                self._sweep()
        self._unfinished = None

    def _sweep(self) -> None:
        """Deletes the old steps that were moved away."""
        if jax.process_index() == 0 and (self._folder / _DELETED).exists():
            sync(self._folder)  # else a power cut could leave a half-deleted step under its number
            shutil.rmtree(self._folder / _DELETED, ignore_errors=True)

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except Exception as error:  # Orbax has no single type for a full or missing disk
            step, self._unfinished = self._unfinished, None
            whole = [saved for saved in self._manager.all_steps() if saved != step]
            last = f"step {max(whole)} is the last good checkpoint" if whole else "there is no checkpoint yet"
            raise UserError(
                f"cannot save step {step} to {self._folder}: {_first_line(error)}; {last}: "
                "free some space or fix the folder, then run the same command again"
            ) from error

    def restore(self, abstract: Mapping[str, Any]) -> Restored | None:
        """Restores the newest intact checkpoint; damaged ones are reported, set aside and skipped.

        Args:
          abstract: `jax.ShapeDtypeStruct`s with shardings, as items of `save`.

        Returns:
          the checkpoint, or None if nothing was ever saved.

        Raises:
          UserError: the saved arrays have other shapes or types, no checkpoint is intact, or one cannot be read now;
            then nothing is set aside.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        damaged: dict[int, Damage] = {}
        for step in steps:
            try:
                items, notes = _restore(self._manager, step, lambda notes: _not_empty(abstract), of=_ITEMS)
            except Damage as damage:
                damaged[step] = damage
                continue
            for each, reason in damaged.items():  # only once there is another to resume from
                aside = self._set_aside(each)
                self._warn(f"checkpoint {each} is damaged ({reason}): set aside as {aside}; using the one before it")
            return Restored(step, {**abstract, **items}, notes)
        set_aside = len([*self._folder.glob("damaged_*")])
        if damaged or set_aside:
            reasons = "".join(f"; {step}: {reason}" for step, reason in [*damaged.items()][:1])
            raise UserError(
                f"no checkpoint in {self._folder} is intact ({len(damaged) + set_aside} damaged{reasons}): restore the "
                "folder from a backup, or use another --workdir"
            )
        return None

    def _set_aside(self, step: int) -> Path:
        folder = self._folder / str(step)
        number = 0
        while (aside := folder.with_name(f"damaged_{step}_{number}")).exists():
            number += 1
        barrier("the name for the damaged checkpoint is chosen")
        if is_primary_host():
            os.rename(folder, aside)
            sync(self._folder)
        barrier("the damaged checkpoint is set aside")
        self._manager.reload()
        return aside


def _restore(
    manager: ocp.CheckpointManager,
    step: int,
    describe: Callable[[dict[str, Any]], dict[str, Any]],
    *,
    of: Sequence[str],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Restores the items `of` a step, as `describe` wants them by its notes, and checks every array's checksum."""
    try:
        notes = _read_notes(manager, step)
    except Damage:
        raise
    except Exception as error:
        _raise(_failure(error, "its notes cannot be read: "), manager, step)
    saved = notes["leaves"]
    abstract = describe(notes)
    _check_shapes(step, saved, abstract, of=of)
    restored: Any = {}
    try:
        restores = {name: _RestoreArrays(tree) for name, tree in abstract.items()}
        restored = manager.restore(step, args=ocp.args.Composite(**restores))
        failed = [item.error for item in (restored[name] for name in abstract) if isinstance(item, _Failed)]
    except Exception as error:
        failed = [error]
    # A step that is damaged for one host is damaged for all.
    mine = _failure(failed[0]) if failed else None
    kind, _, line = first_line(f"{type(mine).__name__}: {mine}" if mine else "").partition(": ")
    if kind:
        _raise(CannotRead(line) if kind == CannotRead.__name__ else Damage(line), manager, step)
    items = {name: restored[name] for name in abstract}
    for name, leaf in _leaves(items).items():
        if crc32(_on_host(leaf)) != saved[name]["crc32"]:
            raise Damage(f"the checksum of {name} differs")
    return items, {key: value for key, value in notes.items() if key not in ("leaves", "empty", "loss")}


def _raise(failure: Damage | CannotRead, manager: ocp.CheckpointManager, step: int) -> NoReturn:
    if isinstance(failure, Damage):
        raise failure
    raise UserError(
        f"cannot read checkpoint {step} in {manager.directory}: {failure}; fix that, then run the same command again"
    )


def _read_notes(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    notes: dict[str, Any] = manager.restore(step, args=ocp.args.Composite(notes=_RestoreNotes()))["notes"]
    saved = notes.pop("step", None)
    if saved != step:
        raise Damage(f"it was saved at step {saved}, and its folder was renamed")
    return notes


def _check_shapes(step: int, saved: dict[str, Any], abstract: dict[str, Any], *, of: Sequence[str]) -> None:
    # Before Orbax restores: it would cast another type silently.
    wanted = _leaves(abstract)
    saved = {name: leaf for name, leaf in saved.items() if name.startswith(tuple(of))}
    for name in sorted({*wanted, *saved}):
        here = f"{tuple(wanted[name].shape)} {wanted[name].dtype}" if name in wanted else "absent"
        there = f"{tuple(saved[name]['shape'])} {saved[name]['dtype']}" if name in saved else "absent"
        if here != there:
            raise UserError(
                f"checkpoint {step} does not fit this configuration: {name} is {there} in the checkpoint, {here} here; "
                "use the run's own configuration, or another --workdir"
            )


def load_ema(run: Path, *, step: int | None = None, warn: Warn) -> tuple[int, Params]:
    """Loads the EMA weights of a run, and nothing else, onto the first device.

    Args:
      run: the run's folder.
      step: which checkpoint; the newest intact one if None.
      warn: called with a line about each damaged checkpoint that is skipped.

    Returns:
      the step and the weights.

    Raises:
      UserError: the folder is not a run's, has no intact checkpoint, or none at `step`.
    """
    device = jax.local_devices()[0]
    damaged: dict[int, Damage] = {}
    for manager, steps in _while_replaced(run):
        if step is not None and step not in steps:
            raise UserError(f"{run} has no checkpoint of step {step}: there are {', '.join(map(str, steps))}")
        for candidate in reversed(steps) if step is None else [step]:
            if candidate in damaged:
                continue
            try:
                items, _ = _restore(
                    manager, candidate, lambda notes: {"ema": _abstract(notes, "ema", device)}, of=["ema"]
                )
            except (Damage, UserError) as failure:
                if _is_gone(run, candidate):
                    continue
                if isinstance(failure, UserError):
                    raise
                if step is not None:
                    others = ", ".join(str(other) for other in steps if other != step)
                    there = f"other checkpoints: {others}" if others else "there is no other"
                    raise UserError(f"checkpoint {step} of {run} is damaged ({failure}): {there}") from failure
                warn(f"checkpoint {candidate} is damaged ({failure})")
                damaged[candidate] = failure
                continue
            return candidate, items["ema"]
    raise UserError(
        f"no checkpoint in {run / _FOLDER} is intact ({len(damaged)} damaged): restore the folder from a backup"
    )


class Verdict(NamedTuple):
    """The result of verifying one checkpoint."""

    step: int
    """The step."""
    arrays: int
    """Number of arrays saved; 0 if that cannot be read."""
    num_bytes: int
    """Their size in memory."""
    damage: str | None
    """What is wrong; None if every array is what was saved, bit for bit."""


def verify(run: Path) -> Iterator[Verdict]:
    """Checks every array of every checkpoint of a run against its checksum; changes nothing, uses no accelerator.

    Args:
      run: the run's folder.

    Yields:
      one verdict per step, in ascending order.

    Raises:
      UserError: the folder is not a run's, or has no checkpoint.
    """
    cpu = jax.local_devices(backend="cpu")[0]
    any_verified = False
    for manager, steps in _while_replaced(run):
        for step in steps:
            saved: dict[str, Any] = {}
            try:
                notes = _read_notes(manager, step)
                saved = notes["leaves"]
                _check_items(manager, step, notes, cpu)
                damage = None
            except Exception as error:  # damage raises half a dozen types
                if _is_gone(run, step):
                    continue
                damage = _first_line(error)
            sizes = [math.prod(leaf["shape"]) * np.dtype(leaf["dtype"]).itemsize for leaf in saved.values()]
            any_verified = True
            yield Verdict(step, len(saved), sum(sizes), damage)
        if any_verified:
            return


def _keys(name: str) -> list[str | int]:
    """Returns the keys in a leaf's name, those of lists and tuples as integers.

    >>> _keys("optimizer[1][0].mu['conv']['kernel']")
    ['optimizer', 1, 0, 'mu', 'conv', 'kernel']
    """
    found = re.findall(r"\['([^']*)'\]|\[(\d+)\]|\.?([^\[\].]+)", name)
    return [int(index) if index else text or attribute for text, index, attribute in found]


def _check_items(manager: ocp.CheckpointManager, step: int, notes: Mapping[str, Any], device: jax.Device) -> None:
    saved = notes["leaves"]
    for item in dict.fromkeys(_keys(name)[0] for name in saved):  # one at a time: the EMA may fit where all do not
        abstract = _abstract(notes, str(item), device)
        restored = manager.restore(step, args=ocp.args.Composite(**{str(item): _RestoreArrays(abstract)}))[str(item)]
        if isinstance(restored, _Failed):
            raise restored.error
        arrays = {tuple(_keys(name)): leaf for name, leaf in _leaves({str(item): restored}).items()}
        for name, leaf in saved.items():
            if _keys(name)[0] != item:
                continue
            if (array := arrays.get(tuple(_keys(name)))) is None:
                raise Damage(f"{name} is missing")
            if leaf["crc32"] != crc32(_on_host(array)):
                raise Damage(f"the checksum of {name} differs")


def _is_gone(run: Path, step: int) -> bool:
    """Returns whether a checkpoint was deleted while it was read: the run is training."""
    return not (run / _FOLDER / str(step)).exists()


def _while_replaced(run: Path) -> Iterator[tuple[ocp.CheckpointManager, list[int]]]:
    """Opens the checkpoints of a run, again while it deletes some of them, as a run that trains with few to keep does.

    Yields:
      as `_reading`.

    Raises:
      UserError: as `_reading`; or no checkpoint stays for long enough to be read.
    """
    until = time.monotonic() + _SECONDS_OF_TRIES
    while True:
        with _reading(run) as (manager, steps):
            yield manager, steps
        if not any(_is_gone(run, step) for step in steps):
            return
        if time.monotonic() > until:
            raise UserError(
                f"{run} is training, and its checkpoints are deleted before they can be read: try again, or train "
                "with more --checkpoints.keep"
            )


@contextlib.contextmanager
def _reading(run: Path) -> Iterator[tuple[ocp.CheckpointManager, list[int]]]:
    """Opens the checkpoints of a run read-only; yields the manager and the steps in ascending order."""
    folder = run.absolute() / _FOLDER
    if not run.is_dir():
        raise UserError(f"there is no folder {run}: give the folder of a run, such as runs/digits")
    if not folder.is_dir():
        raise UserError(f"no checkpoints in {run}: it is not the folder of a run, or the run has not saved yet")
    with ocp.CheckpointManager(
        folder, options=ocp.CheckpointManagerOptions(read_only=True), item_handlers=_handlers()
    ) as manager:
        steps = of_primary_host(sorted(manager.all_steps())).tolist()  # it may train meanwhile
        if not steps:
            raise UserError(f"no checkpoints in {run}: the run has not saved yet")
        yield manager, steps


def _abstract(notes: Mapping[str, Any], item: str, device: jax.Device) -> Any:
    """Returns the shapes of an item as our notes have them: a damaged description of Orbax's is no obstacle.

    Without the structure Orbax restores tuples as lists, named ones as dictionaries, and what is empty as None.
    """
    sharding = jax.sharding.SingleDeviceSharding(device)
    nodes: dict[str, Any] = dict.fromkeys(notes["empty"])
    nodes |= {
        name: jax.ShapeDtypeStruct(leaf["shape"], np.dtype(leaf["dtype"]), sharding=sharding)
        for name, leaf in notes["leaves"].items()
    }
    tree: dict[str | int, Any] = {}
    for name, node in nodes.items():
        first, *keys = _keys(name)
        if first == item:
            place = functools.reduce(lambda tree, key: tree.setdefault(key, {}), keys[:-1], tree)
            place[keys[-1]] = node
    return _with_lists(tree)


def _with_lists(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    found = {key: _with_lists(value) for key, value in tree.items()}
    return [found[key] for key in sorted(found)] if found and all(type(key) is int for key in found) else found
