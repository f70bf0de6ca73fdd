"""What a run's folder holds, as its page shows it: everything that can be read, and a line for what cannot."""

import contextlib
import math
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.config import Config
from ddpm_jax.evaluation.report import commands
from ddpm_jax.evaluation.report.embedded import Picture, embed, evenly, read_frames
from ddpm_jax.evaluation.scores import names_of_scores
from ddpm_jax.run.fields import leaves, value_of
from ddpm_jax.run.pretrained import is_pretrained
from ddpm_jax.run.record import is_run, rates_so_far, read_config
from ddpm_jax.run.snapshots import FOLDER as AVERAGES
from ddpm_jax.system.errors import Damage, UserError, printable
from ddpm_jax.system.files import read_json
from ddpm_jax.training.metrics import check_lines

_MOST_GRIDS, _MOST_GRID_BYTES = 40, 8_000_000
_MOST_DRAWN = 6
_MOST_FILES = 60
_LARGEST, _LARGEST_STEP = 1e300, 2**53  # that JavaScript has


class Shown(typing.NamedTuple):
    """A picture and what it shows."""

    caption: str
    picture: Picture


class Score(typing.NamedTuple):
    """One evaluation of the run."""

    kind: str
    """What was evaluated, the heading of a table."""
    step: int
    """Training step of the weights; 0 if it is not known."""
    values: dict[str, str]
    """The results by their names."""
    protocol: dict[str, str]
    """How they were computed, by names."""
    rank: tuple[int, int]
    """Of the scores of a step the greatest is in the headline: number of images, then how near to the defaults."""
    file: str
    """The file that they are from, in the run's folder."""
    command: str | None
    """What computes them again; None if the file does not tell."""


class FileEntry(typing.NamedTuple):
    """A file of the run, or a folder with all that is in it."""

    name: str
    num_bytes: int
    files: int | None
    """Number of files in it; None: it is one."""


class Contents(typing.NamedTuple):
    """What a run's folder holds."""

    folder: Path
    """The run's folder."""
    name: str
    """What the page calls the run; no other run on the page is called so."""
    config: Config
    """Its configuration."""
    record: dict[str, Any]
    """What else its config.json says: where it was computed, its learning rates."""
    data: dict[str, Any]
    """What data.json says of the images; empty if there is none."""
    metrics: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    timing: list[dict[str, Any]]
    """The lines of timing.jsonl."""
    checkpoints: list[int]
    """Steps of the checkpoints, in ascending order."""
    grids: list[Shown]
    """The grid of samples over training."""
    num_grids: int
    """Number of grids in the folder, of which `grids` are some."""
    drawn: list[Shown]
    """Grids that sample.py drew, the newest first."""
    scores: list[Score]
    """Evaluations of the run, by kind."""
    widths: list[Shown]
    """Plots of scores against the width of the average, by evaluate.py ema."""
    files: list[FileEntry]
    """All that is in the folder."""
    num_bytes: int
    """Size of the folder."""
    commands: dict[str, list[str]]
    """What made it: commands by what they are for."""
    notices: list[str]
    """What could not be read."""


