"""The sampling job of `sample.py`: any number of images of one run, drawn in batches; it can be stopped and resumed.

A job is an endless sequence of images. Image i is drawn from `fold_in(key(seed), i)` alone: the first 64 of 50,000 are
the 64 of a job of 64, and no image depends on the batch size, the devices or an interruption.
"""

import dataclasses
import functools
import math
import typing
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image

from ddpm_jax.config import Config
from ddpm_jax.generation.batches import STEPS_PER_CALL, Driver, Program, Watch, cut
from ddpm_jax.generation.chains import labels_of, make_chain
from ddpm_jax.generation.sampler_config import SamplerConfig, cycle_of, default_columns, number_of_class
from ddpm_jax.generation.store import (
    Parts,
    StoredImages,
    job_folder,
    missing_ranges,
    own_share,
    per_host,
    wait_for_hosts,
)
from ddpm_jax.keys import image_keys, make_key
from ddpm_jax.names import Format
from ddpm_jax.networks import Network
from ddpm_jax.pixels import to_uint8
from ddpm_jax.run.build import image_shape
from ddpm_jax.run.trained import TrainedRun, describe_run, load_run
from ddpm_jax.samplers.chain import Chain, initial_noise
from ddpm_jax.system import pictures
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import (
    check_regular,
    checksum_of,
    copy_file,
    read_json,
    read_or_set_aside,
    set_aside,
    short_name,
    write_json,
)
from ddpm_jax.system.hosts import is_primary_host, of_primary_host
from ddpm_jax.system.progress import Progress, say

_GIF_FRAMES = 50
_GIF_SECONDS, _GIF_PAUSE = 0.06, 2.0
# What Pillow and most viewers open without complaint, and of what fifty frames fit into memory.
_GRID_PIXELS, _GIF_PIXELS = 89_000_000, 8_000_000

_to_uint8 = jax.jit(to_uint8)


class SamplingJob(typing.NamedTuple):
    """All that the images of a job depend on."""

    trained: TrainedRun
    """The run."""
    seed: int
    """Random seed; image i depends only on the seed and on i."""
    sampler: SamplerConfig = SamplerConfig()
    """Algorithm 2 if not given."""


