"""What `sample.py` draws beside samples: `progressive`, `share`, `reconstruct`, `interpolate` and `inpaint`.

Each writes a folder, in which `job.json` says what was drawn. What is made of given pictures is there as pictures of
their own too, beside the row of all with what they were made from. A picture is given as a file, or as the number of
one of the run's test images. Drawn again, a folder holds the new results alone.
"""

import contextlib
import json
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from ddpm_jax.data.decode import open_picture, to_array
from ddpm_jax.data.sources import load_held_out
from ddpm_jax.generation.editor import Editor, read_mask
from ddpm_jax.generation.job import Job
from ddpm_jax.pixels import to_uint8
from ddpm_jax.run.build import image_shape
from ddpm_jax.system import pictures
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import claimed, write_json

SamplerName = typing.Literal["ancestral", "ddim"]
"""The samplers whose chains can be begun in their middle: they remember nothing of the steps before."""

_MOST = 64  # rows or columns of one picture
_SIDE = 1024  # pixels that a small picture is enlarged to
_UNKNOWN = 128  # the level that is shown where a mask hides the image


def lay_out(rows: np.ndarray) -> np.ndarray:
    """Lays out images, (rows, columns, H, W, C) uint8, as one picture, enlarged if they are small."""
    images = rows.reshape(-1, *rows.shape[2:])
    return pictures.enlarge(pictures.grid(images, columns=rows.shape[1]), side=_SIDE)


