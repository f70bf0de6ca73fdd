"""The commands of `sample.py` beside samples: `progressive`, `share`, `reconstruct`, `interpolate` and `inpaint`.

Each writes a folder with a `job.json` that describes its results. Results made from given pictures are also saved one
by one, beside a row that shows them all with their inputs. A picture is given as a file, or as the index of one of the
run's test images. The default folder is named by the settings; results of other settings are replaced only on request.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax import Array

from ddpm_jax.data.decode import open_picture, to_array
from ddpm_jax.data.sources import load_held_out
from ddpm_jax.generation.editor import Editor, read_mask
from ddpm_jax.generation.job import SamplingJob
from ddpm_jax.generation.sampler_config import check_unlabeled, number_of_class
from ddpm_jax.keys import make_key
from ddpm_jax.names import SingleStepSampler
from ddpm_jax.pixels import to_uint8
from ddpm_jax.run.build import image_shape
from ddpm_jax.run.weights import checksum
from ddpm_jax.system import pictures
from ddpm_jax.system.errors import Damage, UserError
from ddpm_jax.system.files import claimed, crc32, job_differences, read_json, short_name, write_json

_MOST = 64  # rows or columns of one picture
_SIDE = 1024  # pixels that a small picture is enlarged to
_UNKNOWN = 128  # the gray shown at unknown pixels


def lay_out(
    images: np.ndarray, *, rows: Sequence[str] = (), columns: Sequence[str] = (), title: str = ""
) -> np.ndarray:
    """Lays out images, (rows, columns, H, W, C) uint8, as one picture, enlarged if it is small; see `annotate`."""
    grid = pictures.grid(images.reshape(-1, *images.shape[2:]), columns=images.shape[1])
    return pictures.annotate(pictures.enlarge(grid, side=_SIDE), rows=rows, columns=columns, title=title)


def describe_class(job: SamplingJob, label: int | None) -> str:
    """Returns a class as pictures name it; empty if the run has none."""
    if label is None:
        return "no label" if job.trained.config.model.num_classes else ""
    names = job.trained.class_names
    return names[label] if names and names[label] != str(label) else f"class {label}"


def describe_chain(job: SamplingJob, num_steps: int | None, *details: str) -> str:
    """Returns the title of a picture: the run, its training step, the chain, and some details."""
    sampler, scale = job.sampler, job.sampler.guidance_scale
    guidance = "" if scale == 1 else f"guidance scale {scale:g}"
    chain = f"{sampler.sampler}, {num_steps} steps"
    trained = job.trained
    average = "" if trained.sigma_rel is None else f"EMA {trained.sigma_rel}"
    run = f"{trained.config.name}, training step {trained.step}"
    return ", ".join(filter(None, [run, average, chain, guidance, *details]))


def hide(images: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Grays out the unknown pixels of images, (.., H, W, C) uint8; `known` is (.., H, W) bool."""
    return np.where(known[..., None], images, np.uint8(_UNKNOWN))


def over_time(frames: Array, images: np.ndarray) -> np.ndarray:
    """Arranges frames of chains, (K, N, H, W, C), and the images they end in, (N, H, W, C) uint8, as (N, K + 1, ..)."""
    return np.concatenate([np.asarray(to_uint8(frames)).swapaxes(0, 1), images[:, None]], axis=1)


def draw_progressive(
    job: SamplingJob, out: Path | None = None, *, num: int, columns: int, overwrite: bool = False
) -> Path:
    """Draws the first images of the sampling job, with x_t and the predicted x_0 on the way to them.

    Args:
      job: the run, the seed and the sampler.
      out: the folder to write; one of these settings in the run's folder if None. It gets `x_t.png`, and `x0.png` with
        the images predicted from x_t.
      num: number of images, one per row, in [1, 64].
      columns: number of timesteps, evenly over the chain, in [1, 64]; fewer if the chain has fewer steps.
      overwrite: whether results of other settings in `out` are replaced.

    Returns:
      the picture of the predictions.

    Raises:
      UserError: a value is out of range, or the result cannot be written.

    Ho et al. 2020, sec. 4.3 and Fig. 6.
    """
    editor = _editor(job, num, "--num")
    _check_number(columns, "--columns")
    labels, levels = editor.job_labels(num), editor.levels(columns)
    t = [editor.paper_t(level) for level in levels]
    description = describe_results("progressive", job, editor.num_steps, t=t, num=num, labels=labels)
    with results_folder(description, out or _default_folder(description, job), overwrite=overwrite) as folder:
        drawn, frames = editor.trajectory(num, labels, levels=levels)
        images = np.asarray(to_uint8(drawn))
        texts = dict(rows=[describe_class(job, label) for label in labels or ()], columns=[*at_t(t), "image"])
        shown = {
            f"{file}.png": lay_out(
                over_time(over, images), title=describe_chain(job, editor.num_steps, f"{name} at t"), **texts
            )
            for file, name, over in (("x_t", "x_t", frames.x_t), ("x0", "predicted x_0", frames.x0))
        }
        _save(folder, description, shown)
    return folder / "x0.png"


