"""The commands that made a run and what lies in its folder, as far as its files tell."""

import dataclasses
import functools
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddpm_jax.config import Config
from ddpm_jax.generation.sampler_config import SamplerConfig
from ddpm_jax.run.experiments import CONFIGS, load_config
from ddpm_jax.run.fields import leaves, value_of
from ddpm_jax.system.errors import Damage, UserError
from ddpm_jax.system.files import open_npz

# More options than this make no command that anyone would type.
_MOST_OPTIONS = 24
_FEATURES = {"Inception": "inception", "EfficientNetLite0": "efficientnet-lite0"}


def quoted(folder: Path) -> str:
    """Returns the name of a file or folder as a shell takes it."""
    return shlex.quote(str(folder))


def train_command(config: Config, folder: Path) -> str | None:
    """Returns the command that trains a run of this configuration from the nearest of the shipped config files.

    Args:
      config: of the run.
      folder: of the run.

    Returns:
      the command; None if the run is far from all of them.
    """
    found = []
    for stem, base in _shipped().items():
        changed = [name for name in leaves(Config) if name != "name" and value_of(config, name) != value_of(base, name)]
        found.append((len(changed), base.name != config.name, stem, changed))
    if not found:
        return None
    number, is_named, stem, changed = min(found)
    if number > _MOST_OPTIONS:
        return None
    name = ["--name", config.name] if is_named else []
    options = [word for field in changed for word in _option(field, value_of(config, field))]
    return shlex.join(["python", "train.py", f"configs/{stem}.py", *options, *name, "--workdir", str(folder)])


@functools.cache
def _shipped() -> dict[str, Config]:
    return {file.stem: load_config(file) for file in sorted(CONFIGS.glob("*.py"))}


def sample_command(job: Mapping[str, Any], run: Path, number: int) -> str:
    """Returns the command that draws the images of a sampling job, by its job.json."""
    return shlex.join(["python", "sample.py", str(run), "--num", str(number), *_sampling(job)])


def quality_command(job: Mapping[str, Any], run: Path, number: int) -> str:
    """Returns the command that judges the images of a sampling job."""
    return shlex.join(["python", "evaluate.py", "quality", str(run), "--num", str(number), *_sampling(job)])


def fid_command(found: Mapping[str, Any], run: Path, file: Path) -> str | None:
    """Returns the command that computes scores again, by their scores.json; None if it does not tell."""
    features = _FEATURES.get(found["features"]["name"])
    if features is None or not file.parent.name.endswith("_train"):  # another reference than the training images
        return None
    words = ["python", "evaluate.py", "fid", str(run), "--features", features]
    return shlex.join([*words, "--num", str(found["images"]["number"]), *_sampling(found["images"]["drawn"])])


def likelihood_command(job: Mapping[str, Any], run: Path, file: Path, *, number: int) -> str:
    """Returns the command that computes bits/dim again, by the description of its job."""
    words = ["python", "evaluate.py", "likelihood", str(run), *_weights(job)]
    given = {
        "split": (job["split"], "test"),
        "num": (number if f"_num_{number}_" in file.parent.name else 0, 0),
        "num_strata": (job["num_strata"], job["diffusion.num_steps"]),
        "sigma": (job["sigma"], "model"),
        "cdf": (job["cdf"], "tanh"),
        "seed": (job["seed"], 0),
    }
    for name, (value, default) in given.items():
        words += _option(name, value) if value != default else []
    return shlex.join(words)


def describe_drawn(job: Mapping[str, Any]) -> str:
    """Returns in a line how the images of a sampling job are drawn."""
    default = dataclasses.asdict(SamplerConfig())
    names = ["eta", "spacing", "clip", "guidance_scale", "guidance_interval", "labels"]
    chosen = [f"{name.replace('_', ' ')} {job[name]}" for name in names if _is_chosen(job.get(name), default[name])]
    steps = job.get("steps") or job.get("diffusion.num_steps")
    width = f", sigma_rel {job['sigma_rel']}" if job.get("sigma_rel") is not None else ""
    weights = f"checkpoint {job['checkpoint']:,}{width}"
    return ", ".join([weights, str(job["sampler"]), f"{steps} steps", *chosen, f"seed {job['seed']}"])


def number_drawn(file: Path) -> int | None:
    """Returns the number of images that a sampling job has packed; None if it is not known."""
    try:
        archive, about = open_npz(file, {})
    except (Damage, UserError, OSError):
        return None
    archive.close()
    return int(about["images"][1])


def _sampling(job: Mapping[str, Any]) -> list[str]:
    default, words = dataclasses.asdict(SamplerConfig()), _weights(job)
    words += ["--seed", str(job["seed"])] if job["seed"] else []
    for name, value in default.items():
        if _is_chosen(job.get(name), value):
            words += _option(name, job[name])
    return words


def _weights(job: Mapping[str, Any]) -> list[str]:
    width = job.get("sigma_rel")
    return ["--step", str(job["checkpoint"]), *([] if width is None else ["--ema", str(width)])]


def _is_chosen(value: Any, default: Any) -> bool:
    return value not in (default, None, [])


def _option(name: str, value: Any) -> list[str]:
    section, dot, last = name.replace("_", "-").rpartition(".")
    if isinstance(value, bool):
        return [f"--{section}{dot}{'' if value else 'no-'}{last}"]
    values = value if isinstance(value, tuple | list) else [value]
    return [f"--{section}{dot}{last}", *map(str, values)]
