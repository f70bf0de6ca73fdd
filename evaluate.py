"""Measures a trained run: `python evaluate.py likelihood runs/digits`, `python evaluate.py quality runs/digits`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from ddpm_jax.bound import Cdf
from ddpm_jax.data.sources import load_source
from ddpm_jax.evaluation import bits_per_dim
from ddpm_jax.evaluation.figures import draw_figures
from ddpm_jax.evaluation.quality import check_real, config_of, judge_file, summary
from ddpm_jax.generation.job import default_folder, load_job, run_job
from ddpm_jax.generation.sampler_config import SamplerConfig
from ddpm_jax.run import checkpoints
from ddpm_jax.run.command import Command, parse_options, run_command
from ddpm_jax.run.trained import load_run
from ddpm_jax.run.weights import save_weights
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.exits import run_script


@dataclasses.dataclass(frozen=True)
class LikelihoodOptions:
    """What to count."""

    run: tyro.conf.Positional[str]
    """The run's folder, as train.py wrote it."""
    split: str = "test"
    """The part of the run's images: test, train or all; for TFDS any that it knows."""
    num: int = 0
    """How many of them, evenly over the part; 0: all."""
    batch_size: int = 64
    """Images at a time; no number depends on it."""
    seed: int = 0
    """From it, its index and the time comes the noise of each image."""
    step: int | None = None
    """The checkpoint of which training step; the newest if not given."""
    sigma: bits_per_dim.Sigma = "model"
    """The variance of the reverse steps: the run's own, fixed_small, fixed_large, or the one that makes the bound
    least, estimated from 512 training images (which are not counted then)."""
    cdf: Cdf = "tanh"
    """The normal distribution function of the decoder: the original's approximation, or the exact erf."""
    num_strata: int = 0
    """Evaluate only this many of the T timesteps, sampled per image in log-spaced strata: an unbiased estimate at a
    fraction of the cost, with its standard error (optimal variances are then estimated the same way); 0: all."""
    out: str | None = None
    """The job's folder; one in RUN/likelihood if not given."""


def likelihood(arguments: Sequence[str]) -> None:
    """Counts bits/dim of a set of images under the averaged weights: the bound, its terms, rate and distortion."""
    options = parse_options(
        LikelihoodOptions,
        arguments,
        description="Counts bits/dim (the variational bound) of a set of images; started again, it goes on. Pixels are "
        "bins of 1/255 as for any 8-bit image, also where a set has fewer levels (the digits have 17): such numbers "
        "compare with others of the same set alone.",
    )
    trained = load_run(Path(options.run), step=options.step)
    request = bits_per_dim.Request(
        options.split, options.num, options.sigma, options.cdf, options.num_strata, options.seed
    )
    out = bits_per_dim.default_folder(trained, request) if options.out is None else Path(options.out)
    print(bits_per_dim.summary(bits_per_dim.run_job(trained, out, request, batch_size=options.batch_size)))
    print(f"{out}: likelihood.json, terms.csv, rate_distortion.csv and their plots")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityOptions(SamplerConfig):
    """What to judge."""

    run: tyro.conf.Positional[str]
    """A run's folder, from which images are drawn, or an .npz file of images (arr_0, uint8, (N, H, W, C))."""
    num: int = 512
    """How many images."""
    batch_size: int = 64
    """Images drawn at a time; no image depends on it."""
    seed: int = 0
    """From it and its index comes each image."""
    step: int | None = None
    """The checkpoint of which training step; the newest if not given."""
    config: str | None = None
    """For an .npz file outside of a run: the config file that names the real images."""


def quality(arguments: Sequence[str]) -> None:
    """Judges samples by a classifier fitted on the real images; writes quality.json beside them."""
    options = parse_options(
        QualityOptions,
        arguments,
        description="Compares samples with real images of a small labeled set; writes quality.json beside them.",
    )
    given = Path(options.run)
    if options.num < 2:
        raise UserError(f"--num must be at least 2 to compare with real images, not {options.num}")
    if given.suffix == ".npz":
        if options.alone() != SamplerConfig():
            raise UserError(f"{given} holds images that are drawn already: a sampler goes with the folder of a run")
        file, config = given, config_of(given, options.config)
    else:
        job = load_job(given, seed=options.seed, step=options.step, sampler=options.alone())
        config = job.trained.config
        check_real(load_source(config.data))  # before anything is drawn
        file = run_job(job, default_folder(job), number=options.num, batch_size=options.batch_size, format="npz")
    print(summary(judge_file(file, config, number=options.num)))
    print(file.with_name("quality.json"))


