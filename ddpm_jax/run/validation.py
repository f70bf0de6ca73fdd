"""Whether a configuration makes sense: every value in its range, and all of them together."""

from pathlib import Path

import numpy as np

from ddpm_jax.config import Config
from ddpm_jax.reverse import LEARNED_VARIANCES
from ddpm_jax.run.build import build_betas, unet_of
from ddpm_jax.run.fields import check_kinds, value_of
from ddpm_jax.system.errors import UserError
from ddpm_jax.unet import check_unet

# Does it make sense?

_AT_LEAST = {
    "data.height": 1,
    "data.width": 1,
    "data.workers": 0,
    "diffusion.num_steps": 1,
    "model.width": 4,  # The time's embedding needs two frequencies, each with its sine and cosine.
    "model.num_res_blocks": 1,
    "model.num_heads": 1,
    "model.num_groups": 1,
    "model.num_classes": 0,
    "train.steps": 1,
    "train.batch_size": 1,
    "train.warmup_steps": 0,
    "train.grad_clip": 0,
    "train.seed": 0,
    "train.fsdp": 1,
    "train.grad_accum_steps": 1,
    "checkpoints.every": 1,
    "checkpoints.keep": 1,
    "checkpoints.keep_every": 0,
    "checkpoints.keep_best": 0,
    "checkpoints.minutes": 0,
    "eval.every": 0,
    "eval.num": 1,
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
    check_kinds(config)
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
    for name in ("model.channel_mult", "model.attention_resolutions"):
        if any(entry < 1 for entry in value_of(config, name)):
            raise UserError(f"{name}={value_of(config, name)} must be integers of at least 1")
    if not model.channel_mult:
        raise UserError("model.channel_mult is empty: give one number for each level of the U-Net, such as 1 2 2 2")
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
    every, evaluated = config.checkpoints.every, config.eval.every
    if config.checkpoints.best_by == "eval_loss" and (not evaluated or every % evaluated):
        raise UserError(
            f"checkpoints.best_by=eval_loss needs an evaluation at every checkpoint, and eval.every={evaluated} does "
            f"not divide checkpoints.every={every}: use --eval.every {every}"
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
        if not model.network:
            check_unet(unet_of(config, out_channels=1), (data.height, data.width))
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
    heights = [data.height // 2**level for level in range(len(model.channel_mult))]
    unused = [resolution for resolution in model.attention_resolutions if resolution not in heights]
    if unused and not model.network:
        found.append(
            f"model.attention_resolutions {' '.join(map(str, unused))}: no level has this height (they have "
            f"{', '.join(map(str, heights))}), so no attention there"
        )
    if 0 < train.steps <= train.warmup_steps:
        found.append(
            f"train.warmup_steps={train.warmup_steps} is not over after train.steps={train.steps}: the learning rate "
            f"stays below {train.learning_rate:g}"
        )
    left = train.ema_decay**train.steps
    if left > 0.1:
        found.append(
            f"train.ema_decay={train.ema_decay:g} over train.steps={train.steps}: the average that is sampled from is "
            f"still {left:.0%} the untrained network; use a smaller decay"
        )
    return found
