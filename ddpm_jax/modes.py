"""What `sample.py` draws beside samples: `progressive`, `share`, `reconstruct`, `interpolate` and `inpaint`.

Each writes a folder. What is made of given pictures is there as pictures of their own too, beside the row of all with
what they were made from. A picture is given as a file, or as the number of one of the run's test images.
"""

import math
import typing
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax import Array

from ddpm_jax import pictures
from ddpm_jax.config import image_shape
from ddpm_jax.data.decode import read_picture
from ddpm_jax.data.pipeline import to_uint8
from ddpm_jax.data.sources import load_held_out
from ddpm_jax.editor import Editor, read_mask
from ddpm_jax.errors import UserError
from ddpm_jax.sampling import Job

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
    """Greys out what is not known of images, (.., H, W, C) uint8, by masks, (.., H, W) bool."""
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
    drawn, frames = editor.trajectory(num, editor.labels_in_turn(num), depths=editor.depths(columns))
    images = np.asarray(to_uint8(drawn))
    for name, over in (("x_t", frames.x_t), ("x0", frames.x0)):
        pictures.save_png(out / f"{name}.png", lay_out(over_time(over, images)))
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
    latents, drawn = editor.share_latents(jax.random.key(job.seed), labels, depths=depths, draws=draws)
    pictures.save_png(out / "share.png", lay_out(np.concatenate([latents[:, None], drawn], axis=1)))
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
    labels, image, depth = _labels(editor, label), _read(job, file), np.array([editor.depth_of(time)])
    made = editor.reconstruct(jax.random.key(job.seed), image[None], labels, depth, draws=draws)[0]
    return _save(out, made, [image], [])


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
    a, b = (_read(job, file) for file in files)
    pair, lambdas = (a[None], b[None]), np.linspace(0, 1, num)
    if time is None:
        made = editor.ddim_interpolate(*pair, lambdas, labels=labels)[0]
    else:
        depth = np.array([editor.depth_of(time)])
        made = editor.interpolate(jax.random.key(job.seed), *pair, lambdas, depth, labels=labels)[0]
    return _save(out, made, [a], [b])


def inpaint_picture(job: Job, file: str, mask: str, out: Path, *, draws: int, label: int | None = None) -> Path:
    """Draws the black part of a mask anew in a picture; see `editing.inpaint`.

    Args:
      job: the weights, the seed, and how many steps.
      file: the picture, cropped and resized as the run's images are; or the number of one of these.
      mask: a picture of the same aspect ratio: white is kept, black is drawn anew.
      out: the folder to write.
      draws: how many results, >= 1.
      label: of the picture, for a conditional run; None: not told.

    Returns:
      the row: the picture, what is known of it, then the results.

    Raises:
      UserError: a value is out of range, there is no such picture, or the result cannot be written.
    """
    editor = _editor(job, draws, "--draws")
    labels, image, known = _labels(editor, label), _read(job, file), read_mask(mask, editor.shape)
    made = editor.inpaint(jax.random.key(job.seed), image[None], known[None], labels, draws=draws)[0]
    return _save(out, made, [image, hide(image, known)], [])


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


def _read(job: Job, given: str) -> np.ndarray:
    """Reads a picture: a file, or a number of the run's test images."""
    if not given.isdecimal():
        return read_picture(given, image_shape(job.config))
    source = load_held_out(job.config.data)
    if int(given) >= source.num_examples:
        raise UserError(f"there is no image {given}: {source.name} has {source.num_examples}, numbered from 0")
    return source.read(np.array([int(given)]))[0]


def _labels(editor: Editor, label: int | None) -> np.ndarray | None:
    classes = editor.job.config.model.num_classes
    if label is not None and not 0 <= label < classes:
        has = f"its classes are 0 to {classes - 1}" if classes else "it is unconditional and knows no labels"
        raise UserError(f"--label {label}: the run has no such class, {has}")
    if label is None and editor.job.choice.guidance:
        raise UserError("--guidance needs --label: it is away from what the network says when it is told none")
    return editor.labels([label])


def _save(out: Path, made: np.ndarray, before: list[np.ndarray], after: list[np.ndarray]) -> Path:
    for i, image in enumerate(made):
        pictures.save_png(out / f"{i:02d}.png", image)
    pictures.save_png(out / "row.png", lay_out(np.stack([*before, *made, *after])[None]))
    return out / "row.png"
