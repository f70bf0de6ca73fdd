"""The folder of a run: claimed by one process, and seen by every host."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ddpm_jax.config import Config
from ddpm_jax.run.checkpoints import has_saved
from ddpm_jax.run.code import keep_copies
from ddpm_jax.run.fields import leaves, value_of
from ddpm_jax.run.record import LearningRates, check_environment, check_same_run, rates_so_far, read_config, save_config
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import claimed, open_file, write_whole
from ddpm_jax.system.hosts import appears
from ddpm_jax.system.progress import say

# What a start writes before its first step.
_OF_A_START = (
    *("config.json", "data.json", "init_from.json", "metrics.jsonl", "timing.jsonl", "checkpoints", "tensorboard"),
    *("wandb", "wandb.json", ".lock"),
)


@contextlib.contextmanager
def adopted(config: Config, run: Path) -> Iterator[Callable[[LearningRates], None]]:
    """Claims a run's folder for this process and writes the configuration into it.

    A refused start leaves no trace: unless the yielded function is called, the previous configuration is put back and
    what is new in the folder is deleted, with the folder itself if it is new. A folder whose run has saved nothing yet
    accepts any configuration.

    Args:
      config: the configuration of the run.
      run: its folder; made if it does not exist.

    Yields:
      the function to call once training begins, with the learning rates of the run.

    Raises:
      UserError: the folder is in use or holds a different run.
    """
    file = run / "config.json"
    moved = False
    rates: LearningRates = ()
    with _without_a_trace(run) as keep, claimed(run):
        if not has_saved(run):
            (run / "data.json").unlink(missing_ok=True)
        elif file.exists():
            check_same_run(file, config)
            check_environment(file)
            rates = rates_so_far(file, config)
            moved = read_config(file).data.path != config.data.path
        else:
            raise UserError(
                f"{run} has checkpoints but no config.json, which says what run they belong to: put it back, or use "
                "another --workdir"
            )
        before = None
        if file.exists():
            with open_file(file) as opened:
                before = opened.read()
        save_config(config, file, rates)
        begun: list[bool] = []
        try:

            def begin(rates: LearningRates) -> None:
                save_config(config, file, rates)
                keep_copies(config, run)
                begun.append(True)
                if moved:
                    say(f"{run}: data.path is now {config.data.path}")
                keep()

            yield begin
        finally:
            if not begun and before is not None:
                write_whole(file, lambda opened: opened.write(before))


@contextlib.contextmanager
def _without_a_trace(folder: Path) -> Iterator[Callable[[], None]]:
    """Deletes at the end what is new in a folder, and a new folder itself, unless the yielded function is called."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    new = [folder / name for name in _OF_A_START if not (folder / name).exists()]
    kept: list[bool] = []
    try:
        yield lambda: kept.append(True)
    finally:
        for path in new if not kept else []:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()
        for each in made if not kept else []:
            with contextlib.suppress(OSError):  # something else is in it
                each.rmdir()


def check_shared(config: Config, run: Path) -> None:
    """Checks that this host sees the folder that host 0 writes to, and was started with the same command.

    Raises:
      UserError: it does not, or was not.
    """
    file = run / "config.json"
    if not appears(file.exists):
        raise UserError(f"host 0's folder {run} is not visible from this host: it must be on a disk that all share")
    theirs = read_config(file)
    different = [name for name in leaves(Config) if value_of(theirs, name) != value_of(config, name)]
    check_environment(file)
    if different:
        raise UserError(f"{', '.join(different)} differs from host 0's: start every host with the same command")
