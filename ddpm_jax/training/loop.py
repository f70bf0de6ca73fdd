"""The training loop: Algorithm 1, the hooks around it, and how a run starts, stops and resumes."""

import contextlib
import dataclasses
import functools
import operator
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddpm_jax.config import FROM_PYTHON, Config
from ddpm_jax.data.check import check_classes, for_training
from ddpm_jax.data.fingerprint import check_same_set
from ddpm_jax.data.own import check_source
from ddpm_jax.data.source import Source
from ddpm_jax.data.sources import load_source
from ddpm_jax.generation.batches import grid_drawer
from ddpm_jax.networks import Network, Params, parameter_shapes
from ddpm_jax.run.build import check_fits, image_shape, matmul_precision
from ddpm_jax.run.checkpoints import Checkpoints, has_saved
from ddpm_jax.run.computed_on import describe, resumed
from ddpm_jax.run.fields import with_kinds
from ddpm_jax.run.folder import adopted, check_shared
from ddpm_jax.run.record import LearningRates, rates_so_far
from ddpm_jax.run.snapshots import rewind_snapshots
from ddpm_jax.run.validation import most_steps, validate
from ddpm_jax.system import environment, pictures
from ddpm_jax.system.errors import Stopped, UserError
from ddpm_jax.system.exits import advice_for_memory
from ddpm_jax.system.hosts import Agreement, barrier, is_primary_host
from ddpm_jax.system.progress import Progress, say
from ddpm_jax.system.signals import stop_signals
from ddpm_jax.training import plots
from ddpm_jax.training.held_out import check_held_out, evaluating, load_test_split
from ddpm_jax.training.hooks import Event, Periodic, Saving, append_metrics, calls, drawing, logging, snapshotting
from ddpm_jax.training.input_pipeline import RunKey, make_input_pipeline, with_inputs
from ddpm_jax.training.metric_writers import check_packages, open_metric_writers
from ddpm_jax.training.metrics import Diagnostics, StepNumbers, read_lines, rewind
from ddpm_jax.training.setup import Setup, make_setup
from ddpm_jax.training.speed import SpeedMeter, forward_flops, peak_tflops
from ddpm_jax.training.start import first_state
from ddpm_jax.training.state import learning_rate

# Calls dispatched before the first of them is waited for: the device never waits for the host, nor runs far ahead.
_IN_FLIGHT = 2


def train(
    config: Config,
    run: Path,
    *,
    network: Network | None = None,
    source: Source | None = None,
    held_out: Source | None = None,
    score: Callable[[Event], None] | None = None,
    hooks: Sequence[Periodic] = (),
    exact: bool = False,
) -> None:
    """Trains a run to `config.train.steps`, from its own newest checkpoint, `train.init_from`, or scratch.

    What the run becomes is a function of its configuration alone: killed at any moment and started again, it is the
    run that was never stopped; on other devices, cores or versions of JAX, to rounding.

    Args:
      config: the whole configuration, valid.
      run: the run's folder; made if it does not exist.
      network: the network to train; if None, the one that `config` describes. One that is given has to be given again
        when the run is resumed.
      source: the images to train on; if None, those that `config` names. Their shape replaces that of `config.data`.
      held_out: the images of `config.eval`; if None, the test split.
      score: what `eval.fid_every` runs, from `scoring_during_training`.
      hooks: what else to do every N steps, in this order: after logging, evaluation and grids, before the checkpoint.
      exact: refuse to resume what was computed elsewhere (on other devices, cores, instructions or versions), and
        would agree with an uninterrupted run to rounding only.

    Raises:
      UserError: the configuration is invalid, the folder holds a different run or is in use, the images cannot be read,
        the batch does not fit the devices, a checkpoint cannot be read or written, or the loss is not finite.
      Stopped: SIGINT, SIGTERM, SIGUSR1 or SIGHUP was received; a checkpoint is saved.
    """
    config = with_kinds(config)
    check_packages(config)
    source = source and check_source(source, "source")
    held_out = held_out and check_source(held_out, "held_out")
    config = _with_given(config, network, source)
    validate(config)  # what the run's record is checked by when it is read
    if config.eval.every and source is not None and held_out is None:
        raise UserError("eval.every needs held-out images: give them to train() as held_out, or use eval.every=0")
    if config.eval.fid_every and score is None:
        raise UserError("eval.fid_every needs what scores: train(score=scoring_during_training(config, run))")
    if score is not None:
        hooks = [Periodic(config.eval.fid_every, score), *hooks]
    with contextlib.ExitStack() as held:
        most = most_steps(config, [hook.every for hook in hooks])
        after = "this step" if most == 1 else f"this call of at most {most} steps"
        received = held.enter_context(
            stop_signals(f"stopping after {after} and saving a checkpoint; press Ctrl-C again to quit without saving")
        )
        held.enter_context(matmul_precision(config))
        begun = held.enter_context(adopted(config, run)) if is_primary_host() else lambda rates: None
        barrier("the run's folder is adopted")
        if not is_primary_host():
            check_shared(config, run)
        so_far = rates_so_far(run / "config.json", config)
        source = for_training(config, load_source(config.data) if source is None else source)
        if is_primary_host():
            check_same_set(run / "data.json", source)
        barrier("the images are checked")
        if not is_primary_host():
            check_same_set(run / "data.json", source, write=False)
        check_classes(config, source)
        # A holdout shares no image with the training images: equal pixels are on the same side.
        apart = held_out is None and config.data.holdout > 0
        if config.eval.every and held_out is None:
            held_out = load_test_split(config)
        if config.eval.every and held_out is not None and not apart and not has_saved(run):
            check_held_out(config, held_out, source)
        number = config.train.grad_accum_steps
        with advice_for_memory(
            f"a batch of {config.train.batch_size} images" + (f" in {number} parts" if number > 1 else ""),
            f"use --train.grad-accum-steps {2 * number} or more, --train.remat, or a smaller --train.batch-size",
        ):
            parts = make_setup(config, network=network)
            _train(parts, run, source, held_out, hooks, received, so_far, begun, exact=exact)


