"""What a run's network makes of a user's own pictures: `evaluate.py reconstruct`, `interpolate` and `inpaint`.

Each writes a folder: the results as pictures of their own, and all in one row with what they were made from.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from ddpm_jax import pictures
from ddpm_jax.data.decode import read_picture
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.edits import Editor, read_mask
from ddpm_jax.sampling import Job

_SIDE = 1024  # pixels that a small row is enlarged to
_UNKNOWN = 128  # the level that is shown where a mask hides the image


def reconstruct_picture(job: Job, file: str, out: Path, *, time: int, draws: int, label: int | None = None) -> Path:
    """Diffuses a picture to `time` and takes it back several times; see `editing.encode_decode`.

    Args:
      job: the weights, the seed and the chain.
      file: the picture; cropped and resized as the run's images are.
      out: the folder to write.
      time: the paper's t, in [0, T].
      draws: how many reconstructions, >= 1.
      label: of the picture, for a conditional run; None: not told.

    Returns:
      the row: the picture, then its reconstructions.

    Raises:
      UserError: a value is out of range, the file is no picture, or the result cannot be written.
    """
    editor, depth = _editor(job, time, draws, "--draws")
    image, labels = read_picture(file, editor.shape), _labels(editor, label)
    made = editor.reconstruct(jax.random.key(job.seed), image[None], labels, np.array([depth]), draws=draws)[0]
    return _save(out, made, [image], [])


def interpolate_pictures(job: Job, files: Sequence[str], out: Path, *, time: int | None, num: int) -> Path:
    """Interpolates between two pictures; see `editing.interpolate` and `editing.ddim_interpolate`.

    Args:
      job: the weights, the seed and the chain.
      files: the two pictures; cropped and resized as the run's images are.
      out: the folder to write.
      time: the paper's t, in [0, T]; None: by DDIM, along the great circle of their noises.
      num: how many steps from the one to the other, >= 2, both ends counted.

    Returns:
      the row: the first picture, what lies between, the second picture.

    Raises:
      UserError: there are not two, a value is out of range, a file is no picture, or the result cannot be written.
    """
    if len(files) != 2:
        raise UserError(f"--images needs two pictures to interpolate between, not {len(files)}")
    if num < 2:
        raise UserError(f"--num must be at least 2, the two ends, not {num}")
    editor, depth = _editor(job, time or 0, num, "--num")
    a, b = (read_picture(file, editor.shape) for file in files)
    lambdas = np.linspace(0, 1, num)
    if time is None:
        made = editor.ddim_interpolate(a[None], b[None], lambdas)[0]
    else:
        made = editor.interpolate(jax.random.key(job.seed), a[None], b[None], lambdas, np.array([depth]))[0]
    return _save(out, made, [a], [b])


def inpaint_picture(job: Job, file: str, mask: str, out: Path, *, draws: int, label: int | None = None) -> Path:
    """Draws the black part of a mask anew in a picture; see `editing.inpaint`.

    Args:
      job: the weights, the seed and the chain.
      file: the picture; cropped and resized as the run's images are.
      mask: a picture of the same aspect ratio: white is kept, black is drawn anew.
      out: the folder to write.
      draws: how many results, >= 1.
      label: of the picture, for a conditional run; None: not told.

    Returns:
      the row: the picture, what is known of it, then the results.

    Raises:
      UserError: a value is out of range, a file is no picture, or the result cannot be written.
    """
    editor, _ = _editor(job, 0, draws, "--draws")
    image, known, labels = read_picture(file, editor.shape), read_mask(mask, editor.shape), _labels(editor, label)
    made = editor.inpaint(jax.random.key(job.seed), image[None], known[None], labels, draws=draws)[0]
    return _save(out, made, [image, np.where(known[..., None], image, np.uint8(_UNKNOWN))], [])


def _editor(job: Job, time: int, number: int, option: str) -> tuple[Editor, int]:
    """Checks what was asked for; gives the editor and the depth of the chain that is next to the time."""
    if not 0 <= time <= job.config.diffusion.num_steps:
        raise UserError(f"--t {time} must be 0 to {job.config.diffusion.num_steps}, the steps of the run's diffusion")
    if number < 1:
        raise UserError(f"{option} must be at least 1, not {number}")
    editor = Editor(job, batch_size=min(number, 64))
    pictures.check_channels(editor.shape[-1])
    return editor, editor.depth_of(time)


def _labels(editor: Editor, label: int | None) -> np.ndarray | None:
    classes = editor.job.config.model.num_classes
    if label is not None and not 0 <= label < classes:
        has = f"its classes are 0 to {classes - 1}" if classes else "it is unconditional and knows no labels"
        raise UserError(f"--label {label}: the run has no such class, {has}")
    return editor.labels([label])


def _save(out: Path, made: np.ndarray, before: list[np.ndarray], after: list[np.ndarray]) -> Path:
    for i, image in enumerate(made):
        pictures.save_png(out / f"{i:02d}.png", image)
    row = pictures.grid(np.stack([*before, *made, *after]), columns=len(before) + len(made) + len(after))
    pictures.save_png(out / "row.png", pictures.enlarge(row, side=_SIDE))
    return out / "row.png"
