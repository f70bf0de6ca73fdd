"""How the examples of a step come to the devices: the same ones, in the same order, wherever the set is kept.

A set that fits is put on every device once, and the compiled step gathers its batch there; another is read on the host,
from memory or from disk, and each batch is sent ahead of need. The loop does not know which: it
passes the input of a step to the compiled step, where the pipeline's `take` makes a batch of it.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddpm_jax.data import prefetch
from ddpm_jax.data.order import epoch_permutation
from ddpm_jax.data.source import Source
from ddpm_jax.system.mesh import batch_sharding, replicated
from ddpm_jax.training.parallel import Layout
from ddpm_jax.training.state import TrainState
from ddpm_jax.training.step import Batch, StepInfo, TrainingStep


class StepInput(typing.NamedTuple):
    """The input of one compiled step."""

    step: int
    """The step that it belongs to."""
    data: typing.Any
    """On the devices: the third argument of the compiled step."""


@dataclasses.dataclass(frozen=True)
class InputPipeline:
    """Where the examples of a run come from."""

    kept: str
    """Where the set is kept, in words."""
    take: Callable[[Array, typing.Any], Batch]
    """Maps (step, data of its `StepInput`) to its batch; pure, part of the compiled step."""
    shapes: Callable[[], typing.Any]
    """Returns the shapes, types and shardings of the data of a `StepInput`, for a layout by jit."""
    open: Callable[[int, int], prefetch.Prefetch[StepInput]]
    """Iterates over the inputs of the steps from the first to before the last; use it in a `with` block."""


class Resident(typing.NamedTuple):
    """A set on the devices, and the order in which the steps of an epoch see it; whole on every device."""

    images: Array
    """(N, H, W, C) uint8."""
    labels: Array | None
    """(N,) int32."""
    order: Array
    """(K N,) int32: the examples of this epoch and of those after it into which its last batch may reach."""
    step: Array
    """A step of the epoch, int32."""
    place: Array
    """The place in `order` of that step's first example, int32."""


def make_input_pipeline(
    source: Source,
    layout: Layout,
    *,
    seed: int,
    batch_size: int,
    labeled: bool,
    device_gib: float,
    workers: int = 0,
) -> InputPipeline:
    """Makes the input pipeline of a run.

    Args:
      source: the images.
      layout: of the devices.
      seed: of the run.
      batch_size: B, images a step, over all devices and hosts.
      labeled: whether the batches have labels.
      device_gib: sets up to this size are kept on the devices.
      workers: processes that decode a set which is streamed; with 0, threads do.

    Returns:
      the `InputPipeline`.
    """
    gib = source.num_examples * math.prod(source.image_shape) / 2**30
    if source.images is not None and layout.place_whole is not None and gib <= device_gib:
        return _resident(source, layout, seed=seed, batch_size=batch_size, labeled=labeled)

    def send(batch: prefetch.Examples) -> StepInput:
        return StepInput(batch.step, layout.place_batch(batch.images, batch.labels))

    def open_on_host(first: int, last: int) -> prefetch.Prefetch[StepInput]:
        return prefetch.batches(
            source,
            seed,
            first,
            last,
            batch_size=batch_size,
            rows=layout.rows,
            labeled=labeled,
            workers=workers,
            then=send,
        )

    def shapes() -> Batch:
        place: typing.Any = functools.partial(jax.ShapeDtypeStruct, sharding=batch_sharding(layout.mesh))
        rows = place((batch_size,), np.int32)
        return Batch(place((batch_size, *source.image_shape), np.uint8), rows, rows if labeled else None)

    kept = "streamed from disk" if source.images is None else "kept in memory"
    return InputPipeline(kept, lambda step, batch: batch, shapes, open_on_host)


def _resident(source: Source, layout: Layout, *, seed: int, batch_size: int, labeled: bool) -> InputPipeline:
    number = source.num_examples
    # A batch that begins at the end of an epoch may reach into so many.
    epochs = (number + batch_size - 2) // number + 1
    place_whole = typing.cast(Callable, layout.place_whole)

    @functools.cache
    def placed() -> tuple[Array, Array | None]:
        return place_whole((source.images, source.labels if labeled else None))

    def take(step: Array, data: Resident) -> Batch:
        rows = jnp.arange(batch_size, dtype=jnp.int32)
        places = (step - data.step) * batch_size + data.place + rows
        examples = layout.share_out(data.order.at[places].get(mode="clip"))
        pick = lambda values: values.at[examples].get(mode="clip")
        labels = None if data.labels is None else pick(data.labels)
        return Batch(layout.share_out(pick(data.images)), layout.share_out(rows), labels)

    def open_on_devices(first: int, last: int) -> prefetch.Prefetch[StepInput]:
        epoch, data = -1, None

        def read(step: int) -> StepInput:
            nonlocal epoch, data
            here, place = divmod(step * batch_size, number)
            if here != epoch:
                epoch = here
                order = [epoch_permutation(seed, here + later, number) for later in range(epochs)]
                fresh = (np.concatenate(order).astype(np.int32), np.array(step, np.int32), np.array(place, np.int32))
                data = Resident(*placed(), *place_whole(fresh))
            return StepInput(step, data)

        return prefetch.Prefetch(read, range(first, last))

    def shapes() -> Resident:
        place: typing.Any = functools.partial(jax.ShapeDtypeStruct, sharding=replicated(layout.mesh))
        scalar = place((), np.int32)
        labels = place((number,), np.int32) if labeled else None
        order = place((epochs * number,), np.int32)
        return Resident(place((number, *source.image_shape), np.uint8), labels, order, scalar, scalar)

    return InputPipeline("kept on the device", take, shapes, open_on_devices)


def with_inputs(make_step: Callable[..., TrainingStep], pipeline: InputPipeline) -> Callable[..., TrainingStep]:
    """Makes steps that take their input from a pipeline.

    Args:
      make_step: makes the step from its keywords about devices.
      pipeline: the input pipeline.

    Returns:
      the same for steps `(key, state, data) -> (state, info)`, to be lifted by the layout.
    """

    def make_with_input(**over_devices: typing.Any) -> TrainingStep:
        step = make_step(**over_devices)

        def step_with_input(key: Array, state: TrainState, data: typing.Any) -> tuple[TrainState, StepInfo]:
            # A barrier, so that the rest of the program is the same, and rounds the same, for every pipeline.
            return step(key, state, jax.lax.optimization_barrier(pipeline.take(state.step, data)))

        return step_with_input

    return make_with_input
