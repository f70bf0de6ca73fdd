"""A trained run: its configuration, its network, and its EMA weights."""

import dataclasses
import typing
from pathlib import Path
from typing import Any

import jax

from ddpm_jax.config import Config
from ddpm_jax.data.fingerprint import check_same_set, read_class_names
from ddpm_jax.data.sources import load_source, resolve
from ddpm_jax.networks import Network, Params, parameter_shapes
from ddpm_jax.run.build import build_network
from ddpm_jax.run.checkpoints import load_ema
from ddpm_jax.run.record import read_run
from ddpm_jax.run.weights import checksum
from ddpm_jax.system import environment
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.progress import say


class TrainedRun(typing.NamedTuple):
    """What sampling and evaluation need of a run."""

    config: Config
    """The run's configuration."""
    network: Network
    """The network that it trained."""
    params: Params
    """The EMA weights."""
    step: int
    """The training step of these weights."""
    folder: Path
    """The run's folder."""
    class_names: tuple[str, ...] = ()
    """Names of its classes in order; empty if it is unconditional, or they are not known."""


def load_run(folder: Path, *, step: int | None = None, network: Network | None = None) -> TrainedRun:
    """Loads a run from its folder, and checks the weights against the configuration.

    Args:
      folder: as `train.py` wrote it.
      step: of which checkpoint; the newest undamaged one if None.
      network: the network, if it was given to `train` in Python.

    Returns:
      the run, with its EMA weights.

    Raises:
      UserError: there is no such folder, it is not a run's, it has no such checkpoint, or one of another network.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give the folder of a run, such as runs/digits")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not the folder of a run: it has no config.json")
    config = read_run(folder)
    network = build_network(config) if network is None else network
    step, params = load_ema(folder, step=step, warn=say)
    kinds = lambda tree: {
        jax.tree_util.keystr(path): f"{leaf.shape} {leaf.dtype}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    expected, found = kinds(parameter_shapes(network)), kinds(params)
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"checkpoint {step} does not fit {folder / 'config.json'}: {name} is {found.get(name, 'absent')} in "
                f"the checkpoint and {expected.get(name, 'absent')} by the configuration; restore the run's own file"
            )
    names = read_class_names(folder)
    known = names if len(names) == config.model.num_classes else ()
    return TrainedRun(config, network, params, step, folder, known)


@dataclasses.dataclass(frozen=True)
class Images:
    """Options of commands that read a run's images."""

    path: str | None = None
    """Where the run's images are, if they have moved since it was trained."""


def with_images(trained: TrainedRun, images: Images) -> TrainedRun:
    """Returns a run that reads its images where they are now.

    Args:
      trained: the run.
      images: where they are.

    Raises:
      UserError: there are no images, or not those that the run was trained on.
    """
    if images.path is None:
        return trained
    data = dataclasses.replace(trained.config.data, path=images.path)
    check_same_set(trained.folder / "data.json", load_source(data), write=False)
    return trained._replace(config=dataclasses.replace(trained.config, data=resolve(data)))


def describe_run(trained: TrainedRun) -> dict[str, Any]:
    """Returns all of a run that its images and likelihoods depend on, under names.

    A checksum of the weights distinguishes two runs of the same configuration.
    """
    config = trained.config
    sections: dict[str, Any] = {"diffusion": config.diffusion, "model": config.model}
    fields = {
        f"{section}.{name}": value
        for section, values in sections.items()
        for name, value in dataclasses.asdict(values).items()
    }
    del fields["model.network"]  # where a copy of the file is, not what is in it: the weights tell
    return {
        "checkpoint": trained.step,
        "weights": f"{checksum(trained.params):08x}",
        "image": (config.data.height, config.data.width, config.data.channels),
        **fields,
        "train.precision": config.train.precision,
        "train.matmul_precision": config.train.matmul_precision,
        **environment.settings(),
    }
