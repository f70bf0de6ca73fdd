"""The configuration of a run: typed, frozen, and saved beside what the run made.

A run is a pure function of its configuration, so everything that shapes its numbers is a field here, with the range of
its values. An experiment is a file that sets `config`.
"""

import dataclasses
import math
import typing
from dataclasses import field
from typing import Annotated

from ddpm_jax.names import (
    WIDEST,
    Cdf,
    Prediction,
    SamplerName,
    ScheduleName,
    Spacing,
    TimeSamplingName,
    Variance,
    Weighting,
)

LossKind = typing.Literal["simple", "vlb", "hybrid"]
Optimizer = typing.Literal["adam", "adamw", "muon"]
Decay = typing.Literal["constant", "cosine", "inverse_sqrt"]
Precision = typing.Literal["float32", "bfloat16"]
MatmulPrecision = typing.Literal["default", "high", "highest"]
Parallel = typing.Literal["jit", "pmap"]
OnUnreadable = typing.Literal["refuse", "skip"]

FROM_PYTHON = "<python>"
"""Value of `model.network` or `data.source` in the record of a run whose network or images were given in Python."""

_FREE: dict[str, bool] = {"free": True}
# A field marked so may change when a run is resumed: it changes how far or how fast the run goes and what it logs, but
# none of its numbers at a given step. The learning rate does; where it changed is part of the record of the run.


@dataclasses.dataclass(frozen=True)
class Range:
    """The finite values that a field may take; in a tuple, each entry."""

    at_least: float = -math.inf
    above: float = -math.inf
    below: float = math.inf
    at_most: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.at_least <= value <= self.at_most and self.above < value < self.below

    def __str__(self) -> str:
        bounds = {"at least": self.at_least, "above": self.above, "below": self.below, "at most": self.at_most}
        return " and ".join(f"{word} {bound}" for word, bound in bounds.items() if math.isfinite(bound))


