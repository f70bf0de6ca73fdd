"""Checks that a configuration can be trained: each value in its range, and all of them together."""

from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

from ddpm_jax.config import Config
from ddpm_jax.reverse import LEARNED_VARIANCES
from ddpm_jax.run.build import build_betas, unet_of
from ddpm_jax.run.fields import leaves, members, value_of, with_kinds
from ddpm_jax.system.errors import UserError
from ddpm_jax.unet import check_unet


def validate(config: Config) -> None:
    """Checks that a configuration can be trained: each value in its range, and all of them together.

    It does not look at the images, nor at the devices, so that it can run before hosts are joined.

    Args:
      config: any configuration.

    Raises:
      UserError: one line for the first error found: the field, its value, and what it must be.
    """
    config = with_kinds(config)
    for name, leaf in leaves(Config).items():
        value = value_of(config, name)
        entries = value if isinstance(value, tuple) else (value,)
        if leaf.range is not None and not all(entry in leaf.range for entry in entries if entry is not None):
            which = ": each entry must" if isinstance(value, tuple) else " must"
            optional = " or None" if type(None) in members(leaf.kind) else ""
            raise UserError(f"{name}={value}{which} be {leaf.range}{optional}")
        if isinstance(value, str) and "\0" in value:
            raise UserError(f"{name}={value!r} must not contain the character 0, which no path or name has")
    data, diffusion, model, train = config.data, config.diffusion, config.model, config.train
    if config.name in ("", ".", "..") or Path(config.name).name != config.name:
        raise UserError(f"name={config.name!r} must be the name of a folder, without a path")
    if not model.channel_mult:
        raise UserError("model.channel_mult is empty: give one number per level of the U-Net, such as 1 2 2 2")
    if train.parallel == "pmap" and train.fsdp > 1:
        raise UserError(
            f"train.parallel=pmap keeps a full copy of the state on every device, and train.fsdp={train.fsdp} shards "
            "it: use --train.parallel jit or --train.fsdp 1"
        )
    if train.weight_decay and train.optimizer == "adam":
        raise UserError(
            f"train.weight_decay={train.weight_decay:g} needs --train.optimizer adamw or muon: adam has none"
        )
    if (train.lr_decay == "constant") != (train.decay_steps == 0):
        raise UserError(
            f"train.decay_steps={train.decay_steps} does not fit train.lr_decay={train.lr_decay}: constant needs 0; "
            "cosine the step at which the learning rate reaches 0; inverse_sqrt that from which it falls"
        )
    if train.lr_decay == "cosine" and train.decay_steps <= train.warmup_steps:
        raise UserError(
            f"train.decay_steps={train.decay_steps} must be larger than train.warmup_steps={train.warmup_steps}, after "
            "which the learning rate falls"
        )
    if len({*config.ema.sigma_rels}) < max(2, len(config.ema.sigma_rels)):
        raise UserError(
            f"ema.sigma_rels={config.ema.sigma_rels} must be two or more different widths, such as 0.05 0.1: other "
            "widths are reconstructed from averages of several"
        )
    every, evaluated = config.checkpoints.every, config.eval.every
    if config.checkpoints.best_by == "eval_loss" and (not evaluated or every % evaluated):
        raise UserError(
            f"checkpoints.best_by=eval_loss needs an evaluation at every checkpoint, and eval.every={evaluated} does "
            f"not divide checkpoints.every={every}: use --eval.every {every}"
        )
    best_by, scored = config.checkpoints.best_by, config.eval.fid_every
    if best_by not in ("loss", "eval_loss") and (not scored or scored % every):
        raise UserError(
            f"checkpoints.best_by={best_by!r} is neither loss nor eval_loss, so it must be a score of eval.fid_every="
            f"{scored}, a multiple of checkpoints.every={every}: every scored step is then a checkpoint"
        )
    learned = diffusion.variance in LEARNED_VARIANCES
    if learned and config.loss.kind == "simple":
        raise UserError(
            f"diffusion.variance={diffusion.variance} is not trained by L_simple, which does not depend on it: use "
            "--loss.kind hybrid or vlb, or a fixed variance"
        )
    if not learned and config.loss.kind == "hybrid":
        raise UserError(
            f"loss.kind=hybrid trains a learned variance, and diffusion.variance={diffusion.variance} is fixed: use "
            "--diffusion.variance learned_range, or --loss.kind simple or vlb"
        )
    if config.loss.weighting != "none" and config.loss.kind == "vlb":
        raise UserError(
            f"loss.weighting={config.loss.weighting} applies to L_simple, not to loss.kind=vlb: use --loss.weighting "
            "none"
        )
    if diffusion.zero_terminal_snr and diffusion.num_steps < 2:
        raise UserError("diffusion.zero_terminal_snr needs diffusion.num_steps of at least 2, not 1")
    _check_end(config)
    try:
        if not model.network:
            check_unet(unet_of(config, out_channels=1), (data.height, data.width))
    except ValueError as error:
        raise UserError(str(error)) from None


