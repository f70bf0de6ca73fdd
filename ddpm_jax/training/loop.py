"""The loop around the training step: a run's folder, its resumption, what it writes, and how it ends."""

import collections
import contextlib
import dataclasses
import functools
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddpm_jax.config import Config
from ddpm_jax.data.check import check_classes
from ddpm_jax.data.fingerprint import check_same_set
from ddpm_jax.data.source import Source
from ddpm_jax.data.sources import load_source
from ddpm_jax.generation.sampler_config import SamplerConfig, labels_of, make_chain
from ddpm_jax.networks import Network
from ddpm_jax.pixels import to_uint8
from ddpm_jax.run.build import image_shape, matmul_precision
from ddpm_jax.run.checkpoints import Checkpoints, has_saved
from ddpm_jax.run.fields import leaves, value_of
from ddpm_jax.run.record import check_same_run, read_config, save_config
from ddpm_jax.run.weights import start_from
from ddpm_jax.samplers.chain import sample
from ddpm_jax.system import pictures
from ddpm_jax.system.errors import Stopped, UserError
from ddpm_jax.system.files import claimed, write_whole
from ddpm_jax.system.hosts import Agreement, are_joined, barrier, end_all, is_primary_host
from ddpm_jax.system.mesh import batch_sharding, gather, replicated
from ddpm_jax.system.progress import Progress, say
from ddpm_jax.training import plots
from ddpm_jax.training.input_pipeline import make_input_pipeline, with_inputs
from ddpm_jax.training.metric_writers import open_metric_writers
from ddpm_jax.training.metrics import StepNumbers, append_line, read_lines, rewind, summarize
from ddpm_jax.training.setup import make_setup
from ddpm_jax.training.speed import forward_flops, peak_memory_gib, peak_tflops, utilization
from ddpm_jax.training.state import Params, from_items, learning_rate, to_items
from ddpm_jax.training.step import StepInfo

# Steps dispatched before the first of them is waited for: the device never waits for the host, nor runs far ahead.
_IN_FLIGHT = 2
# A network's disk may show a file to other hosts so much later.
_SECONDS_TO_BE_SEEN = 60


def train(config: Config, run: Path) -> None:
    """Trains a run to `config.train.steps`, from its own newest checkpoint, `train.init_from`, or scratch.

    What the run becomes is a function of its configuration alone: killed at any moment and started again, it is the
    run that was never stopped.

    Args:
      config: the whole configuration, valid.
      run: the run's folder; made if it is not there.

    Raises:
      UserError: the folder is another run's or in use, the images cannot be read, the batch does not fit the devices,
        a checkpoint cannot be read or written, or the loss is not finite.
      Stopped: SIGINT or SIGTERM came; the state is saved.
    """
    with contextlib.ExitStack() as held:
        received = held.enter_context(_signals())
        held.enter_context(matmul_precision(config))
        begun = held.enter_context(_adopted(config, run)) if is_primary_host() else lambda: None
        barrier("the run's folder is this run's")
        if not is_primary_host():
            _check_shared(config, run)
        source = load_source(config.data)
        say(source.describe())
        if is_primary_host():
            check_same_set(run / "data.json", source)
        barrier("the images are this run's")
        if not is_primary_host():
            check_same_set(run / "data.json", source, write=False)
        _train(config, run, source, received, begun)


