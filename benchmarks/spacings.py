r"""Which timesteps suit each sampler in few steps: every sampler with every spacing, on several laws.

    python benchmarks/spacings.py                                     # the closed forms alone: minutes
    python benchmarks/spacings.py runs/digits runs/fashion_mnist_cpu  # trained runs as well: hours on two CPU cores

Run it again to resume: it measures only what docs/results/spacings.csv lacks, and then writes docs/results/spacings.md.

- Gaussians of several spectra. Every step is affine in each direction of the covariance, so a chain's final law follows
  from the images of 0, of 1 and of each unit noise, without sampling error. Two errors: "whitened" is the Frechet
  distance in coordinates in which the data are N(., I), so that directions of small variance count like the others;
  "plain" is the Frechet distance itself, relative to the total variance. Both as roots, per direction.
- A Gaussian mixture in eight dimensions: "outside" is the share of samples farther from every mode than all but 1e-4 of
  each mode's own; "spread" the relative error of the standard deviations within the modes, of the other samples (1
  if there are none).
- Trained runs: "fd" is the FD-own of `evaluate.py quality`, divided by that of real images. For the deterministic
  samplers "path" is the root mean squared distance to the images that the same noise gives in many steps. All samplers
  and spacings start from the same noise, so that differences are far less noisy than the numbers.
"""

import argparse
import contextlib
import csv
import functools
import math
import time
import typing
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
import threadpoolctl
from jax import Array

from ddpm_jax.config import DataConfig
from ddpm_jax.data.source import Source
from ddpm_jax.data.sources import load_source
from ddpm_jax.evaluation.quality import Classifier, own_frechet_distances
from ddpm_jax.keys import image_keys
from ddpm_jax.names import ScheduleName, Spacing
from ddpm_jax.networks import predict_with
from ddpm_jax.pixels import to_uint8
from ddpm_jax.run.build import build_betas, image_shape
from ddpm_jax.run.trained import load_run
from ddpm_jax.samplers import ancestral, ddim, multistep
from ddpm_jax.samplers.chain import Sampler, initial_noise
from ddpm_jax.samplers.dpm_solver import dpm_solver_pp_2m, dpm_solver_pp_2m_sde
from ddpm_jax.samplers.respacing import choose_timesteps, default_spacing, respace
from ddpm_jax.samplers.unipc import default_order, unipc
from ddpm_jax.schedules import Schedule, make_betas
from ddpm_jax.system.errors import UserError

RESULTS = Path(__file__).parent.parent / "docs" / "results"
SPACINGS: tuple[str, ...] = typing.get_args(Spacing)
STEPS = (4, 5, 6, 8, 10, 12, 15, 20, 30, 50)
SOLVERS: dict[str, Callable[..., Sampler]] = {
    "dpm++2m": dpm_solver_pp_2m,
    "unipc, order 2": functools.partial(unipc, order=2),
    "unipc, order 3": functools.partial(unipc, order=3),
    "dpm++2m_sde": dpm_solver_pp_2m_sde,
    "ddim": ddim.ddim,
    "ancestral": ancestral.ancestral,
}
DETERMINISTIC = ("ddim", "dpm++2m", "unipc, order 2", "unipc, order 3")
BETAS = make_betas("linear", 1000)
ALPHAS_BAR = np.exp(np.cumsum(np.log1p(-BETAS)))

CLOSED = "closed forms"

Measured = dict[str, float]


class Law(typing.NamedTuple):
    """Data that chains are measured on."""

    name: str
    measure: Callable[[str, str, int], Measured]
    """From sampler, spacing and number of steps to its errors, by name."""


def final_images(sampler: Sampler, keys: Array, x: Array) -> Array:
    """Runs a chain step by step: only the network inside is compiled, so that no chain compiles anything new."""
    state = sampler.init(x)
    for k in range(sampler.num_steps):
        state, _ = sampler.step(keys, state, jnp.int32(k))
    return state.x


