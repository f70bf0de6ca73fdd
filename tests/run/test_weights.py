"""Weights alone: files of them, and runs that start from them."""

import dataclasses
import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from ddpm_jax.config import CheckpointConfig, Config, DiffusionConfig, LogConfig, TrainConfig
from ddpm_jax.run.checkpoints import Checkpoints, load_ema
from ddpm_jax.run.init_from import fit, start_from
from ddpm_jax.run.weights import checksum, load_weights, save_weights
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import read_json
from ddpm_jax.training import setup
from ddpm_jax.training.loop import train

CONFIG = Config(
    train=TrainConfig(steps=2, batch_size=8, learning_rate=1e-3, warmup_steps=2, ema_decay=0.5),
    checkpoints=CheckpointConfig(every=2),
    log=LogConfig(every=1, samples_every=0),
)


def weights_of(seed, **more):
    random = np.random.default_rng(seed)
    draw = lambda *shape: random.standard_normal(shape).astype(np.float32)
    return {"down": {"conv": {"kernel": draw(3, 3, 2, 4), "bias": draw(4)}}, "out": {"bias": draw(2)}, **more}


def begin(init_from, run, config=CONFIG):
    drawn = jax.tree.map(jnp.asarray, weights_of(1))
    return start_from(init_from, drawn, drawn, run=run, config=config)


@pytest.fixture
def file(tmp_path):
    save_weights(tmp_path / "weights.safetensors", weights_of(0), config=CONFIG, step=70)
    return tmp_path / "weights.safetensors"


class TestFile:
    def test_gives_back_every_bit_and_what_it_is(self, file):
        weights, metadata = load_weights(file)
        chex.assert_trees_all_equal(weights, weights_of(0))
        assert metadata["step"] == "70"
        assert json.loads(metadata["config"]) == json.loads(json.dumps(dataclasses.asdict(CONFIG)))

    def test_is_read_by_safetensors_alone(self, file):
        arrays = safetensors.numpy.load_file(file)
        assert set(arrays) == {"down.conv.kernel", "down.conv.bias", "out.bias"}
        np.testing.assert_array_equal(arrays["down.conv.kernel"], weights_of(0)["down"]["conv"]["kernel"])

    def test_of_another_program_is_read(self, tmp_path):
        safetensors.numpy.save_file({"out.bias": np.ones(2, np.float32)}, tmp_path / "other.safetensors")
        weights, metadata = load_weights(tmp_path / "other.safetensors")
        chex.assert_trees_all_equal(weights, {"out": {"bias": np.ones(2, np.float32)}})
        assert metadata == {}

    def test_a_flipped_bit_is_found(self, file):
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"is damaged: the checksum of \S+ differs"):
            load_weights(file)

    @pytest.mark.parametrize("how", ["cut off", "no such format", "missing"])
    def test_what_cannot_be_read_is_one_line(self, file, how):
        if how == "cut off":
            file.write_bytes(file.read_bytes()[:-20])
        elif how == "no such format":
            file.write_bytes(b"PK" * 100)
        else:
            file.unlink()
        with pytest.raises(UserError, match="weights.safetensors") as error:
            load_weights(file)
        assert len(str(error.value).splitlines()) == 1

    @pytest.mark.parametrize(
        ("names", "metadata", "said"),
        [
            (["a", "a.b"], {}, "it has an array a and another one a.b"),
            (["a.b.c", "a.b"], {}, "it has an array a.b and another one a.b.c"),
            ([".".join("a" * 5000)], {}, "of 5000 parts"),
            (["a"], {"crc32": "[1]"}, "its checksums are not JSON"),
            (["a"], {"crc32": "[" * 10**5}, "its checksums are not JSON"),
            (["a"], {"crc32": '{"a": [7]}'}, "the checksum of a differs"),
        ],
    )
    def test_names_and_checksums_that_cannot_be_are_one_line(self, tmp_path, names, metadata, said):
        safetensors.numpy.save_file({name: np.zeros(1, np.float32) for name in names}, tmp_path / "hostile", metadata)
        with pytest.raises(UserError, match=said) as error:
            load_weights(tmp_path / "hostile")
        assert len(str(error.value)) < 1000


class TestFit:
    def test_loads_what_is_the_same_draws_what_is_new_and_leaves_out_the_rest(self):
        here = weights_of(1, classes={"embedding": np.zeros((10, 4), np.float32)})
        there = weights_of(2, old={"scale": np.ones(3, np.float32)})
        there["down"]["conv"]["bias"] = np.ones(8, np.float32)  # of another shape
        there["out"]["bias"] = there["out"]["bias"].astype(np.float16)  # and another type
        merged, fitted = fit(here, there)
        expected = weights_of(1, classes=here["classes"])
        expected["down"]["conv"]["kernel"] = there["down"]["conv"]["kernel"]
        chex.assert_trees_all_equal(merged, expected)
        assert set(fitted.loaded) == {"down.conv.kernel"}
        assert set(fitted.new) == {"down.conv.bias", "out.bias", "classes.embedding"}
        assert set(fitted.left_out) == {"down.conv.bias", "out.bias", "old.scale"}
        table = fitted.table()
        assert re.search(r"^loaded +1 arrays +72 parameters$", table, re.MULTILINE)
        assert re.search(r"^new +3 arrays +46 parameters$", table, re.MULTILINE)
        assert re.search(r"^left out +3 arrays +13 parameters$", table, re.MULTILINE)
        assert "new: down.conv.bias (4,) float32" in table
        assert "left out: down.conv.bias (8,) float32" in table
        assert "left out: out.bias (2,) float16" in table

    def test_nothing_that_fits_is_refused_in_one_line(self):
        with pytest.raises(UserError, match="none of the weights fit this network: .* other.bias") as error:
            fit(weights_of(0), {"other": {"bias": np.ones(3)}})
        assert len(str(error.value).splitlines()) == 1

    def test_long_lists_are_cut(self):
        many = {f"layer_{each}": np.ones(1, np.float32) for each in range(50)}
        _, fitted = fit(weights_of(0), {**weights_of(0), **many})
        assert "left out: and 30 more" in fitted.table()
        assert len(fitted.table().splitlines()) == 3 + 20 + 1


