"""The likelihood job: what `evaluate.py likelihood` does. Bits/dim of a set of images, batch by batch, stopped and
continued.

The noise of an image at a time comes from the job's seed, the image's index in its split and the time alone, so that
neither the batch size nor the devices nor an interruption shows.
"""

import csv
import dataclasses
import functools
import io
import math
import re
import typing
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from ddpm_jax.bound import Cdf
from ddpm_jax.config import Config
from ddpm_jax.data.source import Source
from ddpm_jax.data.sources import load_source, resolve
from ddpm_jax.evaluation import plots
from ddpm_jax.generation.batches import cut
from ddpm_jax.generation.job import Job, describe_job
from ddpm_jax.generation.store import Range, missing_ranges
from ddpm_jax.keys import image_keys
from ddpm_jax.likelihood import Bound, bound_at, draw_times, estimated_log_variances, rate_distortion, strata
from ddpm_jax.networks import Params, predict_with
from ddpm_jax.pixels import to_float
from ddpm_jax.reverse import LEARNED_VARIANCES
from ddpm_jax.run.build import build_network, build_schedule, matmul_precision
from ddpm_jax.schedules import Schedule
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import check_same_job, claimed, write_json, write_whole
from ddpm_jax.system.mesh import batch_sharding, gather, replicated, shardings, widest_mesh
from ddpm_jax.system.progress import Progress, say

Sigma = typing.Literal["model", "fixed_small", "fixed_large", "optimal"]
"""The variance of the reverse steps: the model's own, a fixed one, or the one that makes the bound least."""

ESTIMATED_FROM = 512
"""How many training images the optimal variances are estimated from; half of them where there are fewer than twice."""

# So often the host looks: it costs about 1 % and shows progress.
_STEPS_AT_ONCE = 50
# The uses of the job's key.
_EVALUATION, _ESTIMATION = 0, 1


class Images(typing.NamedTuple):
    """Which images are counted."""

    source: Source
    """The split."""
    indices: np.ndarray
    """(N,) those of it that are counted, rising."""


class BatchBound:
    """Computes the bound for batches of one size over some devices.

    The parameters, the key and the variances are arguments of what is compiled: one program serves every seed, every
    checkpoint and every fixed choice of variances.
    """

    def __init__(
        self,
        config: Config,
        *,
        batch_size: int,
        num_times: int = 0,
        cdf: Cdf = "tanh",
        devices: Sequence[jax.Device] | None = None,
    ):
        """Makes the program.

        Args:
          config: of the run.
          batch_size: images at a time, over all devices, >= 1; rounded up to a multiple of their number.
          num_times: K, how many times of each image are looked at, one of each of `strata`; 0: all T.
          cdf: see `bound.decoder_log_likelihood`.
          devices: those of this process if not given.
        """
        devices = jax.local_devices() if devices is None else list(devices)
        mesh = widest_mesh(devices, fsdp=config.train.fsdp)
        self.batch_size = math.ceil(batch_size / len(devices)) * len(devices)
        num_steps = config.diffusion.num_steps
        self.edges = strata(num_steps, num_times or num_steps)
        """(K + 1,) the ranges of times that each give one."""
        network, schedule, diffusion = build_network(config), build_schedule(config), config.diffusion

        def advance(
            params: Params,
            key: Array,
            log_variances: Array | None,
            indices: Array,
            pixels: Array,
            labels: Array | None,
            times: Array,
        ) -> Bound:
            return bound_at(
                image_keys(key, indices),
                schedule,
                predict_with(network, gather(mesh, params), labels, variance=diffusion.variance),
                to_float(pixels),
                times,
                prediction=diffusion.prediction,
                variance=diffusion.variance,
                clip_x0=diffusion.clip_x0,
                cdf=cdf,
                log_variances=log_variances,
            )

        self._conditional = config.model.num_classes > 0
        self._config = config
        self._mesh = mesh
        self._advance = jax.jit(advance)
        self._draw_times = jax.jit(
            lambda key, indices: draw_times(image_keys(key, indices), self.edges),
            out_shardings=batch_sharding(mesh, axis=1),
        )

    def place(self, params: Params) -> Params:
        """Copies parameters to every device, or shares them out as `train.fsdp` says where the devices allow it."""
        return jax.device_put(params, shardings(self._mesh, params))

    def __call__(
        self,
        params: Params,
        key: Array,
        source: Source,
        indices: np.ndarray,
        *,
        log_variances: Array | None = None,
        progress: Callable[[int], object] = lambda steps: None,
    ) -> Bound:
        """Computes the bound of some images of a split.

        Args:
          params: the network's parameters, as `place` gives them.
          key: the job's key; image i of the split uses `fold_in(key, i)`.
          source: the split.
          indices: (B,) which images, B <= the batch size; the batch is filled up, and what fills it cut off again.
          log_variances: (T,) instead of the model's.
          progress: told how many more times are done.

        Returns:
          the bound on the host, at one time of each range.
        """
        filled = np.concatenate([indices, np.full(self.batch_size - len(indices), indices[-1])])
        labels = source.labels[filled] if self._conditional and source.labels is not None else None
        batch = (filled.astype(np.uint32), source.read(filled), labels)
        placed = jax.device_put(batch, batch_sharding(self._mesh))
        key, log_variances = jax.device_put((key, log_variances), replicated(self._mesh))
        times = self._draw_times(key, placed[0])
        parts = []
        with matmul_precision(self._config):
            for first, length in cut(len(times), longest=_STEPS_AT_ONCE):
                bound = self._advance(params, key, log_variances, *placed, times[first : first + length])
                parts.append(jax.tree.map(lambda numbers: np.asarray(numbers)[..., : len(indices)], bound))
                progress(length)
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in Bound._fields}
        return Bound(**{**joined, "prior": parts[0].prior})  # type: ignore[arg-type]


