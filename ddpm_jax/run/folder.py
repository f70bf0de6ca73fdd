"""The folder of a run: claimed by one process, and seen by every host."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ddpm_jax.config import Config
from ddpm_jax.run.checkpoints import has_saved
from ddpm_jax.run.code import keep_copies
from ddpm_jax.run.fields import leaves, value_of
from ddpm_jax.run.record import check_environment, check_same_run, read_config, save_config
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import claimed, write_whole
from ddpm_jax.system.progress import say

# A network file system may show a file to other hosts this much later.
_SECONDS_TO_APPEAR = 60


@contextlib.contextmanager
def adopted(config: Config, run: Path) -> Iterator[Callable[[], None]]:
    """Claims a run's folder for this process and writes the configuration into it.

    A refused start leaves no trace: unless the yielded function is called, the previous configuration is put back. A
    folder whose run has saved nothing yet accepts any configuration.

    Args:
      config: the configuration of the run.
      run: its folder; made if it does not exist.

    Yields:
      the function to call once training begins.

    Raises:
      UserError: the folder is in use or holds a different run.
    """
    file = run / "config.json"
    with claimed(run):
        if not has_saved(run):
            (run / "data.json").unlink(missing_ok=True)
        elif file.exists():
            check_same_run(file, config)
            if warning := check_environment(file):
                say(f"warning: {warning}")
        else:
            raise UserError(
                f"{run} has checkpoints but no config.json, which says what run they belong to: put it back, or use "
                "another --workdir"
            )
        before = file.read_bytes() if file.exists() else None
        save_config(config, file)
        begun: list[bool] = []
        try:

            def begin() -> None:
                keep_copies(config, run)
                begun.append(True)

            yield begin
        finally:
            if not begun and before is None:
                file.unlink(missing_ok=True)
            elif not begun and before is not None:
                write_whole(file, lambda opened: opened.write(before))


def check_shared(config: Config, run: Path) -> None:
    """Checks that this host sees the folder that host 0 writes to, and was started with the same command.

    Raises:
      UserError: it does not, or was not.
    """
    file = run / "config.json"
    until = time.monotonic() + _SECONDS_TO_APPEAR
    while not file.exists() and time.monotonic() < until:
        time.sleep(1)
    if not file.exists():
        raise UserError(f"host 0's folder {run} is not visible from this host: it must be on a disk that all share")
    theirs = read_config(file)
    different = [name for name in leaves(Config) if value_of(theirs, name) != value_of(config, name)]
    check_environment(file)
    if different:
        raise UserError(f"{', '.join(different)} differs from host 0's: start every host with the same command")
