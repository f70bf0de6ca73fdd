"""Scores of samples while a run trains: FID, or the Frechet distance in other features, every N steps.

Each evaluation is a sampling job and a job of features in the run's folder, on all hosts: a run that is killed in the
middle of one trains on from its last checkpoint, and draws only the images that it has not saved.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddpm_jax.config import Config
from ddpm_jax.evaluation import scoring
from ddpm_jax.evaluation.features import Extractor
from ddpm_jax.evaluation.image_sets import open_npz
from ddpm_jax.evaluation.scores import names_of_scores
from ddpm_jax.generation.chains import make_chain
from ddpm_jax.generation.job import SamplingJob, run_job
from ddpm_jax.generation.sampler_config import SamplerConfig
from ddpm_jax.generation.store import per_host
from ddpm_jax.networks import Network
from ddpm_jax.run.build import build_network, image_shape
from ddpm_jax.run.trained import TrainedRun
from ddpm_jax.system import environment
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import read_json, read_or_set_aside, write_json
from ddpm_jax.system.hosts import appears, is_primary_host, of_primary_host, wait_for_all
from ddpm_jax.system.mesh import to_this_host
from ddpm_jax.training.hooks import Event
from ddpm_jax.training.plots import plot_metric


def scoring_during_training(config: Config, run: Path, *, network: Network | None = None) -> Callable[[Event], None]:
    """Makes what `eval.fid_every` runs: it draws samples with the EMA weights, scores them and logs the scores.

    The samples are always of the same latents. The scores and the protocol of a step are kept in
    `fid/training/step_STEP.json` of the run's folder; the images are deleted.

    Args:
      config: of the run: `eval.fid_num` images, `eval.fid_steps` steps of `eval.fid_sampler`, compared with
        `eval.fid_reference` in `eval.features`. Its data section must describe the images, also those given in Python.
      run: the run's folder.
      network: of the run; the one that `config` describes if not given.

    Returns:
      a function that logs the scores by the names of `compute_scores`, for `train(score=..)`.

    Raises:
      UserError: there are no such features or reference, or the run cannot be sampled this way.
    """
    evaluation = config.eval
    features = scoring.load_features(evaluation.features)
    reference = scoring.open_reference(
        evaluation.fid_reference or None, features=features, config=config, evaluated=run
    )
    choices = {"loss", "eval_loss"} | scoring.lower_is_better(reference, features, evaluation.fid_num)
    if config.checkpoints.best_by not in choices:
        raise UserError(
            f"checkpoints.best_by={config.checkpoints.best_by!r} is not a score of these features, this reference and "
            f"eval.fid_num={evaluation.fid_num}: choose {', '.join(sorted(choices))}"
        )
    network = build_network(config) if network is None else network
    steps = min(evaluation.fid_steps, config.diffusion.num_steps) or None
    sampler = SamplerConfig(sampler=evaluation.fid_sampler, steps=steps)
    make_chain(config, network, sampler)
    # As many at a time as a step trains on at a time.
    batch_size = math.ceil(config.train.batch_size / config.train.grad_accum_steps)
    extractor = Extractor(features, batch_size=per_host(batch_size))
    scoring.check_comparable(image_shape(config), reference, extractor)

    def score(event: Event) -> None:
        trained = TrainedRun(config, network, to_this_host(event.state.ema), event.step, run)
        job = SamplingJob(trained, config.train.seed, sampler)
        drawn = scoring.describe_drawn(job)
        request = {
            "images": {"number": evaluation.fid_num, "drawn": drawn},
            "reference": reference.identity,
            "features": f"{features.name} {features.identity}",
            "computed_on": environment.rounding(),
        }
        request = json.loads(json.dumps(request))
        file = run / "fid" / "training" / f"step_{event.step:07d}.json"
        folder = file.with_suffix("")
        is_done = False
        if is_primary_host():
            is_done = _request_of(file) == request
            if is_done or _request_of(folder / "request.json") != request:  # other weights, images or features
                shutil.rmtree(folder, ignore_errors=True)
            if not is_done:
                write_json(folder / "request.json", {"request": request})
        if of_primary_host(is_done):
            if not appears(lambda: _request_of(file) == request):  # host 0 sees it
                raise UserError(f"the scores that host 0 wrote do not appear in {file}: run the same command again")
            scores = _read(file)["scores"]
        else:
            images = run_job(job, folder / "images", number=evaluation.fid_num, batch_size=batch_size, format="npz")
            result = scoring.score(open_npz(images), reference, extractor, folder / "scores", drawn=drawn) or {}
            scores = result["scores"]
            wait_for_all("all hosts have the scores")
            if is_primary_host():
                write_json(file, {**result, "request": request})
                shutil.rmtree(folder, ignore_errors=True)
        event.log(scores)
        if is_primary_host():
            plot_metric(run, names_of_scores(features.name)[0])

    return score


def _read(file: Path) -> dict[str, Any]:
    return (read_or_set_aside(file, read_json) if file.exists() else None) or {}


def _request_of(file: Path) -> Any:
    return _read(file).get("request")
