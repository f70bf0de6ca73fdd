"""The scripts as a user meets them: killed and started again, stopped, misused."""

import fcntl
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from ddpm_jax.run.checkpoints import load_ema
from ddpm_jax.run.weights import load_weights
from ddpm_jax.system.exits import run_script

REPOSITORY = Path(__file__).parents[1]
STEPS = 400
TINY = (
    "--model.width 8 --model.num-groups 4 --model.channel-mult 1 --model.num-res-blocks 1 "
    "--model.attention-resolutions "
    "--diffusion.schedule cosine --diffusion.num-steps 20 --train.batch-size 8 --train.warmup-steps 5 "
    "--train.learning-rate 1e-3 --train.ema-decay 0.9 --checkpoints.every 30 --log.every 20 --log.samples-every 200 "
    f"--log.num-samples 4 --log.sample-steps 0 --train.steps {STEPS}"
).split()

# Ends itself at a bad moment, as a machine that loses its power does: the rest is the script's own.
KILLED = """
import os, runpy, signal, sys
from ddpm_jax.training import hooks
_, moment, step, script, *arguments = sys.argv
append_line, save = hooks.append_line, hooks.Checkpoints.save

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def append_and_tear(path, line):
    append_line(path, line)
    if moment == "half a line" and path.name == "metrics.jsonl" and line["step"] >= int(step):
        os.truncate(path, path.stat().st_size - 9)
        die()

def save_and_die(self, at, *rest, **more):
    save(self, at, *rest, **more)
    if moment == "while saving" and at >= int(step):
        die()

hooks.append_line, hooks.Checkpoints.save = append_and_tear, save_and_die
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """One device, and programs that are compiled once for all processes."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(tmp_path_factory.mktemp("compiled"))
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "OMP_NUM_THREADS": "2",
    }


class Process:
    """A script in a process of its own; what it wrote is shown when an assertion fails."""

    def __init__(self, environment, *words):
        self.process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait(self, status):
        out, err = self.process.communicate(timeout=400)
        assert self.process.returncode == status, f"{out}\n{err}"
        return out, err

    def wait_until(self, happened):
        while not happened():
            if self.process.poll() is not None:
                pytest.fail(f"ended too soon: {self.process.communicate()}")
            time.sleep(0.005)


def logged(run):
    """The last step in the metrics."""
    file = run / "metrics.jsonl"
    found = re.findall(r'^\{"step": (\d+)', file.read_text(), re.MULTILINE) if file.exists() else []
    return int(found[-1]) if found else 0


def checkpoints(run):
    return sorted(int(folder.name) for folder in (run / "checkpoints").iterdir() if folder.name.isdigit())


def notes(run, step):
    """What is saved beside the arrays, the CRC-32 of every one of them included."""
    (file,) = (run / "checkpoints" / str(step) / "notes").glob("*metadata*")
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory, environment):
    run = tmp_path_factory.mktemp("runs") / "whole"
    out, err = Process(environment, "train.py", "--workdir", run, *TINY).wait(0)
    assert f"python sample.py {run}" in err + out
    return run


@pytest.fixture(scope="module")
def often_stopped(tmp_path_factory, environment):
    """The same command, started six times: killed three times, stopped twice."""
    run = tmp_path_factory.mktemp("runs") / "parts"
    command = ("train.py", "--workdir", run, *TINY)
    killed = -signal.SIGKILL

    first = Process(environment, *command)
    first.wait_until(lambda: logged(run) >= 40)
    first.process.kill()
    first.wait(killed)
    Process(environment, "-c", KILLED, "half a line", 120, *command).wait(killed)
    assert logged(run) == 120
    with pytest.raises(json.JSONDecodeError):
        json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    Process(environment, "-c", KILLED, "while saving", 150, *command).wait(killed)

    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process, before = Process(environment, *command), checkpoints(run)[-1]
        process.wait_until(lambda before=before: logged(run) > before + 20)
        with (run / ".lock").open("w") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as a second process would
        process.process.send_signal(number)
        _, err = process.wait(status)
        last_line = err.strip().splitlines()[-1]
        stopped = re.fullmatch(
            rf"train.py: stopped by {number.name} at step (\d+); checkpoint saved\. Run the same command to resume\.",
            last_line,
        )
        assert stopped, err
        assert checkpoints(run)[-1] == int(stopped[1]) < STEPS
        assert f"resuming from step {before}" in err
    # What the environment asks of jax changes no number.
    hostile = {
        "JAX_DEFAULT_PRNG_IMPL": "rbg",
        "JAX_THREEFRY_PARTITIONABLE": "0",
        "JAX_ENABLE_X64": "1",
        "MPLBACKEND": "?",
    }
    _, err = Process({**environment, **hostile}, *command).wait(0)
    assert "JAX_DEFAULT_PRNG_IMPL=rbg is ignored" in err
    return run