def read_contents(folder: Path, *, name: str) -> Contents:
    """Reads a run's folder.

    Args:
      folder: the run's folder.
      name: what the page calls the run.

    Returns:
      what it holds; what is damaged is left out, with a line in `notices`.

    Raises:
      UserError: it is not the folder of a run, or its config.json is damaged.
    """
    shown = printable(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {shown}: give the folder of a run, such as runs/digits")
    if is_pretrained(folder):
        raise UserError(
            f"{shown} is a model of another program, which has no training to report: give runs of train.py"
        )
    if not is_run(folder):
        raise UserError(f"{shown} is not the folder of a run: it has no config.json")
    config = read_config(folder / "config.json")
    reader = _Reader(folder)
    known = {each.partition(".")[0] for each in leaves(Config)}
    record = {key: value for key, value in reader.json("config.json").items() if key not in known}
    grids = sorted(folder.glob("samples/step_*.png"))
    files, num_bytes = _files(folder)
    scores = list(reader.scores())
    rates = rates_so_far(folder / "config.json", config)
    return Contents(
        folder=folder,
        name=name,
        config=config,
        record=record,
        data=reader.json("data.json"),
        metrics=reader.lines("metrics.jsonl"),
        timing=reader.lines("timing.jsonl"),
        checkpoints=sorted(int(each.name) for each in folder.glob("checkpoints/*") if each.name.isdecimal()),
        grids=reader.grids(grids),
        num_grids=len(grids),
        drawn=list(reader.drawn()),
        scores=sorted(scores, key=lambda score: score.kind),
        widths=list(reader.widths()),
        files=files,
        num_bytes=num_bytes,
        commands={
            "train": commands.train_commands(config, folder, rates),
            "resume": [] if commands.is_from_python(config) else [f"python train.py {commands.quoted(folder)}"],
            "sample": reader.commands,
            "evaluate": [score.command for score in scores if score.command],
        },
        notices=reader.notices,
    )


class _Reader:
    """Reads files of a run, and notes which are damaged."""

    def __init__(self, run: Path):
        self.notices: list[str] = []
        self.commands: list[str] = []
        self._run = run

    @contextlib.contextmanager
    def _noting(self, file: Path) -> Iterator[None]:
        try:
            yield
        except (Damage, UserError, OSError) as error:
            self._note(file, f"is damaged ({error}) and left out")
        except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError):
            self._note(file, "does not hold what ddpm_jax writes there, and is left out")

    def _note(self, file: Path, what: str) -> None:
        self.notices.append(printable(f"{file.relative_to(self._run).as_posix()} {what}"))

    def json(self, name: str) -> dict[str, Any]:
        file = self._run / name
        if file.exists():
            with self._noting(file):
                return read_json(file)
        return {}

    def lines(self, name: str) -> list[dict[str, Any]]:
        file = self._run / name
        with self._noting(file):
            lines = check_lines(file)
            if lines.damaged:
                word = "line" if len(lines.damaged) == 1 else "lines"
                numbers = ", ".join(map(str, lines.damaged[:10])) + (", .." if len(lines.damaged) > 10 else "")
                self._note(file, f"is damaged in {word} {numbers}, left out")
            found = [values for _, values in lines.intact if 0 <= values["step"] <= _LARGEST_STEP]
            return sorted(found, key=lambda values: values["step"])
        return []

    def grids(self, files: Sequence[Path]) -> list[Shown]:
        shown: list[Shown] = []
        for at in evenly(len(files), _MOST_GRIDS):
            file = files[at]
            with self._noting(file):
                step = int(file.stem.removeprefix("step_"))
                shown.append(Shown(f"step {step:,}", embed(read_frames(file, most=1)[0])))
        while len(shown) > 2 and sum(len(each.picture.uri) for each in shown) > _MOST_GRID_BYTES:
            shown = shown[::-1][::2][::-1]  # the last stays
        return shown

    def drawn(self) -> Iterator[Shown]:
        jobs = sorted(self._run.glob("samples/*/job.json"), key=lambda file: file.stat().st_mtime, reverse=True)
        pictures = 0
        for file in jobs:
            with self._noting(file):
                job = read_json(file)
                if "command" in job:
                    continue  # an edit of given pictures
                number = commands.number_drawn(file.parent / "samples.npz")
                if number is not None:
                    self.commands.append(commands.sample_command(job, self._run, number))
                grid = file.parent / "grid.png"
                if grid.exists() and pictures < _MOST_DRAWN:
                    pictures += 1
                    yield Shown(commands.describe_drawn(job), embed(read_frames(grid, most=1)[0]))

    def scores(self) -> Iterator[Score]:
        kinds: tuple[tuple[str, Callable[[Path, dict[str, Any]], Score]], ...] = (
            ("fid/training/step_*.json", self._frechet),
            ("fid/*/scores.json", self._frechet),
            ("likelihood/*/likelihood.json", self._likelihood),
            ("samples/*/quality.json", self._quality),
        )
        for pattern, read in kinds:
            files = sorted(self._run.glob(pattern))
            # Of the scores during training, which are a curve, the last.
            for file in files[-1:] if "training" in pattern else files:
                with self._noting(file):
                    yield read(file, read_json(file))

    def widths(self) -> Iterator[Shown]:
        for file in sorted(self._run.glob(f"{AVERAGES}/*.png"))[-_MOST_DRAWN:]:
            with self._noting(file):
                yield Shown(printable(self._name(file)), embed(read_frames(file, most=1)[0]))

    def _name(self, file: Path) -> str:
        return file.relative_to(self._run).as_posix()

    def _frechet(self, file: Path, found: dict[str, Any]) -> Score:
        scores, images, features = found["scores"], found["images"], found["features"]
        drawn, reference = images["drawn"], found["reference"]
        frechet, kernel = names_of_scores(features["name"])
        values = {frechet: f"{scores[frechet]:.3f}"}
        if "sFID" in scores:
            values |= {"sFID": f"{scores['sFID']:.3f}", "IS": f"{scores['IS']:.3f} ({scores['IS_std']:.3f})"}
        if kernel in scores:
            values[kernel] = f"{scores[kernel]:.5f} ± {scores[f'{kernel}_standard_error']:.5f}"
        values |= {name: f"{scores[name]:.3f}" for name in ("precision", "recall") if name in scores}
        of = f" ({reference['number']:,} images)" if reference["number"] else ""
        return Score(
            f"Frechet distance ({features['name']})",
            int(drawn.get("checkpoint", 0)),
            {**_width(drawn), "images": f"{images['number']:,}", **values},
            {
                "samples": commands.describe_drawn(drawn) if drawn else str(images["name"]),
                "reference": f"{reference.get('statistics') or reference['images']}{of}",
                "features": f"{features['name']}, SHA-256 {features['sha256'][:8]}, {features['resize']}",
                **{name: str(value) for name, value in found["settings"].items()},
                "versions": ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
            },
            (images["number"], -commands.num_options(drawn)),
            self._name(file),
            commands.fid_command(found, self._run) if drawn and file.name == "scores.json" else None,
        )

    def _likelihood(self, file: Path, found: dict[str, Any]) -> Score:
        job, error = found["job"], found["standard_error"]
        bits = f"{found['bits_per_dim']:.4f}" + ("" if error is None else f" ± {error:.4f}")
        shared = found["trained_on"]
        return Score(
            "Bits/dim (variational bound)",
            int(job["checkpoint"]),
            {
                **_width(job),
                "images": f"{found['images']:,}",
                "bits/dim": bits,
                "rate": f"{found['rate_bits']:.4f}",
                "distortion": f"{found['distortion_bits']:.4f}",
                "RMSE (of 255)": f"{found['rmse']:.3f}",
                "L_simple": f"{found['l_simple']:.4f}",
            },
            {
                "images": f"{found['images']:,} of split {job['split']} of {job['data.source']}"
                + ("" if shared is None else f", {shared:,} of them also training images"),
                "timesteps": f"{job['num_strata']:,} of the {job['diffusion.num_steps']:,} per image",
                "variance": str(job["sigma"]),
                "decoder": f"normal CDF by {job['cdf']}",
                "seed": str(job["seed"]),
            },
            (found["images"], job["num_strata"]),
            self._name(file),
            commands.likelihood_command(found, self._run),
        )

    def _quality(self, file: Path, found: dict[str, Any]) -> Score:
        job = read_json(file.parent / "job.json")
        real = {
            "confidence on held-out real images": _percent(found["confidence_of_real"]),
            "classifier accuracy on them": _percent(found["accuracy"]),
        }
        return Score(
            "Quality (a small classifier of the real images)",
            int(job["checkpoint"]),
            {
                **_width(job),
                "images": f"{found['images']:,}",
                "confidence": _percent(found["confidence"]),
                "FD-own": f"{found['fd_own']:.3f}",
                "real vs real": f"{found['fd_own_of_real']:.3f}",
                "ratio": f"{found['ratio']:.2f}",
            },
            {
                "samples": commands.describe_drawn(job),
                "real images": str(found["real"]),
                "held out": str(found["held_out"] or "none, there is no labeled test split"),
                **real,
                "images per side of a distance": f"{found['images_compared']:,}",
                "samples by class": ", ".join(f"{name}: {count}" for name, count in found["counts"].items()),
            },
            (found["images"], -commands.num_options(job)),
            self._name(file),
            commands.quality_command(job, self._run, found["images"]),
        )


