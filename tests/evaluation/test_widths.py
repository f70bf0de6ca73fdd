"""Averages of chosen widths, from the command line to samples, and their scores over the width."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.config import EmaConfig
from ddpm_jax.evaluation.bits_per_dim import Request
from ddpm_jax.evaluation.verification import verify_run
from ddpm_jax.evaluation.widths import likelihood_scorer, quality_scorer, save_scores, score_widths, summary
from ddpm_jax.generation.sampler_config import SamplerConfig
from ddpm_jax.run.averages import reconstruct_averages
from ddpm_jax.run.snapshots import save_snapshot
from ddpm_jax.run.trained import load_run

EVERY = 5


@pytest.fixture(scope="module")
def run(runs, tmp_path_factory):
    """A run with a checkpoint of step 20 and snapshots up to it."""
    folder = tmp_path_factory.mktemp("widths") / "run"
    config = dataclasses.replace(runs.make_config(), ema=EmaConfig(snapshots_every=EVERY))
    runs.save_runs(runs.make_trained(config, step=20), folder=folder)
    for step in range(EVERY, 21, EVERY):
        averages = [runs.random_params(config, seed) for seed in (step, 100 + step)]
        save_snapshot(folder, step, averages, config=config)
    return folder


def test_the_script_writes_weights_that_others_take(run, run_script, tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_JAX_CACHE", str(tmp_path))
    (tmp_path / "own.py").write_text("def thirds(images): return images.reshape(len(images), -1)[:, ::3] / 16\n")
    drawn = ("--num", 16, "--sampler", "ddim", "--steps", 3)
    scored = ("--score", "fid", "--features", tmp_path / "own.py:thirds", *drawn)
    status, out, _ = run_script("evaluate.py", "ema", run, "--sigma-rel", "0.07", "0.1", *scored)
    assert not status
    first, second, *table, plot = out.splitlines()
    assert [line.split(": FD-thirds ")[0] for line in table] == ["sigma_rel 0.07", "sigma_rel 0.1", "plain average"]
    assert plot == f"{run}/averages/step_0000020_FD-thirds.png"
    assert first.startswith(f"{run}/averages/step_0000020_sigma_rel_0.07.safetensors: sigma_rel 0.07, error of the pro")
    assert second.endswith("error of the profile 0.00%")
    status, out, _ = run_script("sample.py", run, "--ema", "0.07", *drawn)
    assert not status
    assert out.startswith("16 images of checkpoint 20, EMA of sigma_rel 0.07: ")
    job = json.loads((run / "samples" / "checkpoint_20_ema_0.07_seed_0_sampler_ddim_steps_3" / "job.json").read_text())
    assert (job["checkpoint"], job["sigma_rel"]) == (20, 0.07)
    status, out, _ = run_script("evaluate.py", "export", run, "--ema", "0.1")
    assert out == f"{run}/weights_20_ema_0.1.safetensors\n"
    assert {verdict.damage for verdict in verify_run(run)} == {None}
    assert "averages/step_0000020_sigma_rel_0.07.safetensors" in {verdict.name for verdict in verify_run(run)}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("ema", "--sigma-rel"), "--sigma-rel needs at least one width, such as 0.1"),
        (("ema", "--sigma-rel", "0.3"), "--sigma-rel must be above 0 and at most 0.28, not 0.3"),
        (("ema", "--sigma-rel", "0.1", "--steps", "5"), "--score loss draws no images: options of the sampler apply"),
        (("ema", "--sigma-rel", "0.1", "--reference", "digits"), "--features, --weights and --reference apply only to"),
        (("ema", "--sigma-rel", "0.1", "--step", "7"), "has no snapshot of step 7: there are 5, 10, 15, 20"),
        (("likelihood", "--ema", "0.2"), "has no average of sigma_rel 0.2"),
    ],
)
def test_slips_are_one_line(run, run_script, words, line):
    status, _, error = run_script("evaluate.py", words[0], run, *words[1:])
    assert status == 2
    assert line in error
    assert error.count("\n") == 1


def test_the_score_of_each_width_is_tabulated_and_plotted(runs, run):
    trained = load_run(run)
    averages = reconstruct_averages(run, (0.1, 0.07), step=20, config=trained.config, warn=pytest.fail)

    def apply(params, *given, **more):  # compiled at once
        return params["conv_in"]["bias"][0] * runs.closed_form(None, *given, **more)

    network = trained.network._replace(apply=apply)
    request = Request("test", 8, "model", "tanh", 4, 0)
    scorer = likelihood_scorer(request, first="l_simple", batch_size=8)
    found = score_widths(trained._replace(network=network), averages, scorer)
    assert [each.sigma_rel for each in found] == [0.07, 0.1, None]
    losses = [each.scores["l_simple"] for each in found]
    assert len(set(losses)) == 3
    names = {path.name for path in (run / "likelihood").iterdir()}
    assert names == {f"checkpoint_20{name}_test_num_8_strata_4_model_seed_0" for name in ("", "_ema_0.07", "_ema_0.1")}
    sampler = SamplerConfig(sampler="ddim", steps=3)
    judged = quality_scorer(sampler, seed=0, number=8, batch_size=8)(trained._replace(network=network))
    assert [*judged] == ["FD-own", "ratio", "confidence"]
    picture = save_scores(run, 20, found, title="tiny")
    with Image.open(picture) as opened:
        assert opened.width > 500
        assert np.asarray(opened.convert("L")).std() > 10
    with picture.with_suffix(".csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["sigma_rel", "profile_error", "l_simple", "bits_per_dim"]
    assert [row[0] for row in rows[1:]] == ["0.07", "0.1", "plain"]
    assert [float(row[2]) for row in rows[1:]] == losses
    assert summary(found).splitlines()[2].startswith("plain average: l_simple ")