def _check_end(config: Config) -> None:
    """Refuses a prediction from which x_0 cannot be recovered at t = T, where its weight in it vanishes."""
    diffusion, betas = config.diffusion, build_betas(config)
    before, last = np.append(1, np.cumprod(1 - betas))[-2:]
    weights = {"eps": np.sqrt(last), "mean": np.sqrt(before) * betas[-1] / (1 - last)}
    if weights.get(diffusion.prediction, 1) < np.finfo(np.float32).tiny:
        schedule = "zero-terminal-SNR" if diffusion.zero_terminal_snr else diffusion.schedule
        raise UserError(
            f"diffusion.prediction={diffusion.prediction} does not determine x_0 at the last step of the "
            f"{schedule} schedule, where alphas_bar is {last:.3g}: use --diffusion.prediction v or x0, or smaller betas"
        )


def shortest_period(config: Config) -> tuple[int, str]:
    """Returns the smallest number of steps after which something is due, and the field that says so."""
    periods = (
        "log.every",
        "log.samples_every",
        "eval.every",
        "eval.fid_every",
        "ema.snapshots_every",
        "checkpoints.every",
    )
    return min((value_of(config, name), name) for name in periods if value_of(config, name))


def most_steps(config: Config, periods: Iterable[int] = ()) -> int:
    """Returns the largest number of steps of a call: of those asked for, as many as come before something is due.

    Args:
      config: of the run.
      periods: the `every` of each hook that a caller adds.

    Returns:
      at least 2 where several are asked for, since a call of one is another program, which may round differently.
    """
    shortest = min(config.train.steps, shortest_period(config)[0], *filter(None, periods))
    return min(config.train.steps_per_call, max(2, shortest))


def warnings_of(config: Config) -> list[str]:
    """Lists the choices that are allowed but rarely intended.

    Args:
      config: a configuration that `validate` accepts.

    Returns:
      one line for each; none for the paper's configurations.
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
            f"the last step still contains signal (alphas_bar is {last:.2g} at T={diffusion.num_steps}), so samples "
            f"would start from the wrong prior: {remedy}"
        )
    heights = [data.height // 2**level for level in range(len(model.channel_mult))]
    unused = [resolution for resolution in model.attention_resolutions if resolution not in heights]
    if unused and not model.network:
        found.append(
            f"model.attention_resolutions {' '.join(map(str, unused))}: no level has this height (they have "
            f"{', '.join(map(str, heights))}), so it adds no attention"
        )
    if 0 < train.steps <= train.warmup_steps:
        found.append(
            f"train.warmup_steps={train.warmup_steps} does not end within train.steps={train.steps}: the learning rate "
            f"stays below {train.learning_rate:g}"
        )
    if train.lr_decay == "cosine" and train.steps > train.decay_steps:
        found.append(
            f"train.decay_steps={train.decay_steps}: the learning rate is 0 from there to train.steps={train.steps}"
        )
    every, name = shortest_period(config)
    if train.steps_per_call > every:
        found.append(
            f"train.steps_per_call={train.steps_per_call}: a call ends where something is due, here after "
            f"{name}={every} steps, so --train.steps-per-call {every} does the same"
        )
    loops = [name for name in ("grad_accum_steps", "steps_per_call") if getattr(train, name) > 1]
    if model.network and loops and jax.default_backend() == "cpu":
        found.append(
            f"train.{loops[0]}={getattr(train, loops[0])} runs {model.network} in a loop, where CPUs compute the "
            "gradients of Flax's nn.Conv many times slower without its argument "
            "conv_general_dilated=ddpm_jax.conv_general_dilated"
        )
    left = train.ema_decay**train.steps
    if left > 0.1:
        found.append(
            f"train.ema_decay={train.ema_decay:g} over train.steps={train.steps}: the EMA weights, from which samples "
            f"are drawn, still contain {left:.0%} of the untrained network; use a smaller decay"
        )
    return found
