"""The paper's figures for a run, drawn into one folder with their captions: what `evaluate.py figures` does."""

import math
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.data.check import check_classes
from ddpm_jax.data.shared import count_shared
from ddpm_jax.data.source import Source
from ddpm_jax.data.sources import load_held_out, load_source
from ddpm_jax.evaluation import plots
from ddpm_jax.evaluation.bits_per_dim import Images, bound_program, compute_bounds, conclude, sums_of
from ddpm_jax.evaluation.neighbors import nearest
from ddpm_jax.generation import edits
from ddpm_jax.generation.editor import Editor
from ddpm_jax.generation.job import SamplingJob
from ddpm_jax.generation.store import missing_ranges
from ddpm_jax.keys import image_keys, make_key
from ddpm_jax.likelihood import rate_distortion
from ddpm_jax.run.trained import TrainedRun, describe_run
from ddpm_jax.samplers.chain import initial_noise
from ddpm_jax.system import pictures
from ddpm_jax.system.errors import Damage, UserError
from ddpm_jax.system.files import read_json, write_json, write_whole
from ddpm_jax.system.progress import say

LAMBDAS = np.linspace(0, 1, 11)
_LAMBDA_TEXTS = [f"{each:.1f}" for each in LAMBDAS]
_MOST = 32
_COLUMNS = 10
_GIF_SECONDS, _GIF_PAUSE, _GIF_SIDE = 0.08, 2.0, 512
# Images and timesteps of the rate-distortion curve, if no likelihood job has computed it.
_CURVE_IMAGES, _CURVE_STRATA = 64, 100
_NEIGHBORS, _NEIGHBORS_AMONG = 8, 50_000
_NEVER = (
    "Fig. 2, a drawing of the model and not of results.",
    "Fig. 10, Inception Score and FID over the chain, and the neighbors by features of Figs. 12 and 15: they need the "
    "weights of the Inception network, which this package does not include.",
)
# Not the index of an image: the noise of the figures is not that of the samples.
_FIGURES = 2**32 - 1


class Figure(typing.NamedTuple):
    """A file and its caption."""

    file: str
    caption: str


class Real(typing.NamedTuple):
    """Some images of the run's data."""

    images: np.ndarray
    """(N, H, W, C) uint8."""
    labels: list[int | None]
    """(N,), None for no label."""


def draw_figures(job: SamplingJob, out: Path, *, num: int = 8, batch_size: int = 64, overwrite: bool = False) -> Path:
    """Draws all figures of a run: samples, the chain over time, shared latents, interpolations, inpainting, rate and
    distortion, nearest training images.

    Args:
      job: the run, the seed and the sampler ("ancestral", any number of steps). The run's loss curve is copied, and
        the rate-distortion curve of its newest likelihood job, if there is one.
      out: the folder of the figures; created if missing.
      num: images or pairs per figure, in [1, 32]; the sample grid has num x num images.
      batch_size: at least 1. It does not change the images.
      overwrite: whether figures of other settings in `out` are replaced.

    Returns:
      the file of the captions.

    Raises:
      UserError: a number is out of range, the images cannot be shown, or a file cannot be written. If the run's data
        cannot be read, the figures that need it are left out with a message.
    """
    trained = job.trained
    if not 1 <= num <= _MOST:
        raise UserError(f"--num must be 1 to {_MOST}, not {num}: it is the number of rows of a figure")
    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {batch_size}")
    editor = Editor(job, batch_size=batch_size)
    pictures.check_channels(editor.shape[-1])
    description = edits.describe_results("figures", job, editor.num_steps, num=num)
    with edits.results_folder(description, out, overwrite=overwrite):
        write_json(out / "job.json", description)
        samples, frames = editor.sample(num**2, editor.job_labels(num**2), watched=min(num**2, 16))
        drawn = [*_of_noise(editor, out, samples, frames, num=num)]
        left_out = [*_NEVER]
        finished = finished_curve(trained)
        if finished is not None:
            drawn.append(_copied_curve(finished, out))
        try:
            held_out, own = load_held_out(trained.config.data), load_source(trained.config.data)
            check_classes(trained.config, held_out, training=False)
        except UserError as error:
            say(f"figures of real images are left out: {error}")
            files = "Figures of real images (Figs. 8 and 9), nearest neighbors (Figs. 12 and 15)"
            files += ", the rate-distortion curve (Fig. 5)" if finished is None else ""
            left_out.append(f"{files}: the run's data cannot be read: {error}")
            real = ""
        else:
            drawn += _of_images(editor, out, real_images(job, held_out, 2 * num))
            if finished is None:
                drawn.append(_estimated_curve(job, held_out, out, batch_size=batch_size))
            drawn.append(_neighbors(samples[:num], own, out))
            shared = count_shared(held_out, own)
            of_these = f" ({shared} of its {held_out.num_examples} are also training images)" if shared else ""
            real = f"Real images are from {held_out.name}{of_these}, nearest neighbors from {own.name}. "
        if (trained.folder / "loss.png").is_file():
            _copy(trained.folder / "loss.png", out / "loss.png")
            drawn.append(Figure("loss.png", "The training loss."))
        text = _captions(editor, drawn, left_out, num=num, real=real)
        write_whole(out / "figures.md", lambda file: file.write(text.encode()))
    return out / "figures.md"


