"""Plots of the bound: its terms over the timesteps, rate and distortion; and of scores over widths of averages."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ddpm_jax.system.files import write_whole


def plot_terms(path: Path, terms: np.ndarray, standard_errors: np.ndarray) -> None:
    """Plots the terms of the bound over the timesteps, on logarithmic axes.

    Args:
      path: of the PNG; its folder is created if missing.
      terms: (T,) bits/dim; those not above 0 are left out.
      standard_errors: (T,), nan if unknown.

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
    axes.set_xlabel("t")
    axes.set_ylabel("bits/dim")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    write_whole(path, lambda file: figure.savefig(file, format="png"))


def plot_rate_distortion(path: Path, reverse_time: np.ndarray, rate: np.ndarray, distortion: np.ndarray) -> None:
    """Plots distortion over reverse time, rate over reverse time, and distortion over rate.

    Args:
      path: of the PNG; its folder is created if missing.
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


def plot_widths(
    path: Path, widths: Sequence[float], scores: Sequence[float], plain: float | None, *, score: str, title: str
) -> None:
    """Plots a score of averages over their width, and that of the plain average as a line across.

    Args:
      path: of the PNG; its folder is created if missing.
      widths: (N,) sigma_rel, rising.
      scores: (N,).
      plain: the score of the plain average; None if it is not known.
      score: its name.
      title: of the plot.

    Raises:
      UserError: the file cannot be written.

    As FID over the length of the average in Karras et al. 2024, sec. 3.3.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(widths, scores, color="C0", linewidth=2, marker="o", label="power-function averages")
    if plain is not None:
        axes.axhline(plain, color="C1", linestyle="--", label="plain average")
    axes.set_xlabel("sigma_rel, the width of the average")
    axes.set_ylabel(score)
    axes.set_title(title)
    axes.grid(True, alpha=0.3)
    axes.legend()
    write_whole(path, lambda file: figure.savefig(file, format="png"))
