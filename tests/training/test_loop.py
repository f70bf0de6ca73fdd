"""The loop: what it refuses, how it fails, stops and resumes, its hooks. Killed processes: tests/test_scripts.py."""

import concurrent.futures
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.averages import gamma_of
from ddpm_jax.config import (
    FROM_PYTHON,
    CheckpointConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    EmaConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    TrainConfig,
)
from ddpm_jax.data.source import in_memory
from ddpm_jax.data.sources import load_source
from ddpm_jax.networks import Network
from ddpm_jax.run.build import image_shape
from ddpm_jax.run.checkpoints import load_ema
from ddpm_jax.run.record import read_config
from ddpm_jax.run.snapshots import read_snapshot, snapshot_file, snapshot_steps
from ddpm_jax.run.trained import load_run
from ddpm_jax.run.validation import validate
from ddpm_jax.system.errors import Stopped, UserError
from ddpm_jax.training import loop
from ddpm_jax.training.hooks import Periodic
from ddpm_jax.training.metrics import read_lines

TINY = Config(
    name="tiny",
    diffusion=DiffusionConfig(num_steps=20, schedule="cosine"),
    model=ModelConfig(
        width=4, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=2, dropout=0.1
    ),
    train=TrainConfig(
        steps=6, batch_size=8, learning_rate=1e-3, warmup_steps=2, ema_decay=0.5, matmul_precision="highest"
    ),
    checkpoints=CheckpointConfig(every=2, keep=2),
    log=LogConfig(every=2, samples_every=0),
)
validate(TINY)


def with_train(**choices):
    return dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, **choices))


def linear(params, x_t, t, labels=None, *, dropout_keys=None):
    return params["scale"] * x_t + params["offset"]


# It compiles in a second; the U-Net is trained by tests/test_scripts.py.
NETWORK = Network(lambda key: {"scale": jnp.float32(0.3), "offset": jnp.float32(-0.1)}, linear)
RECORDED = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, network=FROM_PYTHON))


def train(config, run, **given):
    loop.train(config, run, **{"network": NETWORK, **given})


@pytest.fixture(scope="module", autouse=True)
def _lenient():
    with jax.numpy_dtype_promotion("standard"):  # Adam mixes types
        yield