def _width(job: Mapping[str, Any]) -> dict[str, str]:
    return {"sigma_rel": str(job["sigma_rel"])} if job.get("sigma_rel") is not None else {}


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _files(folder: Path) -> tuple[list[FileEntry], int]:
    """Lists the files of a run, folders two levels deep as a whole."""
    sizes: dict[str, list[int]] = {}
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        name = "/".join(parts) if len(parts) < 3 else f"{'/'.join(parts[:2])}/"
        with contextlib.suppress(OSError):  # a run in training deletes checkpoints
            if file.is_file() and not file.is_symlink() and not file.name.startswith("."):
                sizes.setdefault(name, []).append(file.stat().st_size)
    entries = [
        FileEntry(printable(name), sum(each), len(each) if name.endswith("/") else None) for name, each in sizes.items()
    ]
    total = sum(entry.num_bytes for entry in entries)
    if len(entries) > _MOST_FILES:
        rest = entries[_MOST_FILES:]
        entries = [*entries[:_MOST_FILES], FileEntry("others", sum(each.num_bytes for each in rest), len(rest))]
    return entries, total


def fields_of(runs: Sequence[Contents]) -> dict[str, list[tuple[str, list[str], bool]]]:
    """Returns the configuration by section: (field, its value in each run, whether it stands out).

    A field stands out if it differs between the runs; of a single run, if it differs from its default.
    """
    found: dict[str, list[tuple[str, list[str], bool]]] = {}
    default = Config()
    names = [name for name in leaves(Config) if name != "name" or len(runs) > 1]
    if len(runs) == 1:  # three columns of about the same length
        order = ["data", "diffusion", "loss", "model", "eval", "log"]
        place = {section: at for at, section in enumerate(order)}
        names.sort(key=lambda name: place.get(name.partition(".")[0], len(order)))
    for name in names:
        values = [value_of(run.config, name) for run in runs]
        compared = values if len(runs) > 1 else [*values, value_of(default, name)]
        section, _, last = name.rpartition(".")
        stands_out = any(value != compared[0] for value in compared)
        found.setdefault(section or "run", []).append((last, [_value(value) for value in values], stands_out))
    return found


def _value(value: Any) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case tuple():
            return f"({', '.join(map(str, value))})"
        case "":
            return "-"
    return str(value)


def series(lines: Iterable[Mapping[str, Any]], name: str, at: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns a metric over the steps, (N,) and (N,), where it is a finite number.

    Args:
      lines: of metrics or timing.
      name: of the metric.
      at: its index, of a metric that is a list.
    """
    found = []
    for line in lines:
        value = line.get(name)
        if at is not None:
            value = value[at] if isinstance(value, list) and len(value) > at else None
        # Integers of a user's own metric may be larger than any float.
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf:
            found.append((line["step"], float(min(max(value, -_LARGEST), _LARGEST))))
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.asarray(steps, np.int64), np.asarray(values, np.float64)