def real_images(job: SamplingJob, source: Source, number: int) -> Real:
    """Chooses images of a set by the job's seed.

    Args:
      job: of a run.
      source: the set.
      number: of images; some are chosen twice if there are fewer.

    Returns:
      the images, and their labels if the run is class-conditional.
    """
    order = np.random.default_rng(job.seed).permutation(source.num_examples)
    chosen = np.resize(order, number)
    labels: list[int | None] = [None] * number
    if source.labels is not None and job.trained.config.model.num_classes:
        labels = [int(label) for label in source.labels[chosen]]
    return Real(source.read(chosen), labels)


def _of_noise(
    editor: Editor, out: Path, samples: np.ndarray, frames: np.ndarray, *, num: int
) -> typing.Iterator[Figure]:
    """Draws the figures that need only the run's weights."""
    number = len(samples)
    pictures.save_png(out / "samples.png", edits.lay_out(samples.reshape(num, num, *editor.shape)))
    yield Figure(
        "samples.png",
        f"{number} samples, the first of the job with seed {editor.job.seed} (Figs. 1, 3, 4, 11, 13, 16-19).",
    )

    grids = np.stack([pictures.grid(frame) for frame in frames])
    seconds = [_GIF_SECONDS] * (len(grids) - 1) + [_GIF_PAUSE]
    pictures.save_gif(out / "reverse.gif", pictures.enlarge(grids, side=_GIF_SIDE), seconds)
    yield Figure("reverse.gif", f"The reverse process of the first {frames.shape[1]} of them: x_t from t = T to 0.")

    title = lambda *details: edits.describe_chain(editor.job, editor.num_steps, *details)
    classes = [edits.describe_class(editor.job, label) for label in editor.job_labels(num) or ()]
    levels = editor.levels(_COLUMNS)
    _, over_time = editor.trajectory(num, editor.job_labels(num), levels=levels)
    paper_t = [editor.paper_t(level) for level in levels]
    t = ", ".join(map(str, paper_t))
    for file, frames_of, what in (
        ("progressive_x0.png", over_time.x0, "the predicted x_0"),
        ("progressive_x_t.png", over_time.x_t, "x_t"),
    ):
        columns = [*edits.at_t(paper_t), "image"]
        _save(out / file, edits.over_time(frames_of, samples[:num]), rows=classes, columns=columns, title=title(what))
        yield Figure(
            file, f"Progressive generation: {what} at t = {t}, and the final image; one sample per row (Figs. 6, 14)."
        )

    levels = editor.levels(4)
    key = jax.random.fold_in(make_key(editor.job.seed), _FIGURES)
    latent_key, slerp_key = jax.random.split(key)
    latents, drawn = editor.share_latents(latent_key, editor.job_labels(1), levels=levels, draws=num)
    paper_t = [editor.paper_t(level) for level in levels]
    _save(
        out / "shared_latents.png",
        np.concatenate([latents[:, None], drawn], axis=1),
        rows=edits.at_t(paper_t),
        columns=["x_t", *edits.numbered(num)],
        title=title(*classes[:1]),
    )
    t = ", ".join(map(str, paper_t))
    yield Figure(
        "shared_latents.png",
        f"Each row starts with x_t of one chain, at t = {t}, followed by {num} images drawn from it, which share what "
        "x_t determines (Fig. 7).",
    )

    x_a, x_b = (initial_noise(image_keys(each, jnp.arange(num)), editor.shape) for each in jax.random.split(slerp_key))
    between = editor.ddim_between(x_a, x_b, LAMBDAS, labels=_unless_unlabeled(editor, editor.job_labels(num)))
    _save(out / "slerp_of_noise.png", between, columns=_LAMBDA_TEXTS, title=title(editor.settings["ddim"]))
    yield Figure(
        "slerp_of_noise.png",
        f"Interpolation along the great circle between pairs of noises, 11 steps; {editor.settings['ddim']} (DDIM, "
        "Fig. 6).",
    )


