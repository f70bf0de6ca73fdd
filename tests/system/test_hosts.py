"""Many hosts: real processes on loopback train as one process does, and end together."""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from ddpm_jax.config import DataConfig
from ddpm_jax.data.sources import load_source
from ddpm_jax.networks import from_linen
from ddpm_jax.run.build import image_shape
from ddpm_jax.run.checkpoints import load_ema
from ddpm_jax.run.command import parse_run
from ddpm_jax.system import hosts
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.hosts import LOST, Agreement, Hosts, check, first_line, is_loss_of_a_host, launcher
from ddpm_jax.training import setup
from ddpm_jax.training.loop import train

REPOSITORY = Path(__file__).parents[2]
SILENCE = 5
WORDS = [
    *["configs/digits.py", "--train.steps", "40", "--train.batch-size", "16", "--train.warmup-steps", "2"],
    *[
        "--train.ema-decay",
        "0.9",
        "--train.matmul-precision",
        "highest",
        "--log.every",
        "5",
        "--log.samples-every",
        "0",
    ],
    *["--checkpoints.every", "10", "--checkpoints.keep", "9"],
]


def start(run, cache, *others):
    """Starts the two processes of a run, each with 4 devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    where = ["--hosts.coordinator", f"127.0.0.1:{port}", "--hosts.count", "2", "--hosts.silence", str(SILENCE)]
    command = [
        sys.executable,
        "tests/faults/linear.py",
        *WORDS,
        *others,
        "--workdir",
        str(run),
        *where,
        "--hosts.index",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen([*command, str(index)], cwd=REPOSITORY, env=environment, **pipes) for index in range(2)]


def finish(processes):
    """Waits for both; returns their statuses and the lines that train.py printed."""
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    lines = [[line for line in text.splitlines() if "train.py: " in line] for text in said]
    return [process.returncode for process in processes], lines


def wait_for(step, run, processes):
    end = time.monotonic() + 120
    while not (run / "checkpoints" / str(step)).exists():
        assert all(process.poll() is None for process in processes), [process.communicate()[0] for process in processes]
        assert time.monotonic() < end
        time.sleep(0.005)


def saved(run):
    """Shape, type and CRC-32 of every array of every step."""
    notes = {int(path.name): path / "notes" / "metadata" for path in (run / "checkpoints").iterdir()}
    return {step: json.loads(file.read_text())["leaves"] for step, file in notes.items()}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def two(cache, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "two"
    processes = start(run, cache)
    statuses, lines = finish(processes)
    assert statuses == [0, 0]
    assert lines == [[], []]
    return run


def test_two_hosts_train_as_one(two, tmp_path, monkeypatch, record_property):
    network = runpy.run_path(str(REPOSITORY / "tests" / "faults" / "linear.py"), run_name="linear")["Linear"]
    monkeypatch.setattr(setup, "build_network", lambda config: from_linen(network(), image_shape(config)))
    config = parse_run(Hosts, WORDS).config
    assert jax.device_count() == 8
    with jax.numpy_dtype_promotion("standard"):
        train(config, tmp_path)
    here, there = ([json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (tmp_path, two))
    assert [line["step"] for line in here] == [line["step"] for line in there] == list(range(5, 41, 5))
    losses = np.array([[line["loss"] for line in lines] for lines in (here, there)])
    record_property("largest difference of a loss", float(abs(losses[0] - losses[1]).max()))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    (step, ema), (step_there, ema_there) = (load_ema(run, warn=pytest.fail) for run in (tmp_path, two))
    assert step == step_there == 40
    worst = max(float(abs(a - b).max()) for a, b in zip(jax.tree.leaves(ema), jax.tree.leaves(ema_there), strict=True))
    record_property("largest difference of a parameter", worst)
    assert worst < 1e-5


def test_two_hosts_stream_what_they_would_read_from_memory(two, cache, tmp_path):
    """And in several steps a call what they would do in one."""
    digits = load_source(DataConfig())
    np.save(tmp_path / "digits.npy", digits.images)
    np.save(tmp_path / "digits_labels.npy", digits.labels)
    run, data = tmp_path / "run", ["--data.source", "npy", "--data.path", str(tmp_path / "digits.npy")]
    words = [*data, "--data.memory-gib", "0", "--data.device-gib", "0", "--train.steps-per-call", "3"]
    processes = start(run, cache, *words)
    assert finish(processes) == ([0, 0], [[], []])
    assert (run / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()


def test_two_hosts_start_from_the_weights_of_a_run(two, cache, tmp_path):
    run = tmp_path / "run"
    statuses, lines = finish(start(run, cache, "--train.init-from", str(two), "--train.steps", "1"))
    assert (statuses, lines) == ([0, 0], [[], []])
    (step, ema), (_, ema_there) = (load_ema(folder, warn=pytest.fail) for folder in (run, two))
    assert step == 1
    for here, there in zip(jax.tree.leaves(ema), jax.tree.leaves(ema_there), strict=True):
        np.testing.assert_array_equal(here, there)  # the first step has rate 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "fault", "message"),
    [(0, signal.SIGKILL, "another host is gone"), (1, signal.SIGSTOP, f"no sign of life from host 1 for {SILENCE} s")],
    ids=["primary host killed", "host silent"],
)
def test_a_lost_host_ends_the_others_with_one_line(cache, tmp_path, host, fault, message):
    processes = start(tmp_path / "run", cache, "--train.steps", "100000")
    wait_for(10, tmp_path / "run", processes)
    processes[host].send_signal(fault)
    assert processes[1 - host].wait(timeout=60) == 2
    processes[host].kill()
    _, lines = finish(processes)
    (line,) = lines[1 - host]
    assert line == f"train.py: error: {message}: start all hosts again; they resume from what was saved"


@pytest.mark.slow
def test_a_host_that_is_killed_ends_the_other_and_both_resume(two, cache, tmp_path):
    """Killed at one host, then stopped by a signal at the other, then finished: the same bits as never stopped."""
    run = tmp_path / "run"
    processes = start(run, cache)
    wait_for(10, run, processes)
    processes[1].kill()
    statuses, lines = finish(processes)
    assert statuses[1] == -signal.SIGKILL
    # On a busy machine the library was seen to abort the process before we end it.
    assert statuses[0] in (2, -signal.SIGABRT)
    if statuses[0] == 2:
        (line,) = lines[0]
        assert line.endswith("start all hosts again; they resume from what was saved")

    processes = start(run, cache)
    wait_for(20, run, processes)
    processes[1].send_signal(signal.SIGTERM)
    statuses, lines = finish(processes)
    assert statuses in ([143, 143], [0, 0])  # it may have come to its end first
    if statuses[0]:
        assert "stopped by SIGTERM at step" in lines[0][0]

    assert finish(start(run, cache)) == ([0, 0], [[], []])
    here, there = saved(run), saved(two)
    assert {10, 20, 30, 40} <= set(here)
    assert {step: here[step] for step in there} == there
    assert (run / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Hosts(count=2), "many hosts need .* together: given are coordinator none, count 2, index none"),
        (Hosts(coordinator="a:1", index=0), "count none, index 0"),
        (Hosts(coordinator="a:1", count=1, index=0), "count 1, index 0"),
        (Hosts(coordinator="a:1", count=2, index=2), r"--hosts.index must be in 0 to 1, not 2"),
        (Hosts(coordinator="a", count=2, index=0), "must be HOST:PORT, such as .*, not a$"),
        (Hosts(coordinator="a:70000", count=2, index=0), "must be HOST:PORT"),
        (Hosts(count=-1), "--hosts.count must be at least 1, not -1"),
        (Hosts(timeout=0), "--hosts.timeout must be at least 1 second, not 0"),
        (Hosts(silence=0), "--hosts.silence must be at least 5 seconds, not 0"),
    ],
)
def test_hosts_that_do_not_go_together_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        check(given)


def test_hosts_that_go_together_are_not():
    for given in (Hosts(), Hosts(count=1), Hosts(coordinator="10.0.0.1:8476", count=2, index=1)):
        check(given)


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, ""),
        ({"SLURM_STEP_NUM_TASKS": "1"}, ""),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "ompi"),
    ],
)
def test_what_started_the_processes_is_found_out(monkeypatch, environment, found):
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launcher() == found


def test_a_process_alone_agrees_with_itself_at_once():
    agree = Agreement(2, lag=2)
    assert [agree((0, 1)), agree((15, 0))] == [(0, 1), (15, 0)]
    assert first_line("a line") == "a line"
    assert hosts.is_primary_host()
    assert not hosts.are_joined()


def test_the_loss_of_a_host_is_known_by_its_cause():
    error = UserError("cannot save step 30")
    assert not is_loss_of_a_host(error)
    error.__cause__ = ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:5")
    assert is_loss_of_a_host(error)
    assert not is_loss_of_a_host(UserError("cannot save step 30: No space left on device"))
    assert "start all hosts again" in LOST
