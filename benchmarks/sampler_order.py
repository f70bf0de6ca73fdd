r"""How fast each sampler converges: its error against the number of steps, for data with a known distribution.

    python benchmarks/sampler_order.py            # minutes; writes docs/results/sampler_order.png and .csv

The data are Gaussian: four correlated pixels with a nonzero mean and very different variances. The optimal network is
then known in closed form, every step of every sampler is an affine map plus Gaussian noise, and the final distribution
of a chain follows from the sampler's own steps, without drawing any samples: only the sampler itself is measured.

- "order": from the exact q(x_T), in equal steps of log(alpha / sigma), to the first timestep of the schedule, where the
  exact distribution is known too. The slope is the order of convergence.
- "chain": the full chain of the paper's schedule (linear, T = 1000), from N(0, I) to images, as run by `sample.py`.
  The error levels off at the discretization error of the thousand steps.

The error combines those of the mean and of the covariance, relative to the covariance.
"""

import contextlib
import csv
import pathlib
import typing
from collections.abc import Callable, Sequence
from unittest import mock

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from ddpm_jax.samplers import ancestral, ddim, multistep
from ddpm_jax.samplers.by_name import SAMPLERS
from ddpm_jax.samplers.chain import Sampler
from ddpm_jax.samplers.respacing import choose_timesteps, default_spacing, evenly_spaced, respace
from ddpm_jax.schedules import Schedule, make_betas

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

DOCS = pathlib.Path(__file__).parent.parent / "docs" / "results"
IMAGE = (2, 2, 1)
SIZE = 4
ORDER_STEPS = (5, 10, 20, 40, 80, 160)
CHAIN_STEPS = (5, 8, 10, 15, 20, 30, 50, 100, 250)
CHAIN_SPACINGS = ("linspace", "trailing", "cubic", "log_snr")


class Law(typing.NamedTuple):
    """A Gaussian over the four pixels, float64."""

    mean: np.ndarray
    covariance: np.ndarray


def make_data() -> Law:
    """Returns the data distribution: standard deviations 0.1, 0.3, 0.5 and 1 along rotated axes."""
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(SIZE, SIZE)))
    return Law(np.array([-0.5, 0.1, 0.3, 0.7]), rotation @ np.diag([0.1, 0.3, 0.5, 1.0]) ** 2 @ rotation.T)


def diffuse(data: Law, alphas_bar: float) -> Law:
    """Returns q(x_t)."""
    return Law(np.sqrt(alphas_bar) * data.mean, alphas_bar * data.covariance + (1 - alphas_bar) * np.eye(SIZE))


def best_network(data: Law, alphas_bar: np.ndarray) -> Callable[[Array, Array], Array]:
    r"""Returns E[x_0 | x_t] as a function of (x_t, t), computed in the precision of its inputs.

    .. math:: E[x_0 | x_t] = \mu + \sqrt{\bar\alpha}\, C\, (\bar\alpha C + (1 - \bar\alpha) I)^{-1}
              (x_t - \sqrt{\bar\alpha}\, \mu)
    """
    root = np.sqrt(alphas_bar)[:, None, None]
    covariances = root**2 * data.covariance + (1 - root**2) * np.eye(SIZE)
    gains = root * data.covariance @ np.linalg.inv(covariances)

    def predict(x_t: Array, t: Array) -> Array:
        centered = x_t.reshape(-1, SIZE) - jnp.asarray(root[:, :, 0] * data.mean)[t]
        x0 = jnp.einsum("bij,bj->bi", jnp.asarray(gains)[t], centered) + jnp.asarray(data.mean)[None]
        return x0.reshape(x_t.shape)

    return predict


def in_float64(schedule: Schedule) -> Schedule:
    """Converts the tables to float64, so that a chain runs in float64 (inside `jax.enable_x64`)."""
    widen = lambda table: table.astype(jnp.float64) if jnp.issubdtype(table.dtype, jnp.floating) else table
    return jax.tree.map(widen, schedule)


def law_of_chain(sampler: Sampler, start: Law, *, num_steps: int | None = None) -> Law:
    r"""Computes the exact distribution of x after the first steps of a chain, for a network that is affine in x_t.

    Each step is y' = F y + c + B z, where y is the state of the chain (the images and its memory) and z the noise that
    the step draws: F and B are the step's derivatives, and c is its value at 0.

    Args:
      sampler: the sampler.
      start: distribution of x_T.
      num_steps: number of steps; all if None.

    Returns:
      The distribution of x.
    """
    at_zero = sampler.init(jnp.zeros((1, *IMAGE)))
    zero, unravel = ravel_pytree(at_zero)
    where_x, _ = ravel_pytree(at_zero._replace(x=jnp.ones((1, *IMAGE))))
    where_x = np.asarray(where_x, bool)
    keys = jax.random.split(jax.random.key(0), 1)

    def advance(held: Array, z: Array, k: Array) -> Array:
        with contextlib.ExitStack() as stack:
            for module in (ancestral, ddim, multistep):
                drawn = lambda keys, time, shape: z.reshape(len(keys), *shape)
                stack.enter_context(mock.patch.object(module, "step_noise", drawn))
            return ravel_pytree(sampler.step(keys, unravel(held), k)[0])[0]

    def affine(k: Array) -> tuple[Array, Array, Array]:
        no_noise = jnp.zeros(SIZE)
        matrix, noise = jax.jacfwd(advance, argnums=(0, 1))(zero, no_noise, k)
        return matrix, advance(zero, no_noise, k), noise

    num_steps = sampler.num_steps if num_steps is None else num_steps
    maps = jax.device_get(jax.jit(jax.vmap(affine))(jnp.arange(num_steps)))
    mean, covariance = np.zeros(zero.size), np.zeros((zero.size, zero.size))
    mean[where_x], covariance[np.ix_(where_x, where_x)] = start.mean, start.covariance
    for matrix, offset, noise in zip(*maps, strict=True):
        mean = matrix @ mean + offset
        covariance = matrix @ covariance @ matrix.T + noise @ noise.T
    return Law(mean[where_x], covariance[np.ix_(where_x, where_x)])