def load_job(
    folder: Path,
    *,
    seed: int,
    step: int | None = None,
    ema: str | None = None,
    sampler: SamplerConfig | None = None,
) -> SamplingJob:
    """Loads a run from its folder, for sampling.

    Args:
      folder: of the run.
      seed: of the job.
      step: of which checkpoint; the newest undamaged one if None.
      ema: see `load_run`.
      sampler: Algorithm 2 if not given; its labels may be names of classes.

    Raises:
      UserError: the folder is not a run's or has no such checkpoint, the seed is out of range, or the run cannot be
        sampled this way.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed must be in [0, 2^32), not {seed}")
    trained, sampler = load_run(folder, step=step, ema=ema), sampler or SamplerConfig()
    classes = trained.config.model.num_classes
    numbers = [number_of_class(each, trained.class_names, classes, option="--labels") for each in sampler.labels]
    job = SamplingJob(trained, seed, dataclasses.replace(sampler, labels=tuple(numbers)))
    make_chain(trained.config, trained.network, job.sampler)
    return job


def describe_job(job: SamplingJob) -> dict[str, Any]:
    """Returns all that the images of a job depend on: two jobs are the same if these are."""
    return {"seed": job.seed, **describe_run(job.trained), **dataclasses.asdict(job.sampler)}


def default_folder(job: SamplingJob) -> Path:
    """Returns the folder of a job in the folder of its run."""
    default = SamplerConfig()
    options = [
        f"_{name}_{'-'.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in dataclasses.asdict(job.sampler).items()
        if value != getattr(default, name)
    ]
    trained = job.trained
    name = short_name(f"checkpoint_{trained.weights_name}_seed_{job.seed}{''.join(options)}")
    return trained.folder / "samples" / name


def check_request(job: SamplingJob, *, number: int, batch_size: int, format: Format, columns: int | None) -> None:
    """Checks a request before anything is drawn.

    Raises:
      UserError: a number below 1, images that cannot be shown, or a picture too large to be viewed.
    """
    for option, value in (("--num", number), ("--batch-size", batch_size), ("--columns", columns)):
        if value is not None and value < 1:
            raise UserError(f"{option} must be at least 1, not {value}")
    height, width, channels = image_shape(job.trained.config)
    if format != "npz":
        try:
            pictures.check_channels(channels)
        except UserError as error:
            raise UserError(f"--format {format}: {error} (--format npz)") from error
    if format in ("grid", "gif"):
        size = (height + 1) * (width + 1)
        most = _GRID_PIXELS if format == "grid" else _GIF_PIXELS
        if number * size > most:
            raise UserError(
                f"--format {format}: {number} images of {height}x{width} are too many for one picture: "
                f"use --num {most // size} or less, or --format png or npz"
            )


def run_job(
    job: SamplingJob,
    out: Path,
    *,
    number: int,
    batch_size: int,
    format: Format,
    columns: int | None = None,
    file: Path | None = None,
    exact: bool = False,
) -> Path:
    """Draws the images 0 .. number-1 of a job that its folder does not contain yet, and shows them.

    Every batch is saved when it is done: run again after any interruption, with any batch size, the job resumes.
    A finished job can be shown in another format, or extended. Several hosts that share the folder call it together:
    each draws its share of the batches, and host 0 shows the images.

    Args:
      job: the run, the seed and the sampler.
      out: the job's folder; created if missing.
      number: of images, >= 1.
      batch_size: over all hosts, >= 1; rounded up to a multiple of the devices.
      format: how the images are shown; `samples.npz` is always written: `arr_0`, and for a class-conditional run the
        labels `arr_1`, (N,) int64.
      columns: of a grid; see `default_columns` if not given.
      file: where the grid, the GIF or exactly these images are written; in `out` if not given.
      exact: refuse to resume it in another environment: see `job_folder`.

    Returns:
      the file or folder to look at.

    Raises:
      UserError: the folder contains another job, the request is invalid, or the disk is full; no saved image is lost.
    """
    check_request(job, number=number, batch_size=batch_size, format=format, columns=columns)
    config = job.trained.config
    columns = default_columns(config, job.sampler, number) if columns is None else columns
    # Not cut to what is missing: the same batches give the same bits, also after an interruption.
    sampling = sampling_program(config, job.trained.network, job.sampler, batch_size=per_host(min(batch_size, number)))
    stored = StoredImages(out, image_shape(config), asked=describe_job(job), labels=cycle_of(config, job.sampler))
    request = (batch_size, format, columns, file)
    with job_folder(
        out, describe_job(job), kind="sampling", number=number, done=stored.done, request=request, exact=exact
    ):
        if format == "gif":
            shown = _show_gif(job, sampling, out, stored, number=number, columns=columns)
            return shown if file is None or not is_primary_host() else copy_file(shown, file)
        missing = missing_ranges(stored.done(), number, longest=sampling[0].batch_size)
        stored.check_space(missing)
        for first, _, images in _draw(job, sampling, own_share(missing)):
            stored.save(first, images)
        wait_for_hosts(stored.done, number, folder=out)
        places = {"grid": out / "grid.png", "png": out / "images", "npz": stored.file}
        shown = places[format] if file is None else file
        if is_primary_host():
            packed = stored.pack()
            if not missing:
                say(f"all {number} images already exist")
            if packed > number and shown == stored.file:
                say(f"{stored.file} contains all {packed} images of this job, more than the {number} requested")
            if format == "grid":
                images = np.concatenate(list(stored.read(number)))
                pictures.save_png(shown, pictures.enlarge(pictures.grid(images, columns=columns)))
            elif format == "png":
                _show_each(shown, stored, number)
            elif shown != stored.file:
                stored.export(shown, number)
        wait_for_hosts(stored.done, number, folder=out)
        return shown


@functools.lru_cache(maxsize=4)
def sampling_program(
    config: Config,
    network: Network,
    sampler: SamplerConfig,
    *,
    batch_size: int,
    devices: tuple[jax.Device, ...] | None = None,
) -> tuple[Driver, Program]:
    """Makes the program of a job, the same one, already compiled, for another seed or checkpoint.

    Args:
      config: of the run.
      network: of the run.
      sampler: with numbers for labels.
      batch_size: see `Driver`.
      devices: those of this process if not given.

    Returns:
      the driver and its program, which is run on a key and on batches of indices of images.
    """
    driver, make = Driver(config, batch_size=batch_size, devices=devices), make_chain(config, network, sampler)

    def begin(key: Array, indices: Array) -> tuple[Array, Array, Array | None]:
        keys = driver.shard(image_keys(key, indices))
        return keys, initial_noise(keys, image_shape(config)), labels_of(config, sampler, indices)

    labels = labels_of(config, sampler, jnp.zeros(1, jnp.int32))
    return driver, driver.chain(make(None, labels).num_steps, make, begin)


def _draw(
    job: SamplingJob,
    sampling: tuple[Driver, Program],
    missing: Sequence[tuple[int, int]],
    *,
    longest: int = STEPS_PER_CALL,
    watch: Watch | None = None,
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Draws ranges of images; yields their first and stop index, and their pixels."""
    driver, program = sampling
    number = sum(stop - first for first, stop in missing)
    for first, stop, state in driver.run(
        program,
        job.trained.params,
        missing,
        lambda indices: indices,
        shared=make_key(job.seed),
        ranges=cut(program.num_steps, longest=longest),
        watch=watch,
        description=f"sampling {number} images",
    ):
        yield first, stop, np.asarray(_to_uint8(state.x))[: stop - first]


