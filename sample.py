"""Samples images from a trained run: `python sample.py runs/digits`, `python sample.py progressive runs/digits`, .."""

import dataclasses
from pathlib import Path

import tyro

from ddpm_jax.generation import edits
from ddpm_jax.generation.job import Format, SamplingJob, default_folder, load_job, run_job
from ddpm_jax.generation.sampler_config import SamplerConfig
from ddpm_jax.run.checkpoints import silence_orbax
from ddpm_jax.run.command import Command, run_command
from ddpm_jax.system.environment import fix_options
from ddpm_jax.system.exits import run_script


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(SamplerConfig):
    """What to draw."""

    run: tyro.conf.Positional[str]
    """Folder of the run, as written by train.py."""
    num: int = 64
    """Number of images. An existing job with fewer is extended to this number."""
    batch_size: int = 64
    """Batch size. It does not change the images."""
    seed: int = 0
    """Random seed. Image i depends only on the seed and on i."""
    out: str | None = None
    """Folder of the job (default: RUN/samples/checkpoint_STEP_seed_SEED)."""
    format: Format = "grid"
    """grid: one image of them all; png: a file per image; gif: the reverse process; npz: only the array arr_0, uint8
    (N, H, W, C), which is always written."""
    step: int | None = None
    """Training step of the checkpoint (default: the newest)."""
    columns: int | None = None
    """Images per row of the grid (default: about a square; for all classes in turn, one row has each class once)."""


def draw(options: Options) -> None:
    """Samples images from a trained run. Run the same command again to resume."""
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
    """Options of every command."""

    run: tyro.conf.Positional[str]
    """Folder of the run, as written by train.py."""
    out: str | None = None
    """Folder of the results (default: RUN/samples/COMMAND). Existing results there are overwritten."""
    guidance_scale: float = 1.0
    """Scale of classifier-free guidance, for class-conditional runs with labels; 1: no guidance."""
    seed: int = 0
    """Random seed."""
    step: int | None = None
    """Training step of the checkpoint (default: the newest)."""

    def load(self, sampler: SamplerConfig) -> SamplingJob:
        sampler = dataclasses.replace(sampler, guidance_scale=self.guidance_scale)
        return load_job(Path(self.run), seed=self.seed, step=self.step, sampler=sampler)

    def folder(self, command: str) -> Path:
        return Path(self.run) / "samples" / command if self.out is None else Path(self.out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainOptions(ModeOptions):
    """Options of the commands that run the chain of any sampler."""

    sampler: edits.SamplerName = "ancestral"
    """Algorithm 2 of the paper, or DDIM (eta = 0)."""
    steps: int | None = None
    """Number of steps (default: all T). A requested t that the schedule skips is added as one extra step."""

    def chain(self) -> SamplerConfig:
        return SamplerConfig(sampler=self.sampler, steps=self.steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgressiveOptions(ChainOptions):
    """What to draw."""

    num: int = 8
    """Number of images, one per row."""
    columns: int = 10
    """Number of timesteps shown, evenly spaced over the chain."""
    labels: tuple[int, ...] = ()
    """Class labels, for class-conditional runs (default: every class in turn)."""


def progressive(options: ProgressiveOptions) -> None:
    """Draws the chain over time: x_t and the x_0 predicted from it, one sample per row (Fig. 6)."""
    job = options.load(dataclasses.replace(options.chain(), labels=options.labels))
    out = options.folder("progressive")
    print(edits.draw_progressive(job, out, num=options.num, columns=options.columns))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShareOptions(ChainOptions):
    """What to draw."""

    t: tuple[int, ...] = ()
    """Timesteps of the shared latents, one row each: the paper's t, 0 to T (default: T, 3/4 T, 1/2 T and 1/4 T)."""
    draws: int = 8
    """Number of images from each latent."""
    label: int | None = None
    """Class label, for class-conditional runs; if omitted, the images are generated unconditionally."""


def share(options: ShareOptions) -> None:
    """Draws images that share the latent x_t of one chain and differ from there on (Fig. 7)."""
    job, out = options.load(options.chain()), options.folder("share")
    print(edits.share_latents(job, out, t=options.t, draws=options.draws, label=options.label))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReconstructOptions(ChainOptions):
    """What to reconstruct."""

    image: str
    """An image file, center-cropped and resized like the run's images; or the index of a test image of the run (of a
    training image, if it has no test images)."""
    t: int
    """Timestep to noise it to: the paper's t, 0 (unchanged) to T (pure noise)."""
    draws: int = 8
    """Number of reconstructions."""
    label: int | None = None
    """Class label, for class-conditional runs; if omitted, the image is generated unconditionally."""


def reconstruct(options: ReconstructOptions) -> None:
    """Adds noise to an image up to t, and denoises it."""
    job, out = options.load(options.chain()), options.folder("reconstruct")
    print(edits.reconstruct_picture(job, options.image, out, t=options.t, draws=options.draws, label=options.label))


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterpolateOptions(ModeOptions):
    """What to interpolate between."""

    images: tuple[str, ...]
    """Two image files, center-cropped and resized like the run's images; or indices of test images of the run."""
    t: int | None = None
    """Timestep of the latents to mix: the paper's t, 0 (pixels) to T (default: interpolate the DDIM latents on the
    sphere)."""
    num: int = 11
    """Number of images, both ends included."""
    sampler: edits.SamplerName | None = None
    """Algorithm 2 of the paper (only with --t), or DDIM with eta = 0 (default: ancestral with --t, ddim without)."""
    steps: int | None = None
    """Number of steps (default: with --t all T, without it 250 each way). A t that the schedule skips is added as one
    extra step."""
    label: int | None = None
    """Class label of both images, for class-conditional runs; if omitted, they are generated unconditionally."""


def interpolate(options: InterpolateOptions) -> None:
    """Interpolates between two images, at a timestep t or between their DDIM latents (Fig. 8)."""
    sampler = edits.interpolation_sampler(options.t, options.sampler)
    job, out = options.load(SamplerConfig(sampler=sampler, steps=options.steps)), options.folder("interpolate")
    print(edits.interpolate_pictures(job, options.images, out, t=options.t, num=options.num, label=options.label))


@dataclasses.dataclass(frozen=True, kw_only=True)
class InpaintOptions(ModeOptions):
    """What to fill in."""

    image: str
    """An image file, center-cropped and resized like the run's images; or the index of a test image of the run."""
    mask: str
    """An image file of the same aspect ratio, or of the size of the run's images: white is kept, black is repainted."""
    draws: int = 8
    """Number of results."""
    steps: int | None = None
    """Number of steps of Algorithm 2 between which RePaint jumps back and forth (default: 250)."""
    label: int | None = None
    """Class label, for class-conditional runs; if omitted, the image is generated unconditionally."""


def inpaint(options: InpaintOptions) -> None:
    """Repaints the black part of a mask in an image (RePaint)."""
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
    """Runs the command that the first word names, or draws samples."""
    fix_options()
    silence_orbax()
    run_command(COMMANDS, default=draw)


if __name__ == "__main__":
    run_script(main)
