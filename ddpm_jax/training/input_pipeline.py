"""How the examples of a step come to the devices: the same ones, in the same order, wherever the set is kept.

A set that fits is put on every device once, and the compiled step gathers its batch there; another is read on the host,
from memory or from disk, and each batch is sent ahead of need. The loop does not know which: it
passes the input of a call to the compiled program, where the pipeline's `take` makes the batch of each step of it.
"""

import dataclasses
import functools
import math
import threading
import typing
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ddpm_jax.data import prefetch
from ddpm_jax.data.order import epoch_permutation
from ddpm_jax.data.source import Source
from ddpm_jax.system.mesh import batch_sharding, replicated
from ddpm_jax.training.parallel import Layout
from ddpm_jax.training.state import TrainState
from ddpm_jax.training.step import Batch, StepInfo, TrainingStep


class CallInput(typing.NamedTuple):
    """The input of one call of the compiled program, which runs one step or several."""

    steps: range
    """The steps that it belongs to."""
    data: typing.Any
    """On the devices: the third argument of the compiled program."""


class RunKey(typing.NamedTuple):
    """The first argument of a compiled program that runs several steps."""

    key: Array
    """The run's key."""
    steps: ArrayLike
    """How many steps to run, int32."""


@dataclasses.dataclass(frozen=True)
class InputPipeline:
    """Where the examples of a run come from."""

    kept: str
    """Where the set is kept, in words."""
    take: Callable[[typing.Any], Callable[[ArrayLike, Array], Batch]]
    """Maps the data of a `CallInput` to a function from (place in the call, step) to the batch; pure, part of the
    compiled program."""
    shapes: Callable[[], typing.Any]
    """Returns the shapes, types and shardings of the data of a `CallInput`, for a layout by jit."""
    open: Callable[..., prefetch.Prefetch[CallInput]]
    """Iterates over the inputs of `(first, last, calls)`: the steps from the first to before the last, call by call
    (step by step if not given); use it in a `with` block."""
    most: int = 1
    """The largest number of steps of a call."""


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
    most: int = 1,
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
      most: the largest number of steps of a call of the compiled program.

    Returns:
      the `InputPipeline`.
    """
    gib = source.num_examples * math.prod(source.image_shape) / 2**30
    if source.images is not None and layout.place_whole is not None and gib <= device_gib:
        return _resident(source, layout, seed=seed, batch_size=batch_size, labeled=labeled, most=most)

    def send(batch: prefetch.Examples) -> Batch:
        return layout.place_batch(batch.images, batch.labels)

    def open_on_host(first: int, last: int, calls: Iterable[range] | None = None) -> prefetch.Prefetch[CallInput]:
        batches: prefetch.Prefetch[Batch] = prefetch.batches(
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

        closing = threading.Event()

        def read(steps: range) -> CallInput:
            found = [next(batches) for _ in steps if not closing.is_set()]  # a call that nobody takes may lack some
            return CallInput(steps, tuple(found + found[-1:] * (most - len(found))))

        calls = _one_by_one(first, last) if calls is None else calls
        return prefetch.Prefetch(read, calls, hurry=closing.set, finish=batches.close)

    def take(batches: tuple[Batch, ...]) -> Callable[[ArrayLike, Array], Batch]:
        if most == 1:
            return lambda place, step: batches[0]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
        return lambda place, step: jax.tree.map(lambda leaf: leaf[place], stacked)

    def shapes() -> tuple[Batch, ...]:
        place: typing.Any = functools.partial(jax.ShapeDtypeStruct, sharding=batch_sharding(layout.mesh))
        rows = place((batch_size,), np.int32)
        batch = Batch(place((batch_size, *source.image_shape), np.uint8), rows, rows if labeled else None)
        return (batch,) * most

    kept = "streamed from disk" if source.images is None else "kept in memory"
    return InputPipeline(kept, take, shapes, open_on_host, most)


def _one_by_one(first: int, last: int) -> Iterable[range]:
    return (range(step, step + 1) for step in range(first, last))


def _resident(source: Source, layout: Layout, *, seed: int, batch_size: int, labeled: bool, most: int) -> InputPipeline:
    number = source.num_examples
    # A call that begins at the end of an epoch may reach into so many.
    epochs = (number + most * batch_size - 2) // number + 1
    place_whole = typing.cast(Callable, layout.place_whole)

    @functools.cache
    def placed() -> tuple[Array, Array | None]:
        return place_whole((source.images, source.labels if labeled else None))

    def take(data: Resident) -> Callable[[ArrayLike, Array], Batch]:
        def batch_of(place: ArrayLike, step: Array) -> Batch:
            rows = jnp.arange(batch_size, dtype=jnp.int32)
            places = (step - data.step) * batch_size + data.place + rows
            examples = layout.share_out(data.order.at[places].get(mode="clip"))
            pick = lambda values: values.at[examples].get(mode="clip")
            labels = None if data.labels is None else pick(data.labels)
            return Batch(layout.share_out(pick(data.images)), layout.share_out(rows), labels)

        return batch_of

    def open_on_devices(first: int, last: int, calls: Iterable[range] | None = None) -> prefetch.Prefetch[CallInput]:
        epoch, data = -1, None

        def read(steps: range) -> CallInput:
            nonlocal epoch, data
            step = steps.start
            here, place = divmod(step * batch_size, number)
            if here != epoch:
                epoch = here
                order = [epoch_permutation(seed, here + later, number) for later in range(epochs)]
                fresh = (np.concatenate(order).astype(np.int32), np.array(step, np.int32), np.array(place, np.int32))
                data = Resident(*placed(), *place_whole(fresh))
            return CallInput(steps, data)

        return prefetch.Prefetch(read, _one_by_one(first, last) if calls is None else calls)

    def shapes() -> Resident:
        place: typing.Any = functools.partial(jax.ShapeDtypeStruct, sharding=replicated(layout.mesh))
        scalar = place((), np.int32)
        labels = place((number,), np.int32) if labeled else None
        order = place((epochs * number,), np.int32)
        return Resident(place((number, *source.image_shape), np.uint8), labels, order, scalar, scalar)

    return InputPipeline("kept on the device", take, shapes, open_on_devices, most)


def with_inputs(make_step: Callable[..., TrainingStep], pipeline: InputPipeline) -> Callable[..., TrainingStep]:
    """Makes programs of one step or several that take their input from a pipeline.

    Args:
      make_step: makes the step from its keywords about devices.
      pipeline: the input pipeline.

    Returns:
      from the same keywords to `(key, state, data) -> (state, infos)`, to be lifted by the layout; the infos have a
      first axis of `pipeline.most` entries, one per step. If these may be several, the key is a `RunKey`, and the
      entries of steps that were not run are 0.
    """

    def make_program(**over_devices: typing.Any) -> TrainingStep:
        step = make_step(**over_devices)

        def one_step(key: Array, state: TrainState, data: typing.Any) -> tuple[TrainState, StepInfo]:
            batch = pipeline.take(data)(0, state.step)
            # A barrier, so that the rest of the program is the same, and rounds the same, for every pipeline.
            state, info = step(key, state, jax.lax.optimization_barrier(batch))
            return state, jax.tree.map(lambda value: value[None], info)

        def several_steps(run: RunKey, state: TrainState, data: typing.Any) -> tuple[TrainState, StepInfo]:
            batch_at = pipeline.take(data)

            def advance(place: ArrayLike, so_far: tuple[TrainState, StepInfo]) -> tuple[TrainState, StepInfo]:
                state, infos = so_far
                state, info = step(run.key, state, jax.lax.optimization_barrier(batch_at(place, state.step)))
                return state, jax.tree.map(lambda values, value: values.at[place].set(value), infos, info)

            info = jax.eval_shape(lambda: step(run.key, state, batch_at(0, state.step))[1])
            infos = jax.tree.map(lambda like: jnp.zeros((pipeline.most, *like.shape), like.dtype), info)
            # The number of steps is not known to the compiler: so calls of every length are one program, and the
            # numbers of a step do not depend on which call it is in.
            return jax.lax.fori_loop(0, run.steps, advance, (state, infos))

        return one_step if pipeline.most == 1 else several_steps

    return make_program
