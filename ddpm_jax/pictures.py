"""Pictures to look at: grids, PNG, GIF, the curves of the loss and of the bound. Pixels are uint8 NumPy arrays."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm_jax.errors import UserError
from ddpm_jax.files import write_whole

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def grid(images: np.ndarray, *, columns: int | None = None, padding: int = 1, background: int = 255) -> np.ndarray:
    """Lays images out in rows, with lines between and around them.

    Args:
      images: (N, H, W, C) uint8, N >= 1.
      columns: how many images a row; about as many as rows if not given.
      padding: the width of the lines in pixels, >= 0.
      background: the level of the lines and of the places left over, in [0, 255].

    Returns:
      (R (H + padding) + padding, columns (W + padding) + padding, C) uint8, with R = ceil(N / columns) rows.

    Raises:
      ValueError: there is no image, or the images are not uint8 of four axes.

    >>> grid(np.zeros((3, 8, 8, 1), np.uint8)).shape
    (19, 19, 1)
    """
    if images.ndim != 4 or images.dtype != np.uint8 or not len(images):
        raise ValueError(f"a grid needs (N, H, W, C) uint8 with N >= 1, not {images.shape} {images.dtype}")
    number, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(number)) if columns is None else columns
    if columns < 1 or padding < 0:
        raise ValueError(f"a grid needs at least 1 column and no negative padding, not {columns} and {padding}")
    rows = math.ceil(number / columns)
    cells = np.full((rows * columns, height + padding, width + padding, channels), background, np.uint8)
    cells[:number, padding:, padding:] = images
    cells = cells.reshape(rows, columns, height + padding, width + padding, channels).swapaxes(1, 2)
    laid_out = cells.reshape(rows * (height + padding), columns * (width + padding), channels)
    return np.pad(laid_out, [(0, padding), (0, padding), (0, 0)], constant_values=background)


def enlarge(images: np.ndarray, *, side: int = 768) -> np.ndarray:
    """Repeats every pixel in both directions, so that small images can be looked at; whole pixels stay whole.

    Args:
      images: (..., H, W, C).
      side: what the longer side may grow to, in pixels.

    Returns:
      (..., k H, k W, C) with the largest whole k >= 1 for which k max(H, W) <= side, else k = 1.

    >>> enlarge(np.zeros((10, 20, 1), np.uint8), side=65).shape
    (30, 60, 1)
    """
    factor = max(1, side // max(images.shape[-3:-1]))
    return images.repeat(factor, axis=-3).repeat(factor, axis=-2)


def can_show(channels: int) -> bool:
    """Says whether images of so many channels are something to look at: grey, colour, or colour with alpha."""
    return channels in _MODES


def check_channels(channels: int) -> None:
    """Checks that images of so many channels are something to look at.

    Raises:
      UserError: they are not grey, colour, or colour with alpha.
    """
    if not can_show(channels):
        raise UserError(
            f"images of {channels} channels cannot be shown as a picture (1, 3 and 4 can): save them as npz instead"
        )


def save_png(path: Path, image: np.ndarray) -> None:
    """Saves one image as PNG, whole or not at all.

    Args:
      path: where to; its folder is made if it is not there.
      image: (H, W, C) uint8: grey, colour, or colour with alpha.

    Raises:
      UserError: the number of channels is another, or the file cannot be written.
    """
    picture = _picture(image)
    write_whole(path, lambda file: picture.save(file, "PNG"))


def save_gif(path: Path, frames: np.ndarray, seconds: float | Sequence[float], *, comment: str = "") -> None:
    """Saves frames as a GIF that plays for ever, whole or not at all.

    A GIF has 256 colours a frame and no half-transparent pixels: colour is reduced to the best 256, and alpha shown
    over white. Equal frames that follow each other are stored as one that lasts longer.

    Args:
      path: where to; its folder is made if it is not there.
      frames: (F, H, W, C) uint8, F >= 1: grey, colour, or colour with alpha.
      seconds: how long each frame is shown, one number for all or one for each; the format counts in 1/100.
      comment: a text to put into the file.

    Raises:
      UserError: the number of channels is another, or the file cannot be written.
    """
    pictures = [_over_white(_picture(frame)) for frame in frames]
    each = [seconds] * len(pictures) if isinstance(seconds, int | float) else list(seconds)
    if len(each) != len(pictures):
        raise ValueError(f"{len(pictures)} frames need as many durations, not {len(each)}")
    write_whole(
        path,
        lambda file: pictures[0].save(
            file,
            "GIF",
            save_all=True,
            append_images=pictures[1:],
            duration=[round(1000 * duration) for duration in each],
            loop=0,
            comment=comment.encode(),
        ),
    )


def plot_loss(path: Path, steps: Sequence[int], losses: Sequence[float], quartiles: np.ndarray | None = None) -> None:
    """Plots the loss over the steps, as it is and smoothed, on a logarithmic scale.

    Args:
      path: where to, a PNG; its folder is made if it is not there.
      steps: at which steps.
      losses: the loss at each of them; what is not finite or not above 0 is left out.
      quartiles: (N, 4) the losses of the four quarters of the chain, drawn smoothed; nan where there are none.

    Raises:
      UserError: the file cannot be written.
    """
    # Slow to import, and not wanted by those who only draw grids. Without pyplot there is no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    at, loss = np.asarray(steps, np.float64), np.asarray(losses, np.float64)
    if at.shape != loss.shape:
        raise ValueError(f"{len(at)} steps need as many losses, not {len(loss)}")
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()

    def draw(values: np.ndarray, label: str, **style) -> None:
        shown = np.isfinite(values) & (values > 0)
        axes.plot(at[shown], smooth(values[shown]), label=label, **style)

    shown = np.isfinite(loss) & (loss > 0)
    axes.plot(at[shown], loss[shown], color="C0", alpha=0.3, linewidth=1, label="loss")
    draw(loss, "smoothed", color="C0", linewidth=2)
    for number, quartile in enumerate([] if quartiles is None else np.asarray(quartiles, np.float64).T):
        draw(quartile, f"t in quarter {number + 1} of the chain", color=f"C{number + 1}", linewidth=1)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(True, which="both", alpha=0.3)
    # Above the curves, which leave it no room.
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    write_whole(path, lambda file: figure.savefig(file, format="png"))


def plot_terms(path: Path, terms: np.ndarray, standard_errors: np.ndarray) -> None:
    """Plots the terms of the bound over the times, both axes logarithmic.

    Args:
      path: where to, a PNG; its folder is made if it is not there.
      terms: (T,) bits/dim; those not above 0 are left out.
      standard_errors: (T,), nan where they are not known.

    Raises:
      UserError: the file cannot be written.

    Nichol & Dhariwal 2021, Fig. 2.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    number = np.arange(1, len(terms) + 1)
    shown = np.isfinite(terms) & (terms > 0)
    number, bits, error = number[shown], terms[shown], np.nan_to_num(standard_errors[shown])
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lowest = np.maximum(bits - error, bits * 1e-2)
    axes.fill_between(number, lowest, bits + error, color="C0", alpha=0.3, label="standard error")
    axes.plot(number, bits, color="C0", linewidth=1, label="term of the bound")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("t + 1")
    axes.set_ylabel("bits/dim")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    write_whole(path, lambda file: figure.savefig(file, format="png"))