def share_latents(
    job: SamplingJob,
    out: Path | None = None,
    *,
    t: Sequence[int],
    draws: int,
    label: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Draws images that have x_t of one chain in common; see `editing.share_latents`.

    Args:
      job: the run, the seed and the sampler.
      out: the folder to write; one of these settings in the run's folder if None.
      t: values of the paper's t, each in [0, T], one row each; T, 3/4, 1/2 and 1/4 of it if none are given. The
        chain includes them, as extra steps where it would skip them.
      draws: images per row, in [1, 64].
      label: class label of the images, for a class-conditional run; None: no label.
      overwrite: whether results of other settings in `out` are replaced.

    Returns:
      the picture: one row per t, first x_t, then the images drawn from it.

    Raises:
      UserError: a value is out of range, or the result cannot be written.

    Ho et al. 2020, Fig. 7.
    """
    num_steps = job.trained.config.diffusion.num_steps
    t = t or sorted({math.ceil(num_steps * part / 4) for part in range(1, 5)}, reverse=True)
    editor = _editor(job, draws, "--draws", extra_t=t)
    _check_random(job, draws)
    labels, levels = _labels(editor, label), [editor.level_at(each) for each in t]
    description = describe_results("share", job, editor.num_steps, t=list(t), draws=draws, label=label)
    with results_folder(description, out or _default_folder(description, job), overwrite=overwrite) as folder:
        latents, drawn = editor.share_latents(make_key(job.seed), labels, levels=levels, draws=draws)
        shown = lay_out(
            np.concatenate([latents[:, None], drawn], axis=1),
            rows=at_t(t),
            columns=["x_t", *numbered(draws)],
            title=describe_chain(job, editor.num_steps, describe_class(job, label)),
        )
        _save(folder, description, {"share.png": shown})
    return folder / "share.png"


def reconstruct_picture(
    job: SamplingJob,
    file: str,
    out: Path | None = None,
    *,
    t: int,
    draws: int,
    label: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Noises a picture to t and denoises it several times; see `editing.encode_decode`.

    Args:
      job: the run, the seed and the sampler.
      file: the picture, cropped and resized to the size of the run's images; or the index of one of these.
      out: the folder to write; one of these settings in the run's folder if None.
      t: the paper's t, in [0, T]; the chain includes it, as an extra step where it would skip it.
      draws: number of reconstructions, >= 1.
      label: class label of the picture, for a class-conditional run; None: no label.
      overwrite: whether results of other settings in `out` are replaced.

    Returns:
      the row: the picture, then its reconstructions.

    Raises:
      UserError: a value is out of range, there is no such picture, or the result cannot be written.
    """
    editor = _editor(job, draws, "--draws", extra_t=[t])
    if t:
        _check_random(job, draws)
    labels, (image, _), level = _labels(editor, label), _read(job, file), editor.level_at(t)
    options = dict(t=t, pictures=[file], draws=draws, label=label)
    description = describe_results("reconstruct", job, editor.num_steps, content=_crc(image), **options)
    with results_folder(description, out or _default_folder(description, job), overwrite=overwrite) as folder:
        made = editor.reconstruct(make_key(job.seed), image[None], labels, np.array([level]), draws=draws)[0]
        title = describe_chain(job, editor.num_steps, f"t = {t}", describe_class(job, label))
        texts = dict(columns=["given", *numbered(draws)], title=title)
        _save(folder, description, _in_a_row(made, [image], [], **texts))
    return folder / "row.png"


def interpolation_sampler(t: int | None, sampler: SingleStepSampler | None) -> SingleStepSampler:
    """Returns the sampler of `interpolate_pictures`: the requested one, or the default for t.

    Args:
      t: where pictures are mixed, or None.
      sampler: the requested one, if any.

    Raises:
      UserError: "ancestral" is requested without t; only DDIM takes pictures to their noises.
    """
    if t is None and sampler == "ancestral":
        raise UserError("--sampler ancestral needs --t: without it pictures are taken to their noises, only by ddim")
    return sampler or ("ddim" if t is None else "ancestral")


def interpolate_pictures(
    job: SamplingJob,
    files: Sequence[str],
    out: Path | None = None,
    *,
    t: int | None,
    num: int,
    label: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Interpolates between two pictures; see `editing.interpolate` and `editing.ddim_interpolate`.

    Args:
      job: the run, the seed and the sampler.
      files: the two pictures, as in `reconstruct_picture`.
      out: the folder to write; one of these settings in the run's folder if None.
      t: the paper's t, in [0, T]; None: by DDIM, along the great circle between their noises.
      num: number of images from one picture to the other, >= 2, both ends included.
      label: class label of both pictures, for a class-conditional run; None: no label.
      overwrite: whether results of other settings in `out` are replaced.

    Returns:
      the row: the first picture, the interpolation, the second picture.

    Raises:
      UserError: there are not two, a value is out of range, there is no such picture, or the result cannot be written.
    """
    if len(files) != 2:
        raise UserError(f"--images needs two pictures to interpolate between, not {len(files)}")
    if num < 2:
        raise UserError(f"--num must be at least 2, the two ends, not {num}")
    editor = _editor(job, num, "--num", extra_t=[] if t is None else [t])
    labels = _labels(editor, label)
    (a, _), (b, _) = (_read(job, file) for file in files)
    pair, lambdas = (a[None], b[None]), np.linspace(0, 1, num)
    options: dict[str, Any] = dict(pictures=list(files), num=num, label=label, content=_crc(np.stack([a, b])))
    if t is None:
        job = job._replace(sampler=dataclasses.replace(job.sampler, sampler="ddim"))
        num_steps, where = editor.ddim_steps, "between DDIM latents"
    else:
        num_steps, where, options["t"] = editor.num_steps, f"t = {t}", t
    description = describe_results("interpolate", job, num_steps, **options)
    with results_folder(description, out or _default_folder(description, job), overwrite=overwrite) as folder:
        if t is None:
            made = editor.ddim_interpolate(*pair, lambdas, labels=labels)[0]
        else:
            level = np.array([editor.level_at(t)])
            made = editor.interpolate(make_key(job.seed), *pair, lambdas, level, labels=labels)[0]
        title = describe_chain(job, num_steps, where, describe_class(job, label))
        texts = dict(columns=["given", *(f"{each:.2g}" for each in lambdas), "given"], title=title)
        _save(folder, description, _in_a_row(made, [a], [b], **texts))
    return folder / "row.png"


def inpaint_picture(
    job: SamplingJob,
    file: str,
    mask: str,
    out: Path | None = None,
    *,
    draws: int,
    label: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Fills in the black part of a mask in a picture; see `editing.inpaint`.

    Args:
      job: the run, the seed, and the number of steps.
      file: the picture, cropped and resized to the size of the run's images; or the index of one of these.
      mask: a picture of the same aspect ratio, or of the size of the run's images: white is kept, black is filled in.
      out: the folder to write; one of these settings in the run's folder if None.
      draws: number of results, >= 1.
      label: class label of the picture, for a class-conditional run; None: no label.
      overwrite: whether results of other settings in `out` are replaced.

    Returns:
      the row: the picture, its known part, then the results.

    Raises:
      UserError: a value is out of range, there is no such picture, or the result cannot be written.
    """
    editor = _editor(job, draws, "--draws")
    if job.sampler.sampler != "ancestral":
        raise UserError(f"--sampler {job.sampler.sampler}: RePaint needs the noise of ancestral sampling")
    labels, (image, size) = _labels(editor, label), _read(job, file)
    known = read_mask(mask, editor.shape, size=size, max_megapixels=job.trained.config.data.max_megapixels)
    content = _crc(hide(image, known))
    options = dict(pictures=[file], mask=mask, draws=draws, label=label)
    description = describe_results("inpaint", job, editor.repaint_steps, content=content, **options)
    with results_folder(description, out or _default_folder(description, job), overwrite=overwrite) as folder:
        made = editor.inpaint(make_key(job.seed), image[None], known[None], labels, draws=draws)[0]
        title = describe_chain(job, editor.repaint_steps, "RePaint", describe_class(job, label))
        texts = dict(columns=["given", "known", *numbered(draws)], title=title)
        _save(folder, description, _in_a_row(made, [image, hide(image, known)], [], **texts))
    return folder / "row.png"


def at_t(t: Sequence[int]) -> list[str]:
    """Returns the texts of rows or columns at timesteps."""
    return [f"t = {each}" for each in t]


def numbered(number: int) -> list[str]:
    """Returns the texts of columns of several results."""
    return [str(i + 1) for i in range(number)]


def _crc(images: np.ndarray) -> str:
    return f"{crc32(images):08x}"


def _check_random(job: SamplingJob, draws: int) -> None:
    """Checks that several draws from one x_t would differ."""
    if draws > 1 and job.sampler.sampler == "ddim" and not job.sampler.eta:
        raise UserError(
            f"--sampler ddim is deterministic, so all --draws {draws} from one x_t would be the same image: "
            "use --draws 1, or --sampler ancestral"
        )


def _check_number(number: int, option: str) -> None:
    if not 1 <= number <= _MOST:
        raise UserError(f"{option} must be 1 to {_MOST}, not {number}")


def _editor(job: SamplingJob, number: int, option: str, *, extra_t: Sequence[int] = ()) -> Editor:
    """Checks a request, and makes the editor whose chain includes the values of t."""
    num_steps = job.trained.config.diffusion.num_steps
    for t in extra_t:
        if not 0 <= t <= num_steps:
            raise UserError(f"--t {t} must be 0 to {num_steps}, the steps of the run's diffusion")
    _check_number(number, option)
    editor = Editor(job, batch_size=number, extra_t=extra_t)
    pictures.check_channels(editor.shape[-1])
    return editor


def _read(job: SamplingJob, given: str) -> tuple[np.ndarray, tuple[int, int]]:
    """Reads a picture from a file or the run's test images; returns it with its original (H, W)."""
    if not given.isdecimal():
        picture = open_picture(given, max_megapixels=job.trained.config.data.max_megapixels)
        return to_array(picture, image_shape(job.trained.config)), picture.size[::-1]
    source = load_held_out(job.trained.config.data)
    if int(given) >= source.num_examples:
        raise UserError(f"there is no image {given}: {source.name} has {source.num_examples}, numbered from 0")
    return source.read(np.array([int(given)]))[0], source.image_shape[:2]


def _labels(editor: Editor, label: int | None) -> list[int | None]:
    config = editor.job.trained.config
    if label is None:
        check_unlabeled(config, "drawing without --label", "give --label")
    else:
        number_of_class(label, (), config.model.num_classes, option="--label")
    if label is None and editor.job.sampler.guidance_scale != 1:
        raise UserError(
            "--guidance-scale needs --label: guidance moves from the unconditional prediction to that of a class"
        )
    return [label]


def _in_a_row(
    made: np.ndarray, before: list[np.ndarray], after: list[np.ndarray], **texts: Any
) -> dict[str, np.ndarray]:
    """Returns the pictures to save: each result, and the row of all of them between their inputs."""
    each = {f"{i:02d}.png": image for i, image in enumerate(made)}
    return {**each, "row.png": lay_out(np.stack([*before, *made, *after])[None], **texts)}


def _default_folder(description: Mapping[str, Any], job: SamplingJob) -> Path:
    """Returns the folder of a command's results in the folder of a run."""
    left_out = {"command": description["command"], "weights": description["weights"], "label": None}
    left_out |= {"sampler": "ancestral", "guidance_scale": 1.0}
    text = lambda value: "-".join(Path(str(each)).name for each in (value if isinstance(value, list) else [value]))
    parts = [f"{name}_{text(value)}" for name, value in description.items() if left_out.get(name, ()) != value]
    return job.trained.folder / "samples" / description["command"] / short_name("_".join(parts))


@contextlib.contextmanager
def results_folder(description: dict[str, Any], out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Claims the folder of a command's results, and yields it.

    Args:
      description: the command, the checkpoint, the seed and all else that the results depend on.
      out: the folder; created if missing.
      overwrite: whether results of the same command with other settings are replaced.

    Raises:
      UserError: it contains something else, or another process is writing to it.
    """
    command = description["command"]
    file = out / "job.json"
    if file.is_file():
        try:
            found = read_json(file)
        except Damage as damage:
            raise UserError(f"{file} is damaged ({damage}): use another --out, or remove {out}") from None
        there = found.get("command")
        if there != command:
            content = f"the results of {there}" if there else "another job"
            raise UserError(f"{out} contains {content}: use another --out, or remove it")
        different = job_differences(found, description)
        if different and not overwrite:
            raise UserError(
                f"{out} contains other results of {command} ({different}): use another --out, or replace them with "
                "--overwrite"
            )
    elif out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise UserError(f"{out} is not empty and contains no results of {command}: use another --out, or remove it")
    with claimed(out):
        yield out


def describe_results(command: str, job: SamplingJob, num_steps: int | None, **options: Any) -> dict[str, Any]:
    """Returns a description of results, as JSON values."""
    width = job.trained.sigma_rel
    return {
        "command": command,
        "checkpoint": job.trained.step,
        **({} if width is None else {"sigma_rel": width}),
        "weights": f"{checksum(job.trained.params):08x}",
        "seed": job.seed,
        "sampler": job.sampler.sampler,
        "steps": num_steps,
        "guidance_scale": job.sampler.guidance_scale,
        **options,
    }


def _save(out: Path, description: dict[str, Any], shown: Mapping[str, np.ndarray]) -> None:
    """Writes results into a folder of `results_folder`, and removes others of the same command."""
    write_json(out / "job.json", description)
    for path in out.iterdir():
        if re.fullmatch(r"\d\d\.png", path.name) and path.name not in shown:
            path.unlink()
    for name, image in shown.items():
        pictures.save_png(out / name, image)
