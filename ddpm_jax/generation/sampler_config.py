"""From a run's configuration and a sampler's to the chain that draws its images."""

import dataclasses
import math
import typing
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array

from ddpm_jax.config import Config
from ddpm_jax.guidance import timesteps_between
from ddpm_jax.networks import Network, Params, predict_with
from ddpm_jax.reverse import Clip, DynamicThreshold
from ddpm_jax.run.build import build_betas
from ddpm_jax.run.fields import nearest
from ddpm_jax.samplers.by_name import SamplerName, make_sampler
from ddpm_jax.samplers.chain import Sampler
from ddpm_jax.samplers.ddim import EpsAfterClipping
from ddpm_jax.samplers.respacing import default_spacing
from ddpm_jax.system.errors import UserError

_MOST_COLUMNS = 32
_MOST_SHOWN = 200  # characters of a list of classes in one line

MakeChain = Callable[[Params, Array | None], Sampler]
"""(params, labels) to the sampler of images with these labels, (B,) int32; None for an unconditional run."""


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How images are drawn from a trained network."""

    sampler: SamplerName = "ancestral"
    """Algorithm 2 of the paper, or a sampler for fewer steps."""
    steps: int | None = None
    """Number of steps; all T of the schedule if not given."""
    spacing: str | None = None
    """Timesteps of a shorter chain: linspace, leading, trailing, quadratic, cubic, log_snr, karras, or sections
    ("10,20,30"); if not given, the run's diffusion.spacing, or what suits the sampler and the number of steps."""
    eta: float | None = None
    """Share of noise in DDIM, 0 (default) to 1."""
    clip: typing.Literal["on", "off", "dynamic"] | None = None
    """Clip the predicted x0 at every step: to [-1, 1] (on), not at all (off), or by dynamic thresholding, for large
    guidance scales; as in training's configuration if not given."""
    dynamic_quantile: float = 0.995
    """Quantile of the magnitudes of an image's pixels that --clip dynamic clips to."""
    eps_after_clipping: EpsAfterClipping | None = None
    """How DDIM gets eps after x0 is clipped: recompute (from the clipped x0; default) or network (the network's own
    eps)."""
    guidance_scale: float = 1.0
    """Scale s of classifier-free guidance, s eps(x, label) - (s - 1) eps(x); 1: none."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only at noise levels sigma = sqrt(1 / alphas_bar - 1) above the first number and up to the second (images
    are in [-1, 1]); at all levels if not given."""
    labels: tuple[str | int, ...] = ()
    """Classes of the images of a class-conditional run, by number or name, repeated in turn; all classes if none are
    given. "help" prints the classes."""

    def alone(self) -> "SamplerConfig":
        """Returns the sampler's part of a script's options, which extend it."""
        return SamplerConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(SamplerConfig)})


def labels_of(config: Config, sampler_config: SamplerConfig, indices: Array) -> Array | None:
    """Returns the class labels of a job's images from their indices, (B,) to (B,) int32; None if unconditional."""
    if not config.model.num_classes:
        return None
    labels = jnp.asarray(cycle_of(config, sampler_config), jnp.int32)
    return labels[indices % len(labels)]


def cycle_of(config: Config, sampler_config: SamplerConfig) -> tuple[int, ...]:
    """Returns the class labels that the images of a job take in turn; none if the run is unconditional."""
    return tuple(map(int, sampler_config.labels)) or tuple(range(config.model.num_classes))


def list_classes(names: Sequence[str], numbers: Sequence[int] | None = None) -> str:
    """Returns classes with their names, all of them if none are given.

    >>> list_classes(["cat", "dog"])
    '0 (cat), 1 (dog)'
    """
    numbers = range(len(names)) if numbers is None else numbers
    return ", ".join(
        f"{number} ({names[number]})" if names[number] != f"{number}" else f"{number}" for number in numbers
    )


def default_columns(config: Config, sampler_config: SamplerConfig, number: int) -> int:
    """Returns the columns of a grid of a job's first images: about as many as rows, and each of a single class."""
    square, classes = math.ceil(math.sqrt(number)), len(cycle_of(config, sampler_config))
    return classes * max(1, round(square / classes)) if 1 < classes <= min(number, _MOST_COLUMNS) else square


