"""Draws images from a trained run: `python sample.py runs/digits`, `python sample.py progressive runs/digits`, .."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from ddpm_jax.generation import edits
from ddpm_jax.generation.job import Format, SamplingJob, default_folder, load_job, run_job
from ddpm_jax.generation.sampler_config import SamplerConfig
from ddpm_jax.run.checkpoints import silence_orbax
from ddpm_jax.run.command import Command, parse_options, run_command
from ddpm_jax.system.exits import run_script


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(SamplerConfig):
    """What to draw."""

    run: tyro.conf.Positional[str]
    """The run's folder, as train.py wrote it."""
    num: int = 64
    """How many images. A job that has fewer goes on to so many."""
    batch_size: int = 64
    """Images at a time; no image depends on it."""
    seed: int = 0
    """From it and its index comes each image."""
    out: str | None = None
    """The job's folder; RUN/samples/checkpoint_STEP_seed_SEED if not given."""
    format: Format = "grid"
    """grid: one picture; png: a picture each; npz: arr_0, uint8 (N, H, W, C), written in any case; gif: the reverse
    process."""
    step: int | None = None
    """The checkpoint of which training step; the newest if not given."""
    columns: int | None = None
    """Images a row of the grid; if not given about a square, or one of each class where all are drawn in turn."""