def _train(config: Config, run: Path, source: Source, received: list[int], begun: Callable[[], None]) -> None:
    check_classes(config, source)
    parts = make_setup(config)
    layout, init = parts.layout, parts.init
    init_key, run_key, samples_key = parts.keys
    feed = make_input_pipeline(
        source,
        layout,
        seed=config.train.seed,
        batch_size=config.train.batch_size,
        labeled=config.model.num_classes > 0,
        device_gib=config.data.device_gib,
        workers=config.data.workers,
    )
    training_step = layout.lift(with_inputs(parts.make_step, feed))
    draw = _make_draw(config, samples_key, mesh=layout.mesh)
    speed = _make_speed(config, parts.network)
    metrics_file, timing_file = run / "metrics.jsonl", run / "timing.jsonl"

    rules = config.checkpoints
    with Checkpoints(
        run, keep=rules.keep, keep_every=rules.keep_every, keep_best=rules.keep_best, warn=say
    ) as checkpoints:
        abstract = layout.abstract_state(init, init_key)
        restored = checkpoints.restore(to_items(abstract))
        if restored is None:
            state, window = layout.init(init, init_key), []
            if config.train.init_from:
                drawn = layout.saved_state(state)
                params, ema = start_from(Path(config.train.init_from), drawn.params, drawn.ema, run=run)
                state = layout.place_state(dataclasses.replace(drawn, params=params, ema=ema))
        else:
            state = layout.place_state(from_items(restored.step, restored.items, abstract.step.sharding))
            window = [StepNumbers(*numbers) for numbers in restored.notes["window"]]
        first = int(jax.device_get(layout.saved_state(state).step))
        for file in (metrics_file, timing_file) if is_primary_host() else ():
            rewind(file, first, warn=say)
        if first >= config.train.steps:
            say(f"{run} has done its {first} steps; --train.steps {2 * first} would train it further")
            return
        if first:
            say(f"{run}: going on from step {first}")
        say(f"the images are {feed.kept}")
        grids = config.log.samples_every > 0
        if grids and not pictures.can_show(source.image_shape[-1]):
            say(f"no grids are drawn: images of {source.image_shape[-1]} channels are no pictures")
            grids = False
        begun()

        losses_since_save: list[float] = []
        saved_at = time.monotonic()

        def save(step: int) -> None:
            nonlocal saved_at
            loss = float(np.mean(losses_since_save))
            checkpoints.save(step, to_items(layout.saved_state(state)), notes={"window": window}, loss=loss)
            losses_since_save.clear()
            saved_at = time.monotonic()

        in_flight: collections.deque[tuple[int, StepInfo]] = collections.deque()
        agree = Agreement(2, lag=_IN_FLIGHT)

        def collect(left: int) -> None:
            """Waits for all but the last `left` steps, and looks at what they said."""
            while len(in_flight) > left:
                step, info = in_flight.popleft()
                numbers = StepNumbers(*(value.tolist() for value in jax.device_get(info)))
                if not numbers.is_finite():
                    kept = [saved for saved in checkpoints.steps() if saved < step]
                    last = f"the last good checkpoint is step {max(kept)}" if kept else "no checkpoint was saved yet"
                    raise UserError(
                        f"step {step}: loss {numbers.loss}, gradient norm {numbers.grad_norm}, parameter norm "
                        f"{numbers.param_norm}: training stopped, {last} in {run}; the same command with "
                        "--debug-nans names the layer; or try a smaller --train.learning-rate in another --workdir"
                    )
                window.append(numbers)
                losses_since_save.append(numbers.loss)

        busy, stretch = 0.0, time.perf_counter()  # seconds of training alone, since the last line of timing
        waited_before, stretch_first = 0.0, first
        with (
            open_metric_writers(config, run, first=first) as boards,
            feed.open(first, config.train.steps) as opened,
            Progress(config.train.steps, initial=first, unit="step", description=config.name) as progress,
        ):
            for number, data in opened:
                state, info = training_step(run_key, state, data)
                step = number + 1
                in_flight.append((step, info))
                collect(_IN_FLIGHT)
                checkpoints.poll()
                if window:
                    progress.update(1, loss=np.mean([numbers.loss for numbers in window[-50:]]))
                else:
                    progress.update(1)

                overdue = is_primary_host() and 0 < 60 * rules.minutes <= time.monotonic() - saved_at
                if overdue:
                    saved_at = time.monotonic()  # it is said once, and done when all know
                stopped_by, due = agree((received[0] if received else 0, overdue))

                last = step == config.train.steps
                logs = step % config.log.every == 0 or last
                saves = step % rules.every == 0 or due or last
                draws = grids and (step % config.log.samples_every == 0 or last)
                if not (logs or saves or draws or stopped_by):
                    continue
                collect(0)
                busy += time.perf_counter() - stretch
                if logs:
                    rate = float(learning_rate(config.train)(number))
                    line = {"step": step, **summarize(window), "learning_rate": rate}
                    waited = opened.seconds_waited - waited_before
                    timing = {"step": step, **speed((step - stretch_first) * config.train.batch_size, busy, waited)}
                    if is_primary_host():
                        append_line(metrics_file, line)
                        append_line(timing_file, timing)
                    boards.numbers({**line, **timing})
                    window.clear()
                    busy, waited_before, stretch_first = 0.0, opened.seconds_waited, step
                if draws:
                    images = draw(layout.saved_state(state).ema)
                    if is_primary_host():
                        picture = pictures.enlarge(pictures.grid(images))
                        pictures.save_png(run / "samples" / f"step_{step:07d}.png", picture)
                        boards.picture(step, "samples", picture)
                        _plot(run, metrics_file)
                if saves or stopped_by:
                    save(step)
                if stopped_by and not last:
                    checkpoints.wait()
                    name = signal.Signals(stopped_by).name
                    raise Stopped(stopped_by, f"stopped by {name} at step {step}, saved: the same command goes on")
                stretch = time.perf_counter()
        checkpoints.wait()
    if not is_primary_host():
        return
    _plot(run, metrics_file)
    last_line = read_lines(metrics_file)[-1]
    say(f"{run}: {config.train.steps} steps done, loss {last_line['loss']:.4f}")


