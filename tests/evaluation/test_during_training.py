"""Scores of samples during training: logged, drawn, resumed in the middle, and what the best checkpoint goes by."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from ddpm_jax.config import CheckpointConfig, Config, DiffusionConfig, EvalConfig, LogConfig, TrainConfig
from ddpm_jax.evaluation.during_training import scoring_during_training
from ddpm_jax.generation.store import StoredImages
from ddpm_jax.run.validation import validate
from ddpm_jax.system.errors import Stopped, UserError
from ddpm_jax.training import loop
from ddpm_jax.training.hooks import Periodic

CONFIG = Config(
    diffusion=DiffusionConfig(num_steps=20, schedule="cosine"),
    train=TrainConfig(
        steps=8, batch_size=16, learning_rate=1e-2, warmup_steps=2, ema_decay=0.5, matmul_precision="highest"
    ),
    checkpoints=CheckpointConfig(every=4, keep=1, keep_best=1, best_by="FD-corners"),
    eval=EvalConfig(fid_every=4, fid_num=40, fid_steps=5),
    log=LogConfig(every=3, samples_every=0),
)
FEATURES = """
import numpy as np


def corners(images):
    return images[:, ::3, ::3, 0].reshape(len(images), -1)
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine.py").write_text(FEATURES)
    features = f"{tmp_path / 'mine.py'}:corners"
    config = dataclasses.replace(CONFIG, eval=dataclasses.replace(CONFIG.eval, features=features))
    validate(config)
    with jax.numpy_dtype_promotion("standard"):  # Adam mixes types
        yield config


@pytest.fixture
def train(training):
    network = training.linear_network(CONFIG)

    def train(config, run, **more):
        score = scoring_during_training(config, run, network=network)
        loop.train(config, run, network=network, score=score, **more)

    return train


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_stopped_in_the_middle_of_an_evaluation_goes_on_there(config, train, training, tmp_path, monkeypatch):
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(config, whole)
    lines = lines_of(whole)
    scores = [line for line in lines if "FD-corners" in line]
    assert [line["step"] for line in scores] == [4, 8]
    assert {"FD-corners", "KD-corners", "KD-corners_standard_error", "precision", "recall"} < {*scores[0]}
    assert (whole / "FD-corners.png").exists()
    assert {path.name for path in (whole / "fid" / "training").iterdir()} == {"step_0000004.json", "step_0000008.json"}
    kept = json.loads((whole / "fid" / "training" / "step_0000008.json").read_text())
    assert kept["scores"]["FD-corners"] == scores[1]["FD-corners"]
    assert kept["images"]["drawn"]["checkpoint"] == 8
    loop.train(
        dataclasses.replace(config, eval=EvalConfig(), checkpoints=CheckpointConfig(every=4)),
        tmp_path / "off",
        network=training.linear_network(CONFIG),
    )
    assert [line for line in lines if "FD-corners" not in line] == lines_of(tmp_path / "off")

    save, saved = StoredImages.save, []

    def save_and_stop(stored, first, images, *, stop_at):
        save(stored, first, images)
        saved.append(first)
        if len(saved) == stop_at:
            raise Stopped(15, "killed while it samples")

    def crash(event):
        if event.step == 8:
            raise Stopped(15, "killed between the scores and the checkpoint")

    monkeypatch.setattr(StoredImages, "save", functools.partialmethod(save_and_stop, stop_at=5))
    with pytest.raises(Stopped, match="while it samples"):
        train(config, run)  # at step 8, with two of three batches
    assert saved == [0, 16, 32, 0, 16]
    with pytest.raises(Stopped, match="between"):
        train(config, run, hooks=[Periodic(1, crash)])
    assert saved == [0, 16, 32, 0, 16, 32]
    train(config, run)
    assert saved == [0, 16, 32, 0, 16, 32]
    for name in ("metrics.jsonl", "FD-corners.png"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_the_best_checkpoint_is_by_the_score(config, train, tmp_path):
    """With a learning rate that diverges, the first score is the best."""
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, learning_rate=0.9, warmup_steps=0))
    train(config, tmp_path / "run")
    scores = {line["step"]: line["FD-corners"] for line in lines_of(tmp_path / "run") if "FD-corners" in line}
    assert scores[4] < scores[8]
    kept = [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]
    assert {int(path.name) for path in kept} == {4, 8}
    notes = {int(path.name): json.loads((path / "notes" / "metadata").read_text())["loss"] for path in kept}
    assert notes == scores


def test_another_models_images_are_not_scored(config, train, tmp_path):
    """What is left of an evaluation of other weights, or of other images, is drawn anew."""
    run = tmp_path / "run"
    folder = run / "fid" / "training" / "step_0000004"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "job.json").write_text("{}")
    (folder / "request.json").write_text('{"request": {"images": {"number": 41}}}')
    train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=4)), run)
    assert [line["step"] for line in lines_of(run) if "FD-corners" in line] == [4]
    assert not folder.exists()


def test_what_cannot_be_scored_is_one_line(config, tmp_path):
    def with_eval(**choices):
        return dataclasses.replace(config, eval=dataclasses.replace(config.eval, **choices))

    with pytest.raises(UserError, match="eval.fid_every needs what scores"):
        loop.train(config, tmp_path / "run")
    with pytest.raises(UserError, match="choose .*inception"):
        scoring_during_training(with_eval(features="vgg"), tmp_path / "run")
    with pytest.raises(UserError, match="there is no file"):
        scoring_during_training(with_eval(fid_reference="no/such.npz"), tmp_path / "run")
    rules = dataclasses.replace(config.checkpoints, best_by="FID")
    with pytest.raises(
        UserError, match="checkpoints.best_by='FID' is not a score of .*: choose FD-corners, KD-corners"
    ):
        scoring_during_training(dataclasses.replace(config, checkpoints=rules), tmp_path / "run")
    np.savez(tmp_path / "moments.npz", mu=np.zeros(9), sigma=np.eye(9))
    kernel = dataclasses.replace(config.checkpoints, best_by="KD-corners")
    for choices in ({"fid_num": 19}, {"fid_reference": str(tmp_path / "moments.npz")}):  # of which there is no KD
        with pytest.raises(UserError, match="best_by='KD-corners' is not .* choose FD-corners, eval_loss, loss"):
            scoring_during_training(dataclasses.replace(with_eval(**choices), checkpoints=kernel), tmp_path / "run")
    for every in (0, 6):
        with pytest.raises(UserError, match=rf"must be a score of eval.fid_every={every}, a multiple of .*every=4"):
            validate(with_eval(fid_every=every))
