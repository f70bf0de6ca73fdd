"""Sampling and evaluation on many hosts: real processes on loopback give what one process gives, and end together."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ddpm_jax.evaluation import bits_per_dim, scoring
from ddpm_jax.evaluation.features import Extractor, users_features
from ddpm_jax.evaluation.image_sets import open_npz
from ddpm_jax.generation.job import run_job
from ddpm_jax.generation.sampler_config import SamplerConfig

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def trained(runs, tmp_path_factory):
    trained = runs.make_trained(runs.make_config(), folder=tmp_path_factory.mktemp("hosts") / "run")
    runs.save_runs(trained, folder=trained.folder)
    return trained


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts a script on two hosts with two devices each."""
    cache, started = tmp_path_factory.mktemp("compiled"), []

    def start_both(script, *words, on_host=((), ())):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = f"127.0.0.1:{free.getsockname()[1]}"
        environment = {
            **os.environ,
            "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, script, *map(str, words), "--hosts.coordinator", where, "--hosts.count", "2"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started[:] = [
            subprocess.Popen(
                [*command, "--hosts.index", str(index), *on_host[index]], cwd=REPOSITORY, env=environment, **pipes
            )
            for index in range(2)
        ]
        return started

    yield start_both
    for process in started:
        process.kill()


def finish(processes):
    """Waits for both; returns their statuses, what they wrote to stdout, and to stderr."""
    try:
        said = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    shown, errors = zip(*said, strict=True)
    # Gloo, through which hosts without accelerators talk, writes to stdout.
    shown = tuple("".join(line for line in text.splitlines(True) if "[Gloo]" not in line) for text in shown)
    return [process.returncode for process in processes], shown, errors


def stored(parts):
    """The stored batches of a job, with the times of their files."""
    return {path.name: path.stat().st_mtime_ns for path in parts.glob("*.npz")}


def kill_one(processes, parts):
    """Kills the second host once 20 batches are stored; returns the first's status and errors, and the batches."""
    end = time.monotonic() + 200
    while len(list(parts.glob("*.npz"))) < 20:
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < end
        time.sleep(0.002)
    processes[1].kill()
    statuses, _, said = finish(processes)
    assert statuses[1] == -signal.SIGKILL
    assert statuses[0] in (2, -signal.SIGABRT)  # on a busy machine the library was seen to abort it first
    return statuses[0], said[0], stored(parts)


def watch(processes, parts):
    """Waits for both, which must succeed; returns the batches that were stored before they were packed."""
    drawn = {}
    while any(process.poll() is None for process in processes) and not (parts.parent / "samples.npz").exists():
        with contextlib.suppress(FileNotFoundError):
            drawn |= stored(parts)
        time.sleep(0.002)
    assert finish(processes)[0] == [0, 0]
    return drawn


def images_of(folder):
    with np.load(folder / "samples.npz") as arrays:
        return arrays["arr_0"]


def test_two_hosts_draw_the_images_of_one(trained, start, runs, tmp_path):
    words = ["--num", "20", "--batch-size", "8", "--seed", "3"]
    statuses, shown, said = finish(start("sample.py", trained.folder, *words, "--out", tmp_path / "two"))
    assert statuses == [0, 0], said
    assert shown == (f"20 images of checkpoint 7: {tmp_path}/two/grid.png\n", "")
    assert "sampling 12 images" in said[0]  # of five batches of four, it draws three
    job = runs.make_job(seed=3)._replace(trained=trained, sampler=SamplerConfig())
    run_job(job, tmp_path / "one", number=20, batch_size=8, format="grid")
    one, two = (images_of(tmp_path / name).astype(int) for name in ("one", "two"))
    assert abs(one - two).max() <= 1
    assert (one == two).mean() > 0.99
    assert one.std() > 10
    assert {path.name for path in (tmp_path / "two").iterdir()} == {
        *(".lock", "computed_on.json", "job.json", "samples.npz", "grid.png"),
    }


@pytest.mark.slow
def test_a_host_that_is_killed_ends_the_other_and_the_job_resumes(trained, start, tmp_path):
    words = ["--num", "600", "--batch-size", "8", "--format", "npz"]
    assert finish(start("sample.py", trained.folder, *words, "--out", tmp_path / "whole"))[0] == [0, 0]

    out = tmp_path / "killed"
    status, said, kept = kill_one(start("sample.py", trained.folder, *words, "--out", out), out / "parts")
    if status == 2:
        (line,) = [line for line in said.splitlines() if "error" in line]
        assert line == "sample.py: error: another host is gone: start all hosts again; they resume from what was saved"
    assert 20 <= len(kept) < 150

    drawn = watch(start("sample.py", trained.folder, *words, "--out", out), out / "parts")
    assert {name: drawn[name] for name in kept} == kept  # none was drawn again
    assert (out / "samples.npz").read_bytes() == (tmp_path / "whole" / "samples.npz").read_bytes()


