"""The configuration of a run: typed, frozen, saved beside what it made.

A run is a pure function of its configuration, so all that shapes its numbers is a field here. An experiment is a file
that sets `config`; it is loaded, checked as a whole, and kept as JSON in the run's folder.
"""

import contextlib
import dataclasses
import difflib
import functools
import json
import runpy
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.bound import Cdf
from ddpm_jax.errors import UserError
from ddpm_jax.files import write_whole
from ddpm_jax.losses import Weighting
from ddpm_jax.reverse import LEARNED_VARIANCES, Prediction, Variance
from ddpm_jax.schedules import Schedule, ScheduleName, make_betas, schedule_from_betas
from ddpm_jax.times import TimesName
from ddpm_jax.unet import UNet, check_unet

LossKind = typing.Literal["simple", "vlb", "hybrid"]
Precision = typing.Literal["float32", "bfloat16"]
MatmulPrecision = typing.Literal["default", "high", "highest"]
Parallel = typing.Literal["jit", "pmap"]
OnUnreadable = typing.Literal["refuse", "skip"]

_FREE: dict[str, bool] = {"free": True}
# A field marked so may differ between a run and its continuation: it changes how far or how fast a run goes and what
# it writes about itself, but none of its numbers at a given step.


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images."""

    source: str = "digits"
    """digits (scikit-learn's), folder, npz, npy, idx (MNIST's format), cifar10, or tfds:NAME (tensorflow-datasets)."""
    path: str = field(default="", metadata=_FREE)
    """The folder of images or idx files, the .npz or .npy, CIFAR-10's archive, TFDS's data_dir; none for the digits."""
    split: str = "train"
    """train, test or all; for TFDS any split that it knows."""
    height: int = 8
    """Height of the images in pixels; those of a folder are resized and cropped to it."""
    width: int = 8
    """Width of the images in pixels."""
    channels: int | None = 1
    """1 grey, 3 colour, 4 colour with alpha; None: as the folder's files are (they must agree)."""
    flip: bool = False
    """Whether every image is mirrored left to right with probability 0.5 at each step."""
    on_unreadable: OnUnreadable = "refuse"
    """What to do with files of a folder that are no readable image: refuse to train, or skip them and say how many."""
    memory_gib: float = field(default=8.0, metadata=_FREE)
    """Sets that are larger than this when decoded are streamed from disk instead of kept in memory."""
    device_gib: float = field(default=1.0, metadata=_FREE)
    """Sets of up to this size are kept on every device, where the compiled step gathers its batch; 0: none."""
    workers: int = field(default=0, metadata=_FREE)
    """Processes that decode a set which is streamed; 0: threads of the training process do."""


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """Which diffusion."""

    schedule: ScheduleName = "linear"
    """How beta rises with t."""
    num_steps: int = 1000
    """T, the steps from image to noise; with another T than 1000 the betas should be scaled by 1000/T."""
    beta_start: float = 1e-4
    """The first beta; jsd, cosine and const have none."""
    beta_end: float = 0.02
    """The last beta; jsd and cosine have none."""
    prediction: Prediction = "eps"
    """What the network predicts."""
    variance: Variance = "fixed_large"
    """The variance of the reverse steps."""
    clip_x0: bool = True
    """Whether the predicted clean image is clipped to [-1, 1] at every reverse step."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which U-Net."""

    width: int = 128
    """Channels of the first level."""
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    """Channels of each level, in units of the width; one level a number."""
    blocks: int = 2
    """Residual blocks of each level on the way down; one more on the way up."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Feature heights at which attention follows every block."""
    heads: int = 1
    """Heads of each attention; must divide the channels of every level."""
    groups: int = 32
    """Groups of each group normalisation; must divide the channels of every level."""
    dropout: float = 0.1
    """Dropout rate in each residual block."""
    num_classes: int = 0
    """Classes that the network is told of, as many as the images have; 0: an unconditional network."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What it is trained on."""

    kind: LossKind = "simple"
    """simple: L_simple; vlb: the bound, in bits/dim; hybrid: L_simple for the mean, the bound for the variance."""
    vlb_weight: float = 0.001
    """Weight of the bound in hybrid: of the sum of its T terms, in bits/dim."""
    weighting: Weighting = "none"
    """Weights of L_simple's times by their signal-to-noise ratio; none is the paper's."""
    min_snr_gamma: float = 5.0
    """The largest ratio that counts in weighting min_snr."""
    times: TimesName = "uniform"
    """How the times of a batch are drawn; loss_aware looks most where the loss is largest (meant for vlb)."""
    cdf: Cdf = "tanh"
    """The normal distribution function in the bound's decoder: the original's approximation, or the exact erf."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How it is trained."""

    steps: int = field(default=800_000, metadata=_FREE)
    """Training steps in all; a run that has fewer goes on to this many."""
    batch_size: int = 128
    """Images a step, over all devices and hosts."""
    learning_rate: float = 2e-4
    """Adam's, after the warmup."""
    warmup: int = 5000
    """Steps over which the learning rate rises from 0."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient of a step; 0: not clipped."""
    label_dropout: float = 0.1
    """Probability that an image's label is hidden, so that the network learns both with and without (guidance)."""
    ema_decay: float = 0.9999
    """Decay a step of the moving average of the parameters, from which samples are drawn."""
    init_from: str = ""
    """Weights to start from, where they fit: another run's averaged ones (its folder), or a .safetensors file."""
    seed: int = 0
    """From it come the first parameters, the order of the images and every random number of the run."""
    precision: Precision = "float32"
    """Type of the network's computation; parameters and statistics stay float32."""
    matmul_precision: MatmulPrecision = "default"
    """Precision of float32 products on accelerators (default: TF32 on new GPUs, bfloat16 passes on TPUs)."""
    parallel: Parallel = field(default="jit", metadata=_FREE)
    """How a step is spread over the devices: jit over a mesh, or pmap."""
    fsdp: int = field(default=1, metadata=_FREE)
    """How many devices share one copy of parameters, average and optimiser, instead of each having its own."""
    accumulate: int = field(default=1, metadata=_FREE)
    """In how many parts the gradient of a step is computed, where the batch is too large for the devices at once."""
    remat: bool = field(default=False, metadata=_FREE)
    """Whether each block is computed a second time for its gradient, instead of kept in memory: less of it, slower."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is kept."""

    every: int = field(default=5000, metadata=_FREE)
    """Steps between checkpoints; the last step is always saved."""
    keep: int = field(default=2, metadata=_FREE)
    """How many of the newest checkpoints are kept."""
    keep_every: int = field(default=0, metadata=_FREE)
    """Checkpoints of steps that are multiples of this are kept for ever; 0: none."""
    keep_best: int = field(default=0, metadata=_FREE)
    """How many of those with the lowest mean loss since the checkpoint before are kept, beside the newest."""
    minutes: float = field(default=0.0, metadata=_FREE)
    """Save also when so many minutes have passed since the last checkpoint; 0: by steps alone."""


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is written while it trains."""

    every: int = field(default=100, metadata=_FREE)
    """Steps between lines of metrics.jsonl."""
    samples_every: int = field(default=10_000, metadata=_FREE)
    """Steps between grids of samples; 0: none."""
    num_samples: int = field(default=64, metadata=_FREE)
    """Images of a grid."""
    sample_steps: int = field(default=0, metadata=_FREE)
    """Steps of the chain for a grid: so many of DDIM, or 0 for all T of Algorithm 2."""
    tensorboard: bool = field(default=False, metadata=_FREE)
    """Whether to write the same numbers and grids for TensorBoard too, into the run's folder (needs tensorboardX)."""
    wandb: str = field(default="", metadata=_FREE)
    """A project of Weights & Biases to send them to (needs wandb and an account); none if empty."""
    peak_tflops: float = field(default=0.0, metadata=_FREE)
    """What one device can do at most, in 10^12 operations a second, for the share of it that is used; 0: looked up by
    the device's name, not said of devices that are not known."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    name: str = field(default="run", metadata=_FREE)
    """The run's name; its folder is runs/NAME if no other is given."""
    data: DataConfig = DataConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()


