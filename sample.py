"""Draws images from a trained run: `python sample.py runs/digits`."""

import dataclasses
from pathlib import Path

import tyro

from ddpm_jax.chains import Choice
from ddpm_jax.command import parse_options, run_script
from ddpm_jax.sampling import Format, default_folder, load_job, run_job


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Choice):
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
    """Images a row of the grid."""


def main() -> None:
    """Draws what the command line asks for."""
    options = parse_options(Options, description="Draws images from a trained run; started again, it goes on.")
    run = Path(options.run)
    choice = Choice(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Choice)})
    job = load_job(run, seed=options.seed, step=options.step, choice=choice)
    out = default_folder(run, job) if options.out is None else Path(options.out)
    shown = run_job(
        job,
        out,
        number=options.num,
        batch_size=options.batch_size,
        format=options.format,
        columns=options.columns,
    )
    print(f"{options.num} images of checkpoint {job.checkpoint}: {shown}")


if __name__ == "__main__":
    run_script(main)
