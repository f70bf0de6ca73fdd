"""From a run's configuration and a sampler's to the chain that draws its images."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array

from ddpm_jax.config import Config
from ddpm_jax.generation.sampler_config import SamplerConfig, check_unlabeled, cycle_of, number_of_class
from ddpm_jax.guidance import timesteps_between
from ddpm_jax.networks import Network, Params, predict_with
from ddpm_jax.reverse import Clip, DynamicThreshold
from ddpm_jax.run.build import build_betas
from ddpm_jax.samplers.by_name import make_sampler
from ddpm_jax.samplers.chain import Sampler
from ddpm_jax.samplers.respacing import default_spacing
from ddpm_jax.system.errors import UserError

MakeChain = Callable[[Params, Array | None], Sampler]
"""(params, labels) to the sampler of images with these labels, (B,) int32; None for an unconditional run."""


def labels_of(config: Config, sampler_config: SamplerConfig, indices: Array) -> Array | None:
    """Returns the class labels of a job's images from their indices, (B,) to (B,) int32; None if unconditional."""
    if not config.model.num_classes:
        return None
    labels = jnp.asarray(cycle_of(config, sampler_config), jnp.int32)
    return labels[indices % len(labels)]


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
