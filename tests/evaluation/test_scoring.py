import json

import jax
import numpy as np
import pytest

from ddpm_jax.config import DataConfig
from ddpm_jax.data.sources import load_source
from ddpm_jax.evaluation.features import Extractor
from ddpm_jax.evaluation.frechet import moments
from ddpm_jax.evaluation.scores import Statistics, compute_scores
from ddpm_jax.evaluation.scoring import folder_of_scores, load_features, open_images, open_reference, score
from ddpm_jax.system.files import read_json, write_json
from ddpm_jax.system.pictures import save_png

CODE = """
def thirds(images): return images.reshape(len(images), -1)[:, ::3] / 16
def halves(images): return images.reshape(len(images), -1)[:, ::2] / 16
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "own.py").write_text(CODE)
    return f"{tmp_path / 'own.py'}:thirds"


@pytest.fixture
def run(runs, tmp_path):
    return runs.save_runs(runs.make_trained(runs.make_config()), folder=tmp_path / "run")


def thirds(images):
    return (images.reshape(len(images), -1)[:, ::3] / 16).astype(np.float32)


def test_a_run_is_drawn_and_scored_against_its_training_images(run, own, run_script, tmp_path):
    words = ("fid", run, "--features", own, "--num", 45, "--batch-size", 16, "--sampler", "ddim", "--steps", 3)
    status, out, err = run_script("evaluate.py", *words)
    assert status == 0, err
    (file,) = (run / "fid").glob("*/scores.json")
    result = json.loads(file.read_text())
    drawn = np.load(next((run / "samples").glob("*ddim*/samples.npz")))["arr_0"]
    real = thirds(load_source(DataConfig()).images)
    reference = Statistics("real", len(real), moments(real), features=real)
    assert result["scores"] == pytest.approx(compute_scores({"pool": thirds(drawn)}, reference, name="thirds"))
    assert not (file.parent / "parts").exists()
    assert out.startswith(f"FD-thirds {result['scores']['FD-thirds']:.4f} (45 images)\n")
    for line in (
        "warning: FD-thirds of 45 images is biased upwards relative to the 50,000 that papers use",
        "images: run, checkpoint 7, seed 0, sampler ddim, steps 3",
        "reference: digits, train (1,438 images)",
        "FD-thirds is not FID",
    ):
        assert line in out
    assert result["images"]["drawn"]["seed"] == 0
    assert result["reference"]["number"] == 1438
    assert set(result["versions"]) >= {"jax", "numpy"}

    status, again, err = run_script("evaluate.py", *words)
    assert (status, again) == (0, out)
    assert "features" not in err  # nothing is computed twice

    # Its samples by themselves are compared with the images of the run in whose folder they are.
    samples = next((run / "samples").glob("*ddim*/samples.npz"))
    status, alone, err = run_script("evaluate.py", "fid", samples, "--features", own, "--out", tmp_path / "out")
    assert status == 0, err
    assert alone.splitlines()[:2] == out.splitlines()[:2]
    (tmp_path / "out" / "scores.json").write_text("{")
    assert run_script("evaluate.py", "fid", samples, "--features", own, "--out", tmp_path / "out")[:2] == (0, alone)

    # The scores of the first images stay as the job is extended, and those that are only printed as they were computed.
    other = {**read_json(file.with_name("computed_on.json")), "devices": "1 other"}
    write_json(file.with_name("computed_on.json"), other)
    status, _, err = run_script("evaluate.py", *words[:5], 50, *words[6:])
    assert status == 0, err
    assert run_script("evaluate.py", *words)[:2] == (0, out)
    assert read_json(file.with_name("computed_on.json")) == other


def test_statistics_that_are_saved_are_a_reference(own, run_script, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "drawn.npz", arr_0=images)
    saved = tmp_path / "digits.npz"
    status, out, err = run_script(
        "evaluate.py", "fid", "digits", "--features", own, "--save-statistics", saved, "--out", tmp_path / "a"
    )
    assert status == 0, err
    status, out, err = run_script("evaluate.py", "fid", tmp_path / "drawn.npz", "--features", own, "--reference", saved)
    assert status == 0, err
    (file,) = (tmp_path / "drawn_fid").glob("*/scores.json")
    scores = json.loads(file.read_text())["scores"]
    real = thirds(load_source(DataConfig()).images)
    expected = compute_scores({"pool": thirds(images)}, Statistics("", 9, moments(real)), name="thirds")
    assert scores == pytest.approx(expected)
    assert [*scores] == ["FD-thirds"]  # moments alone

    # Another function of the same file does not get the scores of the first one.
    words = ("fid", tmp_path / "drawn.npz", "--reference", "digits", "--out", tmp_path / "b")
    assert run_script("evaluate.py", *words, "--features", own)[1].startswith("FD-thirds ")
    status, _, err = run_script("evaluate.py", *words, "--features", own.replace("thirds", "halves"))
    assert status == 2
    assert "holds another job (features is thirds " in err


def test_folders_of_scores_are_beside_the_images(own, tmp_path, monkeypatch):
    folder = tmp_path / "images.v1"
    folder.mkdir()
    features = load_features(own)
    place = lambda given: folder_of_scores(None, str(given), "real", 9, features)
    assert place(folder) == tmp_path / "images.v1_fid" / "num_9_thirds_real"
    assert place(tmp_path / "images.v2.npz").parent == tmp_path / "images.v2_fid"
    monkeypatch.chdir(folder)
    assert place(".") == place(folder)


def test_the_whole_evaluator_on_real_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_JAX_CACHE", str(tmp_path / "cache"))
    digits = load_source(DataConfig()).images
    np.savez(tmp_path / "a.npz", arr_0=digits[:20])
    np.savez(tmp_path / "b.npz", arr_0=digits[20:40])
    np.savez(tmp_path / "noise.npz", arr_0=np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), np.uint8))
    features = load_features("efficientnet-lite0")
    extractor = Extractor(features, batch_size=20, devices=jax.devices()[:2])
    reference = open_reference(str(tmp_path / "b.npz"), features=features)
    results = {
        name: score(open_images(str(tmp_path / f"{name}.npz")), reference, extractor, tmp_path / name)["scores"]
        for name in ("a", "noise")
    }
    assert [*results["a"]] == [f"{kind}-EfficientNetLite0" for kind in ("FD", "KD")] + [
        "KD-EfficientNetLite0_standard_error",
        "precision",
        "recall",
    ]
    assert 3 * results["a"]["FD-EfficientNetLite0"] < results["noise"]["FD-EfficientNetLite0"]
    assert abs(results["a"]["KD-EfficientNetLite0"]) < 0.2 * results["noise"]["KD-EfficientNetLite0"]
    assert results["a"]["precision"] > 0.5 > results["noise"]["precision"] == 0


def test_what_cannot_be_scored_is_one_line(run, own, run_script, tmp_path):
    def refused(*words):
        status, _, err = run_script("evaluate.py", "fid", *words)
        assert status == 2
        return err.strip().splitlines()[-1]

    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 1), np.uint8)
    file, copy, large = (tmp_path / f"{name}.npz" for name in ("drawn", "copy", "large"))
    np.savez(file, arr_0=images)
    np.savez_compressed(copy, arr_0=images)
    np.savez(large, arr_0=np.repeat(images, 2, axis=1))
    np.savez(tmp_path / "other.npz", mu=np.zeros(5), sigma=np.eye(5))
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    save_png(tmp_path / "mixed" / "0.png", images[0])
    save_png(tmp_path / "mixed" / "1.png", images[0, :4])
    mine = ("--features", own)
    assert "--reference is missing" in refused(file, *mine)
    assert "is, or lies inside, what is being evaluated" in refused(file, *mine, "--reference", file)
    assert "contains the images that are evaluated" in refused(file, *mine, "--reference", copy)
    assert "contains the images that are evaluated" in refused(file, *mine, "--num", 5, "--reference", copy)
    assert "are 16x8, and those to be compared 8x8" in refused(file, *mine, "--reference", large)
    assert "statistics of 5-dimensional features, but --features thirds has 22" in refused(
        file, *mine, "--reference", tmp_path / "other.npz"
    )
    for other in (large, tmp_path / "other.npz"):  # nothing is drawn first
        refused(run, *mine, "--reference", other)
    assert not (run / "samples").exists()
    (run / "samples").mkdir()
    assert "lies inside" in refused(run, *mine, "--reference", run / "samples")
    assert "are a .pkl file" in refused(run, *mine, "--save-statistics", "s.npz", "--statistics-form", "edm2")
    assert "which thirds does not have" in refused(run, *mine, "--save-statistics", "s.npz", "--statistics-form", "adm")
    assert not [*(run / "samples").iterdir()]
    assert "which contains statistics: leave it out" in refused(
        file, *mine, "--reference", tmp_path / "other.npz", "--reference-num", 5
    )
    for option in ("--seed", "--step"):
        assert "not a run: --seed, --step" in refused(file, *mine, option, 1, "--reference", "digits")
    assert "is a model" in refused(file, *mine, "--reference", run)
    assert "looked for config.json of a run; model_index.json" in refused(tmp_path / "empty", *mine)
    assert "images of 2 sizes" in refused(tmp_path / "mixed", *mine, "--reference", "digits")
    assert "neither a folder, nor an .npz" in refused(tmp_path / "absent", *mine, "--reference", "digits")
    assert "contains 9 images: use --num 9" in refused(file, *mine, "--num", 10, "--reference", "digits")
    assert "not a run" in refused(file, *mine, "--steps", 10, "--reference", "digits")
    assert "choose inception, efficientnet-lite0" in refused(file, "--features", "vgg", "--reference", "digits")
    assert "loads its own" in refused(file, *mine, "--weights", file, "--reference", "digits")
    assert "--num must be at least 2" in refused(file, *mine, "--num", 1, "--reference", "digits")
