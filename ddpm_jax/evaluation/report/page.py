"""Writes the page of one or more runs: a single HTML file that needs neither a network nor a server."""

import datetime
import importlib.resources
import shlex
import statistics
import typing
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import ddpm_jax
from ddpm_jax.evaluation.report import commands
from ddpm_jax.evaluation.report.charts import MOST_POINTS, make_charts
from ddpm_jax.evaluation.report.contents import Contents, Score, fields_of, read_contents, series
from ddpm_jax.evaluation.report.embedded import MOST_PIXELS
from ddpm_jax.evaluation.report.reverse_process import ReverseProcess, draw_reverse, read_reverse
from ddpm_jax.names import DrawReverse
from ddpm_jax.networks import parameter_shapes
from ddpm_jax.run.build import build_network
from ddpm_jax.run.record import read_run
from ddpm_jax.run.trained import load_run
from ddpm_jax.system.errors import UserError, printable
from ddpm_jax.system.files import write_whole
from ddpm_jax.system.progress import say

_MOST_RUNS = 8


class _Run(typing.NamedTuple):
    """A run on the page."""

    contents: Contents
    tiles: list[tuple[str, str, str]]
    """Its headline numbers: (name, value, remark)."""
    facts: list[tuple[str, str]]
    reverse: ReverseProcess | None
    why_not: str
    """Why the reverse process is not as it was asked for; empty if it is."""


def write_report(folders: Sequence[Path], out: Path, *, seed: int = 0, drawing: DrawReverse = "auto") -> Path:
    """Writes the page of one or more runs.

    It shows their configurations, curves, grids over training, reverse processes, scores, files and commands; what a
    run does not have is named, with the command that makes it.

    Args:
      folders: of the runs, at most 8.
      out: the file to write.
      seed: of the images of the reverse process.
      drawing: whether to draw it.

    Returns:
      the file.

    Raises:
      UserError: a folder is not that of a run, a run is named twice, or the file cannot be written.
    """
    if not folders:
        raise UserError("missing RUN: give the folder of a run, such as runs/digits, or of several")
    if len(folders) > _MOST_RUNS:
        raise UserError(f"a report compares at most {_MOST_RUNS} runs, not {len(folders)}")
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed must be in [0, 2^32), not {seed}")
    twice = [folder for folder, number in Counter(map(Path.resolve, folders)).items() if number > 1]
    if twice:
        raise UserError(f"{twice[0]} is named twice: name each run once")
    contents = [read_contents(folder, name=name) for folder, name in zip(folders, _names(folders), strict=True)]
    for each in contents:
        for notice in each.notices:
            say(f"{each.folder}: {notice}")
    runs = [_described(each, seed=seed, drawing=drawing) for each in contents]
    text = _render(runs, _command(folders, out, seed, drawing))
    write_whole(out, lambda file: file.write(text.encode(errors="replace")))
    return out