class TestStoppedAndStartedAgain:
    def test_every_array_ends_bit_identical(self, never_stopped, often_stopped):
        assert checkpoints(never_stopped)[-1] == checkpoints(often_stopped)[-1] == STEPS
        whole, parts = notes(never_stopped, STEPS), notes(often_stopped, STEPS)
        assert {"params", "ema", "optimizer"} == {re.match(r"\w+", name)[0] for name in whole["leaves"]}
        assert whole == parts
        (step, ema), (step_there, ema_there) = (
            load_ema(run, warn=pytest.fail) for run in (never_stopped, often_stopped)
        )
        assert step == step_there == STEPS
        chex.assert_trees_all_equal(ema, ema_there)

    def test_what_is_written_is_the_same_byte_for_byte(self, never_stopped, often_stopped):
        pictures = sorted(path.relative_to(never_stopped) for path in never_stopped.rglob("samples/*.png"))
        assert [path.name for path in pictures] == ["step_0000200.png", f"step_{STEPS:07d}.png"]
        for name in ("metrics.jsonl", "config.json", "loss.png", *pictures):
            assert (never_stopped / name).read_bytes() == (often_stopped / name).read_bytes(), name
        assert [json.loads(line)["step"] for line in (often_stopped / "metrics.jsonl").open()] == [*range(20, 401, 20)]

    def test_the_model_learned(self, never_stopped):
        losses = [json.loads(line)["loss"] for line in (never_stopped / "metrics.jsonl").open()]
        assert losses[0] > 0.8
        assert np.mean(losses[-5:]) < 0.75 * losses[0]

    def test_samples_are_the_same(self, never_stopped, often_stopped, environment, tmp_path):
        files = []
        for run in (never_stopped, often_stopped):
            out = tmp_path / run.name
            hostile = {"JAX_DEFAULT_PRNG_IMPL": "rbg"} if run == often_stopped else {}
            Process(environment | hostile, "sample.py", run, "--num", 5, "--batch-size", 4, "--out", out).wait(0)
            files.append(((out / "grid.png").read_bytes(), np.load(out / "samples.npz")["arr_0"]))
        assert files[0][0] == files[1][0]
        np.testing.assert_array_equal(files[0][1], files[1][1])
        assert files[0][1].shape == (5, 8, 8, 1)
        assert len(np.unique(files[0][1])) > 10

    def test_a_finished_run_says_so_and_changes_nothing(self, never_stopped, call):
        before = {path: path.stat().st_mtime_ns for path in (never_stopped / "checkpoints").rglob("*")}
        status, _, err = call("train", "--workdir", never_stopped, *TINY)
        assert status == 0
        assert f"has done its {STEPS} steps; --train.steps {2 * STEPS} would train it further" in err
        assert before == {path: path.stat().st_mtime_ns for path in (never_stopped / "checkpoints").rglob("*")}