@functools.lru_cache(maxsize=4)
def batch_bound(config: Config, *, batch_size: int, num_times: int, cdf: Cdf) -> BatchBound:
    """Makes the program of a run; the same one, already compiled, when it is asked for again: see `BatchBound`."""
    return BatchBound(config, batch_size=batch_size, num_times=num_times, cdf=cdf)


class Sums(typing.NamedTuple):
    """What is kept of a batch, in float64: enough for all that is reported."""

    total: np.ndarray
    """(B,) bits/dim of each image."""
    prior: np.ndarray
    """(B,) its part that is left at the end of the chain."""
    decoder: np.ndarray
    """(B,) its part at t = 0."""
    first_moments: np.ndarray
    """(4, T) sums over the images: of the terms, the squared errors of x_0, those of eps, those of the mean of x_{t-1};
    a range of times that one draw stands for has the same at each of them."""
    second_moments: np.ndarray
    """(4, T) sums of their squares."""


def sums_of(bound: Bound, edges: np.ndarray) -> Sums:
    """Reduces a batch's bound, at one time of each range between the edges, to what is kept of it."""
    stacked = np.asarray([bound.terms, bound.x0_mse, bound.eps_mse, bound.mean_mse], np.float64)
    prior, widths = np.asarray(bound.prior, np.float64), np.diff(edges)
    each_time = lambda moments: np.repeat(moments.sum(axis=2), widths, axis=1)
    return Sums(prior + widths @ stacked[0], prior, stacked[0, 0], each_time(stacked), each_time(stacked**2))


class _Batches:
    """The batches of a job that are done, each a file in its folder."""

    def __init__(self, folder: Path, num_steps: int):
        self.folder, self._num_steps = folder, num_steps

    def read(self) -> dict[Range, Sums]:
        """Reads those that are whole; a damaged one counts as not done."""
        found = {}
        for path in sorted(self.folder.glob("*.npz")):
            name = re.fullmatch(r"(\d+)-(\d+)\.npz", path.name)
            if name is None:
                continue
            first, stop = int(name[1]), int(name[2])
            size, moments = (stop - first,), (4, self._num_steps)
            try:
                with np.load(path) as arrays:
                    sums = Sums(**{field: arrays[field] for field in Sums._fields})
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                continue
            if tuple(array.shape for array in sums) == (size, size, size, moments, moments):
                found[first, stop] = sums
        return found

    def save(self, first: int, sums: Sums) -> None:
        path = self.folder / f"{first:08d}-{first + len(sums.total):08d}.npz"
        write_whole(path, lambda file: np.savez(file, **sums._asdict()))


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """The numbers of a finished job. Bits are bits/dim; errors are standard errors over the images."""

    bits_per_dim: float
    """The whole bound: rate and distortion together."""
    standard_error: float | None
    """Of the whole bound; None for a single image."""
    prior_bits: float
    """L_T, a part of the rate."""
    rate_bits: float
    """What it takes to send x_1: all but the decoder's term."""
    distortion_bits: float
    """The decoder's term, L_0."""
    rmse: float
    """Root mean squared error of the image that is predicted from x_1, in levels of 255."""
    l_simple: float
    """The paper's loss over these images, its mean over all times."""
    images: int
    """How many."""
    dimensions: int
    """Of an image."""


