"""Plots of a run: the loss over the steps."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ddpm_jax.system.files import write_whole
from ddpm_jax.training.metrics import read_lines


def plot_run(run: Path) -> None:
    """Plots the metrics of a run into its `loss.png`; nothing if there are none yet."""
    lines = [line for line in read_lines(run / "metrics.jsonl") if "loss" in line]
    if lines:
        quartiles = np.array([line["loss_quartiles"] for line in lines], np.float64)
        steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
        plot_loss(run / "loss.png", steps, losses, quartiles)


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