# Fields and the kinds of their values


class Leaf(typing.NamedTuple):
    """A field that holds a value, not a section."""

    kind: Any
    """Its type."""
    free: bool
    """Whether it may differ between a run and its continuation."""


def leaves(kind: Any) -> Mapping[str, Leaf]:
    """Lists the fields of a dataclass and of the dataclasses in it by their dotted names, in their order.

    >>> leaves(Config)["train.batch_size"]
    Leaf(kind=<class 'int'>, free=False)
    """
    hints = typing.get_type_hints(kind)
    found: dict[str, Leaf] = {}
    for each in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[each.name]):
            found |= {f"{each.name}.{name}": leaf for name, leaf in leaves(hints[each.name]).items()}
        else:
            found[each.name] = Leaf(hints[each.name], each.metadata.get("free", False))
    return found


def value_of(config: object, name: str) -> Any:
    """Reads the field with a dotted name.

    >>> value_of(Config(), "diffusion.num_steps")
    1000
    """
    return functools.reduce(getattr, name.split("."), config)


def members(kind: Any) -> tuple[Any, ...]:
    """Lists the members of a union; of another kind, itself.

    >>> members(int | None)
    (<class 'int'>, <class 'NoneType'>)
    """
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def describe(kind: Any) -> str:
    """Names a kind of value in words.

    >>> describe(int | None)
    'an integer or None'
    """
    if len(members(kind)) > 1:
        return " or ".join(map(describe, members(kind)))
    match typing.get_origin(kind):
        case typing.Literal:
            return f"one of {', '.join(map(str, typing.get_args(kind)))}"
        case origin if origin is tuple:
            return {int: "integers", float: "numbers"}.get(typing.get_args(kind)[0], "a list of words")
    words = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "text",
        Path: "a path",
        types.NoneType: "None",
    }
    return words[kind]


