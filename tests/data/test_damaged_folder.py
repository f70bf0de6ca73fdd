"""A folder of which one file in twenty is damaged, as train.py meets it."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from ddpm_jax.system.exits import run_script
from ddpm_jax.training import setup

NUMBER, DAMAGED = 60, (7, 31, 58)
TINY = [
    *["configs/image_folder.py", "--data.height", "8", "--data.width", "8", "--train.batch-size", "8"],
    *["--model.width", "4", "--model.channel-mult", "1", "--model.num-res-blocks", "1", "--model.num-groups", "2"],
    *["--model.attention-resolutions", "--diffusion.num-steps", "20", "--diffusion.schedule", "cosine"],
    *["--train.steps", "4", "--train.warmup-steps", "1", "--train.ema-decay", "0.5"],
    *["--log.every", "1", "--log.samples-every", "0"],
]


@pytest.fixture(autouse=True)
def _quickly(training, monkeypatch):
    monkeypatch.setattr(setup, "build_network", training.linear_network)
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set").mkdir()
    for i in range(NUMBER):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "set" / f"{i:02d}.png")
    return tmp_path / "set"


def damage(folder):
    """Cut short, a bit of the pixels flipped, written over."""
    cut, flipped, lost = (folder / f"{i:02d}.png" for i in DAMAGED)
    whole = [file.read_bytes() for file in (cut, flipped, lost)]
    cut.write_bytes(whole[0][: len(whole[0]) // 2])
    at = whole[1].index(b"IDAT") + 60
    flipped.write_bytes(whole[1][:at] + bytes([whole[1][at] ^ 16]) + whole[1][at + 1 :])
    lost.write_bytes(bytes(len(whole[2])))
    return dict(zip((cut, flipped, lost), whole, strict=True))


@pytest.fixture
def train(folder, tmp_path, monkeypatch, capsys, default_precision):
    spec = importlib.util.spec_from_file_location("train_script", Path(__file__).parents[2] / "train.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)  # where the options' docstrings are read from
    spec.loader.exec_module(script)

    def run(*words, workdir="run"):
        arguments = ["train.py", *TINY, "--data.path", str(folder), "--workdir", str(tmp_path / workdir), *words]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as ended:
            run_script(script.main)
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return run


def test_every_damaged_file_is_named_before_training(folder, train, tmp_path):
    damage(folder)
    status, out, err = train("--check-data")
    assert status == 2
    assert "57 images of 8x8x1" in out
    assert "unreadable: 3 files" in out
    for number in DAMAGED:
        assert re.search(rf"^  {folder}/{number:02d}.png \((damaged|no picture)\)$", out, re.MULTILINE)
    assert re.search(r"^skipped: 3 of 60 files .*\ntrain.py: error: data.path: 3 of 60 files .*\n\Z", err, re.MULTILINE)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["data.png"]
    assert train("--check-data", "--data.on-unreadable", "skip")[0] == 0


@pytest.mark.parametrize("memory_gib", ["8", "0"])
def test_training_refuses_the_folder_or_trains_on_the_rest(folder, train, tmp_path, memory_gib):
    damage(folder)
    status, _, err = train("--data.memory-gib", memory_gib)
    assert status == 2
    assert re.search(
        r"^train.py: error: data.path: 3 of 60 files in .* cannot be read as images: .*07.png", err, re.MULTILINE
    )
    assert not (tmp_path / "run" / "checkpoints").exists()
    status, _, err = train("--data.memory-gib", memory_gib, "--data.on-unreadable", "skip", workdir="skipping")
    assert status == 0
    assert "skipped: 3 of 60 files" in err
    assert len((tmp_path / "skipping" / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_run_whose_files_are_damaged_and_mended_is_one_that_never_stopped(folder, train, tmp_path):
    assert train("--train.steps", "9", workdir="whole")[0] == 0
    assert train()[0] == 0
    whole = damage(folder)
    status, _, err = train("--train.steps", "9")
    assert status == 2
    assert "3 of 60 files" in err
    for file in whole:
        file.unlink()
    status, _, err = train("--train.steps", "9")
    assert status == 2
    assert "was begun on other images than" in err
    assert "images 60 there, 57 here" in err
    for file, content in whole.items():
        file.write_bytes(content)
    assert train("--train.steps", "9")[0] == 0
    runs = [tmp_path / name for name in ("whole", "run")]
    assert runs[0].joinpath("metrics.jsonl").read_bytes() == runs[1].joinpath("metrics.jsonl").read_bytes()
    notes = [json.loads(next(run.glob("checkpoints/9/notes/*metadata*")).read_text()) for run in runs]
    assert len(notes[0]["leaves"]) > 5
    assert notes[0]["leaves"] == notes[1]["leaves"]