class PerTime(typing.NamedTuple):
    """Means over the images at each time, and their standard errors (nan for a single image), each (4, T)."""

    means: np.ndarray
    """Terms in bits/dim, squared errors of x_0, of eps, and of the mean of x_{t-1}."""
    errors: np.ndarray
    """The standard errors of these."""


def _standard_error(first_moment: np.ndarray, second_moment: np.ndarray, number: int) -> np.ndarray:
    if number < 2:
        return np.full(np.shape(first_moment), np.nan)
    variance = (second_moment - first_moment**2 / number) / (number - 1)
    return np.sqrt(np.maximum(variance, 0) / number)


def conclude(batches: Sequence[Sums], *, dimensions: int) -> tuple[Likelihood, PerTime]:
    """Puts the batches of a job together.

    Args:
      batches: all of them.
      dimensions: of an image.

    Returns:
      the numbers of the whole, and those of each time.
    """
    totals, priors, decoders = (np.concatenate([getattr(sums, name) for sums in batches]) for name in Sums._fields[:3])
    first_moments = np.sum([sums.first_moments for sums in batches], axis=0)
    second_moments = np.sum([sums.second_moments for sums in batches], axis=0)
    number = len(totals)
    per_time = PerTime(first_moments / number, _standard_error(first_moments, second_moments, number))
    terms, x0_mse, eps_mse, _ = per_time.means
    curve = rate_distortion(terms, priors.mean(), x0_mse)
    return (
        Likelihood(
            bits_per_dim=float(totals.mean()),
            standard_error=float(totals.std(ddof=1) / math.sqrt(number)) if number > 1 else None,
            prior_bits=float(priors.mean()),
            rate_bits=float(curve.rate[-1]),
            distortion_bits=float(decoders.mean()),
            rmse=float(curve.distortion[-1]),
            l_simple=float(eps_mse.mean()),
            images=number,
            dimensions=dimensions,
        ),
        per_time,
    )


# The job


class Request(typing.NamedTuple):
    """What was asked for."""

    split: str
    number: int
    """How many images, evenly over the split; 0: all."""
    sigma: Sigma
    cdf: Cdf
    times: int = 0
    """How many times of each image are looked at, drawn from as many ranges; 0: all T."""


def default_folder(run: Path, job: Job, request: Request) -> Path:
    """Names the folder of a job in the folder of its run."""
    split = re.sub(r"[^\w.-]+", "_", request.split)
    number = f"_num_{request.number}" if request.number else ""
    times = f"_times_{request.times}" if request.times else ""
    cdf = "" if request.cdf == "tanh" else f"_{request.cdf}"
    name = f"checkpoint_{job.checkpoint}_{split}{number}{times}_{request.sigma}{cdf}_seed_{job.seed}"
    return run / "likelihood" / name


