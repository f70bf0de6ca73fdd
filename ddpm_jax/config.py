"""The configuration of a run: typed, frozen, saved beside what it made.

A run is a pure function of its configuration, so all that shapes its numbers is a field here.
"""

import dataclasses
import typing
from dataclasses import field

from ddpm_jax.reverse import Prediction, Variance
from ddpm_jax.schedules import ScheduleName

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
    """digits (scikit-learn's, 8x8), folder, idx (MNIST's file format), or tfds:NAME (tensorflow-datasets)."""
    path: str = ""
    """The folder of images, the folder of idx files, or TFDS's data_dir; not needed for the digits."""
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
    memory_gib: float = 8.0
    """Sets that are larger than this when decoded are read from disk batch by batch instead of kept in memory."""


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """Which diffusion."""

    schedule: ScheduleName = "linear"
    """How beta rises with t."""
    num_steps: int = 1000
    """T."""
    beta_start: float = 1e-4
    """The first beta."""
    beta_end: float = 0.02
    """The last beta."""
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
    """Attention heads."""
    groups: int = 32
    """Groups of each group normalisation; must divide the channels of every level."""
    dropout: float = 0.1
    """Dropout rate in each residual block."""


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
    ema_decay: float = 0.9999
    """Decay a step of the moving average of the parameters, from which samples are drawn."""
    seed: int = 0
    """From it come the first parameters, the order of the images and every random number of the run."""
    precision: Precision = "float32"
    """Type of the network's computation; parameters and statistics stay float32."""
    matmul_precision: MatmulPrecision = "default"
    """Precision of float32 products on accelerators (default: TF32 on new GPUs, bfloat16 passes on TPUs)."""
    parallel: Parallel = field(default="jit", metadata=_FREE)
    """How a step is spread over the devices: jit over a mesh, or pmap."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is kept."""

    every: int = field(default=5000, metadata=_FREE)
    """Steps between checkpoints; the last step is always saved."""
    keep: int = field(default=2, metadata=_FREE)
    """How many of the newest checkpoints are kept."""


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is written while it trains."""

    every: int = field(default=100, metadata=_FREE)
    """Steps between lines of metrics.jsonl."""
    samples_every: int = field(default=10_000, metadata=_FREE)
    """Steps between grids of samples; 0: none."""
    num_samples: int = field(default=64, metadata=_FREE)
    """Images of a grid."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    name: str = "run"
    """The run's name; its folder is runs/NAME if no other is given."""
    data: DataConfig = DataConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