@contextlib.contextmanager
def drawing(noise: Callable[[int], Array]) -> Iterator[None]:
    """Makes every sampler add noise(t) instead of its own."""
    with contextlib.ExitStack() as stack:
        for module in (ancestral, ddim, multistep):
            drawn = lambda keys, time, shape: noise(int(time))
            stack.enter_context(mock.patch.object(module, "step_noise", drawn))
        yield


def in_float64(schedule: Schedule) -> Schedule:
    """Converts the tables to float64."""
    widen = lambda table: table.astype(jnp.float64) if jnp.issubdtype(table.dtype, jnp.floating) else table
    return jax.tree.map(widen, schedule)


def spectra() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the means and standard deviations of Gaussians along their axes, by name."""
    found = {}
    # A few unequal pixels, as in sampler_order.py, and two image-like laws: wide, and falling as 1/f.
    found["four"] = (np.array([0.05, 0.15, 0.25, 0.5]), np.array([0.1, 0.3, 0.5, 1.0]))
    wide = np.geomspace(0.03, 1, 16)
    found["wide"] = (0.5 * wide, wide)
    frequency = np.hypot(*np.meshgrid(np.arange(8), np.arange(8))).reshape(-1)
    falling = 1 / np.maximum(frequency, 1) ** 1.5
    found["falling"] = (0.5 * falling, falling)
    digits = load_source(DataConfig(source="digits", height=8, width=8, channels=1))
    pixels = digits.read(np.arange(digits.num_examples)).reshape(digits.num_examples, -1) / 127.5 - 1
    variances, axes = np.linalg.eigh(np.cov(pixels, rowvar=False))
    kept = variances > 0.02**2  # some pixels are always black
    found["digits' covariance"] = ((pixels.mean(axis=0) @ axes)[kept], np.sqrt(variances[kept]))
    return found


def gaussians(name: ScheduleName) -> Law:
    """Makes the law of all spectra under a schedule, side by side as the pixels of one image."""
    betas = make_betas(name, 1000)
    alphas_bar = np.exp(np.cumsum(np.log1p(-betas)))
    laws = spectra()
    mean, std = (np.concatenate([law[i] for law in laws.values()]) for i in range(2))
    starts = np.cumsum([0, *(len(law[0]) for law in laws.values())])
    root = np.sqrt(alphas_bar)[:, None]
    gain = root * std**2 / (root**2 * std**2 + 1 - root**2)

    # Rows: the image of 0, that of 1, and those of each step's unit noise; always as many.
    rows = 2 + max(STEPS)

    def measure(sampler_name: str, spacing: str, steps: int) -> Measured:
        with jax.enable_x64(True):
            gains, means, mean_0 = jnp.asarray(gain), jnp.asarray(root * mean), jnp.asarray(mean)[None]

            def predict(x: Array, t: Array) -> Array:
                return mean_0 + gains[t] * (x - means[t])

            times = choose_timesteps(betas, num_steps=steps, spacing=spacing)
            sampler = SOLVERS[sampler_name](in_float64(respace(betas, times)), predict, prediction="x0", clip_x0=False)
            unit = lambda row: jnp.zeros((rows, len(std))).at[row].set(1)
            with drawing(lambda t: unit(2 + t)):
                x = final_images(sampler, jax.random.split(jax.random.key(0), rows), unit(1))
        x = np.asarray(x)
        shift, spread = x[0] - mean, np.sqrt(((x[1:] - x[0]) ** 2).sum(axis=0)) - std
        errors = {}
        for law, first, stop in zip(laws, starts[:-1], starts[1:], strict=True):
            part = slice(first, stop)
            squares, variances = shift[part] ** 2 + spread[part] ** 2, std[part] ** 2
            errors[f"{law}: whitened"] = float(np.sqrt(np.mean(squares / variances)))
            errors[f"{law}: plain"] = float(np.sqrt(squares.sum() / variances.sum()))
        return errors

    return Law(f"Gaussians, {name}", measure)


def mixture(*, number: int = 4096, modes: int = 10, size: int = 8) -> Law:
    """Makes the law of a Gaussian mixture whose predictor E[x_0 | x_t] has a closed form."""
    random = np.random.default_rng(0)
    centers = random.uniform(-0.9, 0.9, (modes, size))
    stds = random.choice([0.03, 0.06, 0.12], (modes, size))
    root = np.sqrt(ALPHAS_BAR)[:, None, None]
    variances = root**2 * stds**2 + 1 - root**2  # (T, modes, size), of x_t within each mode
    tables = [jnp.asarray(table, jnp.float32) for table in (root * centers, variances, root * stds**2 / variances)]
    normalizer = jnp.asarray(-0.5 * np.log(variances).sum(axis=2), jnp.float32)

    @jax.jit
    def predict(x: Array, t: Array) -> Array:
        mean, variance, gain = (table[t] for table in tables)
        offset = x[:, None] - mean
        share = jax.nn.softmax(normalizer[t] - 0.5 * (offset**2 / variance).sum(axis=2), axis=1)
        return (share[:, :, None] * (jnp.asarray(centers, jnp.float32)[None] + gain * offset)).sum(axis=1)

    keys = image_keys(jax.random.key(0), jnp.arange(number))
    farthest = scipy.stats.chi2(size).isf(1e-4)

    def measure(name: str, spacing: str, steps: int) -> Measured:
        schedule = respace(BETAS, choose_timesteps(BETAS, num_steps=steps, spacing=spacing))
        sampler = SOLVERS[name](schedule, predict, prediction="x0", clip_x0=False)
        x = np.asarray(final_images(sampler, keys, initial_noise(keys, (size,))), np.float64)
        distances = (((x[:, None] - centers) / stds) ** 2).sum(axis=2)
        nearest = distances.argmin(axis=1)
        inside = distances.min(axis=1) < farthest
        outside, spread = float(1 - inside.mean()), 1.0
        if inside.any():
            whitened = ((x - centers[nearest]) / stds[nearest])[inside]
            spread = float(np.sqrt(np.mean((np.sqrt((whitened**2).mean(axis=0)) - 1) ** 2)))
        return {"outside": outside, "spread": spread}

    return Law("mixture", measure)


class Judge:
    """Measures FD-own against a set's images, with one classifier for all."""

    def __init__(self, source: Source):
        count = min(source.num_examples, 20_000)
        chosen = np.arange(count) * source.num_examples // count
        images, labels = source.read(chosen), typing.cast(np.ndarray, source.labels)[chosen]
        self._classifier = Classifier(images, labels)
        self._real = self._classifier.features(images)

    def ratio(self, images: np.ndarray) -> float:
        """Returns the FD-own of uint8 images, relative to that of real ones."""
        fd_own, fd_own_of_real, _ = own_frechet_distances(self._classifier.features(images), self._real)
        return fd_own / fd_own_of_real