def _with_given(config: Config, network: Network | None, source: Source | None) -> Config:
    """Returns the configuration that records a network and a source given from Python."""
    if source is not None:
        height, width, channels = source.image_shape
        data = dataclasses.replace(
            config.data, source=FROM_PYTHON, path="", height=height, width=width, channels=channels
        )
        config = dataclasses.replace(config, data=data)
    if network is not None:
        model = dataclasses.replace(config.model, network=FROM_PYTHON, num_classes=network.num_classes)
        config = dataclasses.replace(config, model=model)
        try:
            check_fits(network, config)
        except ValueError as error:
            raise UserError(f"network: {error}") from error
    return config


def _train(
    parts: Setup,
    run: Path,
    source: Source,
    held_out: Source | None,
    hooks: Sequence[Periodic],
    received: Sequence[int],
    so_far: LearningRates,
    begun: Callable[[LearningRates], None],
    *,
    exact: bool,
) -> None:
    config, layout, rules, num_steps = parts.config, parts.layout, parts.config.checkpoints, parts.config.train.steps
    pipeline = make_input_pipeline(
        source,
        layout,
        seed=config.train.seed,
        batch_size=config.train.batch_size,
        labeled=config.model.num_classes > 0,
        device_gib=config.data.device_gib,
        workers=config.data.workers,
        most=most_steps(config, [hook.every for hook in hooks]),
    )
    with Checkpoints(
        run, keep=rules.keep, keep_every=rules.keep_every, keep_best=rules.keep_best, warn=say
    ) as checkpoints:
        state, notes = first_state(parts, checkpoints, run)
        first = int(jax.device_get(layout.saved_state(state).step))
        parts = parts.resumed(so_far, first)
        if first >= num_steps:
            if first == num_steps:
                begun(parts.rates)  # its images may have moved
            _rewind(run, first, config, ends=True)
            say(f"{run} has done its {first} steps; --train.steps {2 * first} would train it further")
            return
        computed_on, warning = resumed(notes.get("computed_on", []), first, describe(config), exact=exact)
        if first:
            say(f"{run}: resuming from step {first}")
        if warning:
            say(f"warning: {run}: {warning}")
        if parts.rates and parts.rates[-1].step == first:
            say(f"from step {first} on, the learning rate is {config.train.learning_rate:g} after the warmup")
        say(f"the images are {pipeline.kept}")
        size = sum(leaf.size for leaf in jax.tree.leaves(parameter_shapes(parts.network)))
        say(f"training on {environment.devices()}: {size:,} parameters")
        evaluation = [Periodic(config.eval.every, evaluating(parts, held_out))] if held_out else []
        grids = _make_draw(parts)
        training_step = layout.lift(with_inputs(parts.make_step, pipeline))
        diagnostics = Diagnostics(notes, check=functools.partial(_check_finite, run, checkpoints))
        saving = Saving(checkpoints, diagnostics, rules, computed_on)
        agree = Agreement(2, lag=_IN_FLIGHT)
        with open_metric_writers(config, run, first=first) as writers:
            meter = _make_meter(parts, first, lambda: inputs.seconds_waited)
            log = functools.partial(append_metrics, run, writers)
            hooks = [
                Periodic(
                    config.log.every,
                    logging(run, diagnostics, meter, writers, learning_rate(config.train, parts.rates)),
                ),
                *evaluation,
                *(Periodic(config.log.samples_every, drawing(run, draw, writers)) for draw in grids),
                *hooks,
                Periodic(config.ema.snapshots_every, snapshotting(run, config)),
                Periodic(rules.every, saving),
            ]
            cut = calls(first, num_steps, periods=[hook.every for hook in hooks], most=pipeline.most)
            with (
                pipeline.open(first, num_steps, cut) as inputs,
                Progress(num_steps, initial=first, unit="step", description=config.name) as progress,
            ):
                begun(parts.rates)
                _rewind(run, first, config, ends=False)
                say("compiling the training step")
                for steps, data in inputs:
                    key = parts.keys.run if pipeline.most == 1 else RunKey(parts.keys.run, np.int32(len(steps)))
                    state, infos = training_step(key, state, data)
                    step = steps.stop
                    diagnostics.add(steps, infos)
                    diagnostics.collect(in_flight=_IN_FLIGHT)
                    checkpoints.poll()
                    progress.update(len(steps), **diagnostics.recent())

                    stopped_by, overdue = agree((received[0] if received else 0, saving.is_overdue()))
                    due = [hook for hook in hooks if hook.is_due(step, is_last=step == num_steps)]
                    if (stopped_by or overdue) and hooks[-1] not in due:
                        due.append(hooks[-1])
                    if not due:
                        continue
                    diagnostics.collect()
                    event = Event(step, functools.partial(layout.saved_state, state), log)
                    with meter:
                        for hook in due:
                            event.is_extra = not hook.is_regular(step)
                            hook.run(event)
                    if stopped_by and step < num_steps:
                        checkpoints.wait()
                        name = signal.Signals(stopped_by).name
                        raise Stopped(
                            stopped_by,
                            f"stopped by {name} at step {step}; checkpoint saved. Run the same command to resume.",
                        )
        checkpoints.wait()
    if is_primary_host():
        plots.plot_run(run)
        values: dict[str, Any] = functools.reduce(operator.or_, read_lines(run / "metrics.jsonl"), {})
        evaluated = f", eval loss {values['eval_loss']:.4f}" if values.get("eval_loss") is not None else ""
        loss = f", loss {values['loss']:.4f}" if "loss" in values else ""
        say(f"{run}: {num_steps} steps done{loss}{evaluated}")


