"""How one pure step runs on many devices: by jit over a mesh, or by pmap. The numbers are the same."""

import dataclasses
import functools
import typing
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddpm_jax.config import Parallel
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.mesh import batch_sharding, gather, make_mesh, replicated, shardings
from ddpm_jax.training.state import TrainState
from ddpm_jax.training.step import Batch, StepInfo, TrainingStep

# Of pmap; the axes of a mesh have names of their own.
_AXIS = "devices"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the state and the batch lie, and how a step is lifted over the devices."""

    lift: Callable[[Callable[..., TrainingStep]], TrainingStep]
    """From `make_step(gather=.., ..)` to the compiled step on placed arguments, which donates the state; what a step is
    told of its devices are the keywords of `make_training_step`."""
    lower: Callable[[Callable[..., TrainingStep], Array, TrainState, typing.Any], jax.stages.Lowered] | None
    """Lowers what `lift` compiles, for the shapes and shardings of its three arguments; None for pmap."""
    init: Callable[[Callable[[Array], TrainState], Array], TrainState]
    """From an `init(key)` and a key to the state, made where it lies."""
    place_batch: Callable[[np.ndarray, np.ndarray | None], Batch]
    """From the images of this host's `rows` of the batch and their labels (or None) to the batch on the devices."""
    place_whole: Callable[[typing.Any], typing.Any] | None
    """From arrays on the host to the same, whole on every device; None where a step takes its own share alone."""
    share_out: Callable[[Array], Array]
    """Constrains an array in a compiled function to lie in rows over the devices."""
    place_state: Callable[[TrainState], TrainState]
    """From a state as it is saved to the state on the devices."""
    saved_state: Callable[[TrainState], TrainState]
    """From the state on the devices to the state as it is saved, which has no axis of devices."""
    abstract_state: Callable[[Callable[[Array], TrainState], Array], TrainState]
    """From an `init(key)` and a key to the shapes, types and shardings of the state as it is saved."""
    mesh: jax.sharding.Mesh
    """Where states lie as they are saved."""
    rows: slice | np.ndarray
    """Which rows of the whole batch this host reads, rising."""