def cast(kind: Any, value: Any) -> Any:
    """Checks that a value is of a kind; what JSON has no word for is cast: a list to a tuple, 1 to 1.0.

    Args:
      kind: str, int, float, bool, None, a Literal, `tuple[x, ...]`, or a union of such.
      value: any value.

    Returns:
      the value, of that kind.

    Raises:
      TypeError: it is of another kind; a bool is no number, and 1.0 is no integer.

    >>> cast(tuple[int, ...], [1, 2])
    (1, 2)
    """
    for member in members(kind):
        match typing.get_origin(member):
            case typing.Literal if isinstance(value, str) and value in typing.get_args(member):
                return value
            case origin if origin is tuple and isinstance(value, list | tuple):
                return tuple(cast(typing.get_args(member)[0], entry) for entry in value)
        if member is float and type(value) is int:
            return float(value)
        if type(value) is member:
            return value
    raise TypeError(f"needs {describe(kind)}, not {value!r}")


def nearest(name: str, names: Iterable[str], *, form: Callable[[str], str] = str) -> str:
    """Gives the known name that was probably meant, as the end of an error line; empty if none is near.

    Args:
      name: what was written.
      names: what is known.
      form: how a known name is written in the line.

    Returns:
      `: did you mean NAME?`, or nothing.

    >>> nearest("train.batchsize", leaves(Config))
    ': did you mean train.batch_size?'
    """
    names = list(names)
    last = name.rpartition(".")[2]
    # A forgotten section is the commonest slip, and no spelling distance finds it.
    found = [known for known in names if known.rpartition(".")[2] == last]
    found = found or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    found = found or [
        known for known in names if difflib.get_close_matches(last, [known.rpartition(".")[2]], cutoff=0.7)
    ]
    return f": did you mean {' or '.join(map(form, found[:3]))}?" if found else ""


