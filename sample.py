"""Samples images from a trained run: `python sample.py runs/digits`, `python sample.py progressive runs/digits`, .."""

from ddpm_jax.system import interrupts
from ddpm_jax.system.huge_pages import use_huge_pages

if __name__ == "__main__":
    interrupts.end_at_once()
    use_huge_pages()

import dataclasses
import textwrap
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro

from ddpm_jax.generation.sampler_config import SamplerConfig, cycle_of, list_classes, number_of_class
from ddpm_jax.names import Format, SingleStepSampler
from ddpm_jax.run.command import Command, run_command
from ddpm_jax.run.image_options import Images
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.exits import run_script
from ddpm_jax.system.host_options import Hosts
from ddpm_jax.system.progress import report, say

# What a command needs is imported once its options are parsed: it takes a second, and --help needs none of it.
if typing.TYPE_CHECKING:
    from ddpm_jax.generation.job import SamplingJob
    from ddpm_jax.generation.output import Output

_FORMATS: dict[str, Format] = {".png": "grid", ".gif": "gif", ".npz": "npz"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(SamplerConfig):
    """What to draw."""

    run: tyro.conf.Positional[str]
    """Folder of a run, as written by train.py, or of another program's model."""
    num: int = 64
    """Number of images. An existing job with fewer is extended to this number."""
    batch_size: int = 64
    """Batch size. It does not change the images."""
    seed: int = 0
    """Random seed. Image i depends only on the seed and on i."""
    out: str | None = None
    """Folder of the job (default: RUN/samples/checkpoint_STEP_seed_SEED), or the file to write besides: a grid as .png,
    the reverse process as .gif, or the array as .npz."""
    overwrite: bool = False
    """Replace the file that --out names, if it exists."""
    format: Format | None = None
    """grid: one image of them all (default); png: a file per image; gif: the reverse process; npz: only the array
    arr_0, uint8 (N, H, W, C), which is always written, with the class labels as arr_1."""
    step: int | None = None
    """Training step of the checkpoint (default: the newest)."""
    ema: str | None = None
    """Width (sigma_rel) or file of an average that evaluate.py ema has reconstructed (default: the EMA weights of the
    checkpoint)."""
    columns: int | None = None
    """Images per row of the grid (default: about a square; of class-conditional runs, each column is of one class)."""
    exact: bool = False
    """Refuse to resume on other devices, cores, instructions or versions, where images agree to rounding only."""
    aot: str = ""
    """Compile the chain for accelerators that need not be there, such as v5e:2x4 or h100:8, report whether a batch fits
    and what a step costs, and exit."""
    hosts: Hosts = Hosts()


def draw(options: Options) -> None:
    """Samples images from a trained run. Run the same command again to resume."""
    from ddpm_jax.generation.job import default_folder, load_job, run_job
    from ddpm_jax.generation.output import read_out
    from ddpm_jax.run.process import choose_devices

    if options.aot:
        from ddpm_jax.aot.chains import chain_program
        from ddpm_jax.aot.report import compile_for

        compile_for(
            options.aot,
            lambda topology: chain_program(
                load_job(Path(options.run), seed=options.seed, step=options.step, sampler=options.alone()),
                topology,
                batch_size=min(options.batch_size, options.num),
            ),
        )
        return
    choose_devices(options.hosts)
    print_classes(options.run, options.labels)
    out = read_out(options.out, files=[*_FORMATS], overwrite=options.overwrite)
    format = _FORMATS[out.file.suffix.lower()] if out.file else options.format or "grid"
    if options.format not in (None, format):
        raise UserError(f"--out {options.out}: --format {options.format} is not written as this file: name a folder")
    job = load_job(Path(options.run), seed=options.seed, step=options.step, ema=options.ema, sampler=options.alone())
    if job.trained.class_names:
        classes = list_classes(job.trained.class_names, cycle_of(job.trained.config, job.sampler))
        say(f"classes in turn: {textwrap.shorten(classes, 200, placeholder=' ..')}")
    shown = run_job(
        job,
        out.folder or default_folder(job),
        number=options.num,
        batch_size=options.batch_size,
        format=format,
        columns=options.columns,
        file=out.file,
        exact=options.exact,
    )
    report(f"{options.num} images of {job.trained.title}: {shown}")


def print_classes(run: str, given: Sequence[str | int | None]) -> None:
    """Prints the classes of a run, one a line, and exits, if "help" is given instead of a class."""
    if "help" not in given:
        return
    from ddpm_jax.run.trained import load_run

    trained = load_run(Path(run))
    classes, names = trained.config.model.num_classes, trained.class_names
    if "help" in names:
        return
    for number, name in enumerate(names or classes * ("",)):
        print(f"{number:{len(str(classes))}}  {name}".rstrip())
    if not classes:
        print("no classes: the run is unconditional")
    raise SystemExit(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModeOptions:
    """Options of every command."""

    run: tyro.conf.Positional[str]
    """Folder of a run, as written by train.py, or of another program's model."""
    out: str | None = None
    """Folder of the results (default: one for these settings in RUN/samples/COMMAND); or a .png file, to which the
    main picture is copied."""
    overwrite: bool = False
    """Replace results of other settings in --out, or the file that it names."""
    guidance_scale: float = 1.0
    """Scale of classifier-free guidance, for class-conditional runs with labels; 1: no guidance."""
    seed: int = 0
    """Random seed."""
    step: int | None = None
    """Training step of the checkpoint (default: the newest)."""
    ema: str | None = None
    """Width (sigma_rel) or file of an average that evaluate.py ema has reconstructed (default: the EMA weights of the
    checkpoint)."""
    data: Images = Images()
    hosts: Hosts = Hosts()

    def load(self, sampler: SamplerConfig) -> "tuple[SamplingJob, Output]":
        """Loads the run, and checks where results go."""
        from ddpm_jax.generation.job import load_job
        from ddpm_jax.generation.output import read_out
        from ddpm_jax.run.process import choose_devices
        from ddpm_jax.run.trained import with_images

        choose_devices(self.hosts)
        print_classes(self.run, sampler.labels)
        out = read_out(self.out, files=[".png"], overwrite=self.overwrite)
        sampler = dataclasses.replace(sampler, guidance_scale=self.guidance_scale)
        job = load_job(Path(self.run), seed=self.seed, step=self.step, ema=self.ema, sampler=sampler)
        return job._replace(trained=with_images(job.trained, self.data)), out


def _show(draw: Callable[[], Path], out: "Output") -> None:
    """Draws the main picture of a command, copies it if a file is asked for, and prints where it is.

    Of several hosts, host 0 draws alone.
    """
    from ddpm_jax.system.files import copy_file
    from ddpm_jax.system.hosts import is_primary_host, wait_for_all

    if is_primary_host():
        picture = draw()
        report(picture if out.file is None else copy_file(picture, out.file))
    wait_for_all("the picture is drawn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainOptions(ModeOptions):
    """Options of the commands that run the chain of any sampler."""

    sampler: SingleStepSampler = "ancestral"
    """Algorithm 2 of the paper, or DDIM (eta = 0)."""
    steps: int | None = None
    """Number of steps (default: all T). A requested t that the schedule skips is added as one extra step."""

    def chain(self) -> SamplerConfig:
        return SamplerConfig(sampler=self.sampler, steps=self.steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelOptions(ModeOptions):
    """Options of the commands whose images have one label."""

    label: str | None = None
    """Class by number or name, for class-conditional runs; if omitted, images are generated unconditionally. "help"
    prints the classes."""

    def load(self, sampler: SamplerConfig) -> "tuple[SamplingJob, Output]":
        """Loads the run, and checks where results go."""
        loaded = super().load(sampler)
        print_classes(self.run, [self.label])
        return loaded

    def number(self, job: "SamplingJob") -> int | None:
        """Returns the number of the class, if one is given."""
        trained = job.trained
        classes = trained.config.model.num_classes
        if self.label is None:
            return None
        return number_of_class(self.label, trained.class_names, classes, option="--label")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgressiveOptions(ChainOptions):
    """What to draw."""

    num: int = 8
    """Number of images, one per row."""
    columns: int = 10
    """Number of timesteps shown, evenly spaced over the chain."""
    labels: tuple[str, ...] = ()
    """Classes by number or name, for class-conditional runs (default: every class in turn); "help" prints them."""


def progressive(options: ProgressiveOptions) -> None:
    """Draws the chain over time: x_t and the x_0 predicted from it, one sample per row (Fig. 6)."""
    from ddpm_jax.generation.edits import draw_progressive

    job, out = options.load(dataclasses.replace(options.chain(), labels=options.labels))
    draw = lambda: draw_progressive(
        job, out.folder, num=options.num, columns=options.columns, overwrite=options.overwrite
    )
    _show(draw, out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShareOptions(ChainOptions, LabelOptions):
    """What to draw."""

    t: tuple[int, ...] = ()
    """Timesteps of the shared latents, one row each: the paper's t, 0 to T (default: T, 3/4 T, 1/2 T and 1/4 T)."""
    draws: int = 8
    """Number of images from each latent."""


def share(options: ShareOptions) -> None:
    """Draws images that share the latent x_t of one chain and differ from there on (Fig. 7)."""
    from ddpm_jax.generation.edits import share_latents

    job, out = options.load(options.chain())
    draw = lambda: share_latents(
        job,
        out.folder,
        t=options.t,
        draws=options.draws,
        label=options.number(job),
        overwrite=options.overwrite,
    )
    _show(draw, out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReconstructOptions(ChainOptions, LabelOptions):
    """What to reconstruct."""

    image: str
    """An image file, center-cropped and resized like the run's images; or the index of a test image of the run (of a
    training image, if it has no test images)."""
    t: int
    """Timestep to noise it to: the paper's t, 0 (unchanged) to T (pure noise)."""
    draws: int = 8
    """Number of reconstructions."""


def reconstruct(options: ReconstructOptions) -> None:
    """Adds noise to an image up to t, and denoises it."""
    from ddpm_jax.generation.edits import reconstruct_picture

    job, out = options.load(options.chain())
    draw = lambda: reconstruct_picture(
        job,
        options.image,
        out.folder,
        t=options.t,
        draws=options.draws,
        label=options.number(job),
        overwrite=options.overwrite,
    )
    _show(draw, out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterpolateOptions(LabelOptions):
    """What to interpolate between."""

    images: tuple[str, ...]
    """Two image files, center-cropped and resized like the run's images; or indices of test images of the run."""
    t: int | None = None
    """Timestep of the latents to mix: the paper's t, 0 (pixels) to T (default: interpolate the DDIM latents on the
    sphere)."""
    num: int = 11
    """Number of images, both ends included."""
    sampler: SingleStepSampler | None = None
    """Algorithm 2 of the paper (only with --t), or DDIM with eta = 0 (default: ancestral with --t, ddim without)."""
    steps: int | None = None
    """Number of steps (default: with --t all T, without it 250 each way). A t that the schedule skips is added as one
    extra step."""


def interpolate(options: InterpolateOptions) -> None:
    """Interpolates between two images, at a timestep t or between their DDIM latents (Fig. 8)."""
    from ddpm_jax.generation.edits import interpolate_pictures, interpolation_sampler

    sampler = interpolation_sampler(options.t, options.sampler)
    job, out = options.load(SamplerConfig(sampler=sampler, steps=options.steps))
    draw = lambda: interpolate_pictures(
        job,
        options.images,
        out.folder,
        t=options.t,
        num=options.num,
        label=options.number(job),
        overwrite=options.overwrite,
    )
    _show(draw, out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InpaintOptions(LabelOptions):
    """What to fill in."""

    image: str
    """An image file, center-cropped and resized like the run's images; or the index of a test image of the run."""
    mask: str
    """An image file of the same aspect ratio, or of the size of the run's images: white is kept, black is repainted."""
    draws: int = 8
    """Number of results."""
    steps: int | None = None
    """Number of steps of Algorithm 2 between which RePaint jumps back and forth (default: 250)."""


def inpaint(options: InpaintOptions) -> None:
    """Repaints the black part of a mask in an image (RePaint)."""
    from ddpm_jax.generation.edits import inpaint_picture

    job, out = options.load(SamplerConfig(steps=options.steps))
    draw = lambda: inpaint_picture(
        job,
        options.image,
        options.mask,
        out.folder,
        draws=options.draws,
        label=options.number(job),
        overwrite=options.overwrite,
    )
    _show(draw, out)


COMMANDS: dict[str, Command] = {
    "progressive": progressive,
    "share": share,
    "reconstruct": reconstruct,
    "interpolate": interpolate,
    "inpaint": inpaint,
}


def prepare_to_sample() -> None:
    with interrupts.ending_at_once():
        from ddpm_jax.run.process import prepare
    prepare("sampling")


def main() -> None:
    """Runs the command that the first word names, or draws samples."""
    run_command(COMMANDS, default=draw, before=prepare_to_sample)


if __name__ == "__main__":
    run_script(main)
