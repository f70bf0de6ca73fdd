"""The commands that made a run and what lies in its folder, as far as its files tell."""

import dataclasses
import functools
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddpm_jax.config import FROM_PYTHON, Config
from ddpm_jax.generation.sampler_config import SamplerConfig
from ddpm_jax.run.experiments import CONFIGS, load_config
from ddpm_jax.run.fields import leaves, value_of
from ddpm_jax.run.record import LearningRates
from ddpm_jax.system.errors import Damage, UserError
from ddpm_jax.system.files import open_npz

# More options than this make no command that anyone would type.
_MOST_OPTIONS = 24
_FEATURES = {"Inception": "inception", "EfficientNetLite0": "efficientnet-lite0"}


def quoted(folder: Path) -> str:
    """Returns the name of a file or folder as a shell takes it."""
    return shlex.quote(str(folder))


def train_commands(config: Config, folder: Path, rates: LearningRates = ()) -> list[str]:
    """Returns the commands that train a run of this configuration from the nearest of the shipped config files.

    Args:
      config: of the run.
      folder: of the run.
      rates: the learning rates that it had, if they changed.

    Returns:
      a command for each of the learning rates; none if the run is far from all of the files, or not of train.py.
    """
    if is_from_python(config):
        return []
    ends = [*(rate.step for rate in rates[1:]), config.train.steps]
    found = []
    for rate, end in zip(rates or [None], ends, strict=True):
        learning_rate = (
            {} if rate is None else {name: value for name, value in rate._asdict().items() if name != "step"}
        )
        train = dataclasses.replace(config.train, steps=end, **learning_rate)
        found.append(_train_command(dataclasses.replace(config, train=train), folder))
    return [command for command in found if command is not None] if None not in found else []


def is_from_python(config: Config) -> bool:
    """Returns whether a run's network or images were given to `train` in Python, so that no command trains it."""
    return FROM_PYTHON in (config.model.network, config.data.source)


def _train_command(config: Config, folder: Path) -> str | None:
    found = []
    for stem, base in _shipped().items():
        changed = [name for name in leaves(Config) if name != "name" and value_of(config, name) != value_of(base, name)]
        found.append((len(changed), base.name != config.name, stem, changed))
    if not found:
        return None
    number, is_named, stem, changed = min(found)
    if number > _MOST_OPTIONS:
        return None
    name = _option("name", config.name) if is_named else []
    options = [word for field in changed for word in _option(field, value_of(config, field))]
    return shlex.join(["python", "train.py", f"configs/{stem}.py", *options, *name, *_option("workdir", str(folder))])


@functools.cache
def _shipped() -> dict[str, Config]:
    return {file.stem: load_config(file) for file in sorted(CONFIGS.glob("*.py"))}


def sample_command(job: Mapping[str, Any], run: Path, number: int) -> str:
    """Returns the command that draws the images of a sampling job, by its job.json."""
    return shlex.join(["python", "sample.py", str(run), "--num", str(number), *_sampling(job)])


def quality_command(job: Mapping[str, Any], run: Path, number: int) -> str:
    """Returns the command that judges the images of a sampling job."""
    return shlex.join(["python", "evaluate.py", "quality", str(run), "--num", str(number), *_sampling(job)])


def fid_command(found: Mapping[str, Any], run: Path) -> str | None:
    """Returns the command that computes scores again, by their scores.json; None if it does not tell."""
    features, reference = _FEATURES.get(found["features"]["name"]), found["reference"].get("options")
    if features is None or reference is None:
        return None
    words = ["python", "evaluate.py", "fid", str(run), "--features", features, *reference]
    return shlex.join([*words, "--num", str(found["images"]["number"]), *_sampling(found["images"]["drawn"])])


def likelihood_command(found: Mapping[str, Any], run: Path) -> str:
    """Returns the command that computes bits/dim again, by their likelihood.json."""
    job = found["job"]
    words = ["python", "evaluate.py", "likelihood", str(run), *_weights(job)]
    given = {
        "split": (job["split"], "test"),
        "num": (found["num"], 0),
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
    names = [name for name in default if name not in ("sampler", "steps")]
    chosen = [f"{name.replace('_', ' ')} {job[name]}" for name in names if _is_chosen(job.get(name), default[name])]
    steps = job.get("steps") or job.get("diffusion.num_steps")
    width = f", sigma_rel {job['sigma_rel']}" if job.get("sigma_rel") is not None else ""
    weights = f"checkpoint {job['checkpoint']:,}{width}"
    return ", ".join([weights, str(job["sampler"]), f"{steps} steps", *chosen, f"seed {job['seed']}"])


def num_options(job: Mapping[str, Any]) -> int:
    """Returns how many options of the sampler differ from their defaults."""
    return sum(_is_chosen(job.get(name), value) for name, value in dataclasses.asdict(SamplerConfig()).items())


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
            # A name of another class may be the same number.
            words += _option(name, [f"number:{each}" for each in job[name]] if name == "labels" else job[name])
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
    option, values = f"--{section}{dot}{last}", value if isinstance(value, tuple | list) else [value]
    if len(values) == 1 and str(values[0]).startswith("-"):  # which is no option
        return [f"{option}={values[0]}"]
    return [option, *map(str, values)]
