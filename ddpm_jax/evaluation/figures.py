"""The paper's figures for a run, drawn into one folder with their captions: what `evaluate.py figures` does."""

import json
import math
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.data.source import Source
from ddpm_jax.data.sources import load_held_out, load_source
from ddpm_jax.evaluation import plots
from ddpm_jax.evaluation.bits_per_dim import BatchBound, check_labels, conclude, sums_of
from ddpm_jax.evaluation.neighbors import nearest
from ddpm_jax.generation import edits
from ddpm_jax.generation.editor import Editor
from ddpm_jax.generation.job import Job, describe_job
from ddpm_jax.keys import image_keys
from ddpm_jax.likelihood import rate_distortion
from ddpm_jax.samplers.chain import initial_noise
from ddpm_jax.system import pictures
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import claimed, write_whole
from ddpm_jax.system.progress import Progress, say

LAMBDAS = np.linspace(0, 1, 11)
_MOST = 32
_TIMES = 10
_GIF_SECONDS, _GIF_PAUSE, _GIF_SIDE = 0.08, 2.0, 512
# What the curve of rate and distortion is estimated from, where no job has counted it.
_COUNTED, _COUNTED_TIMES = 64, 100
_NEIGHBOURS, _LOOKED_AT = 8, 50_000
_NEVER = (
    "Fig. 2, a drawing of the model and not of results.",
    "Fig. 10, Inception Score and FID over the chain, and the neighbors by features of Figs. 12 and 15: they need the "
    "weights of the Inception network, which this package does not have.",
)
# The index of no image: what is drawn for the figures of given images is apart from the samples.
_GIVEN = 2**32 - 1


class Figure(typing.NamedTuple):
    """A file and what to say of it."""

    file: str
    caption: str


class Real(typing.NamedTuple):
    """Some images of the run's data."""

    images: np.ndarray
    """(N, H, W, C) uint8."""
    labels: list[int | None]
    """(N,), None where the network is told none."""


def draw_figures(job: Job, run: Path, out: Path, *, num: int = 8, batch_size: int = 64) -> Path:
    """Draws all figures of a run: samples, the chain over time, shared latents, interpolations, inpainting, rate and
    distortion, nearest training images.

    Args:
      job: the weights, the seed and the chain ("ancestral", of any number of steps).
      run: the run's folder; its loss curve is copied, and that of rate and distortion if a likelihood job has drawn it.
      out: the folder of the figures; made if it is not there. What is in it under the same names is written over.
      num: images or pairs of a figure, in [1, 32]; num^2 samples.
      batch_size: images at a time, >= 1; no image depends on it.

    Returns:
      the file of the captions.

    Raises:
      UserError: a number is out of range, the images cannot be shown, or a file cannot be written. Where the run's data
        cannot be read, the figures that need it are left out and that is said.
    """
    if not 1 <= num <= _MOST:
        raise UserError(f"--num must be 1 to {_MOST}, not {num}: it is the number of rows of a figure")
    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {batch_size}")
    editor = Editor(job, batch_size=batch_size)
    pictures.check_channels(editor.shape[-1])
    with claimed(out):
        samples, frames = editor.sample(num**2, editor.labels_in_turn(num**2), watched=min(num**2, 16))
        drawn = [*_of_noise(editor, out, samples, frames, num=num)]
        left_out = [*_NEVER]
        finished = _finished_curve(job, run)
        if finished is not None:
            drawn.append(_copied_curve(finished, out))
        try:
            held_out, own = load_held_out(job.config.data), load_source(job.config.data)
            check_labels(job.config, held_out)
        except UserError as error:
            say(f"the figures of real images are left out: {error}")
            files = "What is made of real images (Figs. 8 and 9), their nearest neighbors (Figs. 12 and 15)"
            files += ", the curve of rate and distortion (Fig. 5)" if finished is None else ""
            left_out.append(f"{files}: the run's data cannot be read: {error}")
            real = ""
        else:
            drawn += _of_images(editor, out, real_images(job, held_out, 2 * num))
            if finished is None:
                drawn.append(_estimated_curve(job, held_out, out, batch_size=batch_size))
            drawn.append(_neighbors(samples[:num], own, out))
            real = f"Real images are of {held_out.name}, those of the nearest neighbors of {own.name}. "
        if (run / "loss.png").is_file():
            _copy(run / "loss.png", out / "loss.png")
            drawn.append(Figure("loss.png", "The loss over the steps of training."))
        text = _captions(editor, run, drawn, left_out, num=num, real=real)
        write_whole(out / "figures.md", lambda file: file.write(text.encode()))
    return out / "figures.md"


