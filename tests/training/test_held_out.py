"""The loss on held-out images: a closed form, any layout, resuming, and the checkpoints that are best by it."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.config import CheckpointConfig, Config, DataConfig, DiffusionConfig, EvalConfig, LogConfig, TrainConfig
from ddpm_jax.data.source import in_memory
from ddpm_jax.data.sources import load_source
from ddpm_jax.networks import Network
from ddpm_jax.run.build import build_schedule
from ddpm_jax.run.validation import validate
from ddpm_jax.system.errors import Stopped, UserError
from ddpm_jax.training import loop
from ddpm_jax.training.held_out import check_held_out, evaluating, load_test_split
from ddpm_jax.training.hooks import Event, Periodic
from ddpm_jax.training.setup import make_setup

T = 20
CONFIG = Config(
    diffusion=DiffusionConfig(num_steps=T, schedule="cosine"),
    train=TrainConfig(
        steps=8, batch_size=16, learning_rate=1e-2, warmup_steps=2, ema_decay=0.5, matmul_precision="highest"
    ),
    checkpoints=CheckpointConfig(every=2, keep=1),
    eval=EvalConfig(every=2, num=100),
    log=LogConfig(every=3, samples_every=0),
)
validate(CONFIG)


def with_train(**choices):
    return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **choices))


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def _lenient():
    with jax.numpy_dtype_promotion("standard"):  # Adam mixes types
        yield


def evaluate(parts, source, state):
    event = Event(1, lambda: state, lambda line: None)
    evaluating(parts, source)(event)
    return event.values


def test_a_known_error_by_quarter_is_the_loss():
    """Of images that are all alike the noise is known; what is added to it, by quarter, is the root of the loss."""
    schedule = build_schedule(CONFIG)

    def apply(params, x_t, t, labels=None, *, dropout_keys=None):
        assert dropout_keys is None
        signal, noise = schedule.sqrt_alphas_bar[t], schedule.sqrt_one_minus_alphas_bar[t]
        column = lambda values: values[:, None, None, None]
        return (x_t - column(signal) * -1.0) / column(noise) + column(params["scale"] * (1 + 4 * t // T))

    network = Network(lambda key: {"scale": jnp.float32(3.0)}, apply)
    parts = make_setup(CONFIG, network=network)
    state = dataclasses.replace(parts.init(parts.keys.init), ema={"scale": jnp.float32(0.5)})  # not the parameters
    values = evaluate(parts, in_memory(np.zeros((1000, 8, 8, 1), np.uint8)), state)
    np.testing.assert_allclose(values["eval_loss_quartiles"], [0.25, 1, 2.25, 4], rtol=1e-4)
    assert 1.5 < values["eval_loss"] < 2.3  # 100 timesteps, near 1.875
    few = dataclasses.replace(CONFIG, eval=EvalConfig(every=1, num=1))
    values = evaluate(make_setup(few, network=network), in_memory(np.zeros((3, 8, 8, 1), np.uint8)), state)
    assert values["eval_loss_quartiles"].count(None) == 3


def test_it_is_the_same_number_on_any_devices_and_its_images_are_spread_over_the_set(training):
    network = training.as_network(training.OneOfEach())
    source = in_memory(np.random.default_rng(0).integers(0, 256, (307, 8, 8, 1), np.uint8))
    read = []
    source = dataclasses.replace(source, read_images=lambda indices: read.append(indices) or source.images[indices])
    found = {}
    layouts = dict(jit={}, fsdp=dict(fsdp=2), pmap=dict(parallel="pmap"), parts=dict(grad_accum_steps=2))
    for name, choices in layouts.items():
        parts = make_setup(with_train(**choices), network=network)
        state = parts.layout.init(parts.init, parts.keys.init)
        found[name] = evaluate(parts, source, parts.layout.saved_state(state))
    for values in found.values():
        np.testing.assert_allclose(values["eval_loss"], found["jit"]["eval_loss"], rtol=1e-5)
        np.testing.assert_allclose(values["eval_loss_quartiles"], found["jit"]["eval_loss_quartiles"], rtol=1e-5)
    assert all(len(indices) == 100 and indices[-1] == 303 for indices in read)


class TestInARun:
    @pytest.fixture
    def train(self, training):
        return functools.partial(loop.train, network=training.linear_network(CONFIG))

    @pytest.fixture
    def whole(self, train, tmp_path):
        train(CONFIG, tmp_path / "whole")
        return tmp_path / "whole"

    def test_it_only_adds_lines(self, train, tmp_path, capsys):
        whole = tmp_path / "on"
        train(CONFIG, whole)
        assert re.search(r"8 steps done, loss 0\.\d+, eval loss 0\.\d+$", capsys.readouterr().err.strip())
        lines = lines_of(whole)
        assert [line["step"] for line in lines] == [2, 3, 4, 6, 6, 8, 8]
        assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4, 6, 8]
        assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]
        train(dataclasses.replace(CONFIG, eval=EvalConfig()), tmp_path / "off")
        assert [line for line in lines if "eval_loss" not in line] == lines_of(tmp_path / "off")
        assert (whole / "loss.png").read_bytes() != (tmp_path / "off" / "loss.png").read_bytes()

    def test_images_that_are_given_are_compared_at_the_first_start_alone(self, train, tmp_path, capsys):
        config, images = (
            dataclasses.replace(with_train(steps=2), data=DataConfig(holdout=0.1)),
            load_source(DataConfig()),
        )
        for warned in (True, False):
            train(config, tmp_path, source=images, held_out=images)
            assert ("are also training images, so eval_loss is partly" in capsys.readouterr().err) == warned

    @pytest.mark.parametrize("step", [3, 4])
    def test_interrupted_and_resumed_it_writes_the_same_bytes(self, train, whole, tmp_path, step):
        def interrupt(event):
            if event.step == step:
                raise Stopped(2, "a crash between the evaluation and the checkpoint")

        with pytest.raises(Stopped):
            train(CONFIG, tmp_path / "parts", hooks=[Periodic(1, interrupt)])
        train(CONFIG, tmp_path / "parts")
        for name in ("metrics.jsonl", "loss.png"):
            assert (whole / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()

    def test_the_best_checkpoint_is_by_it(self, train, tmp_path):
        """With a learning rate that diverges, the first evaluation is the best."""
        rules = CheckpointConfig(every=2, keep=1, keep_best=1, best_by="eval_loss")
        config = dataclasses.replace(with_train(learning_rate=0.9, warmup_steps=0), checkpoints=rules)
        validate(config)
        train(config, tmp_path)
        losses = {line["step"]: line["eval_loss"] for line in lines_of(tmp_path) if "eval_loss" in line}
        best = min(losses, key=losses.get)
        assert best != 8
        kept = [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
        assert {int(path.name) for path in kept} == {best, 8}
        notes = {int(path.name): json.loads((path / "notes" / "metadata").read_text())["loss"] for path in kept}
        assert notes == {step: losses[step] for step in (best, 8)}


@pytest.mark.parametrize("every", [0, 3])
def test_best_by_eval_loss_needs_evaluations_at_every_checkpoint(every):
    rules = CheckpointConfig(every=5, best_by="eval_loss")
    with pytest.raises(UserError, match=rf"eval.every={every} does not divide checkpoints.every=5: use --eval.every 5"):
        validate(dataclasses.replace(CONFIG, checkpoints=rules, eval=EvalConfig(every=every)))


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (DataConfig(split="all"), "data.split=all trains on"),
        (DataConfig(source="npy", path="a.npy"), "eval.every=2 needs held-out images: .*--eval.every 0"),
    ],
)
def test_without_held_out_images_it_is_one_line(tmp_path, data, line):
    np.save(tmp_path / "a.npy", np.zeros((4, 8, 8, 1), np.uint8))
    data = dataclasses.replace(data, path=str(tmp_path / data.path) if data.path else "")
    with pytest.raises(UserError, match=line):
        load_test_split(dataclasses.replace(CONFIG, data=data))


def test_held_out_images_that_are_trained_on_are_counted(capsys):
    training, held_out = load_source(DataConfig()), load_source(DataConfig(split="test"))
    check_held_out(CONFIG, held_out, training)
    assert capsys.readouterr().err == ""
    check_held_out(CONFIG, held_out, load_source(DataConfig(split="all")))
    assert "warning: 100 of the 100 held-out images (digits, test) are also training images" in capsys.readouterr().err
    check_held_out(CONFIG, held_out, dataclasses.replace(training, images=None))
    assert "are among the training images is not known: they are too many to compare" in capsys.readouterr().err