@pytest.fixture(scope="module")
def trained(_lenient, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "tiny"
    train(TINY, run)
    return run


def test_a_run_is_one_folder(trained):
    names = {path.name for path in trained.iterdir()} - {".lock"}
    assert names == {"config.json", "data.json", "metrics.jsonl", "timing.jsonl", "checkpoints", "loss.png"}
    assert read_config(trained / "config.json") == RECORDED
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == ["4", "6"]
    lines = read_lines(trained / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert set(lines[0]) == {"step", "loss", "loss_quartiles", "grad_norm", "param_norm", "learning_rate"}
    np.testing.assert_allclose([line["learning_rate"] for line in lines], [5e-4, 1e-3, 1e-3])
    assert 0.5 < lines[0]["loss"] < 1.5
    for line in read_lines(trained / "timing.jsonl"):
        assert line["images_per_second"] > 0
        assert line["model_flops_utilization"] is None  # what a CPU can do is not known
        assert line["peak_memory_gib"] > 0


def test_a_longer_run_goes_on_by_pmap_as_by_jit(trained, tmp_path):
    """How it is spread, how far it goes and how often it writes are free to change."""
    runs = {}
    for parallel in ("jit", "pmap"):
        runs[parallel] = tmp_path / parallel
        shutil.copytree(trained, runs[parallel])
        train(with_train(steps=8, parallel=parallel), runs[parallel])
    by_jit, by_pmap = (read_lines(run / "metrics.jsonl") for run in runs.values())
    assert [line["step"] for line in by_jit] == [line["step"] for line in by_pmap] == [2, 4, 6, 8]
    assert by_jit[:3] == by_pmap[:3] == read_lines(trained / "metrics.jsonl")
    np.testing.assert_allclose(by_jit[3]["loss"], by_pmap[3]["loss"], rtol=1e-5)
    assert load_ema(runs["pmap"], warn=pytest.fail)[0] == 8


def test_a_run_goes_on_on_fewer_devices(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(
        UserError,
        match=r"--exact: steps 1 to 6 were computed in a different environment \(devices 8 cpu before, 4 cpu n",
    ):
        train(with_train(steps=8, devices=4), tmp_path / "run", exact=True)
    assert contents(tmp_path / "run") == before
    train(with_train(steps=8, devices=4), tmp_path / "run")
    assert (
        f"warning: {tmp_path / 'run'}: devices 8 cpu before, 4 cpu now: the steps from 6 on agree with those of an "
        "uninterrupted run to rounding only\n"
    ) in capsys.readouterr().err
    with pytest.raises(UserError, match="--exact"):  # a step of it was computed on four
        train(with_train(steps=9), tmp_path / "run", exact=True)
    shutil.copytree(trained, tmp_path / "all")
    train(with_train(steps=8), tmp_path / "all", exact=True)
    here, there = (read_lines(tmp_path / name / "metrics.jsonl")[-1] for name in ("run", "all"))
    np.testing.assert_allclose(here["loss"], there["loss"], rtol=1e-5)


def test_a_finished_run_takes_the_new_place_of_its_images(tmp_path, capsys):
    images, run = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), np.uint8), tmp_path / "run"
    for name in ("images.npy", "moved.npy"):
        np.save(tmp_path / name, images)
        data = DataConfig(source="npy", path=str(tmp_path / name))
        train(dataclasses.replace(with_train(steps=2), data=data), run)
    assert read_config(run / "config.json").data == data
    assert f"data.path is now {tmp_path / 'moved.npy'}" in capsys.readouterr().err


def contents(run):
    return {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("choices", "line"),
    [
        (dict(seed=1, steps=8), "train.seed: 0 saved, 1 requested"),
        (dict(steps=8, fsdp=3), "train.fsdp=3 does not divide"),
        (dict(steps=8, grad_accum_steps=3), "cannot be shared out"),
    ],
)
def test_a_command_that_is_refused_leaves_the_folder_as_it_was(trained, choices, line):
    before = contents(trained)
    with pytest.raises(UserError, match=line):
        train(with_train(**choices), trained)
    assert contents(trained) == before


def test_a_refused_first_start_leaves_nothing_and_what_it_said_can_be_done(tmp_path):
    run = tmp_path / "runs" / "run"
    classes = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, num_classes=5))
    with pytest.raises(UserError, match="num-classes 10|num_classes=10|10"):
        train(classes, run, network=None)
    with pytest.raises(UserError, match="there is no such folder, nor a file of weights"):
        train(with_train(init_from=str(tmp_path / "typo")), run)
    with pytest.raises(
        UserError, match="use --train.devices 6, or, for a new run, a --train.batch-size that is a mult"
    ):
        train(with_train(batch_size=12), run)
    assert not list(tmp_path.iterdir())
    run.mkdir(parents=True)
    (run / "notes.txt").write_text("the user's own")
    with pytest.raises(UserError, match="train.devices=9, but JAX sees 8: use --train.devices 8, or 0"):
        train(with_train(devices=9), run)
    assert [path.name for path in run.iterdir()] == ["notes.txt"]
    train(with_train(steps=1, seed=3), run)
    assert read_config(run / "config.json").train.seed == 3


