"""The loss on held-out images while a run trains: always of the same images, timesteps and noises."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import numpy as np
from jax import Array

from ddpm_jax.config import Config
from ddpm_jax.data.check import check_classes
from ddpm_jax.data.shared import count_shared
from ddpm_jax.data.source import Source
from ddpm_jax.data.sources import load_source
from ddpm_jax.keys import image_keys, split
from ddpm_jax.networks import Params
from ddpm_jax.pixels import to_float
from ddpm_jax.system.errors import NoSuchSplit, UserError
from ddpm_jax.system.mesh import batch_sharding, gather, replicated
from ddpm_jax.system.progress import say
from ddpm_jax.time_sampling import uniform_times
from ddpm_jax.training.hooks import Event
from ddpm_jax.training.setup import Setup


def load_test_split(config: Config) -> Source:
    """Opens the test split of a run's images.

    Raises:
      UserError: there is none, the run trains on it, or it cannot be read.
    """
    if config.data.split in ("test", "all"):
        raise UserError(
            f"eval.every={config.eval.every} evaluates on the test split, which data.split={config.data.split} trains "
            "on: use --data.split train, or --eval.every 0"
        )
    try:
        return load_source(dataclasses.replace(config.data, split="test"))
    except NoSuchSplit as error:
        raise UserError(
            f"eval.every={config.eval.every} needs held-out images: {error}; keep some for it with --data.holdout "
            "0.02, or turn it off with --eval.every 0"
        ) from error


def evaluated(config: Config, source: Source) -> np.ndarray:
    """Returns the indices of the held-out images that are evaluated: `config.eval.num`, spread evenly."""
    return np.arange(number := min(config.eval.num, source.num_examples)) * source.num_examples // number


def check_held_out(config: Config, source: Source, training: Source) -> None:
    """Warns if some of the images that are evaluated are training images, or if that is not known.

    Args:
      config: of the run.
      source: the held-out images.
      training: the training images; those on disk are not decoded for it.
    """
    indices = evaluated(config, source)
    shared = count_shared(source, training, indices, most_read=0)
    if shared is None:
        same = source.image_shape == training.image_shape
        reason = "they are too many to compare" if same else "they have another shape"
        say(f"whether held-out images ({source.name}) are among the training images is not known: {reason}")
    elif shared:
        say(
            f"warning: {shared} of the {len(indices)} held-out images ({source.name}) are also training images, so"
            " eval_loss is partly measured on training images"
        )


def evaluating(parts: Setup, source: Source) -> Callable[[Event], None]:
    r"""Returns the hook's function that logs the loss on held-out images, by quarter of the chain.

    .. math:: \frac{1}{N} \sum_i L(x_i, t_i, \epsilon_i; \bar\theta), \quad t_i \sim \mathrm{Uniform}\{0, .., T-1\}

    The loss is the run's objective with the EMA weights, without dropout or flips, and with the images' labels. Image
    i of the set has its timestep and its noise from its own key, which follows from the run's seed and i, so all
    evaluations of a run can be compared.

    Args:
      parts: of the run; `config.eval.num` images are evaluated, spread evenly over the set.
      source: the held-out images.

    Returns:
      a function that logs `eval_loss` and `eval_loss_quartiles`; None stands for a quarter without images, or a loss
      that is not finite.

    Raises:
      UserError: the images have another shape or other classes than those of the run.
    """
    config, mesh, num_steps = parts.config, parts.layout.mesh, parts.schedule.num_steps
    check_classes(config, source, training=False)
    indices = evaluated(config, source)
    number = len(indices)
    images = source.read(indices)
    labels = source.read_labels(indices) if config.model.num_classes and source.read_labels is not None else None
    # As many at a time as a device trains on at a time.
    each = max(
        1, config.train.batch_size // (config.train.grad_accum_steps * (config.train.devices or jax.device_count()))
    )
    size = mesh.size * min(each, math.ceil(number / mesh.size))

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def evaluate(ema: Params, key: Array, indices: Array, images: Array, labels: Array | None) -> tuple[Array, Array]:
        time_keys, noise_keys = split(image_keys(key, indices), 2)
        t = uniform_times(time_keys, num_steps)
        whole = gather(mesh, ema)
        predict = lambda x_t, t: parts.network.apply(whole, x_t, t, labels)
        return t, parts.objective(noise_keys, predict, to_float(images), t)

    def place(array: np.ndarray) -> Array:
        return jax.make_array_from_callback(array.shape, batch_sharding(mesh), array.__getitem__)

    def log_loss(event: Event) -> None:
        ema, found = event.state.ema, []
        for first in range(0, number, size):
            rows = np.minimum(np.arange(first, first + size), number - 1)  # the last batch is filled up
            batch = jax.tree.map(lambda array, rows=rows: place(array[rows]), (indices, images, labels))
            found.append(jax.device_get(evaluate(ema, parts.keys.held_out, *batch)))
        t, losses = (np.concatenate(column)[:number] for column in zip(*found, strict=True))
        quarters = [losses[4 * t // num_steps == quarter] for quarter in range(4)]
        event.log({"eval_loss": _mean(losses), "eval_loss_quartiles": [_mean(quarter) for quarter in quarters]})

    return log_loss


def _mean(losses: np.ndarray) -> float | None:
    mean = losses.mean(dtype=np.float64) if losses.size else np.nan
    return float(mean) if np.isfinite(mean) else None
