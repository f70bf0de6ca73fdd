"""Averages of any width, reconstructed from the snapshots of a run: files of weights beside the snapshots."""

import re
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from flax import traverse_util

from ddpm_jax.averages import WIDEST, Profiles, Reconstruction, gamma_of, reconstruct
from ddpm_jax.config import Config
from ddpm_jax.networks import Params
from ddpm_jax.run.fields import cast
from ddpm_jax.run.snapshots import FOLDER, average_files, check_snapshot, identity, read_snapshot, snapshot_steps
from ddpm_jax.run.weights import SEPARATOR, load_weights, save_weights
from ddpm_jax.system.errors import Damage, UserError, printable
from ddpm_jax.system.files import dump_checked, load_checked

LARGEST_ERROR = 0.1
"""Largest error of a profile, relative to its norm, that counts as reconstructed."""

_METADATA = "average"
_KINDS = {"sigma_rel": float, "step": int, "error": float}


class Average(typing.NamedTuple):
    """A power-function average of a run's weights."""

    sigma_rel: float
    """Its width."""
    step: int
    """Number of training steps that it is taken over."""
    error: float
    """Error of its profile, relative to the profile's norm; about 0 for one that was kept."""
    params: Params
    """The weights, NumPy arrays."""


def average_file(run: Path, step: int, sigma_rel: float) -> Path:
    """Returns the file of a reconstructed average."""
    return run / FOLDER / f"step_{step:07d}_sigma_rel_{sigma_rel}.safetensors"


def choose_step(run: Path, step: int | None, *, config: Config) -> int:
    """Returns the step of the newest snapshot of a run, or checks that there is one of a given step.

    Raises:
      UserError: there is none; the message says which there are, or how to train with snapshots.
    """
    if not config.ema.snapshots_every:
        raise UserError(f"{run} has no snapshots of averages: a run saves them with --ema.snapshots-every")
    steps = snapshot_steps(run)
    if not steps:
        raise UserError(
            f"no snapshots in {run / FOLDER}: the run has saved none yet (ema.snapshots_every="
            f"{config.ema.snapshots_every}), or they were deleted"
        )
    if step is not None and step not in steps:
        raise UserError(f"{run} has no snapshot of step {step}: there are {', '.join(map(str, steps))}")
    return max(steps) if step is None else step


def reconstruct_averages(
    run: Path, sigma_rels: Sequence[float], *, step: int, config: Config, warn: Callable[[str], None]
) -> list[Average]:
    """Reconstructs averages of chosen widths from a run's snapshots, in float64, and writes them as weights.

    Args:
      run: the run's folder.
      sigma_rels: the widths.
      step: a step that has a snapshot; later snapshots are not used.
      config: of the run.
      warn: called with a line about each damaged snapshot, which is left out.

    Returns:
      the averages in the order of their widths; each is in its `average_file`.

    Raises:
      UserError: a width is out of range, the snapshots are too few or too far apart for it, the one of `step` is
        damaged, or a file cannot be read or written.
    """
    if not sigma_rels:
        raise UserError("--sigma-rel needs at least one width, such as 0.1")
    for sigma_rel in sigma_rels:
        if not 0 < sigma_rel <= WIDEST:
            raise UserError(f"--sigma-rel must be above 0 and at most {WIDEST}, not {sigma_rel}")
    steps = _intact(run, step, config, warn)
    gammas = [gamma_of(width) for width in config.ema.sigma_rels]
    given = Profiles(np.tile(gammas, len(steps)), np.repeat(np.asarray(steps, np.float64), len(gammas)))
    widths = sorted({*sigma_rels})
    found = [reconstruct(given, gamma=gamma_of(width), time=step) for width in widths]
    for width, each in zip(widths, found, strict=True):
        _check_error(run, width, each, given, step, steps, config)
    totals: list[dict[str, np.ndarray]] = [{} for _ in widths]
    expected: dict[str, tuple[int, ...]] = {}
    for place, each_step in enumerate(steps):
        try:
            snapshot = read_snapshot(run, each_step, config=config)
        except Damage as damage:
            raise UserError(f"the snapshot of step {each_step} has changed ({damage}): run the command again") from None
        for number, arrays in enumerate(snapshot):
            kinds = {name: array.shape for name, array in arrays.items()}
            if kinds != (expected := expected or kinds):
                raise UserError(f"the snapshots in {run / FOLDER} are not of one network (see step {each_step})")
            for total, how in zip(totals, found, strict=True):
                weight = how.weights[place * len(gammas) + number]
                for name, array in arrays.items():
                    total[name] = total.get(name, 0) + weight * array.astype(np.float64)
    averages = []
    for width, how, total in zip(widths, found, totals, strict=True):
        flat = {name: np.asarray(array, np.float32) for name, array in total.items()}
        params = traverse_util.unflatten_dict(flat, sep=SEPARATOR)
        about = {"run": identity(config), "step": step, "sigma_rel": width, "error": how.error, "snapshots": len(steps)}
        save_weights(
            average_file(run, step, width),
            params,
            config=config,
            step=step,
            more={_METADATA: dump_checked(about).decode()},
        )
        averages.append(Average(width, step, how.error, params))
    return averages