def plot_rate_distortion(path: Path, reverse_time: np.ndarray, rate: np.ndarray, distortion: np.ndarray) -> None:
    """Plots distortion over reverse time, rate over reverse time, and distortion over rate.

    Args:
      path: where to, a PNG; its folder is made if it is not there.
      reverse_time: (T,) 1..T.
      rate: (T,) bits/dim.
      distortion: (T,) root mean squared error in levels of 255.

    Raises:
      UserError: the file cannot be written.

    Ho et al. 2020, Fig. 5.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    of_time, of_rate = "steps of the reverse process", "rate (bits/dim)"
    curves = [
        (reverse_time, distortion, of_time, "distortion (RMSE of 255)"),
        (reverse_time, rate, of_time, of_rate),
        (rate, distortion, of_rate, "distortion (RMSE of 255)"),
    ]
    for axes, (x, y, x_label, y_label) in zip(figure.subplots(1, 3), curves, strict=True):
        axes.plot(x, y, color="C0", linewidth=2)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(True, alpha=0.3)
    write_whole(path, lambda file: figure.savefig(file, format="png"))


def smooth(values: np.ndarray, *, share: float = 0.02) -> np.ndarray:
    r"""Smooths a curve by an exponential average that is not drawn towards 0 at its beginning.

    .. math:: s_k = \sum_{j \le k} d^{k-j} v_j \Big/ \sum_{j \le k} d^{k-j}

    Args:
      values: (N,), finite.
      share: how much of the whole curve the average reaches back, in (0, 1]; it sets d.

    Returns:
      (N,) float64.

    >>> smooth(np.ones(100)).tolist() == [1.0] * 100
    True
    """
    decay = 1 - 1 / max(1.0, share * len(values))
    smoothed, total, weight = np.empty(len(values)), 0.0, 0.0
    for k, value in enumerate(values):
        total, weight = decay * total + value, decay * weight + 1
        smoothed[k] = total / weight
    return smoothed


def _picture(image: np.ndarray) -> Image.Image:
    if image.ndim != 3 or image.dtype != np.uint8:
        raise ValueError(f"a picture needs (H, W, C) uint8, not {image.shape} {image.dtype}")
    check_channels(image.shape[-1])
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _over_white(picture: Image.Image) -> Image.Image:
    if picture.mode != "RGBA":
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