# Larger values are typing errors that would fill the memory before they fail.
Count = Annotated[int, Range(at_least=1, below=2**31)]
CountOrZero = Annotated[int, Range(at_least=0, below=2**31)]
Size = Annotated[int, Range(at_least=1, below=2**16)]
NotNegative = Annotated[float, Range(at_least=0)]
Positive = Annotated[float, Range(above=0)]
Probability = Annotated[float, Range(at_least=0, below=1)]
Beta = Annotated[float, Range(above=0, below=1)]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The images."""

    source: str = "digits"
    """digits (scikit-learn's), folder, npz, npy, idx (MNIST's format), cifar10, tfds:NAME (tensorflow-datasets), or
    your own as my_data.py:function: it takes this section and returns a ddpm_jax.data.source.Source."""
    path: str = field(default="", metadata=_FREE)
    """The folder of images or idx files, the .npz or .npy file, CIFAR-10's archive, or the data_dir of TFDS; unused for
    digits."""
    split: str = "train"
    """train, test or all; for TFDS, any of its splits."""
    height: Size = 8
    """Image height in pixels; images of a folder are resized and center-cropped to it."""
    width: Size = 8
    """Image width in pixels."""
    channels: Annotated[int | None, Range(at_least=1, below=2**16)] = 1
    """1 (gray), 3 (color) or 4 (color with alpha); None: as in the files of the folder, which must agree."""
    flip: bool = False
    """Mirror each image left to right with probability 0.5 at every step."""
    on_unreadable: OnUnreadable = "refuse"
    """What to do about unreadable image files in a folder: refuse to train, or skip them with a warning."""
    max_megapixels: NotNegative = field(default=179.0, metadata=_FREE)
    """Image files with more megapixels than this count as unreadable (a small file can unpack to many GiB); 0: none."""
    white: Annotated[int, Range(at_least=1, below=2**16)] = 2**16 - 1
    """The level of 16-bit gray files that becomes 255: 4095 for scans of 12 bits."""
    holdout: Probability = 0.0
    """Fraction of the images, chosen by their pixels, to hold out as the test split of a set that has none."""
    memory_gib: NotNegative = field(default=8.0, metadata=_FREE)
    """Data sets larger than this when decoded are streamed from disk instead of kept in memory."""
    device_gib: NotNegative = field(default=1.0, metadata=_FREE)
    """Data sets up to this size are kept on every device, where the compiled step gathers its batch; 0: none."""
    workers: CountOrZero = field(default=0, metadata=_FREE)
    """Processes that decode a streamed data set; 0: threads of the training process."""


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The diffusion."""

    schedule: ScheduleName = "linear"
    """How beta grows with t."""
    num_steps: Annotated[int, Range(at_least=1, below=2**20)] = 1000
    """T, the number of diffusion steps. If T is not 1000, scale the betas by 1000/T."""
    beta_start: Beta = 1e-4
    """The first beta; not used by jsd, cosine and const."""
    beta_end: Beta = 0.02
    """The last beta; not used by jsd and cosine."""
    zero_terminal_snr: bool = False
    """Rescale the betas so that no signal is left at the last step; not with prediction eps or mean."""
    prediction: Prediction = "eps"
    """What the network predicts."""
    variance: Variance = "fixed_large"
    """The variance of the reverse steps."""
    clip_x0: bool = True
    """Clip the predicted x_0 to [-1, 1] at every reverse step."""
    spacing: Spacing | None = None
    """Spacing of the timesteps where sample.py draws in fewer steps than T; None: what suits its sampler."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network."""

    network: str = ""
    """Your own network, as my_net.py:function: the function takes the whole Config and returns a Linen module or a
    ddpm_jax.Network. If empty, the paper's U-Net, which the fields below describe."""
    # The timestep embedding needs two frequencies, each with its sine and cosine.
    width: Annotated[int, Range(at_least=4, below=2**16)] = 128
    """Channels of the first level."""
    channel_mult: tuple[Size, ...] = (1, 2, 2, 2)
    """Channels of each level as multiples of the width, one number per level."""
    num_res_blocks: Annotated[int, Range(at_least=1, below=2**10)] = 2
    """Residual blocks per level on the way down; one more on the way up."""
    attention_resolutions: tuple[Count, ...] = (16,)
    """Heights of the feature maps at which each block is followed by attention."""
    mid_attention: bool = True
    """Attention in the middle block."""
    num_heads: Size = 1
    """Attention heads; must divide the channels of every level."""
    num_head_channels: CountOrZero = 0
    """Channels of each attention head, instead of num_heads: wider levels have more heads; 0: num_heads heads."""
    num_groups: Size = 32
    """Groups of the group normalizations; must divide the channels of every level."""
    norm_eps: Positive = 1e-6
    """Added to the variance in the group normalizations; PyTorch's default is 1e-5."""
    symmetric_downsampling: bool = False
    """Zero padding of the downsampling convolutions: on every side (PyTorch's way), or at the bottom and right only
    (TensorFlow's, the paper's)."""
    freq_shift: CountOrZero = 1
    """Frequencies of the timestep embedding: 10000^(-k / (width / 2 - freq_shift)) for k = 0, 1, .."""
    cos_first: bool = False
    """Order of the timestep embedding: cosines before sines."""
    timestep_scale: Positive = 1.0
    """Multiply timesteps by this before their embedding; improved-diffusion's rescale_timesteps is 1000/T."""
    embed_channels: CountOrZero = 0
    """Size of the sinusoidal timestep embedding; 0: the width."""
    scale_shift_norm: bool = False
    """Let the timestep embedding scale and shift each residual block's second norm, instead of being added before."""
    resblock_updown: bool = False
    """Change the resolution between levels by residual blocks, instead of convolutions."""
    dropout: Probability = 0.1
    """Dropout rate in each residual block."""
    num_classes: CountOrZero = 0
    """Number of classes of a class-conditional network, the same as in the data; 0: unconditional."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The training objective."""

    kind: LossKind = "simple"
    """simple: L_simple; vlb: the variational bound in bits/dim; hybrid: L_simple for the mean, the bound for the
    variance."""
    vlb_weight: Positive = 0.001
    """Weight of the bound in hybrid: of the sum of its T terms, in bits/dim."""
    weighting: Weighting = "none"
    """Weight of each timestep in L_simple by its signal-to-noise ratio; none is the paper's."""
    min_snr_gamma: Positive = 5.0
    """Cap on the signal-to-noise ratio with weighting min_snr."""
    time_sampling: TimeSamplingName = "uniform"
    """How the timesteps of a batch are drawn; loss_aware draws those with the largest loss most often (meant for
    vlb)."""
    cdf: Cdf = "tanh"
    """Normal CDF in the decoder term of the bound: the original code's tanh approximation, or the exact erf."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How it is trained."""

    steps: Count = field(default=800_000, metadata=_FREE)
    """Total number of training steps; a run with fewer is resumed to this many."""
    batch_size: Count = 128
    """Images per step, over all devices and hosts."""
    optimizer: Optimizer = "adam"
    """adam is the paper's; adamw also decays the weights; muon (experimental) orthogonalizes the updates of kernels and
    leaves the other parameters to Adam with Nesterov momentum."""
    weight_decay: NotNegative = 0.0
    """With adamw and muon: how much of each parameter (muon: of each kernel) a step takes off, times the learning
    rate."""
    learning_rate: Positive = field(default=2e-4, metadata=_FREE)
    """Learning rate after the warmup; another one on resume applies from there on."""
    warmup_steps: CountOrZero = field(default=5000, metadata=_FREE)
    """Steps from the beginning over which the learning rate rises linearly from 0; may change like the rate."""
    lr_decay: Decay = "constant"
    """The learning rate after the warmup: constant, falling to 0 along a half cosine, or as 1/sqrt(step)."""
    decay_steps: CountOrZero = 0
    """With lr_decay cosine, the step at which it reaches 0; with inverse_sqrt, the step from which it falls."""
    grad_clip: NotNegative = 1.0
    """Clip the global norm of the gradient to this; 0: no clipping."""
    label_dropout: Probability = 0.1
    """Probability of dropping an image's label, for classifier-free guidance."""
    ema_decay: Probability = 0.9999
    """Decay per step of the EMA weights, which samples are drawn from."""
    init_from: str = ""
    """Initial weights, where the shapes match: the EMA weights of another run (its folder), or a .safetensors file."""
    seed: Annotated[int, Range(at_least=0, below=2**32)] = 0
    """Random seed of the initial weights, the order of the images and every other random number of the run."""
    precision: Precision = "float32"
    """Type of the network's computation; parameters and statistics stay float32."""
    matmul_precision: MatmulPrecision = "default"
    """Precision of float32 products on accelerators (default: TF32 on recent GPUs, bfloat16 passes on TPUs)."""
    parallel: Parallel = field(default="jit", metadata=_FREE)
    """How a step is spread over the devices: jit over a mesh, or pmap."""
    devices: CountOrZero = field(default=0, metadata=_FREE)
    """Number of devices to train on, the first of those that JAX sees (on one host); 0: all of them."""
    fsdp: Count = field(default=1, metadata=_FREE)
    """Number of devices that share one copy of parameters, EMA weights and optimizer state."""
    grad_accum_steps: Count = field(default=1, metadata=_FREE)
    """Compute the gradient of a step in this many parts, for batches that do not fit the devices at once."""
    steps_per_call: Count = field(default=1, metadata=_FREE)
    """Run up to this many steps as one compiled program, for small networks on fast devices."""
    remat: bool = field(default=False, metadata=_FREE)
    """Recompute each block in the backward pass instead of keeping its activations: less memory, slower."""


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    """Averages of the weights whose width is chosen after training, beside the plain one (train.ema_decay)."""

    snapshots_every: CountOrZero = 0
    """Steps between snapshots of power-function averages, from which evaluate.py ema makes averages of any width; 0:
    none. Each takes 4 bytes per parameter and width, and all are kept."""
    sigma_rels: tuple[Annotated[float, Range(above=0, at_most=WIDEST)], ...] = (0.05, 0.10)
    """Widths of these averages, as fractions of the training so far."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints are kept."""

    every: Count = field(default=5000, metadata=_FREE)
    """Steps between checkpoints; the last step is always saved."""
    keep: Count = field(default=2, metadata=_FREE)
    """Number of newest checkpoints to keep."""
    keep_every: CountOrZero = field(default=0, metadata=_FREE)
    """Keep checkpoints of steps that are multiples of this for ever; 0: none."""
    keep_best: CountOrZero = field(default=0, metadata=_FREE)
    """Also keep this many checkpoints with the lowest loss, of those at multiples of checkpoints.every."""
    best_by: str = "loss"
    """What keep_best compares: loss (the mean training loss since the previous checkpoint), eval_loss, or a score of
    eval.fid_every such as FID or FD-EfficientNetLite0; lower is better."""
    minutes: NotNegative = field(default=0.0, metadata=_FREE)
    """Also save when this many minutes have passed since the last checkpoint; 0: by steps alone."""


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is logged during training."""

    every: Count = field(default=100, metadata=_FREE)
    """Steps between lines of metrics.jsonl; what is left over at the end of the run gets a line marked as final."""
    samples_every: CountOrZero = field(default=10_000, metadata=_FREE)
    """Steps between grids of samples; 0: none."""
    num_samples: Count = field(default=64, metadata=_FREE)
    """Images per grid."""
    sample_steps: CountOrZero = field(default=0, metadata=_FREE)
    """DDIM steps for a grid, all T of them if T is smaller; 0: all T steps of Algorithm 2."""
    tensorboard: bool = field(default=False, metadata=_FREE)
    """Also write metrics and grids for TensorBoard, into the run's folder (needs tensorboardX)."""
    wandb: str = field(default="", metadata=_FREE)
    """Weights & Biases project to log to (needs wandb and an account); empty: none."""
    peak_tflops: NotNegative = field(default=0.0, metadata=_FREE)
    """Peak TFLOP/s of one device, for its utilization; 0: looked up by the device's name, and left out if unknown."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How it is evaluated during training."""

    every: CountOrZero = field(default=0, metadata=_FREE)
    """Steps between evaluations of the loss on held-out images (the test split), with the EMA weights; 0: none."""
    num: Count = field(default=1024, metadata=_FREE)
    """Number of held-out images, spread evenly over the test split; only losses of the same number are comparable."""
    fid_every: CountOrZero = field(default=0, metadata=_FREE)
    """Steps between scores of samples drawn with the EMA weights: FID, or the Frechet distance in other features; 0:
    none."""
    fid_num: Annotated[int, Range(at_least=2)] = field(default=10_000, metadata=_FREE)
    """Number of samples; only scores of the same number are comparable, and papers use 50,000."""
    fid_sampler: SamplerName = field(default="ddim", metadata=_FREE)
    """Sampler of these samples."""
    fid_steps: CountOrZero = field(default=50, metadata=_FREE)
    """Number of its steps, T at most; 0: all T."""
    fid_reference: str = field(default="", metadata=_FREE)
    """Real images or statistics, as `evaluate.py fid` takes them; empty: the training images."""
    features: str = field(default="inception", metadata=_FREE)
    """inception (FID), efficientnet-lite0, or your own as my_features.py:function (both Frechet distances, not FID)."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    name: str = field(default="run", metadata=_FREE)
    """The run's name; by default, its folder is runs/NAME."""
    data: DataConfig = DataConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    ema: EmaConfig = EmaConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
