"""A trained run: its configuration and its EMA weights."""

from pathlib import Path

import jax

from ddpm_jax.config import Config
from ddpm_jax.networks import Params, parameter_shapes
from ddpm_jax.run.build import build_network
from ddpm_jax.run.checkpoints import load_ema
from ddpm_jax.run.record import read_config
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.progress import say


def run_config(run: Path) -> Config:
    """Reads the configuration of a run.

    Raises:
      UserError: the folder is not there or no run's.
    """
    if not run.is_dir():
        raise UserError(f"there is no folder {run}: give the folder of a run, such as runs/digits")
    if not (run / "config.json").is_file():
        raise UserError(f"{run} is not the folder of a run: it has no config.json")
    return read_config(run / "config.json")


def load_average(run: Path, config: Config, *, step: int | None = None) -> tuple[int, Params]:
    """Loads a run's averaged weights, and holds them against its configuration.

    Args:
      run: the folder.
      config: as `run_config` reads it there.
      step: which checkpoint; the newest that is whole if None.

    Returns:
      the step and the parameters.

    Raises:
      UserError: the folder has no such checkpoint, or one of another network.
    """
    checkpoint, params = load_ema(run, step=step, warn=say)
    shapes = parameter_shapes(build_network(config))
    kinds = lambda tree: {
        jax.tree_util.keystr(path): f"{leaf.shape} {leaf.dtype}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    here, there = kinds(shapes), kinds(params)
    for name in sorted({*here, *there}):
        if here.get(name) != there.get(name):
            raise UserError(
                f"checkpoint {checkpoint} does not fit {run / 'config.json'}: {name} is {there.get(name, 'absent')} "
                f"there and {here.get(name, 'absent')} by the configuration; put back the file that the run wrote"
            )
    return checkpoint, params