def _show_each(folder: Path, stored: StoredImages, number: int) -> None:
    index = 0
    with Progress(number, unit="image", description="writing PNG") as progress:
        for images in stored.read(number):
            for image in images:
                path = folder / f"{index:06d}.png"
                if path.exists() and not _is_of(path, image):
                    say(f"{path} does not show image {index}: kept as {set_aside(path).name}, and written again")
                if not path.exists():
                    pictures.save_png(path, image)
                index += 1
                progress.update()


def _show_gif(
    job: SamplingJob,
    sampling: tuple[Driver, Program],
    out: Path,
    stored: StoredImages,
    *,
    number: int,
    columns: int,
) -> Path:
    path = out / "reverse.gif"
    shown = {"images": number, "columns": columns, "job": checksum_of(describe_job(job))}
    record = path.with_suffix(".json")
    if of_primary_host(path.exists() and _shows(path, record, shown)):
        say(f"the reverse process of all {number} images already exists")
        return path
    driver, program = sampling
    longest = math.ceil(program.num_steps / _GIF_FRAMES)
    num_frames = 1 + len(cut(program.num_steps, longest=longest))
    parts = Parts(out / "frames", {"frames": num_frames, **describe_job(job)})
    frames: list[np.ndarray] = []

    def watch(first: int, step: int, batch: Any, state: Chain) -> None:
        frames.append(np.asarray(_to_uint8(state.x)))

    missing = missing_ranges(parts.ranges(), number, longest=driver.batch_size)
    stored.check_space(missing, copies=1 + num_frames)
    for first, stop, images in _draw(job, sampling, own_share(missing), longest=longest, watch=watch):
        stored.save(first, images)
        parts.save(first, stop, {"images": np.stack([*(frame[: stop - first] for frame in frames), images], axis=1)})
        frames.clear()
    wait_for_hosts(parts.ranges, number, folder=parts.folder)
    if is_primary_host():
        stored.pack()
        images_over_time = np.concatenate(list(parts.read(0, number))).swapaxes(0, 1)
        grids = np.stack([pictures.grid(images, columns=columns) for images in images_over_time])
        seconds = [_GIF_SECONDS] * (num_frames - 1) + [_GIF_PAUSE]
        pictures.save_gif(path, pictures.enlarge(grids, side=512), seconds)
        write_json(record, {**shown, "crc32": zlib.crc32(path.read_bytes())})
        parts.remove()
    wait_for_hosts(stored.done, number, folder=out)
    return path


def _shows(path: Path, record: Path, shown: Mapping[str, Any]) -> bool:
    """Returns whether a file is what its record says, and that is what it should show."""
    found = read_or_set_aside(record, read_json) if record.exists() else None
    return found is not None and found == {**shown, "crc32": zlib.crc32(path.read_bytes())}


def _is_of(path: Path, image: np.ndarray) -> bool:
    """Returns whether a PNG file has these pixels."""
    try:
        check_regular(path)
        with Image.open(path, formats=("PNG",)) as picture:
            return np.asarray(picture).tobytes() == image.tobytes()
    except (OSError, ValueError, SyntaxError):  # Pillow's kinds of damage
        return False