def _check_kinds(config: Config) -> None:
    for name, leaf in leaves(Config).items():
        section, _, last = name.rpartition(".")
        owner = value_of(config, section) if section else config
        if not hasattr(owner, last):
            raise UserError(f"{section} must be a {_sections()[section].__name__}, not {owner!r:.40}")
        try:
            cast(leaf.kind, getattr(owner, last))
        except TypeError as error:
            raise UserError(f"{name} {error}") from None


# Experiments: the files in configs/

_REPOSITORY = Path(__file__).resolve().parents[1]


def _candidates(path: str) -> Iterator[Path]:
    for base in (Path(), Path("configs"), _REPOSITORY / "configs", _REPOSITORY):
        yield base / path
        yield base / f"{path}.py"


def load_config(path: str | Path) -> Config:
    """Loads an experiment: runs a Python file and takes its `config`.

    Args:
      path: the file, or the name of one in `configs/`: `configs/cifar10.py` and `cifar10` are the same.

    Returns:
      its `Config`, with every field of its declared kind; whether they go together `validate` says.

    Raises:
      UserError: there is no such file, it fails, or it sets no `config`.
    """
    found = next((candidate for candidate in _candidates(str(path)) if candidate.is_file()), None)
    if found is None:
        folders = (Path("configs"), _REPOSITORY / "configs")
        known = dict.fromkeys(file.stem for folder in folders for file in sorted(folder.glob("*.py")))
        near = difflib.get_close_matches(Path(path).stem, known, n=1, cutoff=0.5)
        hint = f"did you mean configs/{near[0]}.py?" if near else f"choose one of {', '.join(known)}, or give a file"
        raise UserError(f"there is no config file {path}: {hint}")
    try:
        names = runpy.run_path(str(found))
    except Exception as error:
        raise UserError(_fault(found, error)) from error
    config = names.get("config")
    if not isinstance(config, Config):
        raise UserError(f"{found} sets no configuration: it must contain `config = Config(...)`")
    try:
        _check_kinds(config)
    except UserError as error:
        raise UserError(f"{found}: {error}") from None
    return config


def _fault(path: Path, error: Exception) -> str:
    """What went wrong in a config file, and in which line of it."""
    if isinstance(error, SyntaxError):
        return f"{path}, line {error.lineno}: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    what = " ".join(str(error).split())
    # Python names the constructor and the wrong keyword, but not the nearest right one.
    if isinstance(error, TypeError) and "unexpected keyword argument '" in what:
        wrong = what.split("'")[1]
        section = next((kind for kind in (Config, *_sections().values()) if what.startswith(kind.__name__ + ".")), None)
        if section is not None:
            what = f"{section.__name__} has no {wrong}" + nearest(wrong, [f.name for f in dataclasses.fields(section)])
            return f"{path}, line {lines[-1]}: {what}"
    where = f", line {lines[-1]}" if lines else ""
    return f"{path}{where}: {type(error).__name__}: {what}"


def _sections() -> dict[str, Any]:
    return {name: kind for name, kind in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(kind)}


# Does it make sense?

_AT_LEAST = {
    "data.height": 1,
    "data.width": 1,
    "data.workers": 0,
    "diffusion.num_steps": 1,
    "model.width": 4,  # The time's embedding needs two frequencies, each with its sine and cosine.
    "model.blocks": 1,
    "model.heads": 1,
    "model.groups": 1,
    "model.num_classes": 0,
    "train.steps": 1,
    "train.batch_size": 1,
    "train.warmup": 0,
    "train.grad_clip": 0,
    "train.seed": 0,
    "train.fsdp": 1,
    "train.accumulate": 1,
    "checkpoints.every": 1,
    "checkpoints.keep": 1,
    "checkpoints.keep_every": 0,
    "checkpoints.keep_best": 0,
    "checkpoints.minutes": 0,
    "log.every": 1,
    "log.samples_every": 0,
    "log.num_samples": 1,
    "log.sample_steps": 0,
    "log.peak_tflops": 0,
}