def trained(folder: Path, *, number: int, seeds: int, batch_size: int = 128) -> Law:
    """Makes the law of a trained, unconditional run."""
    run = load_run(folder)
    config, shape = run.config, image_shape(run.config)
    if config.model.num_classes:
        raise UserError(f"{folder}: this benchmark measures unconditional runs")
    betas, diffusion = build_betas(config), config.diffusion
    predict = jax.jit(predict_with(run.network, run.params, None, variance=diffusion.variance))
    options = dict(prediction=diffusion.prediction, variance=diffusion.variance, clip_x0=diffusion.clip_x0)
    judge = Judge(load_source(config.data))

    def draw(name: str, spacing: str, steps: int, seed: int, number: int) -> np.ndarray:
        schedule = respace(betas, choose_timesteps(betas, num_steps=steps, spacing=spacing))
        sampler = SOLVERS[name](schedule, predict, **options)
        images = []
        for first in range(0, number, batch_size):
            keys = image_keys(jax.random.key(seed), first + jnp.arange(batch_size))
            images.append(np.asarray(final_images(sampler, keys, initial_noise(keys, shape))))
        return np.concatenate(images)[:number]

    converged: list[np.ndarray] = []

    def measure(name: str, spacing: str, steps: int) -> Measured:
        found: Measured = {}
        if name in DETERMINISTIC and not converged:
            converged.append(draw("dpm++2m", "log_snr", 100, 0, batch_size))
        for seed in range(seeds):
            images = draw(name, spacing, steps, seed, number)
            found[f"fd of seed {seed}"] = judge.ratio(np.asarray(to_uint8(jnp.asarray(images))))
            if seed == 0 and name in DETERMINISTIC:
                found["path"] = float(np.sqrt(np.mean((images[:batch_size] - converged[0]) ** 2)))
        return found

    return Law(config.name, measure)