@dataclasses.dataclass(frozen=True)
class FiguresOptions:
    """What to draw."""

    run: tyro.conf.Positional[str]
    """The run's folder, as train.py wrote it."""
    out: str | None = None
    """The folder of the figures; RUN/figures if not given."""
    num: int = 8
    """Images or pairs of a figure, 1 to 32; its square of samples."""
    steps: int | None = None
    """Steps of the chain, of DDIM's way to noise and back and of RePaint; if not given all T, and 250 of these two."""
    seed: int = 0
    """From it comes all that is drawn, and which real images are shown."""
    batch_size: int = 64
    """Images at a time; no image depends on it."""
    step: int | None = None
    """The checkpoint of which training step; the newest if not given."""


def figures(arguments: Sequence[str]) -> None:
    """Draws the paper's figures for a run: samples, the chain over time, interpolations, rate and distortion, .."""
    options = parse_options(
        FiguresOptions,
        arguments,
        description="Draws the paper's figures for a run into one folder; figures.md there says what each is.",
    )
    run = Path(options.run)
    job = load_job(run, seed=options.seed, step=options.step, sampler=SamplerConfig(steps=options.steps))
    out = run / "figures" if options.out is None else Path(options.out)
    print(draw_figures(job, out, num=options.num, batch_size=options.batch_size))


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
    """What to verify."""

    run: tyro.conf.Positional[str]
    """The run's folder, as train.py wrote it."""


def verify(arguments: Sequence[str]) -> None:
    """Holds every array of every checkpoint against its checksum; changes nothing."""
    options = parse_options(
        VerifyOptions,
        arguments,
        description="Holds every array of every checkpoint of a run against its checksum, a line a checkpoint; ends "
        "with status 2 if one is damaged. Changes nothing; may run while the run trains.",
    )
    damaged: list[int] = []
    steps: list[int] = []
    for verdict in checkpoints.verify(Path(options.run)):
        print(
            f"step {verdict.step}: {verdict.arrays} arrays, {verdict.num_bytes / 1e6:.1f} MB, "
            f"{'ok' if verdict.damage is None else f'damaged: {verdict.damage}'}",
            flush=True,
        )
        (steps if verdict.damage is None else damaged).append(verdict.step)
    if damaged:
        use = f"step {max(steps)} is the newest that is whole" if steps else "restore the folder from a copy"
        raise UserError(f"{options.run}: {len(damaged)} of {len(damaged) + len(steps)} checkpoints are damaged; {use}")


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What to export."""

    run: tyro.conf.Positional[str]
    """The run's folder, as train.py wrote it."""
    out: str | None = None
    """The file; RUN/weights_STEP.safetensors if not given."""
    step: int | None = None
    """The checkpoint of which training step; the newest if not given."""


def export(arguments: Sequence[str]) -> None:
    """Writes the averaged weights alone into one .safetensors file, for other programs or --train.init-from."""
    options = parse_options(
        ExportOptions, arguments, description="Writes the averaged weights of a run alone into one .safetensors file."
    )
    trained = load_run(Path(options.run), step=options.step)
    file = trained.folder / f"weights_{trained.step}.safetensors" if options.out is None else Path(options.out)
    save_weights(file, trained.params, config=trained.config, step=trained.step)
    print(file)


COMMANDS: dict[str, Command] = {
    "likelihood": likelihood,
    "quality": quality,
    "figures": figures,
    "verify": verify,
    "export": export,
}


def main() -> None:
    """Runs the command that the first word names."""
    checkpoints.silence_orbax()
    run_command(COMMANDS)


if __name__ == "__main__":
    run_script(main)