def validate(config: Config) -> None:
    r"""Checks that a configuration can be trained: each value in its range, and all of them together.

    Whether the images exist and the batch can be shared by the devices is found where they are known. Touches no
    device, so that it can be called before hosts are joined.

    Args:
      config: any configuration.

    Raises:
      UserError: one line for the first fault found: the field, its value, and what it must be.
    """
    _check_kinds(config)
    data, diffusion, model, train = config.data, config.diffusion, config.model, config.train
    for name, least in _AT_LEAST.items():
        if not least <= value_of(config, name) < float("inf"):
            raise UserError(f"{name}={value_of(config, name)} must be at least {least}")
    if config.name in ("", ".", "..") or Path(config.name).name != config.name:
        raise UserError(f"name={config.name!r} must be the name of a folder, without a path before it")
    if data.channels is not None and data.channels < 1:
        raise UserError(f"data.channels={data.channels} must be at least 1, or None to take what the images have")
    for name in ("data.memory_gib", "data.device_gib"):
        if not value_of(config, name) >= 0:
            raise UserError(f"{name}={value_of(config, name)} must be at least 0")
    for name in ("diffusion.beta_start", "diffusion.beta_end"):
        if not 0 < value_of(config, name) < 1:
            raise UserError(f"{name}={value_of(config, name)} must be in (0, 1): it is the variance that a step adds")
    if train.parallel == "pmap" and train.fsdp > 1:
        raise UserError(
            f"train.parallel=pmap keeps a whole state on every device, and train.fsdp={train.fsdp} shares one: use "
            "--train.parallel jit, or --train.fsdp 1"
        )
    for name in ("model.multipliers", "model.attention_resolutions"):
        if any(entry < 1 for entry in value_of(config, name)):
            raise UserError(f"{name}={value_of(config, name)} must be integers of at least 1")
    if not model.multipliers:
        raise UserError("model.multipliers is empty: give one number for each level of the U-Net, such as 1 2 2 2")
    for name in ("model.dropout", "train.label_dropout", "train.ema_decay"):
        if not 0 <= value_of(config, name) < 1:
            raise UserError(f"{name}={value_of(config, name)} must be in [0, 1)")
    if not 0 < train.learning_rate < float("inf"):
        raise UserError(f"train.learning_rate={train.learning_rate} must be above 0")
    if train.seed >= 2**32:
        raise UserError(f"train.seed={train.seed} must be below 2^32")
    if config.log.samples_every and config.log.sample_steps > diffusion.num_steps:
        raise UserError(
            f"log.sample_steps={config.log.sample_steps} is more than diffusion.num_steps={diffusion.num_steps}: "
            f"use --log.sample-steps {diffusion.num_steps} or less, or 0 for the whole chain"
        )
    learned = diffusion.variance in LEARNED_VARIANCES
    if learned and config.loss.kind == "simple":
        raise UserError(
            f"diffusion.variance={diffusion.variance} is not trained by L_simple, which says nothing of the variance: "
            "use --loss.kind hybrid or vlb, or a fixed variance"
        )
    if not learned and config.loss.kind == "hybrid":
        raise UserError(
            f"loss.kind=hybrid trains a learned variance, and diffusion.variance={diffusion.variance} has nothing to "
            "train: use --diffusion.variance learned_range, or --loss.kind simple or vlb"
        )
    if config.loss.weighting != "none" and config.loss.kind == "vlb":
        raise UserError(
            f"loss.weighting={config.loss.weighting} weighs L_simple, and loss.kind=vlb has its own weights: use "
            "--loss.weighting none"
        )
    for name in ("loss.vlb_weight", "loss.min_snr_gamma"):
        if not 0 < value_of(config, name) < float("inf"):
            raise UserError(f"{name}={value_of(config, name)} must be above 0")
    _check_end(config)
    try:
        check_unet(_unet(config, out_channels=1), (data.height, data.width))
    except ValueError as error:
        raise UserError(str(error)) from None