def _rewind(run: Path, step: int, config: Config, *, ends: bool) -> None:
    if is_primary_host():
        for name in ("metrics.jsonl", "timing.jsonl"):
            rewind(run / name, step, ends=ends, warn=say)
        rewind_snapshots(run, step, every=config.ema.snapshots_every, ends=ends)


def _check_finite(run: Path, checkpoints: Checkpoints, step: int, numbers: StepNumbers) -> None:
    if numbers.is_finite():
        return
    kept = [saved for saved in checkpoints.steps() if saved < step]
    last = f"the last good checkpoint is step {max(kept)}" if kept else "no checkpoint was saved yet"
    raise UserError(
        f"step {step}: loss {numbers.loss}, gradient norm {numbers.grad_norm}, parameter norm {numbers.param_norm}: "
        f"training stopped, {last} in {run}; the same command with --debug-nans names the layer; or resume with a "
        "smaller --train.learning-rate"
    )


def _make_meter(parts: Setup, first: int, seconds_waited: Callable[[], float]) -> SpeedMeter:
    config = parts.config
    return SpeedMeter(
        first=first,
        batch_size=config.train.batch_size,
        flops=forward_flops(parts.network, image_shape(config)),
        tflops=config.log.peak_tflops or peak_tflops(jax.local_devices()[0].device_kind),
        seconds_waited=seconds_waited,
    )


def _make_draw(parts: Setup) -> list[Callable[[Params], np.ndarray]]:
    """Makes the function from EMA weights to a grid's images, always of the same latents; [] if none are drawn."""
    config = parts.config
    if not config.log.samples_every:
        return []
    if not pictures.can_show(image_shape(config)[-1]):
        say(f"no sample grids: images with {image_shape(config)[-1]} channels cannot be shown")
        return []
    return [grid_drawer(config, parts.network, parts.keys.samples, mesh=parts.layout.mesh)]