def run_job(job: Job, out: Path, request: Request, *, batch_size: int) -> Likelihood:
    """Counts the bits of a set of images, and writes the tables and the plots.

    Every batch is kept as it is done: started again after whatever stopped it, with any batch size, the job goes on.

    Args:
      job: the weights and the seed.
      out: the job's folder; made if it is not there.
      request: which images and which variance.
      batch_size: images at a time, >= 1; rounded up to a multiple of the devices.

    Returns:
      the numbers; also in `likelihood.json`, those of each time in `terms.csv` and `terms.png`, the rate-distortion
      curve in `rate_distortion.csv` and `.png`.

    Raises:
      UserError: there is no such split or not so many images, the folder holds another job, the network needs labels
        that the images do not have, or the disk is full; nothing that was finished is lost.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {batch_size}")
    if out.exists() and not (out / "job.json").exists() and (not out.is_dir() or {*out.iterdir()} - {out / ".lock"}):
        raise UserError(f"{out} is not empty and holds no likelihood job: give another --out")
    num_steps = job.config.diffusion.num_steps
    if request.times and not min(2, num_steps) <= request.times <= num_steps:
        raise UserError(
            f"--times must be in 2 to {num_steps}, the steps of the run's chain, or 0 for all: {request.times}"
        )
    estimated, images = _choose(job.config, request)
    with claimed(out):
        description = _describe(job, request, images, estimated)
        check_same_job(out / "job.json", description)
        schedule = build_schedule(job.config)
        batches = _Batches(out / "batches", schedule.num_steps)
        bound_of = batch_bound(job.config, batch_size=batch_size, num_times=request.times, cdf=request.cdf)
        params = bound_of.place(job.params)
        number = len(images.indices)
        try:
            log_variances = _log_variances(job, request.sigma, schedule, bound_of, params, estimated, out)
            key = jax.random.fold_in(jax.random.key(job.seed), _EVALUATION)
            description_of_work = f"bits/dim of {number} images"
            done = _count(
                bound_of, params, key, images, batches, log_variances=log_variances, description=description_of_work
            )
        except KeyboardInterrupt:
            left = sum(stop - first for first, stop in missing_ranges(batches.read(), number, longest=number))
            say(f"{number - left} of {number} images are done: the same command goes on")
            raise
        likelihood, per_time = conclude(done, dimensions=math.prod(images.source.image_shape))
        if log_variances is None and job.config.diffusion.variance not in LEARNED_VARIANCES:
            log_variances = _fixed(schedule, job.config.diffusion.variance)
        _write(out, description, likelihood, per_time, log_variances)
        return likelihood


def _choose(config: Config, request: Request) -> tuple[Images | None, Images]:
    """Finds the images that optimal variances are estimated from, and those that are counted."""
    own = "train" if config.data.split == "all" else config.data.split
    optimal = request.sigma == "optimal"
    if optimal and request.split == "all":
        raise UserError(
            "--sigma optimal estimates the variances from training images, which are not counted then: "
            "use --split train or --split test, not all"
        )
    source = _load(config, request.split)
    indices, estimated = np.arange(source.num_examples), None
    if optimal:
        fitted = source if request.split == own else _load(config, own)
        number = min(ESTIMATED_FROM, fitted.num_examples // 2)
        estimated = Images(fitted, _evenly(np.arange(fitted.num_examples), number))
        if request.split == own:
            indices = np.setdiff1d(indices, estimated.indices)
    if not 0 <= request.number <= len(indices):
        raise UserError(f"--num must be in 0 (all) to {len(indices)}, the images of {source.name}: {request.number}")
    if not len(indices) or (estimated is not None and not len(estimated.indices)):
        raise UserError(f"{source.name} has too few images ({source.num_examples})")
    return estimated, Images(source, _evenly(indices, request.number or len(indices)))


def _evenly(indices: np.ndarray, number: int) -> np.ndarray:
    return indices[np.arange(number) * len(indices) // number] if number else indices[:0]


def _load(config: Config, split: str) -> Source:
    source = load_source(resolve(dataclasses.replace(config.data, split=split)))
    check_labels(config, source)
    return source


def check_labels(config: Config, source: Source) -> None:
    """Checks that a conditional network can be told the classes of the images.

    Raises:
      UserError: they have no labels, or labels that the network does not know.
    """
    if not config.model.num_classes:
        return
    if source.labels is None:
        raise UserError(f"the network is told the class of an image, and {source.name} has no labels")
    if int(source.labels.max()) >= config.model.num_classes:
        raise UserError(
            f"the network knows {config.model.num_classes} classes, and {source.name} has a label {source.labels.max()}"
        )


def _fixed(schedule: Schedule, name: str) -> Array:
    return {
        "fixed_small": schedule.posterior_log_variance_clipped,
        "fixed_large": schedule.fixed_large_log_variance,
    }[name]


def _log_variances(
    job: Job,
    sigma: Sigma,
    schedule: Schedule,
    bound_of: BatchBound,
    params: Params,
    estimated: Images | None,
    out: Path,
) -> Array | None:
    """Gives the variances that replace the model's; estimates the optimal ones."""
    if sigma == "model":
        return None
    if estimated is None:
        return _fixed(schedule, sigma)
    done = _count(
        bound_of,
        params,
        jax.random.fold_in(jax.random.key(job.seed), _ESTIMATION),
        estimated,
        _Batches(out / "estimation", schedule.num_steps),
        # Any variances do: the same program then serves the evaluation.
        log_variances=schedule.fixed_large_log_variance,
        description=f"estimating variances from {len(estimated.indices)} images",
    )
    _, per_time = conclude(done, dimensions=math.prod(estimated.source.image_shape))
    return estimated_log_variances(schedule, per_time.means[3], bound_of.edges)