def draw(arguments: Sequence[str]) -> None:
    """Draws samples."""
    options = parse_options(
        Options, arguments, description="Draws images from a trained run; started again, it goes on."
    )
    job = load_job(Path(options.run), seed=options.seed, step=options.step, sampler=options.alone())
    out = default_folder(job) if options.out is None else Path(options.out)
    shown = run_job(
        job,
        out,
        number=options.num,
        batch_size=options.batch_size,
        format=options.format,
        columns=options.columns,
    )
    print(f"{options.num} images of checkpoint {job.trained.step}: {shown}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModeOptions:
    """What is the same for all commands."""

    run: tyro.conf.Positional[str]
    """The run's folder, as train.py wrote it."""
    out: str | None = None
    """The folder of the results; RUN/samples/COMMAND if not given. What the command drew there before goes."""
    guidance_scale: float = 1.0
    """Scale of classifier-free guidance, for a class-conditional run given labels; 1: none."""
    seed: int = 0
    """From it comes all that is drawn."""
    step: int | None = None
    """The checkpoint of which training step; the newest if not given."""

    def load(self, sampler: SamplerConfig) -> SamplingJob:
        sampler = dataclasses.replace(sampler, guidance_scale=self.guidance_scale)
        return load_job(Path(self.run), seed=self.seed, step=self.step, sampler=sampler)

    def folder(self, command: str) -> Path:
        return Path(self.run) / "samples" / command if self.out is None else Path(self.out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainOptions(ModeOptions):
    """What is the same for the commands that run a chain of any sampler."""

    sampler: edits.SamplerName = "ancestral"
    """Algorithm 2 of the paper, or DDIM (eta = 0)."""
    steps: int | None = None
    """Steps of the chain; all T if not given. A time that is asked for and not among them is a step more."""

    def chain(self) -> SamplerConfig:
        return SamplerConfig(sampler=self.sampler, steps=self.steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgressiveOptions(ChainOptions):
    """What to draw."""

    num: int = 8
    """How many images, a row each."""
    columns: int = 10
    """At how many times, evenly over the chain."""
    labels: tuple[int, ...] = ()
    """Labels of the images of a conditional run; all classes if none."""


def progressive(arguments: Sequence[str]) -> None:
    """Draws the chain over time: x_t and the image predicted from it, a sample a row (Fig. 6)."""
    options = parse_options(ProgressiveOptions, arguments, description="Draws a grid of the chain over time.")
    job = options.load(dataclasses.replace(options.chain(), labels=options.labels))
    out = options.folder("progressive")
    print(edits.draw_progressive(job, out, num=options.num, columns=options.columns))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShareOptions(ChainOptions):
    """What to draw."""

    t: tuple[int, ...] = ()
    """Where the chains part, a row each: the paper's t, 0 to T; T, 3/4, 1/2 and 1/4 of it if none."""
    draws: int = 8
    """How many images from each."""
    label: int | None = None
    """Their class, for a conditional run; not told if not given."""


def share(arguments: Sequence[str]) -> None:
    """Draws images that share x_t of one chain, and go their own ways from there (Fig. 7)."""
    options = parse_options(ShareOptions, arguments, description="Draws images that share x_t of one chain.")
    job, out = options.load(options.chain()), options.folder("share")
    print(edits.share_latents(job, out, t=options.t, draws=options.draws, label=options.label))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReconstructOptions(ChainOptions):
    """What to reconstruct."""

    image: str
    """A picture, cropped in the middle and resized as the run's images are; or a number: that of the run's test images
    (of its own, where there are none)."""
    t: int
    """How far to diffuse it: the paper's t, 0 (it comes back as it is) to T (nothing of it is left)."""
    draws: int = 8
    """How many times to take it back."""
    label: int | None = None
    """Its class, for a conditional run; not told if not given."""


def reconstruct(arguments: Sequence[str]) -> None:
    """Diffuses a picture to t and takes it back."""
    options = parse_options(ReconstructOptions, arguments, description="Diffuses a picture to t and takes it back.")
    job, out = options.load(options.chain()), options.folder("reconstruct")
    print(edits.reconstruct_picture(job, options.image, out, t=options.t, draws=options.draws, label=options.label))


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterpolateOptions(ModeOptions):
    """What to interpolate between."""

    images: tuple[str, ...]
    """Two pictures, cropped in the middle and resized as the run's images are; or numbers of the run's test images."""
    t: int | None = None
    """Where to mix them: the paper's t, 0 (pixels) to T; if not given by DDIM, on the great circle of their noises."""
    num: int = 11
    """How many steps from the one to the other, both ends counted."""
    sampler: edits.SamplerName | None = None
    """Algorithm 2 of the paper (with --t alone), or DDIM (eta = 0); ancestral with --t, ddim without, if not given."""
    steps: int | None = None
    """Steps of the chain; if not given all T with --t, where t is a step more if it is not among them, and 250 each way
    without."""
    label: int | None = None
    """The class of both pictures, for a conditional run; not told if not given."""


def interpolate(arguments: Sequence[str]) -> None:
    """Interpolates between two pictures, at a time t or along the noises of DDIM (Fig. 8)."""
    options = parse_options(InterpolateOptions, arguments, description="Interpolates between two pictures.")
    sampler = edits.interpolation_sampler(options.t, options.sampler)
    job, out = options.load(SamplerConfig(sampler=sampler, steps=options.steps)), options.folder("interpolate")
    print(edits.interpolate_pictures(job, options.images, out, t=options.t, num=options.num, label=options.label))


@dataclasses.dataclass(frozen=True, kw_only=True)
class InpaintOptions(ModeOptions):
    """What to fill in."""

    image: str
    """A picture, cropped in the middle and resized as the run's images are; or a number of the run's test images."""
    mask: str
    """A picture of the same aspect ratio, or of the size of the run's images: white is kept, black is drawn anew."""
    draws: int = 8
    """How many results."""
    steps: int | None = None
    """Steps of the chain that RePaint goes up and down, with Algorithm 2; 250 if not given."""
    label: int | None = None
    """Its class, for a conditional run; not told if not given."""


def inpaint(arguments: Sequence[str]) -> None:
    """Draws a part of a picture anew, the black one of a mask (RePaint)."""
    options = parse_options(InpaintOptions, arguments, description="Draws the black part of a mask anew in a picture.")
    job, out = options.load(SamplerConfig(steps=options.steps)), options.folder("inpaint")
    print(edits.inpaint_picture(job, options.image, options.mask, out, draws=options.draws, label=options.label))


COMMANDS: dict[str, Command] = {
    "progressive": progressive,
    "share": share,
    "reconstruct": reconstruct,
    "interpolate": interpolate,
    "inpaint": inpaint,
}


def main() -> None:
    """Draws what the command line asks for."""
    silence_orbax()
    run_command(COMMANDS, otherwise=draw)


if __name__ == "__main__":
    run_script(main)
