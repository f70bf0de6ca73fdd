"""From a run's configuration and a choice of sampler to the chain that draws its images."""

import dataclasses
import typing
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array

from ddpm_jax.config import Config
from ddpm_jax.networks import Params, predict_with
from ddpm_jax.run.build import build_betas, build_network
from ddpm_jax.samplers.by_name import SamplerName, make_sampler
from ddpm_jax.samplers.chain import Sampler
from ddpm_jax.samplers.ddim import EpsAfterClipping
from ddpm_jax.system.errors import UserError

MakeChain = Callable[[Params, Array | None], Sampler]
"""(params, labels) to the sampler of images with these labels, (B,) int32; None for an unconditional run."""


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How images are drawn from a network that is there."""

    sampler: SamplerName = "ancestral"
    """Algorithm 2 of the paper, or a sampler for fewer steps."""
    steps: int | None = None
    """Steps of the chain; all T of the schedule if not given."""
    spacing: str | None = None
    """Which times a shorter chain visits: linspace, leading, trailing, quadratic, log_snr, or sections ("10,20,30");
    what suits the sampler and the number of steps if not given."""
    eta: float | None = None
    """Share of the noise in DDIM, 0 to 1; 0 if not given."""
    clip: typing.Literal["on", "off"] | None = None
    """Whether the predicted clean image is clipped to [-1, 1] at every step; as the run says if not given."""
    eps_after_clipping: EpsAfterClipping | None = None
    """Where a clipped image leaves the noise in DDIM: x0, taken anew from it, or network, as it was said; x0 if not
    given."""
    guidance_scale: float = 1.0
    """Classifier-free guidance: s eps(x, label) - (s - 1) eps(x); 1: none."""
    labels: tuple[int, ...] = ()
    """Labels of the images of a conditional run, one after the other and again from the first; all classes if none."""

    def alone(self) -> "SamplerConfig":
        """Takes the choice out of a script's options, which are one with more fields."""
        return SamplerConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(SamplerConfig)})


def labels_of(config: Config, choice: SamplerConfig, indices: Array) -> Array | None:
    """Gives the labels of a job's images by their indices, (B,) to (B,) int32; None for an unconditional run."""
    if not config.model.num_classes:
        return None
    labels = jnp.asarray(choice.labels or range(config.model.num_classes), jnp.int32)
    return labels[indices % len(labels)]


def make_chain(config: Config, choice: SamplerConfig, *, visited: Sequence[int] = ()) -> MakeChain:
    """Makes the rule of a run's chain.

    Args:
      config: of the run.
      choice: of the sampler.
      visited: 0-based times that the chain visits besides.

    Returns:
      the function from parameters and labels to the sampler, to be called where they are traced.

    Raises:
      UserError: labels or guidance for a run without classes, a label that is none, or what `make_sampler` refuses.
    """
    classes = config.model.num_classes
    if not classes and (choice.labels or choice.guidance_scale != 1):
        asked = "--labels" if choice.labels else "--guidance-scale"
        raise UserError(f"{asked}: this run is unconditional (model.num_classes is 0), it knows no labels")
    for label in choice.labels:
        if not 0 <= label < classes:
            raise UserError(f"--labels {label}: the run's classes are 0 to {classes - 1}")
    if not 0 <= choice.guidance_scale < float("inf"):
        raise UserError(f"--guidance-scale {choice.guidance_scale} must be at least 0")
    network, betas, diffusion = build_network(config), build_betas(config), config.diffusion

    def make(params: Params, labels: Array | None) -> Sampler:
        predict = predict_with(
            network, params, labels, guidance_scale=choice.guidance_scale, variance=diffusion.variance
        )
        return make_sampler(
            choice.sampler,
            betas,
            predict,
            num_steps=choice.steps,
            spacing=choice.spacing,
            visited=visited,
            eta=choice.eta,
            eps_after_clipping=choice.eps_after_clipping,
            prediction=diffusion.prediction,
            variance=diffusion.variance,
            clip_x0=diffusion.clip_x0 if choice.clip is None else choice.clip == "on",
        )

    try:
        make(None, None if not classes else jnp.zeros(1, jnp.int32))  # the network is not asked yet
    except ValueError as error:
        raise UserError(f"{error}") from error
    return make
