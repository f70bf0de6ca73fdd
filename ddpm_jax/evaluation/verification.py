"""Whether the files of a run still hold what was written: its record, metrics, checkpoints, averages, jobs and
evaluations.
"""

import contextlib
import functools
import re
import typing
from collections.abc import Iterator
from pathlib import Path

from ddpm_jax.config import Config
from ddpm_jax.run import checkpoints
from ddpm_jax.run.averages import read_average
from ddpm_jax.run.record import read_config, read_to_resume
from ddpm_jax.run.snapshots import average_files, check_snapshot, snapshot_file, snapshot_steps
from ddpm_jax.system.errors import Damage, UserError
from ddpm_jax.system.files import checksum_of, open_npz, read_json
from ddpm_jax.training.metrics import check_lines

_JOBS = ("samples", "likelihood", "fid", "figures")
_PARTS = ("parts", "frames", "batches", "estimation")
# Parts whose description is not that of their job alone.
_MORE_THAN_THE_JOB = "frames"


class Verdict(typing.NamedTuple):
    """The result of verifying one file, or one checkpoint."""

    name: str
    """The file in the run's folder, or the step."""
    content: str
    """What it holds; empty if that is not counted."""
    damage: str | None
    """What is wrong; None if it holds what was written, bit for bit."""
    step: int | None = None
    """The step, of a checkpoint."""


def verify_run(run: Path) -> Iterator[Verdict]:
    """Checks every file of a run that a command reads back, as that command would; changes nothing.

    What was set aside (`*.damaged`) and what is only looked at (pictures, tables) is left out.

    Args:
      run: the run's folder.

    Yields:
      one verdict per file, and per checkpoint in ascending order of the steps.

    Raises:
      UserError: the folder is not a run's, or has no checkpoint.
    """
    found = checkpoints.verify(run)
    first = next(found)  # is it the folder of a run at all?
    yield _verdict("config.json", run, _check_record)
    for name in ("data.json", "init_from.json", "wandb.json"):
        if (run / name).exists():
            yield _verdict(name, run, _check_json)
    for name in ("metrics.jsonl", "timing.jsonl"):
        if (run / name).exists():
            yield _verdict(name, run, _check_metrics)
    for step, arrays, num_bytes, damage in (first, *found):
        yield Verdict(f"step {step}", f"{arrays} arrays, {num_bytes / 1e6:.1f} MB", damage, step)
    config = _config_of(run)
    for step in snapshot_steps(run):
        name = snapshot_file(run, step).relative_to(run).as_posix()
        yield _verdict(name, run, functools.partial(_check_snapshot, step, config))
    for file in average_files(run):
        yield _verdict(file.relative_to(run).as_posix(), run, functools.partial(_check_average, config))
    for file in sorted(file for folder in _JOBS for file in (run / folder).rglob("*")):
        name = file.relative_to(run).as_posix()
        if file.suffix == ".json":
            yield _verdict(name, run, _check_json)
        elif file.name == "samples.npz" or (file.suffix == ".npz" and file.parent.name in _PARTS):
            yield _verdict(name, run, _check_npz)


def _verdict(name: str, run: Path, check: typing.Callable[[Path], str]) -> Verdict:
    try:
        return Verdict(name, check(run / name), None)
    except (Damage, UserError) as error:
        return Verdict(name, "", str(error))


def _check_record(file: Path) -> str:
    read_to_resume(file.parent)
    return ""


def _check_json(file: Path) -> str:
    read_json(file)
    return ""


def _check_metrics(file: Path) -> str:
    lines = check_lines(file)
    if lines.damaged:
        raise Damage(f"line {', '.join(map(str, lines.damaged))}; training drops what is damaged")
    return f"{len(lines.intact)} lines"


def _config_of(run: Path) -> Config | None:
    with contextlib.suppress(UserError):  # a damaged record has its own verdict
        return read_config(run / "config.json")
    return None


def _check_snapshot(step: int, config: Config | None, file: Path) -> str:
    return check_snapshot(file.parents[1], step, config=config)


def _check_average(config: Config | None, file: Path) -> str:
    return f"sigma_rel {read_average(file, config=config).sigma_rel}"


def _check_npz(file: Path) -> str:
    part = file.parent.name if file.name != "samples.npz" else ""
    archive, about = open_npz(file, {"part": part} if part else {})
    archive.close()
    first, stop = about["images"]
    name = re.fullmatch(r"(\d+)-(\d+)", file.stem)
    if name is not None and (int(name[1]), int(name[2])) != (first, stop):
        raise Damage(f"it contains images {first} to {stop - 1}")
    job = (file.parents[1] if part else file.parent) / "job.json"
    if part != _MORE_THAN_THE_JOB and job.exists() and _checksum_of(job) not in (about["job"], None):
        raise Damage("it belongs to another job than job.json")
    return f"{stop - first} images"


def _checksum_of(job: Path) -> str | None:
    with contextlib.suppress(Damage):  # which has its own verdict
        return checksum_of(read_json(job))
    return None