@pytest.fixture
def call(monkeypatch, capsys, default_precision):
    """Calls a script in this process, as its `__main__` does; gives its status, and what it wrote."""

    def call(name, *words):
        spec = importlib.util.spec_from_file_location(name, REPOSITORY / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # where tyro looks the annotations up
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        spec.loader.exec_module(module)
        with pytest.raises(SystemExit) as ending:
            run_script(module.main)
        return ending.value.code, *capsys.readouterr()

    return call


def refused(answer, *words):
    """Holds an answer to be a refusal: status 2 and, after what was said before, one line that has the words in it."""
    status, out, err = answer
    assert status == 2, err
    assert not out
    *before, line = err.strip().splitlines()
    assert not [each for each in before if not each.startswith(("warning:", "digits, train:"))], err
    assert re.match(r"(train|sample)\.py: error: ", line), err
    for word in words:
        assert str(word) in line


class TestCheckpoints:
    def test_are_verified_a_line_each(self, call, never_stopped, tmp_path):
        status, out, err = call("evaluate", "verify", never_stopped)
        assert (status, err) == (0, "")
        steps = checkpoints(never_stopped)
        lines = out.splitlines()
        assert lines[:4] == [
            *("config.json: ok", "data.json: ok", "metrics.jsonl: 20 lines, ok", "timing.jsonl: 20 lines, ok")
        ]
        found = [
            re.fullmatch(r"step (\d+): \d+ arrays, \d+\.\d MB, ok", line)[1] for line in lines[4:] if "step" in line
        ]
        assert found == [str(step) for step in steps]
        assert all(line.endswith(", ok") or line.endswith(": ok") for line in lines)
        run = tmp_path / "run"
        shutil.copytree(never_stopped, run)
        for file in (run / "checkpoints" / str(STEPS) / "ema").rglob("d/*"):
            os.truncate(file, file.stat().st_size // 2)
        status, out, err = call("evaluate", "verify", run)
        assert status == 2
        assert re.search(rf"^step {STEPS}: \d+ arrays, .* MB, damaged: ", out, re.MULTILINE)
        assert err == (
            f"evaluate.py: error: {run}: 1 of {len(lines)} are damaged (step {STEPS}); step {steps[-2]} is the newest "
            "intact checkpoint\n"
        )

    def test_are_exported_and_started_from(self, call, never_stopped, environment, tmp_path):
        file, tuned = tmp_path / "digits.safetensors", tmp_path / "tuned"
        status, out, err = call("evaluate", "export", never_stopped, "--out", file)
        assert (status, out, err) == (0, f"{file}\n", "")
        weights, metadata = load_weights(file)
        chex.assert_trees_all_equal(weights, load_ema(never_stopped, warn=pytest.fail)[1])
        assert metadata["step"] == str(STEPS)
        words = ["--workdir", tuned, *TINY, "--train.steps", 20, "--train.init-from", file]
        _, err = Process(environment, "train.py", *words).wait(0)
        arrays = len(jax.tree.leaves(weights))
        assert re.search(
            rf"^loaded +{arrays} arrays .*^new +0 arrays .*^left out +0 arrays", err, re.MULTILINE | re.DOTALL
        )
        (line,) = [json.loads(line) for line in (tuned / "metrics.jsonl").open()]
        first = json.loads((never_stopped / "metrics.jsonl").open().readline())
        assert line["loss"] < 0.75 * first["loss"]  # it knows already what the other learned


class TestMisuse:
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ("--train.batchsize 8", ["--train.batchsize", "--train.batch-size"]),
            ("--train.batch-size many", ["--train.batch-size", "'many'"]),
            ("--diffusion.num-steps 0", ["diffusion.num_steps=0", "at least 1"]),
            ("--diffusion.beta-end 1.5", ["diffusion.beta_end=1.5", "above 0 and below 1"]),
            ("--data.height 10 --model.channel-mult 1 2 2", ["height 10", "divisible by 4", "8 or 12"]),
            ("--data.source folder --data.path MISSING", ["MISSING"]),
            ("--data.source folder --data.path EMPTY", ["EMPTY"]),
            ("--train.batch-size 12", ["train.batch_size=12", "8 devices", "multiple of 8"]),
            ("no_such_config", ["no_such_config"]),
        ],
    )
    def test_a_slip_is_one_line(self, call, tmp_path, words, said):
        (tmp_path / "EMPTY").mkdir()
        words = [str(tmp_path / word) if word.isupper() else word for word in words.split()]
        refused(call("train", "--workdir", tmp_path / "run", *words), *said)
        assert not list(tmp_path.rglob("checkpoints/*"))

    def test_another_configuration_is_refused_and_the_difference_named(self, call, never_stopped):
        before = (never_stopped / "config.json").read_bytes()
        answer = call("train", "--workdir", never_stopped, *TINY, "--train.seed", 5, "--train.steps", 1000)
        refused(answer, never_stopped, "train.seed: 0 saved, 5 requested", "another --workdir")
        assert "train.steps" not in answer[2]  # a run may be made longer
        assert (never_stopped / "config.json").read_bytes() == before

    def test_a_second_process_is_kept_out(self, call, tmp_path):
        with (tmp_path / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            refused(call("train", "--workdir", tmp_path, *TINY), tmp_path, "process", "another")

    def test_samples_of_no_run(self, call, tmp_path, never_stopped):
        refused(call("sample", tmp_path / "none"), "there is no folder", tmp_path / "none")
        refused(call("sample", tmp_path), "neither a run nor a model", "looked for config.json of a run")
        refused(call("sample", never_stopped, "--step", 5), "no checkpoint of step 5", STEPS)
        shutil.copy(never_stopped / "config.json", tmp_path)
        refused(call("sample", tmp_path), "has not saved yet")

    def test_cut_off_checkpoints(self, call, never_stopped, tmp_path):
        run = tmp_path / "run"
        shutil.copytree(never_stopped, run)
        for file in (run / "checkpoints").rglob("*"):
            if file.is_file():
                os.truncate(file, file.stat().st_size // 2)
        status, _, err = call("sample", run)
        assert status == 2
        *warnings, line = err.strip().splitlines()
        assert all("is damaged" in warning for warning in warnings)
        assert "sample.py: error: no checkpoint in" in line
        assert "restore the folder from a backup" in line
        status, _, err = call("train", "--workdir", run, *TINY)
        assert status == 2
        assert "train.py: error: no checkpoint in" in err.strip().splitlines()[-1]
        assert checkpoints(run) == checkpoints(
            never_stopped
        )  # nothing is set aside where nothing is left to go on from

    def test_summary(self, call, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        status, out, err = call("train", REPOSITORY / "configs/cifar10.py", "--summary")
        assert (status, err) == (0, "")
        assert "35,746,307 parameters" in out.splitlines()[-1]
        assert not list(tmp_path.iterdir())  # it only looks