def make_layout(
    parallel: Parallel,
    *,
    batch_size: int,
    parts: int = 1,
    fsdp: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Layout:
    """Makes the layout of a run over devices.

    Args:
      parallel: "jit" or "pmap".
      batch_size: images a step over all devices.
      parts: in how many parts a step takes them.
      fsdp: how many devices share one copy of the state (see `mesh`); 1 for pmap.
      devices: which; all there are if not given.

    Returns:
      the `Layout`.

    Raises:
      UserError: the batch, or the devices by `fsdp`, cannot be shared out evenly.
    """
    devices = jax.devices() if devices is None else devices
    shares = len(devices) * parts
    if batch_size % shares:
        in_parts = f" in {parts} parts" if parts > 1 else ""
        raise UserError(
            f"train.batch_size={batch_size} cannot be shared out evenly over {len(devices)} devices{in_parts}: "
            f"use {_way_that_works(batch_size, len(devices), parts, fsdp)}, or, for a new run, a --train.batch-size "
            f"that is a multiple of {shares}"
        )
    if parallel == "jit":
        return _jit_layout(make_mesh(devices, fsdp=fsdp), batch_size, parts)
    if jax.process_count() > 1:
        raise UserError("train.parallel=pmap is for the devices of one host: use --train.parallel jit for many")
    return _pmap_layout(devices, parts)


def _way_that_works(batch_size: int, devices: int, parts: int, fsdp: int) -> str:
    """Returns the options that share out a batch over as many of the devices as can be, in about as many parts."""
    fewer = range(devices, 0, -1) if jax.process_count() == 1 else [devices]
    for number in fewer:
        if batch_size % number or number % fsdp:
            continue
        fitting = [each for each in range(1, batch_size // number + 1) if batch_size // number % each == 0]
        nearest = min(fitting, key=lambda each: (each < parts, abs(each - parts)))  # rather more parts: less memory
        options = [f"--train.devices {number}"] if number < devices else []
        options += [f"--train.grad-accum-steps {nearest}"] if nearest != parts else []
        return " ".join(options)
    return "another number of devices" if fsdp == 1 else f"another --train.fsdp than {fsdp}"


def _jit_layout(mesh: jax.sharding.Mesh, batch_size: int, parts: int) -> Layout:
    whole, shared_out = replicated(mesh), batch_sharding(mesh)

    def on_mesh(make_step: Callable[..., TrainingStep], state: TrainState) -> jax.stages.Wrapped:
        lies = shardings(mesh, state)
        inside, outside = (whole, lies, None), (lies, whole)  # the data lie where they were placed
        step = make_step(gather=functools.partial(gather, mesh), parts=parts)
        return jax.jit(step, donate_argnums=1, in_shardings=inside, out_shardings=outside)

    def lift(make_step: Callable[..., TrainingStep]) -> TrainingStep:
        compiled = None

        def lifted(key: Array, state: TrainState, batch: Batch) -> tuple[TrainState, StepInfo]:
            nonlocal compiled
            if compiled is None:  # where the state's leaves lie is known when the first state is
                compiled = on_mesh(make_step, state)
            return typing.cast(tuple[TrainState, StepInfo], compiled(key, state, batch))

        return lifted

    def init_here(init: Callable[[Array], TrainState], key: Array) -> TrainState:
        return jax.jit(init, out_shardings=shardings(mesh, jax.eval_shape(init, key)))(key)

    rows = _rows_here(shared_out, batch_size)

    def place_batch(images: np.ndarray, labels: np.ndarray | None = None) -> Batch:
        batch = Batch(images, np.arange(batch_size, dtype=np.int32)[rows], labels)
        if isinstance(rows, slice):
            return jax.device_put(batch, shared_out)
        return jax.tree.map(lambda leaf: _from_rows(leaf, rows, batch_size, shared_out), batch)

    def place_whole(arrays: typing.Any) -> typing.Any:
        place = lambda array: jax.make_array_from_callback(array.shape, whole, lambda index: array[index])
        return jax.tree.map(place, arrays)

    def abstract_state(init: Callable[[Array], TrainState], key: Array) -> TrainState:
        shapes = jax.eval_shape(init, key)
        return jax.tree.map(_described, shapes, shardings(mesh, shapes))

    return Layout(
        lift=lift,
        lower=lambda make_step, key, state, batch: on_mesh(make_step, state).lower(key, state, batch),
        init=init_here,
        place_batch=place_batch,
        place_whole=place_whole,
        share_out=lambda array: jax.lax.with_sharding_constraint(array, shared_out),
        place_state=lambda state: jax.device_put(state, shardings(mesh, state)),
        saved_state=lambda state: state,
        abstract_state=abstract_state,
        mesh=mesh,
        rows=rows,
    )


def _rows_here(sharding: jax.sharding.NamedSharding, batch_size: int) -> slice | np.ndarray:
    """Finds the rows of a batch that lie on devices of this host."""
    if sharding.is_fully_addressable:
        return slice(None)
    # Devices of a host need not be neighbors in the mesh.
    parts = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.sort(np.concatenate([np.arange(batch_size)[index] for index in parts]))


def _from_rows(leaf: np.ndarray, rows: np.ndarray, batch_size: int, sharding: jax.sharding.NamedSharding) -> Array:
    """Makes an array over all hosts of the rows that each of them has."""

    def part(index: typing.Any) -> np.ndarray:
        first, stop, _ = index[0].indices(batch_size)
        begin = int(np.searchsorted(rows, first))
        return leaf[begin : begin + stop - first]

    return jax.make_array_from_callback((batch_size, *leaf.shape[1:]), sharding, part)


def _described(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _of_first_device(leaf: Array) -> Array:
    """Takes the copy that the first device has of what pmap gives, (devices, ...)."""
    # Not leaf[0]: that is a program of all devices, and several of them at once were seen to wait for each other for
    # ever on CPUs with fewer cores than devices.
    return leaf.addressable_data(0)[0]


def _pmap_layout(devices: Sequence[jax.Device], parts: int) -> Layout:
    alone = jax.sharding.SingleDeviceSharding(devices[0])

    def lift(make_step: Callable[..., TrainingStep]) -> TrainingStep:
        step = make_step(
            device_mean=functools.partial(jax.lax.pmean, axis_name=_AXIS),
            whole_batch=functools.partial(jax.lax.all_gather, axis_name=_AXIS, tiled=True),
            parts=parts,
        )
        lifted = jax.pmap(step, axis_name=_AXIS, in_axes=(None, 0, 0), donate_argnums=1, devices=devices)

        def first_of(key: Array, state: TrainState, batch: Batch) -> tuple[TrainState, StepInfo]:
            state, info = lifted(key, state, batch)
            return state, jax.tree.map(_of_first_device, info)

        return first_of

    def place_state(state: TrainState) -> TrainState:
        # The same axis as the step, or its own output would be another kind of argument and it be compiled again.
        copies = jax.pmap(lambda _, state: state, axis_name=_AXIS, in_axes=(0, None), devices=devices)
        return copies(jnp.arange(len(devices)), state)

    def place_batch(images: np.ndarray, labels: np.ndarray | None = None) -> Batch:
        batch = Batch(images, np.arange(len(images), dtype=np.int32), labels)
        share = lambda leaf: leaf.reshape(len(devices), -1, *leaf.shape[1:])
        return jax.tree.map(share, batch)  # pmap moves it to the devices

    return Layout(
        lift=lift,
        lower=None,
        init=lambda init, key: place_state(jax.jit(init)(key)),
        place_batch=place_batch,
        place_whole=None,
        share_out=lambda array: array,
        place_state=place_state,
        saved_state=lambda state: jax.tree.map(_of_first_device, state),
        abstract_state=lambda init, key: jax.tree.map(lambda leaf: _described(leaf, alone), jax.eval_shape(init, key)),
        mesh=make_mesh(devices[:1]),
        rows=slice(None),
    )