Key = tuple[str, str, str, int]
"""Law, sampler, spacing, number of steps."""


def read_rows(path: Path) -> dict[Key, Measured]:
    """Reads what is measured already: a row per measure, a column per spacing."""
    rows: dict[Key, Measured] = defaultdict(dict)
    if path.is_file():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for spacing in SPACINGS:
                    if row[spacing]:
                        key = (row["law"], row["sampler"], spacing, int(row["steps"]))
                        rows[key][row["measure"]] = float(row[spacing])
    return rows


def write_rows(path: Path, rows: dict[Key, Measured]) -> None:
    """Writes the table of what is measured."""
    lines: dict[tuple[str, str, str, int], dict[str, str]] = defaultdict(dict)
    for (law, sampler, spacing, steps), errors in rows.items():
        for measure, value in errors.items():
            lines[law, measure, sampler, steps][spacing] = f"{value:.3g}"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["law", "measure", "sampler", "steps", *SPACINGS])
        for line in sorted(lines):
            writer.writerow([*line, *(lines[line].get(spacing, "") for spacing in SPACINGS)])


PAGE = """\
# Spacings of timesteps

Which timesteps suit each sampler, by number of steps, as `python benchmarks/spacings.py RUN..` measured it. What each
error means is in the docstring of [the program](../../benchmarks/spacings.py), every number in
[spacings.csv](spacings.csv), and what follows for users in
[running.md](../running.md#how-many-steps-which-timesteps).

Each number is an error relative to the smallest of the same sampler in as many steps (UniPC at either order): 1 is
the best, 2 twice its error. The first is the geometric mean over the closed forms (Gaussians of four spectra under the
linear and the cosine schedule, and the mixture), the others are of the trained runs:
{runs}. Differences below a tolerance do not count: 0.02 in distances of Gaussians, 0.01 in shares
outside the modes, 0.03 in their spread, 0.1 in FD-own (as much as chance moves it), 0.01 in distance to the converged
images. A star marks the default, "-" what was not measured.

FD-own alone can mislead: the errors of a coarse chain may bring its images closer to the real ones than the converged
images are. The distance to these, which counts as much here, says how well a sampler solves its equation.

"""

# Differences below these do not count: they are at the level of chance, or of what anyone would see.
TOLERANCE = {"whitened": 0.02, "plain": 0.02, "outside": 0.01, "spread": 0.03, "fd": 0.1, "path": 0.01}


def tolerance(measure: str) -> float:
    """Returns the tolerance of a measure by its name, such as "wide: plain" or "fd of seed 1"."""
    return next(value for kind, value in TOLERANCE.items() if kind in measure)


def group(law: str) -> str:
    """Returns what a law counts as: all closed forms together, each run alone."""
    return CLOSED if law.startswith(("Gaussians", "mixture")) else law