def number_of_class(given: str | int, names: Sequence[str], num_classes: int, *, option: str) -> int:
    """Returns the number of the class that a user named.

    Args:
      given: its number, or its name. A name that is the number of another class is refused; "name:3" and "number:3" say
        which of the two is meant.
      names: of the classes in order; may be empty.
      num_classes: of the run; 0 if it is unconditional.
      option: for messages.

    Raises:
      UserError: there is no such class; the message names the nearest.

    >>> number_of_class("dog", ["cat", "dog"], 2, option="--label"), number_of_class("0", [], 2, option="--label")
    (1, 0)
    """
    if not num_classes:
        raise UserError(f"{option} needs a class-conditional run; this one is unconditional (model.num_classes=0)")
    kind, _, rest = str(given).partition(":")
    if str(given) in names or kind not in ("name", "number"):
        kind, rest = "", str(given)
    by_name = [number for number, name in enumerate(names) if name == rest and kind != "number"]
    # Only a class has a number: -1 and 10 of 10 classes are refused, as words are.
    by_number = [int(rest)] if kind != "name" and rest.isdecimal() and int(rest) < num_classes else []
    if isinstance(given, int):
        by_name = []
    found = sorted({*by_name, *by_number})
    if len(found) == 1:
        return found[0]
    if found:
        known = " and ".join(f"class {number} ({names[number]})" for number in found)
        raise UserError(f"{option} {given} may be {known}: write name:{rest} or number:{rest}")
    every = f"0 to {num_classes - 1}"
    if [*names] != [str(number) for number in range(len(names))]:
        shown = list_classes(names)
        every = shown if len(shown) <= _MOST_SHOWN else f"{every}; {option} help lists their names"
    hint = nearest(rest, names) if names and not rest.lstrip("-").isdecimal() else ""
    raise UserError(f"{option} {given}: the run's classes are {every}{hint}")


def check_unlabeled(config: Config, what: str, remedy: str) -> None:
    """Checks that the network of a class-conditional run has learned to predict without a label.

    Args:
      config: of the run.
      what: needs this, for the message.
      remedy: what to do instead, for the message.

    Raises:
      UserError: it was trained without label dropout.
    """
    if config.model.num_classes and not config.train.label_dropout:
        raise UserError(
            f"{what} needs a run trained with label dropout; this one never learned to predict without a label "
            f"(train.label_dropout=0): {remedy}, or train a run with --train.label-dropout 0.1"
        )


def spacing_of(config: Config, sampler_config: SamplerConfig) -> str:
    """Returns the spacing of a chain's timesteps: as asked for, as the run has it, or what suits the sampler."""
    default = default_spacing(sampler_config.sampler, sampler_config.steps)
    return sampler_config.spacing or config.diffusion.spacing or default


def make_chain(
    config: Config, network: Network, sampler_config: SamplerConfig, *, extra_timesteps: Sequence[int] = ()
) -> MakeChain:
    """Makes the sampler of a run.

    Args:
      config: of the run.
      network: of the run.
      sampler_config: which sampler, and its options.
      extra_timesteps: 0-based timesteps that the chain includes besides.

    Returns:
      the function from parameters and labels to the sampler, to be called where they are traced.

    Raises:
      UserError: labels or guidance for a run without classes, a label out of range, or what `make_sampler` refuses.
    """
    classes, labels, scale = config.model.num_classes, sampler_config.labels, sampler_config.guidance_scale
    if not classes and (labels or scale != 1):
        raise UserError(
            f"{'--labels' if labels else '--guidance-scale'} needs a class-conditional run; this one is unconditional "
            "(model.num_classes=0)"
        )
    for label in labels:
        if not isinstance(label, int):
            raise TypeError(f"labels must be numbers here, not {label!r}: load_job takes names")
        number_of_class(label, (), classes, option="--labels")
    if not 0 <= scale < float("inf"):
        raise UserError(f"--guidance-scale {scale} must be at least 0")
    if scale != 1:
        check_unlabeled(config, f"--guidance-scale {scale}", "use --guidance-scale 1")
    betas, diffusion = build_betas(config), config.diffusion
    clip_x0: Clip = diffusion.clip_x0 if sampler_config.clip is None else sampler_config.clip == "on"
    if sampler_config.clip == "dynamic":
        clip_x0 = DynamicThreshold(sampler_config.dynamic_quantile)
        if not 0 < clip_x0.quantile < 1:
            raise UserError(f"--dynamic-quantile {clip_x0.quantile} must be above 0 and below 1, such as 0.995")
    elif sampler_config.dynamic_quantile != SamplerConfig.dynamic_quantile:
        raise UserError(f"--dynamic-quantile {sampler_config.dynamic_quantile} needs --clip dynamic")
    guided_timesteps = None
    if sampler_config.guidance_interval is not None:
        if scale == 1:
            raise UserError("--guidance-interval needs --guidance-scale: at scale 1 there is no guidance")
        try:
            guided_timesteps = timesteps_between(betas, *sampler_config.guidance_interval)
        except ValueError as error:
            raise UserError(f"--guidance-interval: {error}") from None

    def make(params: Params, labels: Array | None) -> Sampler:
        return make_sampler(
            sampler_config.sampler,
            betas,
            predict_with(
                network,
                params,
                labels,
                guidance_scale=scale,
                guided_timesteps=guided_timesteps,
                variance=diffusion.variance,
            ),
            num_steps=sampler_config.steps,
            spacing=spacing_of(config, sampler_config),
            extra_timesteps=extra_timesteps,
            eta=sampler_config.eta,
            eps_after_clipping=sampler_config.eps_after_clipping,
            prediction=diffusion.prediction,
            variance=diffusion.variance,
            clip_x0=clip_x0,
        )

    try:
        make(None, None if not classes else jnp.zeros(1, jnp.int32))  # nothing of the network is evaluated
    except ValueError as error:
        raise UserError(f"{error}") from error
    return make
