"""A trained run, or a trained network of another program: its configuration, its network, and its weights."""

import dataclasses
import typing
from pathlib import Path
from typing import Any

import jax

from ddpm_jax.config import Config
from ddpm_jax.data.fingerprint import check_same_set, read_class_names
from ddpm_jax.data.sources import load_source, resolve
from ddpm_jax.networks import Network, Params
from ddpm_jax.run.averages import load_average
from ddpm_jax.run.build import build_network, check_params
from ddpm_jax.run.checkpoints import load_ema
from ddpm_jax.run.experiments import load_config
from ddpm_jax.run.image_options import Images
from ddpm_jax.run.pretrained import LOOKED_FOR, is_pretrained, load_pretrained
from ddpm_jax.run.record import is_run, read_config, read_run
from ddpm_jax.run.validation import validate
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
    """The EMA weights; those in its files, of another program's network."""
    step: int
    """The training step of these weights; 0 if it is not known."""
    folder: Path
    """The run's folder."""
    class_names: tuple[str, ...] = ()
    """Names of its classes in order; empty if it is unconditional, or they are not known."""
    sigma_rel: float | None = None
    """Width of the average that the weights are, if it was reconstructed; None: the EMA weights of the checkpoint."""

    @property
    def weights_name(self) -> str:
        """Which of the run's weights these are, as in names of folders: the step, and the width of their average."""
        return f"{self.step}{'' if self.sigma_rel is None else f'_ema_{self.sigma_rel}'}"

    @property
    def title(self) -> str:
        """Which of the run's weights these are, in words."""
        return f"checkpoint {self.step}{'' if self.sigma_rel is None else f', EMA of sigma_rel {self.sigma_rel}'}"


def load_run(
    folder: Path, *, step: int | None = None, ema: str | None = None, network: Network | None = None
) -> TrainedRun:
    """Loads a run, or another program's trained network, and checks the weights against the configuration.

    Args:
      folder: as `train.py` wrote it; or of another program's network, see `interop`.
      step: of which checkpoint; the newest undamaged one if None.
      ema: width or file of an average that `evaluate.py ema` reconstructed, instead of the checkpoint's EMA weights.
      network: the network, if it was given to `train` in Python.

    Returns:
      the run, with its EMA weights.

    Raises:
      UserError: there is no such folder, it contains neither a run nor a network that can be read, it has no such
        checkpoint or average, or one of another network.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give the folder of a run, such as runs/digits")
    if is_pretrained(folder):
        if ema is not None:
            raise UserError(f"--ema needs a run with snapshots of averages; {folder} has only one set of weights")
        return _load_pretrained(folder, step)
    if not is_run(folder):
        raise UserError(f"{folder} is neither a run nor a model of another program: looked for {LOOKED_FOR}")
    config = read_run(folder)
    network = build_network(config) if network is None else network
    sigma_rel = None
    if ema is None:
        step, params = load_ema(folder, step=step, warn=say)
    else:
        sigma_rel, step, _, arrays = load_average(folder, ema, step=step, config=config)
        params = jax.device_put(arrays, jax.local_devices()[0])  # as those of a checkpoint
    what = f"checkpoint {step}" if ema is None else f"--ema {ema}"
    check_params(network, params, what, f"{folder / 'config.json'}", "restore the run's own file")
    names = read_class_names(folder)
    known = names if len(names) == config.model.num_classes else ()
    return TrainedRun(config, network, params, step, folder, known, sigma_rel)


def _load_pretrained(folder: Path, step: int | None) -> TrainedRun:
    if step is not None:
        raise UserError(f"--step needs a run with checkpoints; {folder} has only one set of weights")
    found = load_pretrained(folder)
    try:
        validate(found.config)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    network = build_network(found.config)
    check_params(network, found.params, "the weights", f"the configuration of {folder}", "get both from one source")
    params = jax.device_put(found.params, jax.local_devices()[0])  # as those of a run
    return TrainedRun(found.config, network, params, found.step, folder, found.class_names)


def with_images(trained: TrainedRun, images: Images) -> TrainedRun:
    """Returns a run that reads its images where they are now.

    Args:
      trained: the run.
      images: where they are.

    Raises:
      UserError: there are no images, or not those that the run was trained on.
    """
    if images.path is None and images.config is None:
        return trained
    data = trained.config.data
    if images.config is not None:
        if not is_pretrained(trained.folder):
            raise UserError(f"--data.config is for models of other programs: {trained.folder} records its own images")
        described = Path(images.config)
        config = read_config(described / "config.json") if is_run(described) else load_config(images.config)
        data = dataclasses.replace(config.data, height=data.height, width=data.width, channels=data.channels)
    if images.path is not None:
        data = dataclasses.replace(data, path=images.path)
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
    average = {} if trained.sigma_rel is None else {"sigma_rel": trained.sigma_rel}
    return {
        "checkpoint": trained.step,
        "weights": f"{checksum(trained.params):08x}",
        **average,
        "image": (config.data.height, config.data.width, config.data.channels),
        **fields,
        "train.precision": config.train.precision,
        "train.matmul_precision": config.train.matmul_precision,
        **environment.settings(),
    }