def scores(rows: dict[Key, Measured], family: str, steps: int) -> dict[tuple[str, str], dict[str, float]]:
    r"""Computes how far each (sampler, spacing) of a family of samplers is from the family's best, by group of laws.

    .. math:: \exp \left\langle \log \frac{e + \tau}{e_{best} + \tau} \right\rangle

    The mean is over the measures of each law, then over the laws; e is the error, tau the tolerance of the measure.
    """
    errors: dict[tuple[str, str], dict[tuple[str, str], float]] = defaultdict(dict)
    for (law, sampler, spacing, count), measured in rows.items():
        if count == steps and sampler.split(",")[0] == family:
            for measure, value in measured.items():
                errors[law, measure][sampler, spacing] = math.log(value + tolerance(measure))
    logs: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (law, _), by_choice in errors.items():
        if len(by_choice) < 3:
            continue  # nothing to compare with
        best = min(by_choice.values())
        for choice, value in by_choice.items():
            logs[choice][law].append(value - best)
    found = {}
    for choice, by_law in logs.items():
        by_group = defaultdict(list)
        for law, values in by_law.items():
            by_group[group(law)].append(np.mean(values))
        found[choice] = {name: math.exp(float(np.mean(values))) for name, values in by_group.items()}
    return found


def default_unipc(steps: int) -> str:
    """Returns the name here of UniPC with its default order."""
    return f"unipc, order {default_order(steps)}"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Formats a Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines]) + "\n"


def report(rows: dict[Key, Measured]) -> str:
    """Formats the page of results."""
    runs = sorted({group(key[0]) for key in rows} - {CLOSED})
    text = PAGE.format(runs=", ".join(runs) or "none")
    for name in SOLVERS:
        family, lines = name.split(",")[0], []
        for steps in sorted({key[3] for key in rows if key[1] == name}):
            found, cells = scores(rows, family, steps), []
            for spacing in SPACINGS:
                by_group = found.get((name, spacing), {})
                numbers = [f"{by_group[part]:.2f}" if part in by_group else "-" for part in (CLOSED, *runs)]
                chosen = default_spacing(family, steps) == spacing and name in (family, default_unipc(steps))
                cells.append(" / ".join(numbers) + (" *" if chosen else ""))
            lines.append([str(steps), *cells])
        text += f"## {name}\n\n" + table(["steps", *SPACINGS], lines) + "\n"
    for run in runs:
        text += f"## FD-own on {run}\n\nRelative to that of real images, mean over the seeds.\n\n"
        for name in SOLVERS:
            lines = []
            for steps in sorted({key[3] for key in rows if key[:2] == (run, name)}):
                cells = []
                for spacing in SPACINGS:
                    measured = rows.get((run, name, spacing, steps), {})
                    values = [value for measure, value in measured.items() if measure.startswith("fd")]
                    cells.append(f"{np.mean(values):.2f}" if values else "-")
                lines.append([str(steps), *cells])
            if lines:
                text += f"### {name} on {run}\n\n" + table(["steps", *SPACINGS], lines) + "\n"
    return text.rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of trained runs")
    parser.add_argument("--number", type=int, default=512, help="images per seed, of each run")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--spacings", nargs="+", default=SPACINGS)
    parser.add_argument("--samplers", nargs="+", default=tuple(SOLVERS))
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long; run again to resume")
    given = parser.parse_args()
    csv_file, end = RESULTS / "spacings.csv", time.monotonic() + 60 * given.minutes
    rows = read_rows(csv_file)
    options = dict(number=given.number, seeds=given.seeds)
    laws = [gaussians("linear"), gaussians("cosine"), mixture(), *(trained(folder, **options) for folder in given.runs)]
    with threadpoolctl.threadpool_limits(1):  # the matrices are small
        for law in laws:
            for steps in given.steps:
                for sampler in given.samplers:
                    for spacing in given.spacings:
                        key = (law.name, sampler, spacing, steps)
                        if key in rows:
                            continue
                        if time.monotonic() > end:
                            return
                        measured = law.measure(sampler, spacing, steps)
                        rows = read_rows(csv_file) | {key: measured}  # another process may measure another run
                        print(*key, {name: f"{value:.3g}" for name, value in rows[key].items()}, flush=True)
                        write_rows(csv_file, rows)
    (RESULTS / "spacings.md").write_text(report(rows))


if __name__ == "__main__":
    main()
