"""The job of `evaluate.py likelihood`: bits/dim of a set of images in batches; it can be stopped and resumed.

The noise of an image at a timestep depends only on the job's seed, the image's index in its split and the timestep, not
on the batch size, the devices or an interruption.
"""

import csv
import dataclasses
import functools
import io
import math
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddpm_jax.config import Config
from ddpm_jax.data.check import check_classes
from ddpm_jax.data.fingerprint import fingerprint
from ddpm_jax.data.shared import count_trained_on
from ddpm_jax.data.source import Source
from ddpm_jax.data.sources import load_source, resolve
from ddpm_jax.evaluation import plots
from ddpm_jax.generation.batches import Driver, Program, cut
from ddpm_jax.generation.store import (
    Parts,
    Range,
    job_folder,
    missing_ranges,
    own_share,
    per_host,
    wait_for_hosts,
)
from ddpm_jax.keys import image_keys, make_key
from ddpm_jax.likelihood import (
    Bound,
    bound_at,
    draw_timesteps,
    estimated_log_variances,
    fewest_strata,
    rate_distortion,
    strata,
)
from ddpm_jax.names import Cdf, Sigma
from ddpm_jax.networks import Network, Params, predict_with
from ddpm_jax.pixels import to_float
from ddpm_jax.reverse import LEARNED_VARIANCES
from ddpm_jax.run.build import build_schedule
from ddpm_jax.run.trained import TrainedRun, describe_run
from ddpm_jax.schedules import Schedule
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import short_name, write_json, write_whole
from ddpm_jax.system.hosts import is_primary_host, wait_for_all

ESTIMATED_FROM = 512
"""Number of training images that optimal variances are estimated from; half of them if there are fewer than twice."""

_MOST_BYTES = 2**30  # of a saved batch

# The uses of the job's key.
_EVALUATION, _ESTIMATION = 0, 1


class Images(typing.NamedTuple):
    """Images of a split."""

    source: Source
    """The split."""
    indices: np.ndarray
    """(N,) indices of the images in the split, rising."""


class BoundProgram(typing.NamedTuple):
    """The bound of batches of images as a program, whose state is a `Bound` that is filled in timestep by timestep."""

    driver: Driver
    program: Program
    edges: np.ndarray
    """(K + 1,) the strata of timesteps: one timestep of each is evaluated per image."""
    labeled: bool
    """Whether the network is given class labels."""


def check_strata(config: Config, num_strata: int) -> None:
    """Checks the number of timesteps evaluated per image.

    Raises:
      UserError: it is neither 0 nor in the range in which the standard error means something.
    """
    num_steps = config.diffusion.num_steps
    fewest = fewest_strata(num_steps)
    if num_strata and not fewest <= num_strata <= num_steps:
        raise UserError(
            f"--num-strata must be in {fewest} to {num_steps}, the steps of the run's chain, or 0 for all, not "
            f"{num_strata}: with fewer than {fewest} the estimate is so skewed that its standard error misleads"
        )


@functools.lru_cache(maxsize=4)
def bound_program(
    config: Config,
    network: Network,
    *,
    batch_size: int,
    num_strata: int = 0,
    cdf: Cdf = "tanh",
    devices: tuple[jax.Device, ...] | None = None,
) -> BoundProgram:
    """Makes the program of the bound, the same one, already compiled, for another seed, checkpoint or fixed variance.

    Args:
      config: of the run.
      network: of the run.
      batch_size: see `Driver`.
      num_strata: K, the number of timesteps evaluated per image, one of each of `strata`; 0: all T.
      cdf: see `bound.decoder_log_likelihood`.
      devices: those of this process if not given.
    """
    driver = Driver(config, batch_size=batch_size, devices=devices)
    schedule, diffusion = build_schedule(config), config.diffusion
    edges = strata(schedule.num_steps, num_strata or schedule.num_steps)
    num_terms = len(edges) - 1

    def start(params: Params, shared: Any, batch: Any) -> Bound:
        indices, _, _ = batch
        terms = driver.shard(jnp.zeros((num_terms, len(indices))), axis=1)
        return Bound(terms, driver.shard(terms[0]), terms, terms, terms)

    def advance(params: Params, shared: Any, batch: Any, bound: Bound, first: Array, *, num_steps: int) -> Bound:
        (key, log_variances), (indices, pixels, labels) = shared, batch
        keys = image_keys(key, indices)
        part = bound_at(
            keys,
            schedule,
            predict_with(network, params, labels, variance=diffusion.variance),
            to_float(pixels),
            jax.lax.dynamic_slice_in_dim(draw_timesteps(keys, edges), first, num_steps),
            prediction=diffusion.prediction,
            variance=diffusion.variance,
            clip_x0=diffusion.clip_x0,
            cdf=cdf,
            log_variances=log_variances,
        )
        write = lambda whole, rows: driver.shard(jax.lax.dynamic_update_slice_in_dim(whole, rows, first, 0), axis=1)
        filled = {name: write(getattr(bound, name), getattr(part, name)) for name in Bound._fields if name != "prior"}
        return Bound(prior=part.prior, **filled)

    program = driver.program(num_terms, start, advance)
    return BoundProgram(driver, program, edges, config.model.num_classes > 0)