def error(law: Law, truth: Law) -> float:
    """Computes the combined error of mean and covariance, relative to the true covariance."""
    distance = np.hypot(np.linalg.norm(law.mean - truth.mean), np.linalg.norm(law.covariance - truth.covariance))
    return float(distance / np.linalg.norm(truth.covariance))


def betas_of_even_log_ratios(num_times: int, *, highest: float = 3.0) -> np.ndarray:
    """Returns the betas of a schedule whose log(alpha / sigma) falls linearly from `highest` to `-highest`."""
    alphas_bar = 1 / (1 + np.exp(-2 * np.linspace(highest, -highest, num_times)))
    return 1 - alphas_bar / np.append(1.0, alphas_bar[:-1])


def order_errors(make: Callable[..., Sampler], steps: Sequence[int], **options: typing.Any) -> np.ndarray:
    """Measures a sampler in equal steps, from the exact q(x_T) to the first timestep: (len(steps),)."""
    data, errors = make_data(), []
    num_times = int(np.lcm.reduce(steps)) + 1
    betas = betas_of_even_log_ratios(num_times)
    alphas_bar = np.cumprod(1 - betas)
    predict = best_network(data, alphas_bar)
    with jax.enable_x64(True):
        for count in steps:
            schedule = in_float64(respace(betas, evenly_spaced(num_times, count + 1)))
            sampler = make(schedule, predict, prediction="x0", clip_x0=False, **options)
            law = law_of_chain(sampler, diffuse(data, alphas_bar[-1]), num_steps=count)
            errors.append(error(law, diffuse(data, alphas_bar[0])))
    return np.array(errors)


def chain_errors(
    make: Callable[..., Sampler], steps: Sequence[int], *, spacing: str, **options: typing.Any
) -> np.ndarray:
    """Measures a sampler from N(0, I) to images on the paper's schedule: (len(steps),)."""
    data, errors = make_data(), []
    betas = make_betas("linear", 1000)
    predict = best_network(data, np.cumprod(1 - betas))
    with jax.enable_x64(True):
        for count in steps:
            schedule = in_float64(respace(betas, choose_timesteps(betas, num_steps=count, spacing=spacing)))
            sampler = make(schedule, predict, prediction="x0", clip_x0=False, **options)
            errors.append(error(law_of_chain(sampler, Law(np.zeros(SIZE), np.eye(SIZE))), data))
    return np.array(errors)


def slope(steps: Sequence[int], errors: np.ndarray) -> float:
    """Fits the order of convergence: the power of the number of steps at which the error falls."""
    return float(-np.polyfit(np.log(steps), np.log(errors), 1)[0])


def main() -> None:
    # "ancestral" and "ddim" read the schedule's float32 tables: below this floor, their rounding error dominates.
    floor = 3e-7
    rows = []
    figure, (order_axes, chain_axes) = plt.subplots(1, 2, figsize=(11, 4.6), sharey=False)
    for i, (name, make) in enumerate(SAMPLERS.items()):
        errors = order_errors(make, ORDER_STEPS)
        above = errors[-4:] > floor
        order = slope(np.array(ORDER_STEPS[-4:])[above], errors[-4:][above])
        print(f"{name:12s} order {order:.2f}", flush=True)
        order_axes.loglog(ORDER_STEPS, errors, "o-", color=f"C{i}", label=f"{name}: order {order:.2f}")
        rows += [("order", name, "even log SNR", *row) for row in zip(ORDER_STEPS, errors, strict=True)]
        by_spacing = {spacing: chain_errors(make, CHAIN_STEPS, spacing=spacing) for spacing in CHAIN_SPACINGS}
        for spacing, errors in by_spacing.items():
            rows += [("chain", name, spacing, *row) for row in zip(CHAIN_STEPS, errors, strict=True)]
        chosen = [default_spacing(name, count) for count in CHAIN_STEPS]
        errors = [by_spacing[spacing][k] for k, spacing in enumerate(chosen)]
        label = f"{name} ({', '.join(dict.fromkeys(chosen))})"
        chain_axes.loglog(CHAIN_STEPS, errors, "o-", color=f"C{i}", label=label)
        if "linspace" not in chosen:
            label = f"{name} (linspace)"
            chain_axes.loglog(CHAIN_STEPS, by_spacing["linspace"], ":", color=f"C{i}", label=label)
    order_axes.set(title="order: equal steps in log SNR", xlabel="steps", ylabel="error of mean and covariance")
    chain_axes.set(title="chain: linear, T = 1000, noise to images", xlabel="steps", ylim=(1e-3, 3))
    for axes in (order_axes, chain_axes):
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(DOCS / "sampler_order.png", dpi=90)
    with (DOCS / "sampler_order.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["measured", "sampler", "spacing", "steps", "error"])
        writer.writerows((*row[:-1], f"{row[-1]:.3g}") for row in rows)


if __name__ == "__main__":
    main()