def real_images(job: Job, source: Source, number: int) -> Real:
    """Chooses images of a set by the job's seed.

    Args:
      job: of the run.
      source: the set.
      number: how many; some twice if there are fewer.

    Returns:
      the images, and their labels if the run is conditional.
    """
    order = np.random.default_rng(job.seed).permutation(source.num_examples)
    chosen = np.resize(order, number)
    labels: list[int | None] = [None] * number
    if source.labels is not None and job.config.model.num_classes:
        labels = [int(label) for label in source.labels[chosen]]
    return Real(source.read(chosen), labels)


def _of_noise(
    editor: Editor, out: Path, samples: np.ndarray, frames: np.ndarray, *, num: int
) -> typing.Iterator[Figure]:
    """Draws the figures for which nothing is needed but the run's weights."""
    number = len(samples)
    _save(out / "samples.png", samples.reshape(num, num, *editor.shape))
    yield Figure(
        "samples.png",
        f"{number} samples, the first of the job of seed {editor.job.seed} (Figs. 1, 3, 4, 11, 13, 16-19).",
    )

    grids = np.stack([pictures.grid(frame) for frame in frames])
    seconds = [_GIF_SECONDS] * (len(grids) - 1) + [_GIF_PAUSE]
    pictures.save_gif(out / "reverse.gif", pictures.enlarge(grids, side=_GIF_SIDE), seconds)
    yield Figure("reverse.gif", f"The reverse process of the first {frames.shape[1]} of them: x_t from t = T to 0.")

    depths = editor.depths(_TIMES)
    _, over_time = editor.trajectory(num, editor.labels_in_turn(num), depths=depths)
    times = ", ".join(str(editor.paper_time(depth)) for depth in depths)
    for file, frames_of, what in (
        ("progressive_x0.png", over_time.x0, "the predicted x_0"),
        ("progressive_x_t.png", over_time.x_t, "x_t"),
    ):
        _save(out / file, edits.over_time(frames_of, samples[:num]))
        yield Figure(
            file, f"Progressive generation: {what} at t = {times}, and the image at last; a sample a row (Figs. 6, 14)."
        )

    depths = editor.depths(4)
    key = jax.random.fold_in(jax.random.key(editor.job.seed), _GIVEN)
    latent_key, slerp_key = jax.random.split(key)
    latents, drawn = editor.share_latents(latent_key, editor.labels_in_turn(1), depths=depths, draws=num)
    _save(out / "shared_latents.png", np.concatenate([latents[:, None], drawn], axis=1))
    times = ", ".join(str(editor.paper_time(depth)) for depth in depths)
    yield Figure(
        "shared_latents.png",
        f"First of each row x_t of one chain, at t = {times}; then {num} images drawn from it: what x_t has of them "
        "they share (Fig. 7).",
    )

    x_a, x_b = (initial_noise(image_keys(each, jnp.arange(num)), editor.shape) for each in jax.random.split(slerp_key))
    _save(out / "slerp_of_noise.png", editor.ddim_between(x_a, x_b, LAMBDAS))
    yield Figure(
        "slerp_of_noise.png",
        f"Between pairs of noises along the great circle, 11 steps; {editor.settings['ddim']} (DDIM, Fig. 6).",
    )