def compute_bounds(
    bounds: BoundProgram,
    params: Params,
    key: Array,
    images: Images,
    missing: Sequence[Range],
    *,
    log_variances: Array | None = None,
    description: str,
) -> typing.Iterator[tuple[int, Bound]]:
    """Computes the bound of images batch by batch.

    Args:
      bounds: of `bound_program`.
      params: of the network.
      key: of the job; image i of the split uses `fold_in(key, i)`.
      images: the images.
      missing: the ranges of them, each at most a batch.
      log_variances: (T,) instead of the model's.
      description: of the work, for the progress.

    Yields:
      the first index of a range, and its bound on the host, at one timestep of each stratum.
    """
    source = images.source

    def read(rows: np.ndarray) -> Any:
        indices = images.indices[rows]
        labels = source.labels[indices] if bounds.labeled and source.labels is not None else None
        return indices.astype(np.uint32), source.read(indices), labels

    for first, stop, bound in bounds.driver.run(
        bounds.program,
        params,
        missing,
        read,
        shared=(key, log_variances),
        ranges=cut(bounds.program.num_steps),
        description=description,
    ):
        yield first, jax.tree.map(lambda numbers, size=stop - first: np.asarray(numbers)[..., :size], bound)


class Sums(typing.NamedTuple):
    """Sums over a batch, in float64: enough for all that is reported."""

    total: np.ndarray
    """(B,) bits/dim of each image."""
    prior: np.ndarray
    """(B,) the prior term L_T of each image."""
    decoder: np.ndarray
    """(B,) the decoder term L_0 of each image."""
    first_moments: np.ndarray
    """(4, T) sums over the images: of the terms, and the squared errors of x_0, of eps, and of the mean of x_{t-1};
    constant over each stratum."""
    second_moments: np.ndarray
    """(4, T) sums of their squares."""


def sums_of(bound: Bound, edges: np.ndarray) -> Sums:
    """Reduces a batch's bound, at one timestep of each stratum between the edges, to its sums."""
    stacked = np.asarray([bound.terms, bound.x0_mse, bound.eps_mse, bound.mean_mse], np.float64)
    prior, widths = np.asarray(bound.prior, np.float64), np.diff(edges)
    each_time = lambda moments: np.repeat(moments.sum(axis=2), widths, axis=1)
    return Sums(prior + widths @ stacked[0], prior, stacked[0, 0], each_time(stacked), each_time(stacked**2))


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Results of a job. Bits are bits/dim; errors are standard errors over the images."""

    bits_per_dim: float
    """The whole bound, rate + distortion."""
    standard_error: float | None
    """Of the whole bound; None for a single image."""
    prior_bits: float
    """L_T, a part of the rate."""
    rate_bits: float
    """All terms but the decoder's: the cost of sending x_1."""
    distortion_bits: float
    """The decoder's term, L_0."""
    rmse: float
    """Root mean squared error of the image predicted from x_1, in levels of 255."""
    l_simple: float
    """The paper's simple loss over these images, averaged over all timesteps."""
    images: int
    """Number of images."""
    dimensions: int
    """Of an image."""
    trained_on: int | None = None
    """Number of these images that are also among the training images; None if that is not known."""


class PerTimestep(typing.NamedTuple):
    """Means over the images at each timestep, and their standard errors (nan for a single image), each (4, T)."""

    means: np.ndarray
    """Terms in bits/dim, squared errors of x_0, of eps, and of the mean of x_{t-1}."""
    errors: np.ndarray
    """Their standard errors."""


def _standard_error(first_moment: np.ndarray, second_moment: np.ndarray, number: int) -> np.ndarray:
    if number < 2:
        return np.full(np.shape(first_moment), np.nan)
    variance = (second_moment - first_moment**2 / number) / (number - 1)
    return np.sqrt(np.maximum(variance, 0) / number)


