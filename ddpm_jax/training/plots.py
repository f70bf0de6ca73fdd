"""Plots the loss and other metrics of a run over its steps."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ddpm_jax.system.files import write_whole
from ddpm_jax.training.metrics import read_lines


def plot_run(run: Path) -> None:
    """Plots the metrics of a run into its `loss.png`; nothing if there are none yet."""
    lines = read_lines(run / "metrics.jsonl")
    trained = [line for line in lines if {"loss", "loss_quartiles"} <= line.keys()]  # others are a user's own
    if trained:
        quartiles = np.array([line["loss_quartiles"] for line in trained], np.float64)
        steps, losses = [line["step"] for line in trained], [line["loss"] for line in trained]
        evaluated = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
        plot_loss(run / "loss.png", steps, losses, quartiles, np.array(evaluated, np.float64).reshape(-1, 2))


def plot_metric(run: Path, name: str) -> None:
    """Plots a metric of a run over its steps into NAME.png of its folder.

    Raises:
      UserError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [line for line in read_lines(run / "metrics.jsonl") if line.get(name) is not None]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([line["step"] for line in lines], [line[name] for line in lines], marker="o", markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel(name)
    axes.grid(True, alpha=0.3)
    write_whole(run / f"{name}.png", lambda file: figure.savefig(file, format="png"))


def plot_loss(
    path: Path,
    steps: Sequence[int],
    losses: Sequence[float],
    quartiles: np.ndarray | None = None,
    evaluated: np.ndarray | None = None,
) -> None:
    """Plots the loss over the steps, raw and smoothed, on a logarithmic scale.

    Args:
      path: the PNG to write; its folder is made if it does not exist.
      steps: (N,) the steps.
      losses: (N,) the loss at each of them; values that are not finite or not above 0 are left out.
      quartiles: (N, 4) the losses of the four quarters of the chain, drawn smoothed; nan where there are none.
      evaluated: (M, 2) steps and losses on held-out images; nan where there are none.

    Raises:
      UserError: the file cannot be written.
    """
    # Slow to import, and not needed for grids. Without pyplot there is no global state.
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
    if evaluated is not None and len(evaluated):
        steps_evaluated, held_out = evaluated[(evaluated[:, 1] > 0) & np.isfinite(evaluated[:, 1])].T
        axes.plot(steps_evaluated, held_out, color="black", marker="o", markersize=3, linewidth=1, label="held-out")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(True, which="both", alpha=0.3)
    # Above the curves, which leave no room for it.
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    write_whole(path, lambda file: figure.savefig(file, format="png"))


def smooth(values: np.ndarray, *, share: float = 0.02) -> np.ndarray:
    r"""Smooths a curve by an exponential average without bias towards 0 at its start.

    .. math:: s_k = \sum_{j \le k} d^{k-j} v_j \Big/ \sum_{j \le k} d^{k-j}

    Args:
      values: (N,), finite.
      share: the share of the curve that the average reaches back, in (0, 1]; it sets d.

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
