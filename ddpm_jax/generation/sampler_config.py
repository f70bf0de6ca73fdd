"""From a run's configuration and a sampler's to the chain that draws its images."""

import dataclasses
import typing
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array

from ddpm_jax.config import Config
from ddpm_jax.networks import Network, Params, predict_with
from ddpm_jax.run.build import build_betas
from ddpm_jax.samplers.by_name import SamplerName, make_sampler
from ddpm_jax.samplers.chain import Sampler
from ddpm_jax.samplers.ddim import EpsAfterClipping
from ddpm_jax.system.errors import UserError

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
    """Timesteps of a shorter chain: linspace, leading, trailing, quadratic, log_snr, or sections ("10,20,30"); if not
    given, what suits the sampler and the number of steps."""
    eta: float | None = None
    """Share of noise in DDIM, 0 (default) to 1."""
    clip: typing.Literal["on", "off"] | None = None
    """Whether to clip the predicted x0 to [-1, 1] at every step; as in training's configuration if not given."""
    eps_after_clipping: EpsAfterClipping | None = None
    """How DDIM gets eps after x0 is clipped: recompute (from the clipped x0; default) or network (the network's own
    eps)."""
    guidance_scale: float = 1.0
    """Scale s of classifier-free guidance, s eps(x, label) - (s - 1) eps(x); 1: none."""
    labels: tuple[int, ...] = ()
    """Class labels of the images of a class-conditional run, repeated in turn; all classes if none are given."""

    def alone(self) -> "SamplerConfig":
        """Returns the sampler's part of a script's options, which extend it."""
        return SamplerConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(SamplerConfig)})


def labels_of(config: Config, sampler_config: SamplerConfig, indices: Array) -> Array | None:
    """Returns the class labels of a job's images from their indices, (B,) to (B,) int32; None if unconditional."""
    if not config.model.num_classes:
        return None
    labels = jnp.asarray(sampler_config.labels or range(config.model.num_classes), jnp.int32)
    return labels[indices % len(labels)]


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
        if not 0 <= label < classes:
            raise UserError(f"--labels {label}: the run's classes are 0 to {classes - 1}")
    if not 0 <= scale < float("inf"):
        raise UserError(f"--guidance-scale {scale} must be at least 0")
    betas, diffusion = build_betas(config), config.diffusion

    def make(params: Params, labels: Array | None) -> Sampler:
        return make_sampler(
            sampler_config.sampler,
            betas,
            predict_with(network, params, labels, guidance_scale=scale, variance=diffusion.variance),
            num_steps=sampler_config.steps,
            spacing=sampler_config.spacing,
            extra_timesteps=extra_timesteps,
            eta=sampler_config.eta,
            eps_after_clipping=sampler_config.eps_after_clipping,
            prediction=diffusion.prediction,
            variance=diffusion.variance,
            clip_x0=diffusion.clip_x0 if sampler_config.clip is None else sampler_config.clip == "on",
        )

    try:
        make(None, None if not classes else jnp.zeros(1, jnp.int32))  # nothing of the network is evaluated
    except ValueError as error:
        raise UserError(f"{error}") from error
    return make
