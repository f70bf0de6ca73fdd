"""The curves of runs as the page's script draws them."""

import typing
from collections.abc import Sequence
from typing import Any

import numpy as np

from ddpm_jax.evaluation.report.contents import Contents, series
from ddpm_jax.evaluation.report.embedded import evenly
from ddpm_jax.training.plots import smooth

MOST_POINTS = 2000
"""Points of a curve; longer ones are thinned, after they are smoothed."""

_QUARTERS = ("1st", "2nd", "3rd", "4th")
# What has a chart of its own, or needs none.
_KNOWN = {"step", "loss", "eval_loss", "loss_quartiles", "learning_rate", "grad_norm", "param_norm", "final"}

Style = typing.Literal["faint", "line", "points"]
"""How a curve is drawn: thin and pale, as a line, or as a line with a marker at each value."""


class Chart(typing.NamedTuple):
    """A chart of curves over the training steps."""

    title: str
    note: str
    """What it shows, in a sentence."""
    axis: str
    """What its values are."""
    is_log: bool
    curves: list[dict[str, Any]]
    """name, x, y, color (a number), style; `legend` where the curve is in the legend."""


def make_charts(runs: Sequence[Contents]) -> list[Chart]:
    """Makes the charts of runs, those without any values left out.

    Of a single run, each curve has its own color; of several, each run has.

    Args:
      runs: the runs, at least one.

    Returns:
      loss, loss by timestep, learning rate, images/s, gradient norm, parameter norm, and any other number in the runs'
      metrics.
    """
    several = len(runs) > 1
    charts = [_loss(runs), *(_quarters_of_several(runs) if several else [_quarters(runs[0])])]
    for name, title, note, of_timing in (
        ("learning_rate", "Learning rate", "Of the last step before each line of metrics.", False),
        ("images_per_second", "Images/s", "Training speed over all devices, without evaluations and grids.", True),
        ("grad_norm", "Gradient norm", "Before clipping, averaged like the loss.", False),
        ("param_norm", "Parameter norm", "Of all parameters, at the end of each interval.", False),
    ):
        curves = [
            _curve(run.name, *series(run.timing if of_timing else run.metrics, name), color=color)
            for color, run in enumerate(runs)
        ]
        charts.append(Chart(title, note, title.lower(), False, curves))
    others = dict.fromkeys(name for run in runs for line in run.metrics for name in line if name not in _KNOWN)
    for name in others:
        curves = [
            _curve(run.name, *series(run.metrics, name), color=color, style="points") for color, run in enumerate(runs)
        ]
        charts.append(Chart(name, "Logged during training.", name, False, curves))
    kept = [chart._replace(curves=[curve for curve in chart.curves if curve["x"]]) for chart in charts]
    return [chart for chart in kept if chart.curves]


def _loss(runs: Sequence[Contents]) -> Chart:
    curves, several = [], len(runs) > 1
    for color, run in enumerate(runs):
        steps, losses = _positive(*series(run.metrics, "loss"))
        prefix = f"{run.name}: " if several else ""
        smoothed = smooth(losses)
        if (smoothed != losses).any():
            curves.append(_curve(f"{prefix}loss", steps, losses, color=color, style="faint", legend=not several))
        curves += [
            _curve(run.name if several else "smoothed loss" if curves else "loss", steps, smoothed, color=color),
            _curve(
                f"{prefix}eval loss",
                *_positive(*series(run.metrics, "eval_loss")),
                color=color if several else 1,
                style="points",
            ),
        ]
    has = {curve["style"] for curve in curves if curve["x"]}
    raw = ", raw and smoothed" if "faint" in has else ""
    held_out = ", and the loss of the EMA weights on held-out images" if "points" in has else ""
    return Chart("Loss", f"Training loss{raw}{held_out}.", "loss", True, curves)


def _quarters(run: Contents) -> Chart:
    curves = []
    for quarter, name in enumerate(_QUARTERS):
        steps, losses = _positive(*series(run.metrics, "loss_quartiles", quarter))
        curves.append(_curve(f"{name} quarter", steps, smooth(losses), color=quarter))
    return Chart(
        "Loss by timestep",
        "Smoothed training loss of images whose t is in each quarter of the chain; the 1st is the least noisy.",
        "loss",
        True,
        curves,
    )


def _quarters_of_several(runs: Sequence[Contents]) -> list[Chart]:
    charts = []
    for quarter, name in enumerate(_QUARTERS):
        curves = []
        for color, run in enumerate(runs):
            steps, losses = _positive(*series(run.metrics, "loss_quartiles", quarter))
            curves.append(_curve(run.name, steps, smooth(losses), color=color))
        noisy = {0: ", the least noisy", 3: ", the noisiest"}.get(quarter, "")
        note = f"Smoothed training loss of images whose t is in the {name} quarter of the chain{noisy}."
        charts.append(Chart(f"Loss, {name} quarter of t", note, "loss", True, curves))
    return charts


def _positive(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return steps[values > 0], values[values > 0]


def _curve(
    name: str, steps: np.ndarray, values: np.ndarray, *, color: int, style: Style = "line", legend: bool = True
) -> dict[str, Any]:
    kept = evenly(len(steps), MOST_POINTS)
    y = [float(f"{value:.5g}") for value in values[kept]]
    return {"name": name, "x": steps[kept].tolist(), "y": y, "color": color, "style": style, "legend": legend}