def _names(folders: Sequence[Path]) -> list[str]:
    """Returns the shortest names that tell the folders apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return [printable(name) for name in names]


def _described(contents: Contents, *, seed: int, drawing: DrawReverse) -> _Run:
    try:
        shapes = parameter_shapes(build_network(read_run(contents.folder)))
        parameters = f"{sum(leaf.size for leaf in jax.tree.leaves(shapes)):,}"
    except UserError:  # the user's own file is missing
        parameters = "unknown"
    reverse, why_not = None, "--reverse never leaves it out"
    if not contents.checkpoints:
        why_not = "the run has no checkpoint yet"
    elif drawing != "never":
        try:
            reverse, why_not = draw_reverse(load_run(contents.folder), seed=seed, drawing=drawing), ""
        except UserError as error:
            why_not = str(error)
    if reverse is None:
        reverse = read_reverse(contents.folder)
    return _Run(contents, _tiles(contents), _facts(contents, parameters), reverse, why_not)


def _tiles(run: Contents) -> list[tuple[str, str, str]]:
    done = max([0, *run.checkpoints, *(line["step"] for line in run.metrics)])
    planned = run.config.train.steps
    tiles = [("Step", f"{done:,}", "finished" if done >= planned else f"of {planned:,}")]
    steps, losses = series(run.metrics, "loss")
    if len(losses):
        tiles.append(("Loss", f"{losses[-1]:.4g}", f"at step {steps[-1]:,}"))
    steps, losses = series(run.metrics, "eval_loss")
    if len(losses):
        tiles.append(("Best eval loss", f"{losses.min():.4g}", f"at step {steps[losses.argmin()]:,}"))
    _, speeds = series(run.timing, "images_per_second")
    if len(speeds):
        tiles.append(("Images/s", f"{statistics.median(speeds):,.0f}", "median"))
    newest: dict[str, Score] = {}
    for score in sorted(run.scores, key=lambda score: (score.step, score.rank)):
        if "sigma_rel" not in score.values:
            newest[score.kind] = score
    for score in newest.values():
        name = next((name for name in score.values if name not in ("images", "confidence")), "")
        how = next(f"{name} {value}" for name, value in score.protocol.items() if name in ("samples", "timesteps"))
        tiles.append((name, score.values[name].partition(" ")[0], f"{score.values['images']} images; {how}"))
    return tiles


def _facts(run: Contents, parameters: str) -> list[tuple[str, str]]:
    config = run.config
    data, model, diffusion, train = config.data, config.model, config.diffusion, config.train
    shape = "×".join(str(size) for size in (data.height, data.width, data.channels) if size is not None)
    images = f"{run.data['images']:,} images, " if isinstance(run.data.get("images"), int) else ""
    mult = ", ".join(map(str, model.channel_mult))
    network = printable(model.network) or f"the paper's U-Net, width {model.width}, channel_mult ({mult})"
    done = max([0, *(line["step"] for line in run.metrics)])
    _, seconds = series(run.timing, "seconds")
    _, memory = series(run.timing, "peak_memory_gib")
    environment = run.record.get("environment")
    known = environment if isinstance(environment, dict) else {}
    names = [name for name in ("devices", "cpu", "cores", "jax", "jaxlib") if name in known]
    computed = ", ".join(f"{name} {known[name]}" for name in names)
    facts = [
        ("Data", f"{printable(data.source)}, {images}{shape}"),
        ("Network", f"{network}; {parameters} parameters"),
        (
            "Classes",
            f"{model.num_classes}, label dropout {train.label_dropout:g}" if model.num_classes else "unconditional",
        ),
        (
            "Diffusion",
            f"{diffusion.schedule} schedule, T = {diffusion.num_steps:,}, predicts {diffusion.prediction}, "
            f"variance {diffusion.variance}",
        ),
        ("Training", f"batch {train.batch_size}, learning rate {train.learning_rate}, EMA decay {train.ema_decay}"),
        ("Images seen", f"{done * train.batch_size:,}"),
        ("Time in training steps", _duration(seconds.sum()) if len(seconds) else ""),
        ("Peak memory", f"{memory.max():.2f} GiB" if len(memory) else ""),
        ("Checkpoints", ", ".join(f"{step:,}" for step in run.checkpoints[-6:]) or "none yet"),
        ("Computed on", printable(computed)),
    ]
    return [(name, value) for name, value in facts if value]


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"


def _bytes(number: int) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000  # type: ignore[assignment]
    return f"{number:.1f} GB"


def _tables(runs: Sequence[_Run]) -> list[dict[str, Any]]:
    """Returns the scores of all runs by kind: the columns, and (run, score) rows."""
    rows: dict[str, list[tuple[int, Score]]] = {}
    for number, run in enumerate(runs):
        for score in run.contents.scores:
            rows.setdefault(score.kind, []).append((number, score))
    return [
        {"kind": kind, "columns": list(dict.fromkeys(name for _, score in each for name in score.values)), "rows": each}
        for kind, each in rows.items()
    ]


def _missing_scores(runs: Sequence[_Run]) -> list[str]:
    """Returns the commands that compute the scores which the runs do not have."""
    wanted = {"Bits/dim": "likelihood", "Frechet": "fid", "Quality": "quality"}
    found = []
    for run in runs:
        kinds = {score.kind.partition(" ")[0] for score in run.contents.scores}
        words = [word for kind, word in wanted.items() if kind not in kinds]
        found += [f"python evaluate.py {word} {commands.quoted(run.contents.folder)}" for word in words]
    return found


def _command(folders: Sequence[Path], out: Path, seed: int, drawing: DrawReverse) -> str:
    is_default = out == (folders[0] if len(folders) == 1 else Path()) / "report.html"
    options = [] if is_default else ["--out", str(out)]
    options += ["--reverse", drawing] if drawing != "auto" else []
    options += ["--seed", str(seed)] if seed else []
    return shlex.join(["python", "evaluate.py", "report", *map(str, folders), *options])


def _render(runs: Sequence[_Run], command: str) -> str:
    import jinja2  # with plotly, used here alone
    import plotly.offline

    place = importlib.resources.files(__package__)
    source = {name: (place / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["bytes"] = _bytes
    plotly_js = plotly.offline.get_plotlyjs()
    contents = [run.contents for run in runs]
    frames = [
        {
            "grids": _frames([(shown.caption, [shown.picture]) for shown in run.contents.grids]),
            "reverse": _frames([*run.reverse.frames] if run.reverse else []),
        }
        for run in runs
    ]
    charts = [chart._asdict() for chart in make_charts(contents)]
    num_pictures = sum(len(frame["uris"]) for each in frames for frame in (*each["grids"], *each["reverse"]))
    page: str = environment.from_string(source["html"]).render(
        runs=runs,
        title=" · ".join(run.name for run in contents),
        css=source["css"],
        js=source["js"],
        plotly_js=plotly_js,
        charts=charts,
        frames=frames,
        has_eval=any("eval_loss" in line for run in contents for line in run.metrics),
        fields=(fields := fields_of(contents)),
        differ=any(stands_out for rows in fields.values() for _, _, stands_out in rows),
        tables=_tables(runs),
        missing_scores=_missing_scores(runs),
        quoted=commands.quoted,
        most_points=MOST_POINTS,
        most_pixels=MOST_PIXELS,
        num_pictures=num_pictures,
        plotly_bytes=len(plotly_js),
        plotly_version=plotly.offline.get_plotlyjs_version(),
        version=ddpm_jax.__version__,
        written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=command,
    )
    return page


def _frames(frames: Sequence[tuple[str, Sequence[Any]]]) -> list[dict[str, Any]]:
    return [{"caption": caption, "uris": [picture.uri for picture in pictures]} for caption, pictures in frames]