class TestStart:
    def test_is_from_the_average_of_a_run_or_a_file(self, file, tmp_path, capsys):
        source = tmp_path / "source"
        with Checkpoints(source, keep=1, warn=pytest.fail) as checkpoints:
            items = {"params": weights_of(5), "ema": weights_of(0), "optimizer": {"mu": np.ones(2)}}
            checkpoints.save(70, jax.tree.map(jnp.asarray, items), notes={})
        for init_from in (source, file):
            run = tmp_path / f"from_{init_from.name}"
            params, ema = begin(init_from, run)
            chex.assert_trees_all_equal(params, weights_of(0))
            chex.assert_trees_all_equal(ema, weights_of(0))
            noted = read_json(run / "init_from.json")
            assert noted == {"from": str(init_from), "step": 70, "crc32": checksum(weights_of(0))}
            assert f"starting from the weights of {init_from}, step 70:\nloaded" in capsys.readouterr().err

    def test_of_another_diffusion_is_warned_about(self, file, tmp_path, capsys):
        begin(file, tmp_path / "same", dataclasses.replace(CONFIG, diffusion=DiffusionConfig(clip_x0=False)))
        assert "warning" not in capsys.readouterr().err
        diffusion = DiffusionConfig(num_steps=100, prediction="v")
        begin(file, tmp_path / "other", dataclasses.replace(CONFIG, diffusion=diffusion))
        assert (
            "warning: these weights were trained with diffusion.num_steps=1000 (100 here), diffusion.prediction=eps "
            "(v here): " in capsys.readouterr().err
        )

    def test_again_from_others_is_refused(self, file, tmp_path):
        run = tmp_path / "run"
        begin(file, run)
        begin(file, run)
        save_weights(file, weights_of(9), config=CONFIG, step=80)
        with pytest.raises(UserError, match=r"not those that .*run started from \(step 70 then, 80 now\)"):
            begin(file, run)
        (run / "init_from.json").write_text("{")
        begin(file, run)
        assert read_json(run / "init_from.json")["step"] == 80

    def test_from_nothing_is_one_line(self, tmp_path):
        with pytest.raises(UserError, match=r"train.init_from=.*none: there is no such folder, nor a file"):
            begin(tmp_path / "none", tmp_path)
        with pytest.raises(UserError, match="it is not the folder of a run"):
            begin(tmp_path, tmp_path)

    def test_the_checksum_knows_names_shapes_and_every_bit(self):
        whole = checksum(weights_of(0))
        other = weights_of(0)
        other["out"]["bias"][0] = np.nextafter(other["out"]["bias"][0], np.float32(9))
        renamed = {**weights_of(0)}
        renamed["last"] = renamed.pop("out")
        flat = {**weights_of(0)}
        flat["out"] = {"bias": flat["out"]["bias"][None]}
        assert len({whole, checksum(other), checksum(renamed), checksum(flat)}) == 4
        assert checksum(jax.tree.map(jnp.asarray, weights_of(0))) == whole


def test_a_run_starts_from_the_average_of_another(training, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "build_network", training.linear_network)
    first, second = tmp_path / "first", tmp_path / "second"
    with jax.numpy_dtype_promotion("standard"):
        train(CONFIG, first)
        train(dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, init_from=str(first))), second)
    before, after = (load_ema(run, warn=pytest.fail)[1] for run in (first, second))
    np.testing.assert_allclose(after["scale"], before["scale"], atol=2e-3)


def test_two_exports_are_the_same_bytes(tmp_path):
    files = [tmp_path / name for name in ("a", "b", "c")]
    for file in files:
        save_weights(file, weights_of(0), config=CONFIG, step=7)
    assert len({file.read_bytes() for file in files}) == 1
    weights, metadata = load_weights(files[0])
    assert checksum(weights) == checksum(weights_of(0))
    assert metadata["step"] == "7"


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_a_run_goes_on_from_its_own_checkpoint_not_from_the_weights(training, tmp_path, monkeypatch, parallel):
    monkeypatch.setattr(setup, "build_network", training.linear_network)
    weights = {"scale": np.full((8, 8, 1), 0.9, np.float32), "offset": np.array([0.2], np.float32)}
    file, run = tmp_path / "weights.safetensors", tmp_path / "run"
    save_weights(file, weights, config=CONFIG, step=70)
    config = lambda **more: dataclasses.replace(
        CONFIG, train=dataclasses.replace(CONFIG.train, init_from=str(file), parallel=parallel, **more)
    )
    with jax.numpy_dtype_promotion("standard"):
        train(config(), run)
        # The first update has rate 0, the second moves each by at most half the rate (Adam's bound).
        _, ema = load_ema(run, warn=pytest.fail)
        np.testing.assert_allclose(ema["scale"], 0.9, atol=1e-3)
        np.testing.assert_allclose(ema["offset"], 0.2, atol=1e-3)
        file.unlink()  # not needed any more
        train(config(steps=4), run)
    assert load_ema(run, warn=pytest.fail)[0] == 4