def _of_images(editor: Editor, out: Path, real: Real) -> typing.Iterator[Figure]:
    """Draws the figures that begin with real images: two a row of the figures of pairs."""
    whole, num = editor.num_steps, len(real.images) // 2
    key = jax.random.fold_in(jax.random.key(editor.job.seed), _GIVEN - 1)
    reconstruction_key, pair_key, depth_key, hole_key = jax.random.split(key, 4)
    a, b = real.images[:num], real.images[num:]
    labels = editor.labels(real.labels[:num])
    pairs = "first and last the images, between them lambda = 0, 0.1, .., 1"

    depths = np.array([0, *editor.depths(8)[::-1]])
    times = ", ".join(str(editor.paper_time(depth)) for depth in depths)
    each = None if labels is None else np.repeat(labels, len(depths) - 1)
    back = editor.reconstruct(
        reconstruction_key, a.repeat(len(depths) - 1, axis=0), each, np.tile(depths[1:], num)
    ).reshape(num, len(depths) - 1, *editor.shape)
    _save(out / "reconstruction.png", np.concatenate([a[:, None], back], axis=1))
    yield Figure(
        "reconstruction.png",
        f"An image a row, first as it is, then diffused to t and taken back: t = {times} (stochastic encoding and "
        "decoding, sec. 4.3).",
    )

    half = np.full(num, math.ceil(whole / 2))
    between = editor.interpolate(pair_key, a, b, LAMBDAS, half)
    _save(out / "interpolation.png", np.concatenate([a[:, None], between, b[:, None]], axis=1))
    yield Figure(
        "interpolation.png",
        f"Interpolation at t = {editor.paper_time(int(half[0]))}, a pair a row: {pairs}; the noise of a row is fixed "
        "(Fig. 8).",
    )

    number = len(depths)
    a0, b0 = a[:1].repeat(number, axis=0), b[:1].repeat(number, axis=0)
    between = editor.interpolate(depth_key, a0, b0, LAMBDAS, depths, indices=np.zeros(number, int))
    _save(out / "interpolation_over_t.png", np.concatenate([a0[:, None], between, b0[:, None]], axis=1))
    yield Figure(
        "interpolation_over_t.png",
        f"One pair, a row for each of t = {times}: {pairs}; at t = 0 pixels are mixed, at t = T the images are new "
        "(Fig. 9).",
    )

    between = editor.ddim_interpolate(a, b, LAMBDAS)
    _save(out / "slerp.png", np.concatenate([a[:, None], between, b[:, None]], axis=1))
    yield Figure(
        "slerp.png",
        f"Interpolation along the great circle of the noises that DDIM draws the images from, a pair a row: {pairs}; "
        f"{editor.settings['ddim']} (DDIM, sec. 5.3).",
    )

    masks = _masks(editor.shape)
    known = np.tile(masks, (num, 1, 1))
    twice = a.repeat(len(masks), axis=0)
    each = None if labels is None else np.repeat(labels, len(masks))
    filled = editor.inpaint(hole_key, twice, known, each, draws=4)
    hidden = edits.hide(twice, known)
    _save(out / "inpainting.png", np.concatenate([twice[:, None], hidden[:, None], filled], axis=1))
    yield Figure(
        "inpainting.png",
        "An image as it is, what is known of it (the right half or a box in the middle is not), and four ways to fill "
        f"it in; {editor.settings['repaint']} (Lugmayr et al. 2022).",
    )


def _finished_curve(job: Job, run: Path) -> Path | None:
    """Finds the newest likelihood job of a run that has counted bits with these weights, and drawn the curve."""
    weights = describe_job(job)["weights"]
    found = []
    for file in (run / "likelihood").glob("*/likelihood.json"):
        try:
            of = json.loads(file.read_text())["job"]
            if of["weights"] == weights and (file.parent / "rate_distortion.png").is_file():
                found.append((file.stat().st_mtime, file.parent))
        except (OSError, ValueError, TypeError, KeyError):
            continue  # damaged: as one that is not there
    return max(found)[1] if found else None


def _copied_curve(folder: Path, out: Path) -> Figure:
    """Copies the curve of rate and distortion from a finished likelihood job."""
    counted = json.loads((folder / "likelihood.json").read_text())
    of = counted["job"]
    _copy(folder / "rate_distortion.png", out / "rate_distortion.png")
    return _curve(
        f"of {of['images']} images of the part '{of['split']}', at {of['times']} of the T times each, variances "
        f"'{of['sigma']}', from {folder.parent.name}/{folder.name}",
        counted["bits_per_dim"],
        counted["standard_error"],
    )


