"""Snapshots of a run's power-function averages: small files, all of them kept, in the folder `averages` of the run.

A snapshot is saved before the checkpoint of its step, so a run that is resumed from a checkpoint has every snapshot up
to it, and writes the later ones again with the same bytes.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.config import Config
from ddpm_jax.networks import Params
from ddpm_jax.run.fields import leaves, value_of, with_kinds
from ddpm_jax.run.weights import SEPARATOR, flat
from ddpm_jax.system.errors import Damage, UserError
from ddpm_jax.system.files import checksum_of, open_npz, read_arrays, write_arrays

FOLDER = "averages"
"""In the folder of the run."""
# They name files, which may be copied elsewhere.
_PLACES = ("model.network", "data.source")


def identity(config: Config) -> str:
    """Returns a checksum of the configuration: of what never changes in a run, and is not the default."""
    config, default = with_kinds(config), Config()
    names = [name for name, leaf in leaves(Config).items() if not leaf.free and name not in _PLACES]
    values = {name: value_of(config, name) for name in names}
    return checksum_of({name: value for name, value in values.items() if value != value_of(default, name)})


def snapshot_file(run: Path, step: int) -> Path:
    """Returns the file of a snapshot."""
    return run / FOLDER / f"step_{step:07d}.npz"


def snapshot_steps(run: Path) -> list[int]:
    """Returns the steps of a run's snapshots in ascending order."""
    names = (re.fullmatch(r"step_(\d+)\.npz", path.name) for path in (run / FOLDER).glob("*.npz"))
    return sorted(int(name[1]) for name in names if name)


def average_files(run: Path) -> dict[Path, int]:
    """Returns the files of a run's reconstructed averages, by step and width, and their steps."""
    names = {file: re.match(r"step_(\d+)_", file.name) for file in (run / FOLDER).glob("*_sigma_rel_*.safetensors")}
    found = {file: int(name[1]) for file, name in names.items() if name}
    return dict(sorted(found.items(), key=lambda each: (each[1], each[0])))


def save_snapshot(run: Path, step: int, averages: Sequence[Params], *, config: Config) -> None:
    """Writes a snapshot, atomically: the same averages give the same bytes.

    Args:
      run: the run's folder.
      step: number of training steps done.
      averages: one for each of `ema.sigma_rels`, on this host.
      config: of the run.

    Raises:
      UserError: the file cannot be written.
    """
    trees = {str(number): average for number, average in enumerate(averages)}
    arrays = {name: np.asarray(array, np.float32) for name, array in flat(trees).items()}
    write_arrays(snapshot_file(run, step), arrays, _about(step, config))


def read_snapshot(run: Path, step: int, *, config: Config) -> list[dict[str, np.ndarray]]:
    """Reads a snapshot.

    Args:
      run: the run's folder.
      step: of the snapshot.
      config: of the run.

    Returns:
      for each of `ema.sigma_rels` the arrays by name, float32.

    Raises:
      Damage: the file does not hold what was written, or is a snapshot of another step or of another run.
      UserError: it cannot be read now.
    """
    found: list[dict[str, np.ndarray]] = [{} for _ in config.ema.sigma_rels]
    for name, array in read_arrays(snapshot_file(run, step), _about(step, config)).items():
        number, _, rest = name.partition(SEPARATOR)
        if not number.isdecimal() or int(number) >= len(found) or array.dtype != np.float32:
            raise Damage(f"it contains an array {name:.100} of {array.dtype}, as no snapshot of this run does")
        found[int(number)][rest] = array
    return found


def check_snapshot(run: Path, step: int, *, config: Config | None) -> str:
    """Checks a snapshot as `read_snapshot` does, and returns in words what it contains.

    Without a configuration, of which run it is is not checked.
    """
    file = snapshot_file(run, step)
    archive, _ = open_npz(file, {"step": step} if config is None else _about(step, config))
    with archive:
        return f"{len(archive.infolist())} arrays, {file.stat().st_size / 1e6:.1f} MB"


def rewind_snapshots(run: Path, step: int, *, every: int, ends: bool = False) -> None:
    """Deletes the snapshots that a run resumed from a step writes again, or that a longer run would not have.

    What was reconstructed from those after the step is deleted too.

    Args:
      run: the run's folder.
      step: the last step to keep.
      every: `ema.snapshots_every`; a snapshot of another step was saved because the run ended there.
      ends: whether the run ends at `step` still.

    Raises:
      UserError: a file cannot be deleted.
    """
    is_kept = lambda each: each <= step and (ends or (every and each % every == 0))
    files = [snapshot_file(run, each) for each in snapshot_steps(run) if not is_kept(each)]
    files += [file for file, each in average_files(run).items() if each > step]
    for file in files:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot delete {file}: {error.strerror}") from error


def _about(step: int, config: Config) -> dict[str, Any]:
    return {"step": step, "sigma_rels": config.ema.sigma_rels, "run": identity(config)}