def _of_images(editor: Editor, out: Path, real: Real) -> typing.Iterator[Figure]:
    """Draws the figures that start from real images, pairs of the first and the second half."""
    num = len(real.images) // 2
    key = jax.random.fold_in(make_key(editor.job.seed), _FIGURES - 1)
    reconstruction_key, pair_key, level_key, inpainting_key = jax.random.split(key, 4)
    a, b = real.images[:num], real.images[num:]
    labels = np.array(real.labels[:num], object)
    of_pairs = _unless_unlabeled(editor, real.labels[:num])
    title = lambda *details: edits.describe_chain(editor.job, editor.num_steps, *details)
    classes = [edits.describe_class(editor.job, label) for label in real.labels[:num]]
    ends = ["given", *_LAMBDA_TEXTS, "given"]
    pairs = "first and last the images, between them lambda = 0, 0.1, .., 1"

    levels = np.array([0, *editor.levels(8)[::-1]])
    paper_t = [editor.paper_t(level) for level in levels]
    t = ", ".join(map(str, paper_t))
    each = len(levels) - 1
    reconstructed = editor.reconstruct(
        reconstruction_key, a.repeat(each, axis=0), np.repeat(labels, each), np.tile(levels[1:], num)
    ).reshape(num, each, *editor.shape)
    _save(
        out / "reconstruction.png",
        np.concatenate([a[:, None], reconstructed], axis=1),
        rows=classes,
        columns=edits.at_t(paper_t),
        title=title(),
    )
    yield Figure(
        "reconstruction.png",
        f"One image per row, first the original, then noised to t and denoised: t = {t} (stochastic encoding and "
        "decoding, sec. 4.3).",
    )

    half = np.full(num, math.ceil(editor.num_steps / 2))
    between = editor.interpolate(pair_key, a, b, LAMBDAS, half, labels=of_pairs)
    _save(
        out / "interpolation.png",
        np.concatenate([a[:, None], between, b[:, None]], axis=1),
        columns=ends,
        title=title(f"t = {editor.paper_t(int(half[0]))}"),
    )
    yield Figure(
        "interpolation.png",
        f"Interpolation at t = {editor.paper_t(int(half[0]))}, one pair per row: {pairs}; the noise of a row is fixed "
        "(Fig. 8).",
    )

    number = len(levels)
    a0, b0 = a[:1].repeat(number, axis=0), b[:1].repeat(number, axis=0)
    of_pair = None if of_pairs is None else number * of_pairs[:1]
    between = editor.interpolate(level_key, a0, b0, LAMBDAS, levels, labels=of_pair, indices=np.zeros(number, int))
    _save(
        out / "interpolation_over_t.png",
        np.concatenate([a0[:, None], between, b0[:, None]], axis=1),
        rows=edits.at_t(paper_t),
        columns=ends,
        title=title(),
    )
    yield Figure(
        "interpolation_over_t.png",
        f"One pair, one row for each of t = {t}: {pairs}; at t = 0 pixels are mixed, at t = T the images are new "
        "(Fig. 9).",
    )

    between = editor.ddim_interpolate(a, b, LAMBDAS, labels=of_pairs)
    _save(
        out / "slerp.png",
        np.concatenate([a[:, None], between, b[:, None]], axis=1),
        columns=ends,
        title=title(editor.settings["ddim"]),
    )
    yield Figure(
        "slerp.png",
        f"Interpolation along the great circle between the images' DDIM noises, one pair per row: {pairs}; "
        f"{editor.settings['ddim']} (DDIM, sec. 5.3).",
    )

    masks = _masks(editor.shape)
    known = np.tile(masks, (num, 1, 1))
    twice = a.repeat(len(masks), axis=0)
    filled = editor.inpaint(inpainting_key, twice, known, np.repeat(labels, len(masks)), draws=4)
    hidden = edits.hide(twice, known)
    _save(
        out / "inpainting.png",
        np.concatenate([twice[:, None], hidden[:, None], filled], axis=1),
        rows=[name for name in classes for _ in masks],
        columns=["given", "known", *edits.numbered(4)],
        title=title(editor.settings["repaint"]),
    )
    yield Figure(
        "inpainting.png",
        "An image, its known part (all but the right half, or a box in the middle), and four ways to fill in the rest; "
        f"{editor.settings['repaint']} (Lugmayr et al. 2022).",
    )