def hide(images: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Grays out what is not known of images, (.., H, W, C) uint8, by masks, (.., H, W) bool."""
    return np.where(known[..., None], images, np.uint8(_UNKNOWN))


def over_time(frames: Array, images: np.ndarray) -> np.ndarray:
    """Puts frames of chains, (K, N, H, W, C), in rows that end in their images, (N, H, W, C) uint8: (N, K + 1, ..)."""
    return np.concatenate([np.asarray(to_uint8(frames)).swapaxes(0, 1), images[:, None]], axis=1)


def draw_progressive(job: Job, out: Path, *, num: int, columns: int) -> Path:
    """Draws the first images of the sampling job, and what the chain was on the way to them.

    Args:
      job: the weights, the seed and the chain.
      out: the folder to write: `x_t.png`, and `x0.png` with the images that are predicted from x_t.
      num: how many images, a row each, in [1, 64].
      columns: at how many times, evenly over the chain, in [1, 64]; fewer where the chain has fewer steps.

    Returns:
      the picture of the predictions.

    Raises:
      UserError: a value is out of range, or the result cannot be written.

    Ho et al. 2020, sec. 4.3 and Fig. 6.
    """
    editor = _editor(job, num, "--num")
    _check_number(columns, "--columns")
    labels, depths = editor.labels_in_turn(num), editor.depths(columns)
    with _results("progressive", out):
        drawn, frames = editor.trajectory(num, labels, depths=depths)
        images = np.asarray(to_uint8(drawn))
        shown = {
            f"{name}.png": lay_out(over_time(over, images)) for name, over in (("x_t", frames.x_t), ("x0", frames.x0))
        }
        times = [editor.paper_time(depth) for depth in depths]
        about = dict(t=times, num=num, labels=None if labels is None else labels.tolist())
        _save(out, _described("progressive", job, editor.num_steps, **about), shown)
    return out / "x0.png"


def share_latents(job: Job, out: Path, *, times: Sequence[int], draws: int, label: int | None = None) -> Path:
    """Draws images that have x_t of one chain in common; see `editing.share_latents`.

    Args:
      job: the weights, the seed and the chain.
      out: the folder to write.
      times: the paper's t, each in [0, T], a row each; T, 3/4, 1/2 and 1/4 of it if none are given. The chain visits
        just these, in as many steps more as are new to it.
      draws: how many images from each, in [1, 64].
      label: of the images, for a conditional run; None: not told.

    Returns:
      the picture: a row for each time, first x_t, then the images drawn from it.

    Raises:
      UserError: a value is out of range, or the result cannot be written.

    Ho et al. 2020, Fig. 7.
    """
    whole = job.config.diffusion.num_steps
    times = times or sorted({math.ceil(whole * part / 4) for part in range(1, 5)}, reverse=True)
    editor = _editor(job, draws, "--draws", times=times)
    labels, depths = _labels(editor, label), [editor.depth_of(time) for time in times]
    with _results("share", out):
        latents, drawn = editor.share_latents(jax.random.key(job.seed), labels, depths=depths, draws=draws)
        about = dict(t=[editor.paper_time(depth) for depth in depths], draws=draws, label=label)
        shown = lay_out(np.concatenate([latents[:, None], drawn], axis=1))
        _save(out, _described("share", job, editor.num_steps, **about), {"share.png": shown})
    return out / "share.png"


def reconstruct_picture(job: Job, file: str, out: Path, *, time: int, draws: int, label: int | None = None) -> Path:
    """Diffuses a picture to `time` and takes it back several times; see `editing.encode_decode`.

    Args:
      job: the weights, the seed and the chain.
      file: the picture, cropped and resized as the run's images are; or the number of one of these.
      out: the folder to write.
      time: the paper's t, in [0, T]; the chain visits just it, in a step more where it is new to it.
      draws: how many reconstructions, >= 1.
      label: of the picture, for a conditional run; None: not told.

    Returns:
      the row: the picture, then its reconstructions.

    Raises:
      UserError: a value is out of range, there is no such picture, or the result cannot be written.
    """
    editor = _editor(job, draws, "--draws", times=[time])
    labels, (image, _), depth = _labels(editor, label), _read(job, file), editor.depth_of(time)
    with _results("reconstruct", out):
        made = editor.reconstruct(jax.random.key(job.seed), image[None], labels, np.array([depth]), draws=draws)[0]
        about = dict(t=editor.paper_time(depth), pictures=[file], draws=draws, label=label)
        _save(out, _described("reconstruct", job, editor.num_steps, **about), _in_a_row(made, [image], []))
    return out / "row.png"


def interpolation_sampler(time: int | None, sampler: SamplerName | None) -> SamplerName:
    """Names the sampler of `interpolate_pictures`: the one asked for, or what suits the way.

    Args:
      time: where pictures are mixed, or None.
      sampler: the one asked for, if any.

    Raises:
      UserError: "ancestral" is to take pictures to their noises, which DDIM alone can.
    """
    if time is None and sampler == "ancestral":
        raise UserError("--sampler ancestral needs --t: without it pictures are taken to their noises, by ddim alone")
    return sampler or ("ddim" if time is None else "ancestral")


def interpolate_pictures(
    job: Job, files: Sequence[str], out: Path, *, time: int | None, num: int, label: int | None = None
) -> Path:
    """Interpolates between two pictures; see `editing.interpolate` and `editing.ddim_interpolate`.

    Args:
      job: the weights, the seed and the chain.
      files: the two pictures, likewise as in `reconstruct_picture`.
      out: the folder to write.
      time: the paper's t, in [0, T]; None: by DDIM, along the great circle of their noises.
      num: how many steps from the one to the other, >= 2, both ends counted.
      label: of both pictures, for a conditional run; None: not told.

    Returns:
      the row: the first picture, what lies between, the second picture.

    Raises:
      UserError: there are not two, a value is out of range, there is no such picture, or the result cannot be written.
    """
    if len(files) != 2:
        raise UserError(f"--images needs two pictures to interpolate between, not {len(files)}")
    if num < 2:
        raise UserError(f"--num must be at least 2, the two ends, not {num}")
    editor = _editor(job, num, "--num", times=[] if time is None else [time])
    labels = _labels(editor, label)
    (a, _), (b, _) = (_read(job, file) for file in files)
    pair, lambdas = (a[None], b[None]), np.linspace(0, 1, num)
    about: dict[str, Any] = dict(pictures=list(files), num=num, label=label)
    with _results("interpolate", out):
        if time is None:
            made = editor.ddim_interpolate(*pair, lambdas, labels=labels)[0]
            described = _described("interpolate", job, editor.ddim_steps, **about) | dict(sampler="ddim")
        else:
            depth = editor.depth_of(time)
            made = editor.interpolate(jax.random.key(job.seed), *pair, lambdas, np.array([depth]), labels=labels)[0]
            described = _described("interpolate", job, editor.num_steps, t=editor.paper_time(depth), **about)
        _save(out, described, _in_a_row(made, [a], [b]))
    return out / "row.png"


def inpaint_picture(job: Job, file: str, mask: str, out: Path, *, draws: int, label: int | None = None) -> Path:
    """Draws the black part of a mask anew in a picture; see `editing.inpaint`.

    Args:
      job: the weights, the seed, and how many steps.
      file: the picture, cropped and resized as the run's images are; or the number of one of these.
      mask: a picture of the same aspect ratio, or of the size of the run's images: white is kept, black is drawn anew.
      out: the folder to write.
      draws: how many results, >= 1.
      label: of the picture, for a conditional run; None: not told.

    Returns:
      the row: the picture, what is known of it, then the results.

    Raises:
      UserError: a value is out of range, there is no such picture, or the result cannot be written.
    """
    editor = _editor(job, draws, "--draws")
    if job.choice.sampler != "ancestral":
        raise UserError(f"--sampler {job.choice.sampler}: RePaint draws noise at every step, as ancestral does")
    labels, (image, size) = _labels(editor, label), _read(job, file)
    known = read_mask(mask, editor.shape, size=size)
    with _results("inpaint", out):
        made = editor.inpaint(jax.random.key(job.seed), image[None], known[None], labels, draws=draws)[0]
        about = dict(pictures=[file], mask=mask, draws=draws, label=label)
        described = _described("inpaint", job, editor.repaint_steps, **about)
        _save(out, described, _in_a_row(made, [image, hide(image, known)], []))
    return out / "row.png"


def _check_number(number: int, option: str) -> None:
    if not 1 <= number <= _MOST:
        raise UserError(f"{option} must be 1 to {_MOST}, not {number}")


def _check_time(job: Job, time: int) -> None:
    if not 0 <= time <= job.config.diffusion.num_steps:
        raise UserError(f"--t {time} must be 0 to {job.config.diffusion.num_steps}, the steps of the run's diffusion")


def _editor(job: Job, number: int, option: str, *, times: Sequence[int] = ()) -> Editor:
    """Checks what was asked for; gives the editor whose chain visits the times."""
    for time in times:
        _check_time(job, time)
    _check_number(number, option)
    editor = Editor(job, batch_size=number, times=times)
    pictures.check_channels(editor.shape[-1])
    return editor


def _read(job: Job, given: str) -> tuple[np.ndarray, tuple[int, int]]:
    """Reads a picture, a file or a number of the run's test images; gives its (H, W) as it was given, too."""
    if not given.isdecimal():
        picture = open_picture(given)
        return to_array(picture, image_shape(job.config)), picture.size[::-1]
    source = load_held_out(job.config.data)
    if int(given) >= source.num_examples:
        raise UserError(f"there is no image {given}: {source.name} has {source.num_examples}, numbered from 0")
    return source.read(np.array([int(given)]))[0], source.image_shape[:2]


def _labels(editor: Editor, label: int | None) -> np.ndarray | None:
    classes = editor.job.config.model.num_classes
    if label is not None and not 0 <= label < classes:
        has = f"its classes are 0 to {classes - 1}" if classes else "it is unconditional and knows no labels"
        raise UserError(f"--label {label}: the run has no such class, {has}")
    if label is None and editor.job.choice.guidance_scale != 1:
        raise UserError(
            "--guidance-scale needs --label: guidance moves from the unconditional prediction to that of a class"
        )
    return editor.labels([label])


def _in_a_row(made: np.ndarray, before: list[np.ndarray], after: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Names what was made, each image and the row of all between what they were made from."""
    each = {f"{i:02d}.png": image for i, image in enumerate(made)}
    return {**each, "row.png": lay_out(np.stack([*before, *made, *after])[None])}


@contextlib.contextmanager
def _results(command: str, out: Path) -> Iterator[None]:
    """Claims the folder of a command's results.

    Raises:
      UserError: it holds something else, or another process writes to it.
    """
    description = out / "job.json"
    if description.is_file():
        try:
            there = dict(json.loads(description.read_text())).get("command")
        except (ValueError, TypeError) as error:
            raise UserError(f"{description} is damaged: give another --out, or remove {out}") from error
        if there != command:
            holds = f"the results of {there}" if there else "another job"
            raise UserError(f"{out} holds {holds}: give another --out, or remove it")
    elif out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise UserError(f"{out} is not empty and holds no results of {command}: give another --out, or remove it")
    with claimed(out):
        yield


def _described(command: str, job: Job, num_steps: int | None, **about: Any) -> dict[str, Any]:
    """Says what was drawn and how, in the kinds that JSON has."""
    return {
        "command": command,
        "checkpoint": job.checkpoint,
        "seed": job.seed,
        "sampler": job.choice.sampler,
        "steps": num_steps,
        "guidance_scale": job.choice.guidance_scale,
        **about,
    }


def _save(out: Path, described: dict[str, Any], shown: Mapping[str, np.ndarray]) -> None:
    """Writes results, in a folder of `_results`; what an earlier job of the command drew more of is removed."""
    write_json(out / "job.json", described)
    for path in out.iterdir():
        if re.fullmatch(r"\d\d\.png", path.name) and path.name not in shown:
            path.unlink()
    for name, image in shown.items():
        pictures.save_png(out / name, image)