@pytest.mark.slow
def test_two_hosts_evaluate_as_one(trained, start, tmp_path):
    words = ["--num", "20", "--batch-size", "8", "--sigma", "optimal", "--num-strata", "4"]
    command = ["likelihood", trained.folder, *words, "--out", tmp_path / "two"]
    statuses, shown, said = finish(start("evaluate.py", *command))
    assert statuses == [0, 0], said
    assert "bits/dim over 20 images" in shown[0]
    assert shown[1] == ""
    request = bits_per_dim.Request("test", 20, "optimal", "tanh", 4, 0)
    one = bits_per_dim.run_job(trained, tmp_path / "one", request, batch_size=8)
    two = json.loads((tmp_path / "two" / "likelihood.json").read_text())
    assert two["bits_per_dim"] == pytest.approx(one.bits_per_dim, rel=1e-5)
    assert two["images"] == 20
    assert len(list((tmp_path / "two" / "batches").iterdir())) == 5


@pytest.mark.slow
def test_hosts_that_were_started_differently_end_with_one_line(trained, start, tmp_path):
    words = [trained.folder, "--num", "20", "--out", tmp_path / "out"]
    statuses, shown, said = finish(start("sample.py", *words, on_host=(["--seed", "1"], ["--seed", "2"])))
    assert (statuses, shown) == ([2, 2], ("", ""))
    for each in said:
        (line,) = [line for line in each.splitlines() if "error" in line]
        assert "host 1 was started with other options than host 0" in line


@pytest.mark.slow
def test_what_one_host_draws_the_others_wait_for(trained, start, tmp_path):
    words = ["--num", "2", "--columns", "3", "--out", tmp_path / "out"]
    statuses, shown, said = finish(start("sample.py", "progressive", trained.folder, *words))
    assert statuses == [0, 0], said
    assert shown == (f"{tmp_path}/out/x0.png\n", "")
    assert (tmp_path / "out" / "x0.png").exists()


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """A file of features that need no network; and where statistics are cached."""
    folder = tmp_path_factory.mktemp("features")
    (folder / "mine.py").write_text(
        "def corners(images):\n    return images[:, ::3, ::3, 0].reshape(len(images), -1)\n"
    )
    os.environ["DDPM_JAX_CACHE"] = str(folder / "cache")
    yield f"{folder / 'mine.py'}:corners"
    del os.environ["DDPM_JAX_CACHE"]


@pytest.mark.slow
def test_two_hosts_score_as_one(trained, start, features, tmp_path):
    words = ["fid", trained.folder, "--num", "40", "--batch-size", "8", "--features", features]
    statuses, shown, said = finish(start("evaluate.py", *words, "--out", tmp_path / "two"))
    assert statuses == [0, 0], said
    assert shown[0].startswith("FD-corners ")
    assert shown[1] == ""
    drawn = next((trained.folder / "samples").glob("*/samples.npz"))
    one = scoring.score(
        open_npz(drawn),
        scoring.open_reference(None, features=users_features(features), config=trained.config),
        Extractor(users_features(features), batch_size=8),
        tmp_path / "one",
    )
    assert json.loads((tmp_path / "two" / "scores.json").read_text())["scores"] == pytest.approx(one["scores"])


@pytest.mark.slow
def test_scores_of_two_hosts_in_training_resume_in_the_middle(start, features, tmp_path):
    words = [
        *["--model.width", "8", "--model.channel-mult", "1", "--model.num-res-blocks", "1", "--model.num-groups", "4"],
        *[
            "--diffusion.schedule",
            "cosine",
            "--diffusion.num-steps",
            "20",
            "--train.steps",
            "20",
            "--train.batch-size",
            "8",
        ],
        *["--train.warmup-steps", "5", "--train.ema-decay", "0.9", "--log.every", "5", "--log.samples-every", "0"],
        *["--checkpoints.every", "10", "--checkpoints.keep-best", "1", "--checkpoints.best-by", "FD-corners"],
        *["--eval.fid-every", "10", "--eval.fid-num", "800", "--eval.fid-steps", "0", "--eval.features"],
        features,
    ]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert finish(start("train.py", *words, "--workdir", whole))[0] == [0, 0]
    parts = run / "fid" / "training" / "step_0000020" / "images" / "parts"
    _, _, kept = kill_one(start("train.py", *words, "--workdir", run), parts)
    drawn = watch(start("train.py", *words, "--workdir", run), parts)
    assert {name: drawn[name] for name in kept} == kept  # none was drawn again
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert [line["step"] for line in map(json.loads, (run / "metrics.jsonl").open()) if "FD-corners" in line] == [
        10,
        20,
    ]