def finished_curve(trained: TrainedRun) -> Path | None:
    """Returns the folder of the newest finished likelihood job of a run's weights, None if there is none."""
    weights = describe_run(trained)["weights"]
    found = []
    for file in (trained.folder / "likelihood").glob("*/likelihood.json"):
        try:
            of = read_json(file)["job"]
        except Damage as damage:
            say(f"{file} is damaged ({damage}), and left out: evaluate again to write it anew")
            continue
        if of["weights"] == weights and (file.parent / "rate_distortion.png").is_file():
            found.append((file.stat().st_mtime, file.parent))
    return max(found)[1] if found else None


def _copied_curve(folder: Path, out: Path) -> Figure:
    """Copies the rate-distortion curve of a finished likelihood job."""
    results = read_json(folder / "likelihood.json")
    of = results["job"]
    _copy(folder / "rate_distortion.png", out / "rate_distortion.png")
    return _curve(
        f"of {of['images']} images of the {of['split']} split, at {of['num_strata']} of the T timesteps each, "
        f"variances '{of['sigma']}', from {folder.parent.name}/{folder.name}",
        results["bits_per_dim"],
        results["standard_error"],
    )


def _estimated_curve(job: SamplingJob, source: Source, out: Path, *, batch_size: int) -> Figure:
    """Draws the rate-distortion curve of some images of a set at some timesteps."""
    trained, num_steps = job.trained, job.trained.config.diffusion.num_steps
    number, num_strata = min(_CURVE_IMAGES, source.num_examples), min(_CURVE_STRATA, num_steps)
    bounds = bound_program(trained.config, trained.network, batch_size=min(batch_size, number), num_strata=num_strata)
    computed = compute_bounds(
        bounds,
        trained.params,
        jax.random.fold_in(make_key(job.seed), _FIGURES - 2),
        Images(source, np.arange(number) * source.num_examples // number),
        missing_ranges([], number, longest=bounds.driver.batch_size),
        description=f"rate and distortion of {number} images",
    )
    sums = [sums_of(bound, bounds.edges) for _, bound in computed]
    likelihood, per_timestep = conclude(sums, dimensions=math.prod(source.image_shape))
    curve = rate_distortion(per_timestep.means[0], likelihood.prior_bits, per_timestep.means[1])
    plots.plot_rate_distortion(out / "rate_distortion.png", curve.reverse_time, curve.rate, curve.distortion)
    which = f"all {number}" if number == source.num_examples else f"{number}, evenly over all {source.num_examples},"
    timesteps = "all T timesteps" if num_strata == num_steps else f"{num_strata} log-spaced strata of the T timesteps"
    return _curve(
        f"of {which} images of {source.name}, at {timesteps}", likelihood.bits_per_dim, likelihood.standard_error
    )


def _curve(of: str, bits: float, error: float | None) -> Figure:
    bound = f"{bits:.3f}" if error is None else f"{bits:.3f} +- {error:.3f}"
    return Figure(
        "rate_distortion.png",
        f"Distortion and rate over the reverse process, and distortion over rate: {of}; in total {bound} bits/dim "
        "(Fig. 5).",
    )


def _neighbors(samples: np.ndarray, source: Source, out: Path) -> Figure:
    """Draws samples beside their nearest images in the run's own set."""
    indices = nearest(samples, source, number=_NEIGHBORS, most=_NEIGHBORS_AMONG)
    found = source.read(indices.reshape(-1)).reshape(*indices.shape, *source.image_shape)
    columns = ["sample", *edits.numbered(indices.shape[1])]
    title = f"nearest images in {source.name}"
    _save(
        out / "nearest_neighbors.png",
        np.concatenate([samples[:, None], found], axis=1),
        columns=columns,
        title=title,
    )
    total = source.num_examples
    among = f"all {total}" if total <= _NEIGHBORS_AMONG else f"the first {_NEIGHBORS_AMONG} of the {total}"
    return Figure(
        "nearest_neighbors.png",
        f"Each row starts with a sample, followed by the {indices.shape[1]} nearest images, by squared distance of "
        f"pixels, among {among} images of {source.name} (Figs. 12, 15).",
    )


def _copy(file: Path, to: Path) -> None:
    content = file.read_bytes()
    write_whole(to, lambda opened: opened.write(content))


def _masks(shape: tuple[int, int, int]) -> np.ndarray:
    """Returns known pixels, (2, H, W) bool: all but the right half, and all but a box in the middle."""
    height, width, _ = shape
    known = np.ones((2, height, width), bool)
    known[0, :, width // 2 :] = False
    known[1, height // 4 : -(height // 4) or None, width // 4 : -(width // 4) or None] = False
    return known


def _unless_unlabeled(editor: Editor, labels: Sequence[int | None] | None) -> list[int | None] | None:
    """Returns the labels for a network that was trained without label dropout, else None for no label."""
    config = editor.job.trained.config
    return list(labels) if labels and config.model.num_classes and not config.train.label_dropout else None


def _save(path: Path, images: np.ndarray, **texts: Any) -> None:
    pictures.save_png(path, edits.lay_out(images, **texts))


def _captions(editor: Editor, drawn: list[Figure], left_out: list[str], *, num: int, real: str) -> str:
    job, trained, config = editor.job, editor.job.trained, editor.job.trained.config
    height, width, channels = editor.shape
    average = "" if trained.sigma_rel is None else f" of sigma_rel {trained.sigma_rel}"
    options = ("" if trained.sigma_rel is None else f" --ema {trained.sigma_rel}") + (
        f" --steps {job.sampler.steps}" if job.sampler.steps else ""
    )
    lines = [
        f"# Figures of {config.name}",
        "",
        f"Checkpoint {trained.step}, EMA weights{average}; {config.data.source} at {height}x{width}x{channels}; "
        f"T = {config.diffusion.num_steps}, schedule {config.diffusion.schedule}; "
        f"{job.sampler.sampler} in {editor.num_steps} steps, variance {config.diffusion.variance}, "
        f"x_0 {'clipped' if config.diffusion.clip_x0 else 'not clipped'}; seed {job.seed}. "
        f"{real}Figures are numbered as in Ho et al. 2020; t is the paper's, from 1 to T. "
        f"To draw them again: `python evaluate.py figures {trained.folder} --num {num} --seed {job.seed} --step "
        f"{trained.step}{options}`.",
        "",
    ]
    if config.model.num_classes:
        of_pairs = "none" if config.train.label_dropout else "that of their first image"
        lines += [
            f"The run is class-conditional: samples take the {config.model.num_classes} classes in turn, "
            f"reconstructions and inpainting have their images' labels, interpolations {of_pairs}.",
            "",
        ]
    for file, caption in drawn:
        lines += [f"## {file}", "", caption, "", f"![{file}]({file})", ""]
    lines += ["Left out of the paper's figures:", "", *(f"- {each}" for each in left_out), ""]
    return "\n".join(lines)
