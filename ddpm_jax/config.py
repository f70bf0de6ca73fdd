"""The configuration of a run: typed, frozen, saved beside what it made.

A run is a pure function of its configuration, so all that shapes its numbers is a field here. An experiment is a file
that sets `config`; it is loaded, checked as a whole, and kept as JSON in the run's folder.
"""

import dataclasses
import typing
from dataclasses import field

from ddpm_jax.bound import Cdf
from ddpm_jax.losses import Weighting
from ddpm_jax.reverse import Prediction, Variance
from ddpm_jax.schedules import ScheduleName
from ddpm_jax.time_sampling import TimeSamplingName

LossKind = typing.Literal["simple", "vlb", "hybrid"]
Precision = typing.Literal["float32", "bfloat16"]
MatmulPrecision = typing.Literal["default", "high", "highest"]
Parallel = typing.Literal["jit", "pmap"]
BestBy = typing.Literal["loss", "eval_loss"]
OnUnreadable = typing.Literal["refuse", "skip"]

_FREE: dict[str, bool] = {"free": True}
# A field marked so may differ between a run and its continuation: it changes how far or how fast a run goes and what
# it writes about itself, but none of its numbers at a given step.


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images."""

    source: str = "digits"
    """digits (scikit-learn's), folder, npz, npy, idx (MNIST's format), cifar10, tfds:NAME (tensorflow-datasets), or
    your own as my_data.py:function: it takes this section and returns a ddpm_jax.data.source.Source."""
    path: str = field(default="", metadata=_FREE)
    """The folder of images or idx files, the .npz or .npy, CIFAR-10's archive, TFDS's data_dir; none for the digits."""
    split: str = "train"
    """train, test or all; for TFDS any split that it knows."""
    height: int = 8
    """Height of the images in pixels; those of a folder are resized and cropped to it."""
    width: int = 8
    """Width of the images in pixels."""
    channels: int | None = 1
    """1 gray, 3 color, 4 color with alpha; None: as the folder's files are (they must agree)."""
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
    """Which network."""

    network: str = ""
    """Your own network, as my_net.py:function: the function takes the whole Config and returns a Linen module or a
    ddpm_jax.networks.Network. If empty, the paper's U-Net, which the fields below describe."""
    width: int = 128
    """Channels of the first level."""
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    """Channels of each level, in units of the width; one level a number."""
    num_res_blocks: int = 2
    """Residual blocks of each level on the way down; one more on the way up."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Feature heights at which attention follows every block."""
    num_heads: int = 1
    """Heads of each attention; must divide the channels of every level."""
    num_groups: int = 32
    """Groups of each group normalization; must divide the channels of every level."""
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
    time_sampling: TimeSamplingName = "uniform"
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
    warmup_steps: int = 5000
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
    """How many devices share one copy of parameters, average and optimizer, instead of each having its own."""
    grad_accum_steps: int = field(default=1, metadata=_FREE)
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
    """How many of the checkpoints with the lowest loss are kept, beside the newest."""
    best_by: BestBy = "loss"
    """Which loss keep_best compares: the mean training loss since the checkpoint before, or eval_loss (see eval)."""
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
class EvalConfig:
    """How it is evaluated while it trains."""

    every: int = field(default=0, metadata=_FREE)
    """Steps between evaluations of the loss on held-out images (the test split), with the EMA weights; 0: none."""
    num: int = field(default=1024, metadata=_FREE)
    """Number of held-out images, spread evenly over the test split; only losses of the same number are comparable."""


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
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