def _intact(run: Path, step: int, config: Config, warn: Callable[[str], None]) -> list[int]:
    """Returns the steps of the intact snapshots up to a step, which must be one of them."""
    intact = []
    for each in snapshot_steps(run):
        if each > step:
            break
        try:
            check_snapshot(run, each, config=config)
            intact.append(each)
        except Damage as damage:
            if each == step:
                raise UserError(
                    f"the snapshot of step {step} in {run / FOLDER} is damaged ({damage}): choose another --step"
                ) from None
            warn(f"the snapshot of step {each} in {run / FOLDER} is damaged ({damage}): left out")
    return intact


def _check_error(
    run: Path, width: float, found: Reconstruction, given: Profiles, step: int, steps: Sequence[int], config: Config
) -> None:
    if found.error <= LARGEST_ERROR:
        return
    possible = [
        each
        for each in sorted([*np.arange(0.005, WIDEST, 0.005), *config.ema.sigma_rels])
        if reconstruct(given, gamma=gamma_of(float(each)), time=step).error <= LARGEST_ERROR
    ]
    choice = f"choose a width from {min(possible):.3g} to {max(possible):.3g}, or " if possible else ""
    number = f"the {len(steps)} snapshots" if len(steps) > 1 else "the only snapshot"
    raise UserError(
        f"--sigma-rel {width} cannot be reconstructed from {number} of {run} up to step {step} (error of the "
        f"profile {found.error:.1%}, at most {LARGEST_ERROR:.0%}): {choice}train with a "
        f"smaller --ema.snapshots-every than {config.ema.snapshots_every}"
    )


def read_average(file: Path, *, config: Config | None) -> Average:
    """Reads an average that `reconstruct_averages` wrote.

    Args:
      file: the file; it may have been renamed.
      config: of the run; None: any run.

    Raises:
      UserError: there is no such file, it is damaged, or is no average of this run.
    """
    params, metadata = load_weights(file)
    if _METADATA not in metadata:
        raise UserError(f"{printable(file)} is not an average that evaluate.py ema wrote")
    try:
        about = load_checked(metadata[_METADATA].encode(errors="replace"))
        width, step, error = (cast(kind, about.get(name)) for name, kind in _KINDS.items())
    except (Damage, TypeError) as reason:
        raise UserError(f"{printable(file)} is damaged ({reason}): write it again with evaluate.py ema") from None
    if config is not None and about.get("run") != identity(config):
        raise UserError(f"{printable(file)} is an average of another run: use one that evaluate.py ema wrote for this")
    return Average(width, step, error, params)


def load_average(run: Path, ema: str, *, step: int | None, config: Config) -> Average:
    """Loads a reconstructed average of a run.

    Args:
      run: the run's folder.
      ema: its width, or its file.
      step: of which step; of a width, the newest that there is if None.
      config: of the run.

    Raises:
      UserError: there is no such average, or as `read_average`.
    """
    if not re.fullmatch(r"\d*\.?\d+(e-?\d+)?", ema):
        found = read_average(Path(ema), config=config)
        if step is not None and found.step != step:
            raise UserError(f"--step {step} does not fit --ema {printable(ema)}, an average of step {found.step}")
        return found
    width = float(ema)
    files = [
        file for file, of in average_files(run).items() if step in (None, of) and file == average_file(run, of, width)
    ]
    if not files:
        there = ", ".join(file.stem for file in average_files(run)) or "none"
        of_step = "" if step is None else f" --step {step}"
        raise UserError(
            f"{run} has no average of sigma_rel {width}{'' if step is None else f' of step {step}'} (there are: "
            f"{there}): make it with python evaluate.py ema {run} --sigma-rel {width}{of_step}"
        )
    found = read_average(files[-1], config=config)
    if average_file(run, found.step, found.sigma_rel) != files[-1]:
        raise UserError(f"{printable(files[-1])} was renamed: it is of step {found.step}, sigma_rel {found.sigma_rel}")
    return found