def _count(
    bound_of: BatchBound,
    params: Params,
    key: Array,
    images: Images,
    batches: _Batches,
    *,
    log_variances: Array | None,
    description: str,
) -> list[Sums]:
    """Does the batches that are not done yet, and gives all of them."""
    missing = missing_ranges(batches.read(), len(images.indices), longest=bound_of.batch_size)
    with Progress(len(missing) * (len(bound_of.edges) - 1), description=description) as progress:
        for first, stop in missing:
            chosen = images.indices[first:stop]
            bound = bound_of(params, key, images.source, chosen, log_variances=log_variances, progress=progress.update)
            batches.save(first, sums_of(bound, bound_of.edges))
    done = batches.read()
    if sum(stop - first for first, stop in done) != len(images.indices):
        raise UserError(f"the batches in {batches.folder} do not fit each other: remove it, and start again")
    return list(done.values())


def _describe(job: Job, request: Request, images: Images, estimated: Images | None) -> dict[str, Any]:
    """Says all that the numbers of a job depend on."""
    of_sampling = dataclasses.asdict(job.choice)
    return {
        **{name: value for name, value in describe_job(job).items() if name not in of_sampling},
        "data.source": job.config.data.source,
        "data.path": job.config.data.path,
        "split": request.split,
        "images": len(images.indices),
        "sigma": request.sigma,
        "variances estimated from": None if estimated is None else len(estimated.indices),
        "cdf": request.cdf,
        "times": request.times or job.config.diffusion.num_steps,
        "conditional": job.config.model.num_classes > 0,
    }


def _write(
    out: Path, description: dict[str, Any], likelihood: Likelihood, per_time: PerTime, log_variances: Array | None
) -> None:
    write_json(out / "likelihood.json", {**dataclasses.asdict(likelihood), "job": description})
    (terms, x0_mse, eps_mse, _), (terms_error, x0_error, eps_error, _) = per_time.means, per_time.errors
    rmse = 127.5 * np.sqrt(x0_mse)
    # sqrt(m) varies by half as much as m, relatively.
    rmse_error = 127.5 * x0_error / (2 * np.sqrt(np.maximum(x0_mse, np.finfo(np.float64).tiny)))
    columns = {
        "t": np.arange(len(terms)),
        "bits": terms,
        "bits_standard_error": terms_error,
        "x0_rmse": rmse,
        "x0_rmse_standard_error": rmse_error,
        "eps_mse": eps_mse,
        "eps_mse_standard_error": eps_error,
    }
    if log_variances is not None:
        columns["log_variance"] = np.asarray(log_variances, np.float64)
    _write_csv(out / "terms.csv", columns)
    plots.plot_terms(out / "terms.png", terms, terms_error)
    curve = rate_distortion(terms, likelihood.prior_bits, x0_mse)
    _write_csv(
        out / "rate_distortion.csv",
        {"reverse_time": curve.reverse_time, "rate_bits": curve.rate, "rmse": curve.distortion},
    )
    plots.plot_rate_distortion(out / "rate_distortion.png", curve.reverse_time, curve.rate, curve.distortion)


def _write_csv(path: Path, columns: dict[str, np.ndarray]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow([int(value) if isinstance(value, np.integer) else f"{value:.8g}" for value in row])
    write_whole(path, lambda file: file.write(text.getvalue().encode()))


def summary(likelihood: Likelihood) -> str:
    """Says it in three lines."""
    error = "" if likelihood.standard_error is None else f" +- {likelihood.standard_error:.4f}"
    return (
        f"{likelihood.bits_per_dim:.4f}{error} bits/dim over {likelihood.images} images of {likelihood.dimensions} "
        "dimensions\n"
        f"rate {likelihood.rate_bits:.4f} (prior {likelihood.prior_bits:.2g}), distortion "
        f"{likelihood.distortion_bits:.4f} bits/dim, RMSE {likelihood.rmse:.3f} of 255\n"
        f"L_simple {likelihood.l_simple:.4f}"
    )
