"""How one pure step runs on many devices: by jit over a mesh, or by pmap. The numbers are the same."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from ddpm_jax.config import Parallel
from ddpm_jax.errors import UserError
from ddpm_jax.training.state import TrainState
from ddpm_jax.training.step import Batch, StepInfo, TrainingStep

_AXIS = "data"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the state and the batch lie, and how a step is lifted over the devices."""

    lift: Callable[[Callable[..., TrainingStep]], TrainingStep]
    """From `make_step(device_mean=.., whole_batch=..)` to the compiled step on placed arguments; donates the state."""
    init: Callable[[Callable[[Array], TrainState], Array], TrainState]
    """From an `init(key)` and a key to the state, made where it lies."""
    place_batch: Callable[[np.ndarray, np.ndarray | None], Batch]
    """From the images of the whole batch and their labels (or None), on the host, to the batch on the devices."""
    place_state: Callable[[TrainState], TrainState]
    """From a state as it is saved to the state on the devices."""
    saved_state: Callable[[TrainState], TrainState]
    """From the state on the devices to the state as it is saved, which has no axis of devices."""
    abstract_state: Callable[[Callable[[Array], TrainState], Array], TrainState]
    """From an `init(key)` and a key to the shapes, types and shardings of the state as it is saved."""


def make_mesh(devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    """Makes a mesh of devices along one axis, "data"."""
    # Automatic axes: the default became explicit ones, under which jax 0.12 refuses some gradients.
    return jax.make_mesh((len(devices),), (_AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)


def make_layout(parallel: Parallel, *, batch_size: int, devices: Sequence[jax.Device] | None = None) -> Layout:
    """Makes the layout of a run over devices.

    Args:
      parallel: "jit" or "pmap".
      batch_size: images a step over all devices.
      devices: which; all there are if not given.

    Returns:
      the `Layout`.

    Raises:
      UserError: the batch cannot be shared out evenly.
    """
    devices = jax.devices() if devices is None else devices
    if batch_size % len(devices):
        raise UserError(
            f"train.batch_size={batch_size} cannot be shared out evenly over {len(devices)} devices: "
            f"use a multiple of {len(devices)}"
        )
    return _jit_layout(devices) if parallel == "jit" else _pmap_layout(devices)


def _abstract(init: Callable[[Array], TrainState], key: Array, sharding: jax.sharding.Sharding) -> TrainState:
    shapes = jax.eval_shape(init, key)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def _jit_layout(devices: Sequence[jax.Device]) -> Layout:
    mesh = make_mesh(devices)
    everywhere, shared_out = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(_AXIS))

    def lift(make_step: Callable[..., TrainingStep]) -> TrainingStep:
        return jax.jit(
            make_step(),
            donate_argnums=1,
            in_shardings=(everywhere, everywhere, shared_out),
            out_shardings=(everywhere, everywhere),
        )

    def place_batch(images: np.ndarray, labels: np.ndarray | None = None) -> Batch:
        return jax.device_put(Batch(images, np.arange(len(images), dtype=np.int32), labels), shared_out)

    return Layout(
        lift=lift,
        init=lambda init, key: jax.jit(init, out_shardings=everywhere)(key),
        place_batch=place_batch,
        place_state=lambda state: jax.device_put(state, everywhere),
        saved_state=lambda state: state,
        abstract_state=lambda init, key: _abstract(init, key, everywhere),
    )


def _pmap_layout(devices: Sequence[jax.Device]) -> Layout:
    alone = jax.sharding.SingleDeviceSharding(devices[0])

    def lift(make_step: Callable[..., TrainingStep]) -> TrainingStep:
        step = make_step(
            device_mean=functools.partial(jax.lax.pmean, axis_name=_AXIS),
            whole_batch=functools.partial(jax.lax.all_gather, axis_name=_AXIS, tiled=True),
        )
        lifted = jax.pmap(step, axis_name=_AXIS, in_axes=(None, 0, 0), donate_argnums=1, devices=devices)

        def first_of(key: Array, state: TrainState, batch: Batch) -> tuple[TrainState, StepInfo]:
            state, info = lifted(key, state, batch)
            return state, jax.tree.map(lambda leaf: leaf[0], info)

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
        init=lambda init, key: place_state(jax.jit(init)(key)),
        place_batch=place_batch,
        place_state=place_state,
        saved_state=lambda state: jax.tree.map(lambda leaf: leaf[0], state),
        abstract_state=lambda init, key: _abstract(init, key, alone),
    )
