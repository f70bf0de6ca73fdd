"""Why a step is not finite: that step again, which is a pure function, with every layer watched."""

import functools
import typing
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from ddpm_jax.config import Config
from ddpm_jax.data import prefetch
from ddpm_jax.data.check import check_classes, for_training
from ddpm_jax.data.fingerprint import check_same_set
from ddpm_jax.data.sources import load_source
from ddpm_jax.run.build import matmul_precision
from ddpm_jax.run.checkpoints import Checkpoints
from ddpm_jax.run.record import check_same_run, rates_so_far
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import claimed
from ddpm_jax.system.progress import Progress, say
from ddpm_jax.training.metrics import StepNumbers
from ddpm_jax.training.setup import Setup, make_setup
from ddpm_jax.training.start import first_state
from ddpm_jax.training.state import TrainState
from ddpm_jax.training.step import Batch


def find_not_finite(config: Config, run: Path) -> str:
    """Goes on from a run's newest checkpoint until a step is not finite, and says which layer was the first.

    Nothing is written: neither metrics nor checkpoints.

    Args:
      config: the whole configuration, valid.
      run: the run's folder; without a checkpoint in it, the run's own beginning.

    Returns:
      one line.

    Raises:
      UserError: as `loop.train`; also where several hosts train together.
    """
    if jax.process_count() > 1:
        raise UserError(
            "--debug-nans looks at a step on one host: start it alone, with a --train.grad-accum-steps that fits"
        )
    with claimed(run), matmul_precision(config):
        check_same_run(run / "config.json", config)
        source = for_training(config, load_source(config.data))
        check_same_set(run / "data.json", source, write=False)
        check_classes(config, source)
        parts = make_setup(config)
        layout, keys = parts.layout, parts.keys
        rules = config.checkpoints
        with Checkpoints(
            run, keep=rules.keep, keep_every=rules.keep_every, keep_best=rules.keep_best, warn=say
        ) as checkpoints:
            state, _ = first_state(parts, checkpoints, run)
        first = int(jax.device_get(layout.saved_state(state).step))
        parts = parts.resumed(rates_so_far(run / "config.json", config), first)
        step = layout.lift(parts.make_step)
        train = config.train
        batches: prefetch.Prefetch[prefetch.Examples] = prefetch.batches(
            source, train.seed, first, train.steps, batch_size=train.batch_size
        )
        with (
            batches,
            Progress(train.steps, initial=first, unit="step", description="looking") as progress,
        ):
            for batch in batches:
                before = jax.tree.map(jnp.copy, layout.saved_state(state))  # the step gives the state away
                state, info = step(keys.run, state, layout.place_batch(batch.images, batch.labels))
                numbers = StepNumbers(*(value.tolist() for value in jax.device_get(info)))
                progress.update(1, loss=numbers.loss)
                if not numbers.is_finite():
                    indices = np.arange(train.batch_size, dtype=np.int32)
                    cause = first_not_finite(parts, before, Batch(batch.images, indices, batch.labels))
                    return (
                        f"step {batch.step + 1}: loss {numbers.loss}, gradient norm {numbers.grad_norm}, parameter "
                        f"norm {numbers.param_norm}: {cause}"
                    )
    return f"all steps from {first} to {train.steps} are finite"


class _Seen(typing.NamedTuple):
    name: str
    finite_in: bool
    finite_out: bool
    largest_in: float


def first_not_finite(parts: Setup, state: TrainState, batch: Batch) -> str:
    """Returns where a step first has numbers that are not finite: forward through the layers, then back.

    Args:
      parts: of the run.
      state: before the step.
      batch: of the step.

    Returns:
      a part of a sentence; that all is finite, if it is.
    """
    bad = [name for name, leaf in _named(state.params) if not bool(jnp.isfinite(leaf).all())]
    if bad:
        return f"the parameter {bad[0]} was not finite before the step"
    layers, gradients, losses = _watched(parts, state, batch)
    for layer in layers:
        if not layer.finite_in:
            return f"what goes into the layer {layer.name} is the first that is not finite"
        if not layer.finite_out:
            return (
                f"the layer {layer.name} is the first whose output is not finite; its input is, and at most "
                f"{layer.largest_in:.3g}"
            )
    if not losses:
        return "the loss is the first that is not finite: all layers are"
    spoiled = [name for name, finite in gradients.items() if not finite]
    if spoiled:
        order = [layer.name for layer in layers]
        place = lambda name: max((i for i, layer in enumerate(order) if name.startswith(f"{layer}/")), default=-1)
        return f"all layers are finite, and the gradient of {max(spoiled, key=place)} is the first that is not"
    return "the gradient is finite, and the update or a norm is not: its numbers are too large"


def _named(tree: typing.Any) -> list[tuple[str, Array]]:
    return [("/".join(str(key.key) for key in path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _watched(parts: Setup, state: TrainState, batch: Batch) -> tuple[list[_Seen], dict[str, bool], bool]:
    """Does a step, and notes of every layer in the order of the calls, of every gradient and of the loss."""
    names: list[str] = []
    layers: dict[int, _Seen] = {}
    gradients: dict[str, bool] = {}

    def note(number: np.ndarray, finite_in: np.ndarray, finite_out: np.ndarray, largest_in: np.ndarray) -> None:
        layers[int(number)] = _Seen(names[int(number)], bool(finite_in), bool(finite_out), float(largest_in))

    def watch(call, arguments, keywords, context):
        output = call(*arguments, **keywords)
        if context.method_name == "__call__":
            inputs = [leaf for leaf in jax.tree.leaves(arguments) if jnp.issubdtype(leaf.dtype, jnp.floating)]
            number = len(names)
            names.append("/".join(context.module.path) or "the network")
            largest = jnp.stack([jnp.abs(leaf).max().astype(jnp.float32) for leaf in inputs] or [jnp.float32(0)]).max()
            finite_in = jnp.array([jnp.isfinite(leaf).all() for leaf in inputs] or [True]).all()
            jax.debug.callback(note, number, finite_in, jnp.isfinite(output).all(), largest)
        return output

    def note_gradient(name: str, finite: np.ndarray) -> None:
        gradients[name] = bool(finite)

    def update(gradient, opt_state, params=None):
        for name, leaf in _named(gradient):
            jax.debug.callback(functools.partial(note_gradient, name), jnp.isfinite(leaf).all())
        return parts.optimizer.update(gradient, opt_state, params)

    optimizer = optax.GradientTransformation(parts.optimizer.init, update)
    step = parts._replace(optimizer=optimizer).make_step()
    with nn.intercept_methods(watch):
        _, info = jax.jit(step)(parts.keys.run, state, batch)
    jax.effects_barrier()
    return [layers[number] for number in sorted(layers)], gradients, bool(jnp.isfinite(info.loss))