def _check_end(config: Config) -> None:
    """Refuses what cannot tell x_0 at the last step: there it is divided by its weight in what is predicted."""
    diffusion, betas = config.diffusion, build_betas(config)
    before, last = np.append(1, np.cumprod(1 - betas))[-2:]
    weights = {"eps": np.sqrt(last), "mean": np.sqrt(before) * betas[-1] / (1 - last)}
    if weights.get(diffusion.prediction, 1) < np.finfo(np.float32).tiny:
        raise UserError(
            f"diffusion.prediction={diffusion.prediction} cannot tell x_0 at the last step of the {diffusion.schedule} "
            f"schedule, where alphas_bar is {last:.3g}: use --diffusion.prediction v or x0, or smaller betas"
        )


def warnings_of(config: Config) -> list[str]:
    """Says what is allowed but seldom meant.

    Args:
      config: a configuration that `validate` accepts.

    Returns:
      one line each; none for the paper's configurations.
    """
    data, diffusion, model, train = config.data, config.diffusion, config.model, config.train
    found = []
    last = np.prod(1 - build_betas(config))
    if last > 1e-2:
        start, end = (1000 / diffusion.num_steps * beta for beta in (diffusion.beta_start, diffusion.beta_end))
        scaled = diffusion.schedule not in ("jsd", "cosine") and start < 1 and end < 1
        remedy = (
            f"scale betas by 1000/T: --diffusion.beta-start {start:.4g} --diffusion.beta-end {end:.4g}"
            if scaled and diffusion.num_steps < 1000
            else "use --diffusion.schedule cosine"
        )
        found.append(
            f"the chain ends before all signal is gone (alphas_bar is {last:.2g} at T={diffusion.num_steps}): samples "
            f"would start from the wrong prior; {remedy}"
        )
    heights = [data.height // 2**level for level in range(len(model.multipliers))]
    unused = [resolution for resolution in model.attention_resolutions if resolution not in heights]
    if unused:
        found.append(
            f"model.attention_resolutions {' '.join(map(str, unused))}: no level has this height (they have "
            f"{', '.join(map(str, heights))}), so no attention there"
        )
    if 0 < train.steps <= train.warmup:
        found.append(
            f"train.warmup={train.warmup} is not over after train.steps={train.steps}: the learning rate stays below "
            f"{train.learning_rate:g}"
        )
    left = train.ema_decay**train.steps
    if left > 0.1:
        found.append(
            f"train.ema_decay={train.ema_decay:g} over train.steps={train.steps}: the average that is sampled from is "
            f"still {left:.0%} the untrained network; use a smaller decay"
        )
    return found


# What follows from it


def build_betas(config: Config) -> np.ndarray:
    """Gives the betas of the diffusion, (T,) float64, of a configuration that `validate` accepts."""
    diffusion = config.diffusion
    return make_betas(
        diffusion.schedule, diffusion.num_steps, beta_start=diffusion.beta_start, beta_end=diffusion.beta_end
    )


def build_schedule(config: Config) -> Schedule:
    """Makes the diffusion's tables, of T steps, of a configuration that `validate` accepts."""
    return schedule_from_betas(build_betas(config))


def image_shape(config: Config) -> tuple[int, int, int]:
    """Gives (H, W, C) of a configuration whose `data.channels` is known.

    Raises:
      ValueError: `data.channels` is None.
    """
    if config.data.channels is None:
        raise ValueError("data.channels is None: take it from the images before the network is made")
    return config.data.height, config.data.width, config.data.channels


def build_unet(config: Config) -> UNet:
    """Makes the network: as many channels out as the images have, twice as many for a learned variance.

    Args:
      config: a configuration that `validate` accepts, whose `data.channels` is known.

    Returns:
      the `UNet`, without parameters.

    Raises:
      ValueError: `data.channels` is None.
    """
    channels = image_shape(config)[-1]
    return _unet(config, out_channels=2 * channels if config.diffusion.variance in LEARNED_VARIANCES else channels)


def matmul_precision(config: Config) -> contextlib.AbstractContextManager[Any]:
    """Gives the context in which float32 products have the precision that `train.matmul_precision` says."""
    name = config.train.matmul_precision
    return jax.default_matmul_precision(None if name == "default" else name)


def _unet(config: Config, *, out_channels: int) -> UNet:
    model = config.model
    return UNet(
        width=model.width,
        multipliers=model.multipliers,
        blocks=model.blocks,
        attention_resolutions=model.attention_resolutions,
        heads=model.heads,
        dropout=model.dropout,
        out_channels=out_channels,
        groups=model.groups,
        num_classes=model.num_classes,
        remat=config.train.remat,
        dtype=jnp.bfloat16 if config.train.precision == "bfloat16" else jnp.float32,
    )


# Kept beside what it made


def save_config(config: Config, path: str | Path) -> None:
    """Writes a configuration as JSON; the file is there whole or not at all.

    Args:
      config: any configuration.
      path: the file; its folder is made if it is not there.

    Raises:
      UserError: it cannot be written; says why.
    """
    text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
    write_whole(Path(path), lambda file: file.write(text.encode("ascii")))


def read_config(path: str | Path) -> Config:
    """Reads what `save_config` wrote.

    A field that the file does not have (it was added since) takes its default, so that old runs stay readable.

    Args:
      path: the file.

    Returns:
      the `Config`.

    Raises:
      UserError: the file is missing or is no JSON, a key is unknown or a value of the wrong kind; names the file.
    """
    try:
        loaded = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged, it is no whole JSON file: {error}") from None
    try:
        return _from_json(Config, loaded, "")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _from_json(kind: type, loaded: Any, section: str) -> Any:
    if not isinstance(loaded, dict):
        raise UserError(f"{section.rstrip('.') or 'the configuration'} must be an object in braces, not {loaded!r:.40}")
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in loaded.items():
        name = section + key
        if key not in hints:
            raise UserError(f"unknown key {name}{nearest(name, leaves(Config))}")
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _from_json(hints[key], value, f"{name}.")
            continue
        try:
            values[key] = cast(hints[key], value)
        except TypeError as error:
            raise UserError(f"{name} {error}") from None
    return kind(**values)


def differences(old: Config, new: Config) -> list[str]:
    """Lists the fields that keep one run from being continued as the other.

    Args:
      old: the configuration found.
      new: the configuration asked for.

    Returns:
      one line a field; fields that change no number of a step (how many steps, how often to save) are left out.

    >>> differences(Config(), Config(train=TrainConfig(batch_size=64, steps=10)))
    ['train.batch_size: 128 there, 64 here']
    """
    pairs = {name: (value_of(old, name), value_of(new, name)) for name, leaf in leaves(Config).items() if not leaf.free}
    return [f"{name}: {there!r} there, {here!r} here" for name, (there, here) in pairs.items() if there != here]


def check_same_run(file: Path, config: Config) -> None:
    """Holds a configuration against the one in a run's folder, if there is one.

    Args:
      file: what `save_config` wrote there, or would.
      config: the configuration asked for.

    Raises:
      UserError: the folder holds a run that cannot be continued as this one, and in what they differ.
    """
    different = differences(read_config(file), config) if file.exists() else []
    if different:
        raise UserError(
            f"{file.parent} holds a run of another configuration ({'; '.join(different)}): "
            "use its configuration, or another --workdir"
        )
