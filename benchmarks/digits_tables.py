"""The tables of docs/results/digits.md: bits/dim of the digits by loss and variance, and quality by sampler and steps.

    python benchmarks/digits_tables.py

Trains one run per loss (three, minutes each), then evaluates them: about two hours on two CPU cores. Run it again to
resume: every command that it calls resumes. Writes docs/results/digits_bits.csv, digits_quality.csv and its plot.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RUNS = Path("runs") / "digits_tables"

LOSSES = {
    "simple": [],
    "hybrid": ["--loss.kind=hybrid", "--diffusion.variance=learned_range"],
    "vlb": ["--loss.kind=vlb", "--diffusion.variance=learned_range", "--loss.time-sampling=loss_aware"],
}
# The page was measured before `make demo` trained longer.
TRAINING = ("--train.steps=1600", "--train.learning-rate=2e-3", "--train.ema-decay=0.997")
# "model" is the run's own variance: fixed_large for the simple loss, learned for the others.
VARIANCES = ("model", "optimal", "fixed_small", "fixed_large")
SAMPLERS = ("ancestral", "ddim", "dpm++2m", "dpm++2m_sde", "unipc")
STEPS = (5, 10, 20, 50, 100, 250)
IMAGES = 256


def call(*words: str | Path) -> None:
    """Runs one of the scripts; ends where it fails, since it has printed why."""
    print("python", *words, flush=True)
    if status := subprocess.run([sys.executable, *map(str, words)], cwd=ROOT).returncode:
        sys.exit(status)


def bits(loss: str, variance: str) -> dict[str, object]:
    """Computes bits/dim of all held-out digits for a run, with the given variance."""
    out = RUNS / loss / "likelihood" / variance
    part = () if variance == "model" else ("--num-strata", "100")  # an unbiased estimate at a tenth of the cost
    call("evaluate.py", "likelihood", RUNS / loss, "--sigma", variance, "--out", out, "--batch-size", "360", *part)
    found = json.loads((ROOT / out / "likelihood.json").read_text())
    names = ("bits_per_dim", "standard_error", "rate_bits", "distortion_bits", "l_simple", "images")
    return {"loss": loss, "variance": variance, **{name: found[name] for name in names}}


def quality(sampler: str, steps: int) -> dict[str, object]:
    """Scores samples from the run with the simple loss, using a classifier of the real digits."""
    out = RUNS / "simple" / "quality" / f"{sampler}_{steps}"
    how = ("--sampler", sampler, "--steps", steps) if steps < 1000 else ()
    call("sample.py", RUNS / "simple", "--num", IMAGES, "--batch-size", IMAGES, "--format", "npz", "--out", out, *how)
    file = next((ROOT / out).glob("*.npz")).relative_to(ROOT)
    call("evaluate.py", "quality", file, "--num", IMAGES)
    found = json.loads((ROOT / out / "quality.json").read_text())
    names = ("confidence", "fd_own", "ratio", "images")
    return {"sampler": sampler, "steps": steps, **{name: found[name] for name in names}}


def write(name: str, rows: list[dict[str, object]]) -> None:
    """Writes one table."""
    with (ROOT / "docs" / "results" / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def plot(rows: list[dict[str, object]]) -> None:
    """Plots the quality table: distance against number of steps, one line per sampler."""
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for sampler in SAMPLERS:
        steps, ratios = zip(*[(row["steps"], row["ratio"]) for row in rows if row["sampler"] == sampler], strict=True)
        axes.plot(steps, ratios, marker="o", label=sampler)
    axes.axhline(1, color="gray", linestyle="--", label="real images")
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="Frechet distance, relative to real images'")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(ROOT / "docs" / "results" / "digits_quality.png")


def main() -> None:
    for loss, words in LOSSES.items():
        call("train.py", "configs/digits.py", "--workdir", RUNS / loss, *TRAINING, *words)
    table = []
    for sampler in SAMPLERS:
        table += [quality(sampler, steps) for steps in STEPS]
        write("digits_quality.csv", table)
    table += [quality("ancestral", 1000)]
    write("digits_quality.csv", table)
    plot(table)
    table = []
    for variance in VARIANCES:
        for loss in LOSSES:
            if (loss, variance) == ("simple", "fixed_large"):
                continue  # the model's own
            table.append(bits(loss, variance))
            write("digits_bits.csv", table)


if __name__ == "__main__":
    main()