def conclude(batches: Sequence[Sums], *, dimensions: int) -> tuple[Likelihood, PerTimestep]:
    """Combines the batches of a job.

    Args:
      batches: all of them.
      dimensions: of an image.

    Returns:
      the results over all timesteps, and at each.
    """
    totals, priors, decoders = (np.concatenate([getattr(sums, name) for sums in batches]) for name in Sums._fields[:3])
    first_moments = np.sum([sums.first_moments for sums in batches], axis=0)
    second_moments = np.sum([sums.second_moments for sums in batches], axis=0)
    number = len(totals)
    per_timestep = PerTimestep(first_moments / number, _standard_error(first_moments, second_moments, number))
    terms, x0_mse, eps_mse, _ = per_timestep.means
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
        per_timestep,
    )


# The job


class Request(typing.NamedTuple):
    """Which images to evaluate, and how."""

    split: str
    number: int
    """Number of images, evenly over the split; 0: all."""
    sigma: Sigma
    cdf: Cdf
    num_strata: int = 0
    """Number of timesteps evaluated per image, one of each stratum; 0: all T."""
    seed: int = 0
    """Random seed of the noise."""


def default_folder(trained: TrainedRun, request: Request) -> Path:
    """Returns the folder of a job in the folder of its run."""
    number = f"_num_{request.number}" if request.number else ""
    num_strata = f"_strata_{request.num_strata}" if request.num_strata else ""
    cdf = "" if request.cdf == "tanh" else f"_{request.cdf}"
    settings = f"{request.split}{number}{num_strata}_{request.sigma}{cdf}_seed_{request.seed}"
    name = f"checkpoint_{trained.weights_name}_{settings}"
    return trained.folder / "likelihood" / short_name(name)


def run_job(trained: TrainedRun, out: Path, request: Request, *, batch_size: int, exact: bool = False) -> Likelihood:
    """Computes bits/dim of a set of images, and writes tables and plots.

    Every batch is saved when it is done: run again after any interruption, with any batch size, the job resumes.
    Several hosts that share the folder call it together: each computes its share of the batches, and host 0 writes the
    results.

    Args:
      trained: the run.
      out: the job's folder; created if missing.
      request: which images, variance and seed.
      batch_size: over all hosts, >= 1; rounded up to a multiple of the devices.

    Returns:
      the results; also in `likelihood.json`, those at each timestep in `terms.csv` and `terms.png`, the rate-distortion
      curve in `rate_distortion.csv` and `.png`.

    Raises:
      UserError: there is no such split or too few images, the folder contains another job, the network needs labels
        that the images do not have, or the disk is full; no saved batch is lost.
    """
    config = trained.config
    if not 0 <= request.seed < 2**32:
        raise UserError(f"--seed must be in [0, 2^32), not {request.seed}")
    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {batch_size}")
    check_strata(config, request.num_strata)
    estimated, images = _choose(config, request)
    description = _describe(trained, request, images, estimated)
    schedule, number = build_schedule(config), len(images.indices)
    bounds = bound_program(
        config, trained.network, batch_size=per_host(batch_size), num_strata=request.num_strata, cdf=request.cdf
    )
    batches, estimation = (Parts(out / name, description) for name in ("batches", "estimation"))
    with job_folder(
        out, description, kind="likelihood", number=number, done=batches.ranges, request=[batch_size], exact=exact
    ):
        log_variances = _log_variances(trained, request, schedule, bounds, estimated, estimation)
        sums = _evaluate(
            trained,
            jax.random.fold_in(make_key(request.seed), _EVALUATION),
            bounds,
            images,
            batches,
            log_variances=log_variances,
            description=f"bits/dim of {number} images",
        )
        likelihood, per_timestep = conclude(sums, dimensions=math.prod(images.source.image_shape))
        shared = count_trained_on(config.data, request.split, images.source, images.indices)
        likelihood = dataclasses.replace(likelihood, trained_on=shared)
        if log_variances is None and config.diffusion.variance not in LEARNED_VARIANCES:
            log_variances = _fixed(schedule, config.diffusion.variance)
        if is_primary_host():
            _write(out, description, request.number, likelihood, per_timestep, log_variances)
        wait_for_all("the results are written")
        return likelihood