def _estimated_curve(job: Job, source: Source, out: Path, *, batch_size: int) -> Figure:
    """Draws the curve of rate and distortion from some images of a set at some of the times."""
    number, num_times = min(_COUNTED, source.num_examples), min(_COUNTED_TIMES, job.config.diffusion.num_steps)
    chosen = np.arange(number) * source.num_examples // number
    bound_of = BatchBound(job.config, batch_size=min(batch_size, number), num_times=num_times)
    params, key = bound_of.place(job.params), jax.random.fold_in(jax.random.key(job.seed), _GIVEN - 2)
    batches = [chosen[first : first + bound_of.batch_size] for first in range(0, number, bound_of.batch_size)]
    with Progress(len(batches) * num_times, description=f"rate and distortion of {number} images") as progress:
        sums = [
            sums_of(bound_of(params, key, source, batch, progress=progress.update), bound_of.edges) for batch in batches
        ]
    likelihood, per_time = conclude(sums, dimensions=math.prod(source.image_shape))
    curve = rate_distortion(per_time.means[0], likelihood.prior_bits, per_time.means[1])
    plots.plot_rate_distortion(out / "rate_distortion.png", curve.reverse_time, curve.rate, curve.distortion)
    which = f"all {number}" if number == source.num_examples else f"{number}, evenly over all {source.num_examples},"
    times = (
        "at all T times"
        if num_times == job.config.diffusion.num_steps
        else (f"at {num_times} of the T times each, drawn from ranges of about equal ratio")
    )
    return _curve(f"of {which} images of {source.name}, {times}", likelihood.bits_per_dim, likelihood.standard_error)


def _curve(of: str, bits: float, error: float | None) -> Figure:
    bound = f"{bits:.3f}" if error is None else f"{bits:.3f} +- {error:.3f}"
    return Figure(
        "rate_distortion.png",
        f"Distortion and rate over the reverse process, and distortion over rate: {of}; in all {bound} bits/dim "
        "(Fig. 5).",
    )


def _neighbors(samples: np.ndarray, source: Source, out: Path) -> Figure:
    """Draws samples with the images of the run's own set that are nearest to them."""
    indices = nearest(samples, source, number=_NEIGHBOURS, most=_LOOKED_AT)
    found = source.read(indices.reshape(-1)).reshape(*indices.shape, *source.image_shape)
    _save(out / "nearest_neighbors.png", np.concatenate([samples[:, None], found], axis=1))
    total = source.num_examples
    among = f"all {total}" if total <= _LOOKED_AT else f"the first {_LOOKED_AT} of the {total}"
    return Figure(
        "nearest_neighbors.png",
        f"First of each row a sample, then the {indices.shape[1]} images nearest to it by the squared distance of "
        f"their pixels, among {among} images of {source.name}, nearest first (Figs. 12, 15).",
    )


def _copy(file: Path, to: Path) -> None:
    content = file.read_bytes()
    write_whole(to, lambda opened: opened.write(content))


def _masks(shape: tuple[int, int, int]) -> np.ndarray:
    """(2, H, W) bool, what is known: all but the right half, all but a box in the middle."""
    height, width, _ = shape
    known = np.ones((2, height, width), bool)
    known[0, :, width // 2 :] = False
    known[1, height // 4 : -(height // 4) or None, width // 4 : -(width // 4) or None] = False
    return known


def _save(path: Path, rows: np.ndarray) -> None:
    pictures.save_png(path, edits.lay_out(rows))


def _captions(editor: Editor, run: Path, drawn: list[Figure], left_out: list[str], *, num: int, real: str) -> str:
    job, data = editor.job, editor.job.config.data
    lines = [
        f"# Figures of {job.config.name}",
        "",
        f"Checkpoint {job.checkpoint}, averaged weights; {data.source} at {data.height}x{data.width}x{data.channels}; "
        f"T = {job.config.diffusion.num_steps}, schedule {job.config.diffusion.schedule}; "
        f"{job.choice.sampler} in {editor.num_steps} steps, variance {job.config.diffusion.variance}, "
        f"x_0 {'clipped' if job.config.diffusion.clip_x0 else 'not clipped'}; seed {job.seed}. "
        f"{real}Figures are numbered as in Ho et al. 2020; t is the paper's, from 1 to T. "
        f"Drawn again by `python evaluate.py figures {run} --num {num} --seed {job.seed} --step {job.checkpoint}"
        + (f" --steps {job.choice.steps}`." if job.choice.steps else "`."),
        "",
    ]
    if job.config.model.num_classes:
        lines += [
            f"The run is conditional: samples take the {job.config.model.num_classes} classes in turn, reconstructions "
            "and inpainting their images' own; interpolations are told none.",
            "",
        ]
    for file, caption in drawn:
        lines += [f"## {file}", "", caption, "", f"![{file}]({file})", ""]
    lines += ["Left out of the paper's figures:", "", *(f"- {each}" for each in left_out), ""]
    return "\n".join(lines)