def _make_speed(config: Config, network: Network) -> Callable[[int, float, float], dict[str, float | None]]:
    """Makes the function from images, seconds of training and of waiting to what is said of a run's speed."""
    device = jax.local_devices()[0]
    flops = forward_flops(network, image_shape(config))
    tflops = config.log.peak_tflops or peak_tflops(device.device_kind)

    def speed(images: int, seconds: float, waited: float) -> dict[str, float | None]:
        rate = images / seconds
        share = utilization(rate, flops, devices=jax.device_count(), tflops=tflops)
        return {
            "seconds": round(seconds, 3),
            "images_per_second": round(rate, 2),
            "waited_for_data": round(waited / seconds, 4),
            "model_flops_utilization": None if share is None else round(share, 4),
            "peak_memory_gib": round(peak_memory_gib(device), 3),
        }

    return speed


def _make_draw(config: Config, key: Array, *, mesh: jax.sharding.Mesh) -> Callable[[Params], np.ndarray]:
    """Makes the function from averaged parameters to a grid's images, always of the same latents."""
    steps, number = config.log.sample_steps, config.log.num_samples
    choice = SamplerConfig(sampler="ddim", steps=steps) if steps else SamplerConfig()
    make = make_chain(config, choice)
    drawn = math.ceil(number / mesh.size) * mesh.size

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def draw(ema: Params, key: Array) -> Array:
        indices = jax.lax.with_sharding_constraint(jnp.arange(drawn), batch_sharding(mesh))
        sampler = make(gather(mesh, ema), labels_of(config, choice, indices))
        return to_uint8(sample(key, sampler, (drawn, *image_shape(config)), indices=indices))

    return lambda ema: np.asarray(draw(ema, key))[:number]


def _plot(run: Path, metrics_file: Path) -> None:
    lines = read_lines(metrics_file)
    if lines:
        quartiles = np.array([line["loss_quartiles"] for line in lines], np.float64)
        steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
        plots.plot_loss(run / "loss.png", steps, losses, quartiles)


@contextlib.contextmanager
def _adopted(config: Config, run: Path) -> Iterator[Callable[[], None]]:
    """Keeps others out of a run's folder, and writes the configuration into it.

    What is refused leaves no trace: unless the function that is given is called, the configuration that was there comes
    back. A folder whose run has saved nothing yet takes any other.
    """
    file = run / "config.json"
    with claimed(run):
        if not has_saved(run):
            (run / "data.json").unlink(missing_ok=True)
        elif file.exists():
            check_same_run(file, config)
        else:
            raise UserError(
                f"{run} has checkpoints but no config.json, which says what run they are of: put it back, or use "
                "another --workdir"
            )
        before = file.read_bytes() if file.exists() else None
        save_config(config, file)
        begun: list[bool] = []
        try:
            yield lambda: begun.append(True)
        finally:
            if not begun and before is None:
                file.unlink(missing_ok=True)
            elif not begun and before is not None:
                write_whole(file, lambda opened: opened.write(before))


def _check_shared(config: Config, run: Path) -> None:
    """Checks that this host sees the folder that the first one writes to, and was started with the same command."""
    file = run / "config.json"
    until = time.monotonic() + _SECONDS_TO_BE_SEEN
    while not file.exists() and time.monotonic() < until:
        time.sleep(1)
    if not file.exists():
        raise UserError(f"{run} of the first host is not seen from here: it must be on a disk that all hosts share")
    theirs = read_config(file)
    different = [name for name in leaves(Config) if value_of(theirs, name) != value_of(config, name)]
    if different:
        raise UserError(f"started with another {', '.join(different)} than the first host: use the same command")


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that the loop can end between two steps; a second one ends at once."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        del frame
        if received:
            if are_joined():
                end_all("stopped by a second signal, not saved", 128 + number)
            os._exit(128 + number)
        received.append(number)
        say("stopping after this step, saving; once more to stop without saving")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
