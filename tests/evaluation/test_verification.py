"""The files of a run: each that a command reads back is verified, and damage is named where it is."""

import dataclasses
import re
import shutil

import numpy as np
import pytest

from ddpm_jax.config import TrainConfig
from ddpm_jax.evaluation.verification import verify_run
from ddpm_jax.generation.job import describe_job, run_job
from ddpm_jax.generation.store import Parts
from ddpm_jax.run.record import read_config
from ddpm_jax.run.snapshots import save_snapshot
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import write_json
from ddpm_jax.training.metrics import append_line, rewind

FILES = [
    *("config.json", "data.json", "metrics.jsonl", "step 7", "averages/step_0000006.npz"),
    "samples/job/computed_on.json",
    *(
        "samples/job/frames/00000000-00000002.npz",
        "samples/job/job.json",
        "samples/job/parts/00000008-00000010.npz",
        "samples/job/samples.npz",
    ),
]


@pytest.fixture(scope="module")
def run(runs, tmp_path_factory):
    """A run with two lines of metrics, a checkpoint, and a job that is not packed yet."""
    folder = tmp_path_factory.mktemp("verification") / "run"
    job = runs.make_job(folder=folder)
    runs.save_runs(job.trained, folder=folder)
    write_json(folder / "data.json", {"images": 3, "class_names": []})
    for step in (5, 7):
        append_line(folder / "metrics.jsonl", {"step": step, "loss": 0.5})
    save_snapshot(folder, 6, [{"w": np.ones(3)}, {"w": np.zeros(3)}], config=job.trained.config)
    out = folder / "samples" / "job"
    run_job(job, out, number=4, batch_size=8, format="npz")
    drawn = np.load(out / "samples.npz")["arr_0"]
    Parts(out / "parts", describe_job(job)).save(8, 10, {"images": drawn[:2]})
    Parts(out / "frames", {"frames": 3, **describe_job(job)}).save(0, 2, {"images": drawn[:2]})
    return folder


def damaged(folder):
    return [verdict.name for verdict in verify_run(folder) if verdict.damage is not None]


def test_what_was_written_is_intact(run):
    found = list(verify_run(run))
    assert [verdict.name for verdict in found] == FILES
    assert [verdict.damage for verdict in found] == [None] * len(FILES)
    contents = {verdict.name: verdict.content for verdict in found}
    assert contents["metrics.jsonl"] == "2 lines"
    assert contents["samples/job/samples.npz"] == "4 images"


def test_a_flipped_bit_is_named_in_its_file_alone(run, tmp_path):
    for number, name in enumerate(name for name in FILES if not name.startswith("step")):
        copy = tmp_path / str(number)
        shutil.copytree(run, copy)
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 4
        (copy / name).write_bytes(content)
        assert damaged(copy) == [name]
    rewind(tmp_path / "2" / "metrics.jsonl", 7, warn=lambda line: None)  # set aside, what is left is intact
    assert damaged(tmp_path / "2") == []


def test_what_is_of_another_range_job_or_step_is_named(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    parts = copy / "samples" / "job" / "parts"
    (parts / "00000008-00000010.npz").rename(parts / "00000018-00000020.npz")
    (copy / "checkpoints" / "7").rename(copy / "checkpoints" / "9")
    shutil.copytree(copy / "samples" / "job", copy / "samples" / "other")
    save_snapshot(
        copy,
        5,
        [{"w": np.ones(3)}],
        config=dataclasses.replace(read_config(copy / "config.json"), train=TrainConfig(seed=9)),
    )
    write_json(copy / "samples" / "other" / "job.json", {"seed": 5})
    names = {verdict.name: verdict.damage for verdict in verify_run(copy) if verdict.damage is not None}
    assert re.fullmatch(r"it is of run \w+, not \w+", names.pop("averages/step_0000005.npz"))
    assert names == {
        "step 9": "it was saved at step 7, and its folder was renamed",
        "samples/job/parts/00000018-00000020.npz": "it contains images 8 to 9",
        "samples/other/parts/00000018-00000020.npz": "it contains images 8 to 9",
        "samples/other/samples.npz": "it belongs to another job than job.json",
    }
    (copy / "config.json").unlink()
    assert next(verdict.damage for verdict in verify_run(copy)).startswith("cannot read ")


def test_a_folder_without_checkpoints_is_no_run(tmp_path):
    with pytest.raises(UserError, match="no checkpoints in"):
        list(verify_run(tmp_path))