def _choose(config: Config, request: Request) -> tuple[Images | None, Images]:
    """Returns the images that optimal variances are estimated from, and those that are evaluated."""
    own = "train" if config.data.split == "all" else config.data.split
    optimal = request.sigma == "optimal"
    if optimal and request.split == "all":
        raise UserError(
            "--sigma optimal estimates the variances from training images, which are then not evaluated: "
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
    check_classes(config, source, training=False)
    return source


def _fixed(schedule: Schedule, name: str) -> Array:
    return {
        "fixed_small": schedule.posterior_log_variance_clipped,
        "fixed_large": schedule.fixed_large_log_variance,
    }[name]


def _log_variances(
    trained: TrainedRun,
    request: Request,
    schedule: Schedule,
    bounds: BoundProgram,
    estimated: Images | None,
    parts: Parts,
) -> Array | None:
    """Returns the variances that replace the model's, the optimal ones estimated."""
    if request.sigma == "model":
        return None
    if estimated is None:
        return _fixed(schedule, request.sigma)
    done = _evaluate(
        trained,
        jax.random.fold_in(make_key(request.seed), _ESTIMATION),
        bounds,
        estimated,
        parts,
        # Any variances will do: the same program then serves the evaluation.
        log_variances=schedule.fixed_large_log_variance,
        description=f"estimating variances from {len(estimated.indices)} images",
    )
    _, per_timestep = conclude(done, dimensions=math.prod(estimated.source.image_shape))
    return estimated_log_variances(schedule, per_timestep.means[3], bounds.edges)


def _evaluate(
    trained: TrainedRun,
    key: Array,
    bounds: BoundProgram,
    images: Images,
    parts: Parts,
    *,
    log_variances: Array | None,
    description: str,
) -> list[Sums]:
    """Evaluates the batches that are missing among the parts, and returns all."""
    number = len(images.indices)
    missing = missing_ranges(parts.ranges(), number, longest=bounds.driver.batch_size)
    for first, bound in compute_bounds(
        bounds, trained.params, key, images, own_share(missing), log_variances=log_variances, description=description
    ):
        sums = sums_of(bound, bounds.edges)
        parts.save(first, first + len(sums.total), sums._asdict())
    wait_for_hosts(parts.ranges, number, folder=parts.folder)
    done = parts.ranges()
    if sum(stop - first for first, stop in done) != number:
        raise UserError(f"the batches in {parts.folder} do not fit each other: remove it, and start again")
    return [Sums(**parts.load(first, stop)) for first, stop in done]


def _describe(trained: TrainedRun, request: Request, images: Images, estimated: Images | None) -> dict[str, Any]:
    """Returns all that the results of a job depend on."""
    config = trained.config
    return {
        "seed": request.seed,
        **describe_run(trained),
        "data.source": config.data.source,
        "data": f"{fingerprint(images.source)['crc32']:08x}",  # not the path: the images may move
        "split": request.split,
        "images": len(images.indices),
        "sigma": request.sigma,
        "variances estimated from": None if estimated is None else len(estimated.indices),
        "cdf": request.cdf,
        "num_strata": request.num_strata or config.diffusion.num_steps,
        "conditional": config.model.num_classes > 0,
    }


def _write(
    out: Path,
    description: dict[str, Any],
    number: int,
    likelihood: Likelihood,
    per_timestep: PerTimestep,
    log_variances: Array | None,
) -> None:
    write_json(out / "likelihood.json", {**dataclasses.asdict(likelihood), "num": number, "job": description})
    (terms, x0_mse, eps_mse, _), (terms_error, x0_error, eps_error, _) = per_timestep.means, per_timestep.errors
    rmse = 127.5 * np.sqrt(x0_mse)
    # The relative error of sqrt(m) is half that of m.
    rmse_error = 127.5 * x0_error / (2 * np.sqrt(np.maximum(x0_mse, np.finfo(np.float64).tiny)))
    columns = {
        "t": np.arange(1, len(terms) + 1),
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


def describe_images(config: Config, split: str, likelihood: Likelihood) -> str:
    """Returns one line: which images a run was evaluated on, and how many of them it was trained on."""
    own, number, trained_on = config.data.split, likelihood.images, likelihood.trained_on
    if split == own:
        relation = "the images that the run was trained on"
    elif trained_on is None:
        relation = f"whether it was trained on some of them is not known; it was trained on split {own}"
    elif trained_on:
        relation = f"warning: the run was trained on {trained_on} of these {number} images, in split {own}"
    else:
        relation = "held out: the run was not trained on them"
    return f"images: split {split} of {config.data.source} ({relation})"


def summary(likelihood: Likelihood) -> str:
    """Returns the results as three lines of text."""
    error = "" if likelihood.standard_error is None else f" +- {likelihood.standard_error:.4f}"
    return (
        f"{likelihood.bits_per_dim:.4f}{error} bits/dim over {likelihood.images} images of {likelihood.dimensions} "
        "dimensions\n"
        f"rate {likelihood.rate_bits:.4f} (prior {likelihood.prior_bits:.2g}), distortion "
        f"{likelihood.distortion_bits:.4f} bits/dim, RMSE {likelihood.rmse:.3f} of 255\n"
        f"L_simple {likelihood.l_simple:.4f}"
    )
