"""Measures a trained run: `python evaluate.py likelihood runs/digits`, `python evaluate.py quality runs/digits`."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro

from ddpm_jax.bound import Cdf
from ddpm_jax.command import parse_options, run_script
from ddpm_jax.config import nearest
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import bits
from ddpm_jax.evaluation.quality import config_of, judge_file, summary
from ddpm_jax.sampling import default_folder, load_job, run_job


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
    sigma: bits.Sigma = "model"
    """The variance of the reverse steps: the run's own, fixed_small, fixed_large, or the one that makes the bound
    least, estimated from 512 training images (which are not counted then)."""
    cdf: Cdf = "tanh"
    """The normal distribution function of the decoder: the original's approximation, or the exact erf."""
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
    run = Path(options.run)
    job = load_job(run, seed=options.seed, step=options.step)
    request = bits.Request(options.split, options.num, options.sigma, options.cdf)
    out = bits.default_folder(run, job, request) if options.out is None else Path(options.out)
    print(bits.summary(bits.run_job(job, out, request, batch_size=options.batch_size)))
    print(f"{out}: likelihood.json, terms.csv, rate_distortion.csv and their plots")


@dataclasses.dataclass(frozen=True)
class QualityOptions:
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
        description="Compares samples with real images of a small labelled set; writes quality.json beside them.",
    )
    given = Path(options.run)
    if given.suffix == ".npz":
        file, config = given, config_of(given, options.config)
    else:
        job = load_job(given, seed=options.seed, step=options.step)
        out = default_folder(given, job)
        file = run_job(job, out, number=options.num, batch_size=options.batch_size, format="npz")
        config = job.config
    print(summary(judge_file(file, config, number=options.num)))
    print(file.with_name("quality.json"))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"likelihood": likelihood, "quality": quality}


def main() -> None:
    """Runs the command that the first word names."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: evaluate.py COMMAND RUN [options]      (evaluate.py COMMAND --help lists them)\n")
        for known, command in COMMANDS.items():
            print(f"  {known:12}{command.__doc__}")
        return
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS) or f": choose {', '.join(COMMANDS)}"
        raise UserError(f"there is no command {name!r}{hint}")
    COMMANDS[name](arguments)


if __name__ == "__main__":
    run_script(main)