def test_a_package_that_is_missing_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    np.save(tmp_path / "images.npy", np.zeros((16, 8, 8, 1), np.uint8))
    data = DataConfig(source="npy", path=str(tmp_path / "images.npy"), memory_gib=0, device_gib=0)
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(UserError, match="streamed from disk needs the package grain, which is not installed: pip inst"):
        train(dataclasses.replace(TINY, data=data), tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["images.npy"]


def test_checkpoints_without_a_configuration_are_no_run(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "config.json").unlink()
    before = contents(run)
    with pytest.raises(UserError, match="has checkpoints but no config.json"):
        train(with_train(steps=8, seed=3), run)
    assert contents(run) == before


def test_images_that_are_no_pictures_are_trained_on_without_grids(tmp_path, capsys):
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (16, 8, 8, 2), np.uint8))
    data = DataConfig(source="npy", path=str(tmp_path / "images.npy"), channels=2)
    log = dataclasses.replace(TINY.log, samples_every=1)
    train(dataclasses.replace(with_train(steps=2), data=data, log=log), tmp_path / "run")
    assert "no sample grids: images with 2 channels cannot be shown" in capsys.readouterr().err
    assert load_ema(tmp_path / "run", warn=pytest.fail)[0] == 2


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    # The first update has rate 0, the second breaks everything.
    config = dataclasses.replace(with_train(learning_rate=1e30), checkpoints=CheckpointConfig(every=1, keep=2))
    with pytest.raises(UserError) as error:
        train(config, tmp_path)
    line = str(error.value)
    assert line.startswith("step 2: loss ")
    assert f"the last good checkpoint is step 1 in {tmp_path}" in line
    assert "smaller --train.learning-rate" in line
    step, ema = load_ema(tmp_path, warn=pytest.fail)
    assert step == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(ema))


