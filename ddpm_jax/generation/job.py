"""The sampling job: what `sample.py` does. Any number of images of one run, drawn in batches, stopped and continued.

A job is an endless line of images. Image i is drawn from `fold_in(key(seed), i)` alone, so the first 64 of 50,000 are
the 64 of a job of 64, and neither the batch size nor the devices nor an interruption shows.
"""

import dataclasses
import json
import math
import typing
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from PIL import Image

from ddpm_jax.config import Config
from ddpm_jax.generation.batches import STEPS_AT_ONCE, batch_chain, cut, whole_batch
from ddpm_jax.generation.sampler_config import SamplerConfig, make_chain
from ddpm_jax.generation.store import Parts, StoredImages, missing_ranges
from ddpm_jax.networks import Params
from ddpm_jax.run.build import image_shape, matmul_precision
from ddpm_jax.run.trained import load_average, run_config
from ddpm_jax.system import pictures
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import check_same_job, claimed
from ddpm_jax.system.progress import Progress, say

Format = typing.Literal["grid", "png", "npz", "gif"]
"""How images are shown: one picture of all, a picture each, none, or the reverse process of all."""

_ALGORITHM_2 = SamplerConfig()
_GIF_FRAMES = 50
_GIF_SECONDS, _GIF_PAUSE = 0.06, 2.0
# What Pillow and most viewers open without complaint, and what fifty frames fit into memory of.
_GRID_PIXELS, _GIF_PIXELS = 89_000_000, 8_000_000
_MOST_COLUMNS = 32


def describe_job(job: "Job") -> dict[str, Any]:
    """Says all that the images of a job depend on, so that two jobs are the same if these are.

    Args:
      job: a checksum of its weights tells two runs of one configuration apart.

    Returns:
      names and values, of the kinds that JSON has.
    """
    config, checksum = job.config, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(job.params):
        checksum = zlib.crc32(jax.tree_util.keystr(path).encode(), checksum)
        checksum = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data, checksum)
    sections: dict[str, Any] = {"diffusion": config.diffusion, "model": config.model}
    fields = {
        f"{section}.{name}": value
        for section, values in sections.items()
        for name, value in dataclasses.asdict(values).items()
    }
    description = {
        "seed": job.seed,
        "checkpoint": job.checkpoint,
        "weights": f"{checksum:08x}",
        "image": (config.data.height, config.data.width, config.data.channels),
        **dataclasses.asdict(job.choice),
        **fields,
        "train.precision": config.train.precision,
        "train.matmul_precision": config.train.matmul_precision,
    }
    return json.loads(json.dumps(description))


class Job(typing.NamedTuple):
    """What was asked for."""

    config: Config
    """Of the run."""
    params: Params
    """The averaged weights."""
    checkpoint: int
    """The training step that they are of."""
    seed: int
    """From it and its index comes an image."""
    choice: SamplerConfig = _ALGORITHM_2
    """Of the sampler."""


