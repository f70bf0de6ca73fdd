"""The reverse process of a run for its page: x_t and the predicted x_0 over time, from its newest EMA weights."""

import math
import typing
from pathlib import Path

import jax
import numpy as np

from ddpm_jax.evaluation.report.embedded import Picture, embed, read_frames
from ddpm_jax.generation import edits
from ddpm_jax.generation.editor import Editor
from ddpm_jax.generation.job import SamplingJob
from ddpm_jax.generation.sampler_config import SamplerConfig
from ddpm_jax.names import DrawReverse
from ddpm_jax.pixels import to_uint8
from ddpm_jax.run.build import image_shape
from ddpm_jax.run.trained import TrainedRun
from ddpm_jax.system import environment, pictures
from ddpm_jax.system.errors import Damage, UserError
from ddpm_jax.training.speed import forward_flops

_STEPS, _FRAMES = 50, 25
_MOST_SECONDS = 120
_LARGE = 64  # pixels of a side
# What a convolutional network gets of a core, and of an accelerator; rather too little than too much.
_FLOPS_OF_CORE, _FLOPS_OF_ACCELERATOR = 1e10, 5e12


class Frame(typing.NamedTuple):
    """One moment of the reverse process."""

    caption: str
    """Which moment."""
    pictures: tuple[Picture, ...]
    """A picture for each of the names."""


class ReverseProcess(typing.NamedTuple):
    """The reverse process over time."""

    names: tuple[str, ...]
    """What the pictures of a frame show."""
    frames: list[Frame]
    """From noise to images."""
    caption: str
    """How it was drawn."""


def draw_reverse(trained: TrainedRun, *, seed: int, drawing: DrawReverse = "auto") -> ReverseProcess:
    """Draws the first images of a sampling job, with x_t and the predicted x_0 on the way to them.

    It takes 16 images (4 if they are larger than 64 pixels, or 16 take too long), rounded up to a multiple of the
    devices, and 50 steps of DDIM, T at most.

    Args:
      trained: the run.
      seed: of the job.
      drawing: "auto" refuses what takes too long.

    Returns:
      the reverse process at 25 timesteps and at its end.

    Raises:
      UserError: it would take too long, the images cannot be shown, or the run cannot be sampled by DDIM.
    """
    height, width, channels = image_shape(trained.config)
    pictures.check_channels(channels)
    steps = min(_STEPS, trained.config.diffusion.num_steps)
    devices = jax.local_device_count()  # they share a batch
    numbers = [math.ceil(number / devices) * devices for number in ([4] if max(height, width) > _LARGE else [16, 4])]
    if drawing == "auto":
        each = _seconds(trained, passes=steps + min(_FRAMES, steps))
        if each is None:
            raise UserError("how long it would take on this machine is not known: draw it with --reverse always")
        fast = [number for number in numbers if number * each <= _MOST_SECONDS]
        if not fast:
            raise UserError(
                f"it would take about {numbers[-1] * each / 60:.0f} minutes on this machine ({numbers[-1]} images, "
                f"{steps} steps): draw it with --reverse always"
            )
        numbers = fast
    number = numbers[0]
    job = SamplingJob(trained, seed, SamplerConfig(sampler="ddim", steps=steps))
    editor = Editor(job, batch_size=number)
    labels, levels = editor.job_labels(number), editor.levels(_FRAMES)
    drawn, over_time = editor.trajectory(number, labels, levels=levels)
    picture = lambda images: embed(pictures.grid(np.asarray(to_uint8(images))))
    frames = [
        Frame(f"t = {editor.paper_t(level)}", (picture(x_t), picture(x0)))
        for level, x_t, x0 in zip(levels, over_time.x_t, over_time.x0, strict=True)
    ]
    final = picture(drawn)
    frames.append(Frame("t = 0", (final, final)))
    classes = ", classes in turn" if labels else ""
    return ReverseProcess(
        ("x_t", "predicted x_0"),
        frames,
        f"{number} images{classes}: {edits.describe_chain(job, editor.num_steps)}, EMA weights, seed {seed}",
    )


def read_reverse(run: Path) -> ReverseProcess | None:
    """Reads the newest reverse process that `sample.py --format gif` or `evaluate.py figures` drew for a run.

    Returns:
      it; None if there is none that can be read.
    """
    files = [*run.glob("samples/*/reverse.gif"), *run.glob("figures/reverse.gif")]
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            read = read_frames(file, most=_FRAMES + 1)
        except Damage:
            continue
        number = len(read)
        frames = [Frame(f"frame {i} of {number}", (embed(pixels),)) for i, pixels in enumerate(read, 1)]
        name = file.relative_to(run).as_posix()
        return ReverseProcess(("x_t",), frames, f"From t = T to 0, as {name} shows it")
    return None


def _seconds(trained: TrainedRun, *, passes: int) -> float | None:
    """Returns about how long so many forward passes of an image take, None if that is not known."""
    flops = forward_flops(trained.network, image_shape(trained.config))
    if flops is None:
        return None
    if jax.default_backend() == "cpu":
        return passes * flops / (_FLOPS_OF_CORE * environment.cores())
    return passes * flops / (_FLOPS_OF_ACCELERATOR * jax.local_device_count())