def test_what_is_kept_and_that_minutes_save_too(trained, tmp_path):
    """The best is one of every other step, by the mean loss since the one before; no rule changes a number."""
    rules = CheckpointConfig(every=2, keep=2, keep_every=3, keep_best=1, minutes=1e-9)  # so every step is overdue
    train(dataclasses.replace(TINY, checkpoints=rules), tmp_path)
    losses = {
        int(path.name): json.loads((path / "notes" / "metadata").read_text())["loss"]
        for path in (tmp_path / "checkpoints").iterdir()
    }
    means = {line["step"]: line["loss"] for line in read_lines(tmp_path / "metrics.jsonl")}
    newest, milestones, best = {5, 6}, {3, 6}, min(means, key=means.get)
    assert set(losses) == newest | milestones | {best}
    assert (tmp_path / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()
    for step, loss in losses.items():
        assert loss == (None if step % 2 else pytest.approx(means[step], rel=1e-12))


def signal_at(step, number, *, every=1):
    """A hook that sends this process a signal once."""
    sent = []

    def send(event):
        if event.step == step and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    return Periodic(every, send)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_stops_the_run_after_its_step_and_the_same_command_resumes(trained, tmp_path, capsys, number):
    before = signal.getsignal(number)
    with pytest.raises(
        Stopped,
        match=rf"stopped by {number.name} at step 5; checkpoint saved\. Run the same command to resume\.",
    ) as stop:
        train(TINY, tmp_path, hooks=[signal_at(4, number)])
    assert stop.value.signal_number == number
    assert signal.getsignal(number) is before
    assert "stopping after this step and saving a checkpoint; press Ctrl-C again" in capsys.readouterr().err
    assert load_ema(tmp_path, warn=pytest.fail)[0] == 5
    train(TINY, tmp_path)
    assert f"{tmp_path}: resuming from step 5" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()


def test_ends_on_the_way_leave_no_trace(tmp_path):
    """Of a run extended twice, and stopped in between: metrics, what is best, and every array; also off the periods."""

    def run_to(steps, run, **given):
        config = dataclasses.replace(
            with_train(steps=steps),
            eval=EvalConfig(every=4, num=8),
            log=dataclasses.replace(TINY.log, every=3),
            checkpoints=CheckpointConfig(every=4, keep=1, keep_best=2),
        )
        train(config, run, source=SOURCE, held_out=SOURCE, **given)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_to(17, whole)
    run_to(5, parts)
    ended = read_lines(parts / "metrics.jsonl")
    assert [(line["step"], "eval_loss" in line, line.get("final")) for line in ended] == [
        *((3, False, None), (4, True, None)),
        *((5, False, True), (5, True, True)),
    ]
    with pytest.raises(Stopped):
        run_to(11, parts, hooks=[signal_at(9, signal.SIGTERM)])
    run_to(11, parts)
    run_to(17, parts)
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    notes = [
        {path.name: (path / "notes" / "metadata").read_text() for path in (run / "checkpoints").iterdir()}
        for run in (whole, parts)
    ]
    assert notes[0] == notes[1]  # they hold the checksums of all arrays
    assert {"17"} < set(notes[0]) <= {"4", "8", "12", "16", "17"}
    run_to(17, whole)  # the end stays where it is, and so do its lines
    assert read_lines(whole / "metrics.jsonl")[-1]["final"]


def test_power_averages_are_kept_in_snapshots_and_exact_however_the_run_went(trained, tmp_path):
    def run_to(steps, run, **given):
        config = dataclasses.replace(
            with_train(steps=steps),
            ema=EmaConfig(snapshots_every=3, sigma_rels=(0.05, 0.2)),
            checkpoints=CheckpointConfig(every=4, keep=10),
        )
        train(config, run, **given)
        return read_config(run / "config.json")

    params = []
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    config = run_to(11, whole, hooks=[Periodic(1, lambda event: params.append(jax.device_get(event.state.params)))])
    run_to(5, parts)
    assert snapshot_steps(parts) == [3, 5]
    with pytest.raises(Stopped):
        run_to(11, parts, hooks=[signal_at(9, signal.SIGTERM)])
    assert snapshot_steps(parts) == [3, 6, 9]
    for step in (8, 10):
        shutil.rmtree(parts / "checkpoints" / str(step))
    run_to(11, parts)
    assert snapshot_steps(parts) == snapshot_steps(whole) == [3, 6, 9, 11]
    for step in snapshot_steps(whole):
        assert snapshot_file(parts, step).read_bytes() == snapshot_file(whole, step).read_bytes()
        for average, width in zip(read_snapshot(whole, step, config=config), (0.05, 0.2), strict=True):
            weights = np.diff((np.arange(step + 1) / step) ** (gamma_of(width) + 1))
            for name, array in average.items():
                np.testing.assert_allclose(array, weights @ [each[name] for each in params[:step]], rtol=1e-5)
    (_, ema), (_, plain) = load_ema(whole, step=4, warn=pytest.fail), load_ema(trained, step=4, warn=pytest.fail)
    chex.assert_trees_all_equal(ema, plain)  # beside the plain average, which stays as it was
    assert {path.name for path in (trained / "checkpoints" / "4").iterdir()} >= {"params", "ema", "optimizer"}
    assert not (trained / "checkpoints" / "4" / "power_averages").exists()


def test_a_learning_rate_that_changes_on_resume_is_part_of_the_run(trained, tmp_path):
    """From where it was changed; however often the run is stopped after that, and from wherever it is resumed."""
    rules = CheckpointConfig(every=2, keep=10)
    slower = dataclasses.replace(with_train(steps=12, learning_rate=1e-4), checkpoints=rules)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for run in (whole, parts):
        shutil.copytree(trained, run)
    train(slower, whole)
    lines = read_lines(whole / "metrics.jsonl")
    np.testing.assert_allclose([line["learning_rate"] for line in lines], [5e-4, 1e-3, 1e-3, 1e-4, 1e-4, 1e-4])
    assert lines[:3] == read_lines(trained / "metrics.jsonl")
    with pytest.raises(Stopped):
        train(slower, parts, hooks=[signal_at(8, signal.SIGTERM)])
    for saved in (parts / "checkpoints").iterdir():
        if saved.name != "4":  # before the change
            shutil.rmtree(saved)
    train(slower, parts)
    for name in ("metrics.jsonl", "config.json"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    (_, ema), (_, ema_there) = (load_ema(run, warn=pytest.fail) for run in (whole, parts))
    chex.assert_trees_all_equal(ema, ema_there)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_other_optimizers_resume_in_the_same_bits(tmp_path, optimizer):
    choices = dict(optimizer=optimizer, weight_decay=0.1, lr_decay="cosine", decay_steps=6, fsdp=2)
    kernel = jnp.arange(8.0).reshape(4, 2) / 8
    network = Network(
        lambda key: {"layer": {"kernel": kernel, "bias": jnp.float32(0)}},
        lambda params, x_t, t, labels=None, dropout_keys=None: (
            params["layer"]["kernel"].mean() * x_t + params["layer"]["bias"]
        ),
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(with_train(**choices), whole, network=network)
    train(with_train(**choices, steps=4), parts, network=network)
    train(with_train(**choices), parts, network=network)
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    (_, ema), (_, ema_there) = (load_ema(run, warn=pytest.fail) for run in (whole, parts))
    chex.assert_trees_all_equal(ema, ema_there)
    assert np.abs(ema["layer"]["kernel"] - kernel).max() > 1e-5


def test_steps_in_one_call_leave_the_run_as_it_is(tmp_path):
    """Wherever a hook is due, the run is stopped or extended; with calls of another length to rounding."""

    def run_to(steps, run, steps_per_call, *, hooks=()):
        config = dataclasses.replace(
            with_train(steps=steps, steps_per_call=steps_per_call, devices=1),
            log=dataclasses.replace(TINY.log, every=5),
            checkpoints=CheckpointConfig(every=7, keep=3),
        )
        train(config, run, hooks=[Periodic(11, lambda event: seen.append((run.name, event.step))), *hooks])

    seen, single, several, parts = [], *(tmp_path / name for name in ("single", "several", "parts"))
    run_to(20, several, 4)
    with pytest.raises(Stopped, match="stopped by SIGTERM at step 14; "):  # calls end at 10, 11 and 14
        run_to(20, parts, 4, hooks=[signal_at(11, signal.SIGTERM, every=11)])
    run_to(17, parts, 4)
    run_to(20, parts, 4)
    assert [step for name, step in seen if name == "several"] == [11, 20]
    assert (parts / "metrics.jsonl").read_bytes() == (several / "metrics.jsonl").read_bytes()
    arrays = [json.loads((run / "checkpoints/20/notes/metadata").read_text())["leaves"] for run in (several, parts)]
    assert arrays[0] == arrays[1]  # their checksums
    run_to(8, single, 100)
    run_to(20, single, 1)
    losses, losses_there = ([line["loss"] for line in read_lines(run / "metrics.jsonl")] for run in (several, single))
    np.testing.assert_allclose(losses_there, losses, rtol=1e-5)


def test_a_loss_that_is_not_finite_is_found_at_its_step_within_a_call(tmp_path):
    with pytest.raises(UserError, match="^step 2: loss .* no checkpoint was saved yet"):
        train(with_train(learning_rate=1e30, steps_per_call=4), tmp_path)


def test_a_thread_that_is_not_the_main_one_trains_without_signal_handlers(trained, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        threads.submit(jax.numpy_dtype_promotion("standard")(train), TINY, tmp_path).result()
    assert (tmp_path / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()


def test_hooks_run_every_n_steps_and_after_the_last_and_may_log(trained, tmp_path):
    """Between the metrics and the checkpoint of their step; they see the state that is saved, and change nothing."""
    seen = []

    def note(event):
        saved = (tmp_path / "checkpoints" / str(event.step)).exists()
        seen.append((event.step, int(event.state.step), saved))
        event.log({"norm": float(sum((leaf**2).sum() for leaf in jax.tree.leaves(event.state.ema)))})

    train(TINY, tmp_path, hooks=[Periodic(4, note), Periodic(0, pytest.fail)])
    assert seen == [(4, 4, False), (6, 6, False)]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert [line[:10] for line in lines] == [f'{{"step": {step}' for step in (2, 4, 4, 6, 6)]
    own = [line for line in lines if '"norm"' in line]
    assert "".join(line for line in lines if line not in own) == (trained / "metrics.jsonl").read_text()
    assert np.isfinite([json.loads(line)["norm"] for line in own]).all()


SOURCE = in_memory(np.random.default_rng(0).integers(0, 256, (40, 4, 6, 3), np.uint8), [0, 1] * 20)


@pytest.fixture(scope="module")
def own_images(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "own"
    train(TINY, run, source=SOURCE)
    return run


class TestGivenInPython:
    def test_the_record_says_so_with_the_shape_of_the_images(self, own_images):
        config = read_config(own_images / "config.json")
        assert (config.model.network, config.data.source) == (FROM_PYTHON, FROM_PYTHON)
        assert image_shape(config) == (4, 6, 3)

    def test_the_same_call_resumes(self, own_images, tmp_path):
        with pytest.raises(Stopped):
            train(TINY, tmp_path, source=SOURCE, hooks=[signal_at(2, signal.SIGINT)])
        train(TINY, tmp_path, source=SOURCE)
        assert (tmp_path / "metrics.jsonl").read_bytes() == (own_images / "metrics.jsonl").read_bytes()

    def test_what_is_not_given_again_is_refused_in_one_line(self, own_images):
        with pytest.raises(UserError, match=f"model.network: '{FROM_PYTHON}'"):
            loop.train(TINY, own_images, source=SOURCE)
        with pytest.raises(UserError, match=f"data.source: '{FROM_PYTHON}'"):
            train(TINY, own_images)
        other = in_memory(255 - SOURCE.images, SOURCE.labels)
        with pytest.raises(UserError, match="pixels"):
            train(with_train(steps=9), own_images, source=other)
        with pytest.raises(UserError, match=r"given to train\(\) in Python.*give it again, to train\(\) or load_run"):
            load_run(own_images)
        with pytest.raises(UserError, match=r"images of this run were given to train\(\) in Python"):
            load_source(read_config(own_images / "config.json").data)
        assert load_run(own_images, network=NETWORK).step == 6

    @pytest.mark.parametrize(
        ("given", "line"),
        [
            (
                dict(network=Network(NETWORK.init, lambda params, x_t, t, labels=None: x_t[:1])),
                "^network: the output of",
            ),
            (dict(source=dataclasses.replace(SOURCE, image_shape=(8, 8, 3))), "^source: images must be a NumPy array"),
            (dict(source=SOURCE), "eval.every needs held-out images: give them to train"),
        ],
    )
    def test_what_does_not_fit_is_one_line(self, tmp_path, given, line):
        with pytest.raises(UserError, match=line):
            train(dataclasses.replace(TINY, eval=EvalConfig(every=1)), tmp_path / "run", **given)
        assert not (tmp_path / "run").exists()

    def test_held_out_images_are_evaluated(self, tmp_path):
        config = dataclasses.replace(TINY, eval=EvalConfig(every=6))
        train(config, tmp_path, source=SOURCE, held_out=SOURCE)
        assert "eval_loss" in read_lines(tmp_path / "metrics.jsonl")[-1]


class TestRefused:
    def test_another_configuration(self, trained):
        with pytest.raises(UserError, match=r"different configuration \(train.ema_decay: 0.5 saved, 0.1 requested\)"):
            train(with_train(ema_decay=0.1, steps=9), trained)
        assert read_config(trained / "config.json") == RECORDED

    def test_a_folder_in_use(self, tmp_path):
        with (tmp_path / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(UserError, match="process"):
                train(TINY, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]

    def test_a_folder_that_cannot_be(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="cannot write to"):
            train(TINY, tmp_path / "file" / "run")

    def test_a_batch_that_cannot_be_shared_out(self, tmp_path):
        with pytest.raises(UserError, match="train.batch_size=12 cannot be shared out evenly over 8 devices"):
            train(with_train(batch_size=12), tmp_path)