def load_job(run: Path, *, seed: int, step: int | None = None, choice: SamplerConfig = _ALGORITHM_2) -> Job:
    """Loads what a job needs from a run's folder.

    Args:
      run: the folder.
      seed: of the job.
      choice: of the sampler; Algorithm 2 if not given.
      step: which checkpoint; the newest that is whole if None.

    Raises:
      UserError: the folder is not there or no run's, or has no such checkpoint, the seed is out of range, or the run
        cannot be sampled so.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed must be in [0, 2^32), not {seed}")
    config = run_config(run)
    make_chain(config, choice)  # refuses what cannot be, before the weights are read
    checkpoint, params = load_average(run, config, step=step)
    return Job(config, params, checkpoint, seed, choice)


def default_folder(run: Path, job: Job) -> Path:
    """Names the folder of a job in the folder of its run."""
    default = SamplerConfig()
    chosen = [
        f"_{name}_{'-'.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in dataclasses.asdict(job.choice).items()
        if value != getattr(default, name)
    ]
    return run / "samples" / f"checkpoint_{job.checkpoint}_seed_{job.seed}{''.join(chosen)}"


def check_request(job: Job, *, number: int, batch_size: int, format: Format, columns: int | None) -> None:
    """Checks what was asked for, before anything is drawn.

    Raises:
      UserError: a number below 1, a picture of images that are none, or one too large to be looked at.
    """
    for option, value in (("--num", number), ("--batch-size", batch_size), ("--columns", columns)):
        if value is not None and value < 1:
            raise UserError(f"{option} must be at least 1, not {value}")
    data = job.config.data
    if format != "npz":
        try:
            pictures.check_channels(image_shape(job.config)[-1])
        except UserError as error:
            raise UserError(f"--format {format}: {error} (--format npz)") from error
    if format in ("grid", "gif"):
        size = (data.height + 1) * (data.width + 1)
        most = _GRID_PIXELS if format == "grid" else _GIF_PIXELS
        if number * size > most:
            raise UserError(
                f"--format {format}: {number} images of {data.height}x{data.width} are too many to look at: "
                f"use --num {most // size} or less, or --format png or npz"
            )


def default_columns(job: Job, number: int) -> int:
    """Says how many images stand in a row: one of each class where all classes are drawn in turn, else about a square.

    Args:
      job: of a conditional run or not.
      number: how many images.
    """
    classes = 0 if job.choice.labels else job.config.model.num_classes
    return classes if 1 < classes <= min(number, _MOST_COLUMNS) else math.ceil(math.sqrt(number))


def run_job(job: Job, out: Path, *, number: int, batch_size: int, format: Format, columns: int | None = None) -> Path:
    """Draws the images 0 .. number-1 of a job that its folder does not have yet, and shows them.

    Every batch is kept as it is done: started again after whatever stopped it, with any batch size, the job goes on.
    A finished job can be shown otherwise, or made longer.

    Args:
      job: the weights and the seed.
      out: the job's folder; made if it is not there.
      number: how many images, >= 1.
      batch_size: images at a time, >= 1; rounded up to a multiple of the devices.
      format: how they are shown. `samples.npz` is written for each.
      columns: images a row in a grid; see `default_columns` if not given.

    Returns:
      the file or folder to look at.

    Raises:
      UserError: the folder holds another job, what was asked for makes no sense, or the disk is full; nothing that
        was drawn is lost.
    """
    check_request(job, number=number, batch_size=batch_size, format=format, columns=columns)
    if out.exists() and not (out / "job.json").exists() and (not out.is_dir() or {*out.iterdir()} - {out / ".lock"}):
        raise UserError(f"{out} is not empty and holds no sampling job: give another --out")
    columns = default_columns(job, number) if columns is None else columns
    # Not cut to what is missing: the same batches give the same bits, also after an interruption.
    batch_size = whole_batch(min(batch_size, number))
    with claimed(out):
        check_same_job(out / "job.json", describe_job(job))
        stored = StoredImages(out, image_shape(job.config))
        try:
            if format == "gif":
                return _show_gif(job, out, stored, number=number, batch_size=batch_size, columns=columns)
            missing = missing_ranges(stored.done(), number, longest=batch_size)
            for first, looks in _draw(job, missing, batch_size=batch_size, longest=STEPS_AT_ONCE):
                stored.save(first, looks[-1])
        except KeyboardInterrupt:
            left = sum(stop - first for first, stop in missing_ranges(stored.done(), number, longest=number))
            say(f"{number - left} of {number} images are in {out}: the same command goes on")
            raise
        packed = stored.pack()
        if not missing:
            say(f"the {number} images were there already")
        match format:
            case "npz":
                if packed > number:
                    say(f"{stored.file} holds all {packed} images of this job, more than the {number} asked for")
                return stored.file
            case "grid":
                images = np.concatenate(list(stored.read(number)))
                pictures.save_png(out / "grid.png", pictures.enlarge(pictures.grid(images, columns=columns)))
                return out / "grid.png"
            case "png":
                return _show_each(out / "images", stored, number)
            case _:
                typing.assert_never(format)


def _draw(
    job: Job, missing: Sequence[tuple[int, int]], *, batch_size: int, longest: int, every_look: bool = False
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Draws ranges of images; yields the first index of each, and its images at the last look or at every one."""
    if not missing:
        return
    number = sum(stop - first for first, stop in missing)
    with matmul_precision(job.config):
        chain = batch_chain(job.config, job.choice, batch_size=batch_size)
        key, params = jax.random.key(job.seed), chain.place(job.params)
        total = len(missing) * chain.num_steps
        with Progress(total, description=f"sampling {number} images") as progress:
            for first, stop in missing:
                looks: list[Array] = []
                steps_before = 0
                for steps, images in chain.draw(key, params, first, longest=longest):
                    progress.update(steps - steps_before)
                    steps_before = steps
                    looks = [*looks, images] if every_look else [images]
                # Whole batches are drawn also where less is missing: one shape, one program.
                yield first, [np.asarray(images)[: stop - first] for images in looks]


def _show_each(folder: Path, stored: StoredImages, number: int) -> Path:
    index = 0
    with Progress(number, unit="image", description="writing PNG") as progress:
        for images in stored.read(number):
            for image in images:
                path = folder / f"{index:06d}.png"
                if not path.exists():
                    pictures.save_png(path, image)
                index += 1
                progress.update()
    return folder


def _show_gif(job: Job, out: Path, stored: StoredImages, *, number: int, batch_size: int, columns: int) -> Path:
    path = out / "reverse.gif"
    comment = f"{number} images, {columns} columns"
    if path.exists() and _comment(path) == comment:
        say(f"the reverse process of the {number} images was there already")
        return path
    num_steps = batch_chain(job.config, job.choice, batch_size=batch_size).num_steps
    longest = math.ceil(num_steps / _GIF_FRAMES)
    frames = 1 + len(cut(num_steps, longest=longest))
    parts = Parts(out / "frames", (frames, *image_shape(job.config)))
    missing = missing_ranges(parts.files(), number, longest=batch_size)
    for first, looks in _draw(job, missing, batch_size=batch_size, longest=longest, every_look=True):
        stored.save(first, looks[-1])
        parts.save(first, np.stack(looks, axis=1))
    stored.pack()
    images_over_time = np.concatenate(list(parts.read(0, number))).swapaxes(0, 1)
    grids = np.stack([pictures.grid(images, columns=columns) for images in images_over_time])
    seconds = [_GIF_SECONDS] * (frames - 1) + [_GIF_PAUSE]
    pictures.save_gif(path, pictures.enlarge(grids, side=512), seconds, comment=comment)
    parts.remove()
    return path


def _comment(path: Path) -> str:
    try:
        with Image.open(path) as picture:
            return picture.info.get("comment", b"").decode()
    except (OSError, ValueError):
        return ""
