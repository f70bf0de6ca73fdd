"""Scores of a run's weights against the width of their average: what `evaluate.py ema` tabulates and plots."""

import csv
import io
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ddpm_jax.evaluation import bits_per_dim, plots, scoring
from ddpm_jax.evaluation.features import Extractor
from ddpm_jax.evaluation.image_sets import open_npz
from ddpm_jax.evaluation.quality import judge_file
from ddpm_jax.generation.job import SamplingJob, default_folder, run_job
from ddpm_jax.generation.sampler_config import SamplerConfig
from ddpm_jax.run.averages import Average
from ddpm_jax.run.build import image_shape
from ddpm_jax.run.checkpoints import load_ema
from ddpm_jax.run.snapshots import FOLDER
from ddpm_jax.run.trained import TrainedRun
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import short_name, write_whole
from ddpm_jax.system.progress import say

Scorer = Callable[[TrainedRun], dict[str, float]]
"""From a run with some weights to scores by name, the one that is plotted first."""


class Scored(typing.NamedTuple):
    """The scores of one average."""

    sigma_rel: float | None
    """Its width; None for the plain average of the checkpoint."""
    error: float | None
    """Error of its profile."""
    scores: dict[str, float]
    """By name."""


def likelihood_scorer(request: bits_per_dim.Request, *, first: str, batch_size: int) -> Scorer:
    """Makes the scorer by `evaluate.py likelihood`, whose noises are the same for all weights.

    Args:
      request: which images, and how.
      first: "l_simple" or "bits_per_dim": which of the two is plotted.
      batch_size: of the job.
    """

    def score(trained: TrainedRun) -> dict[str, float]:
        out = bits_per_dim.default_folder(trained, request)
        found = bits_per_dim.run_job(trained, out, request, batch_size=batch_size)
        scores = {"l_simple": found.l_simple, "bits_per_dim": found.bits_per_dim}
        return {first: scores.pop(first), **scores}

    return score


def quality_scorer(sampler: SamplerConfig, *, seed: int, number: int, batch_size: int) -> Scorer:
    """Makes the scorer by `evaluate.py quality`, whose samples are of the same latents for all weights."""

    def score(trained: TrainedRun) -> dict[str, float]:
        job = SamplingJob(trained, seed, sampler)
        file = run_job(job, default_folder(job), number=number, batch_size=batch_size, format="npz")
        found = judge_file(file, trained.config, number=number)
        return {"FD-own": found.fd_own, "ratio": found.ratio, "confidence": found.confidence}

    return score


def features_scorer(
    sampler: SamplerConfig,
    reference: scoring.Reference,
    extractor: Extractor,
    *,
    seed: int,
    number: int,
    batch_size: int,
) -> Scorer:
    """Makes the scorer by `evaluate.py fid`, whose samples are of the same latents for all weights."""

    def score(trained: TrainedRun) -> dict[str, float]:
        job = SamplingJob(trained, seed, sampler)
        scoring.check_comparable(image_shape(trained.config), reference, extractor)
        file = run_job(job, default_folder(job), number=number, batch_size=batch_size, format="npz")
        images = open_npz(file)._replace(name=f"{trained.folder}, {trained.title}").first(number).by_content()
        out = scoring.folder_of_scores(job, str(trained.folder), reference.name, number, extractor.features)
        found = scoring.score(images, reference, extractor, out, drawn=scoring.describe_drawn(job)) or {}
        return dict(found["scores"])

    return score


def score_widths(trained: TrainedRun, averages: Sequence[Average], score: Scorer) -> list[Scored]:
    """Scores averages of one step, and the plain average of its checkpoint if that is still there.

    Args:
      trained: the run; its weights are not used.
      averages: the averages, all of one step.
      score: the scorer.

    Returns:
      the scores in the order of the averages; those of the plain one last.
    """
    found = []
    for average in averages:
        weights = trained._replace(params=average.params, step=average.step, sigma_rel=average.sigma_rel)
        found.append(Scored(average.sigma_rel, average.error, score(weights)))
    step = averages[0].step
    try:
        _, params = load_ema(trained.folder, step=step, warn=say)
    except UserError as error:
        say(f"the plain average of step {step} is left out: {error}")
        return found
    plain = trained._replace(params=params, step=step, sigma_rel=None)
    return [*found, Scored(None, None, score(plain))]


def save_scores(run: Path, step: int, found: Sequence[Scored], *, title: str) -> Path:
    """Writes a table and a plot of scores against width, and returns the plot's file.

    Args:
      run: the run's folder.
      step: of the averages.
      found: their scores.
      title: of the plot.

    Raises:
      UserError: a file cannot be written.
    """
    names = [*found[0].scores]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["sigma_rel", "profile_error", *names])
    for each in found:
        width = "plain" if each.sigma_rel is None else str(each.sigma_rel)
        error = "" if each.error is None else f"{each.error:.3g}"
        writer.writerow([width, error, *(each.scores[name] for name in names)])
    file = run / FOLDER / f"step_{step:07d}_{short_name(names[0])}.png"
    write_whole(file.with_suffix(".csv"), lambda opened: opened.write(table.getvalue().encode()))
    widths = {each.sigma_rel: each.scores[names[0]] for each in found if each.sigma_rel is not None}
    plain = next((each.scores[names[0]] for each in found if each.sigma_rel is None), None)
    plots.plot_widths(file, [*widths], [*widths.values()], plain, score=names[0], title=title)
    return file


def summary(found: Sequence[Scored]) -> str:
    """Returns the scores as one line of text per average."""
    shown: Callable[[Mapping[str, float]], str] = lambda scores: ", ".join(
        f"{name} {value:.4f}" for name, value in scores.items()
    )
    name = lambda width: "plain average" if width is None else f"sigma_rel {width}"
    return "\n".join(f"{name(each.sigma_rel)}: {shown(each.scores)}" for each in found)
