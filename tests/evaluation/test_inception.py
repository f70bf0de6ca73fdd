"""The network of FID against torch-fidelity 0.4.0: inception_values.json has its outputs for random weights."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.evaluation.features import Extractor, Features
from ddpm_jax.evaluation.inception import Inception, apply, load_inception, params_from_torch, resize
from ddpm_jax.system.errors import UserError

VALUES = json.loads(Path(__file__).with_name("inception_values.json").read_text())


def random_weights(random):
    """Weights under PyTorch's names, drawn in the order of the names."""
    inputs = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
    shapes = jax.eval_shape(Inception().init, jax.random.key(0), inputs)["params"]
    state = {}
    for name in sorted(set(shapes) - {"fc"}):
        height, width, old, new = shapes[name]["kernel"].shape
        deviation = np.sqrt(2 / (old * height * width))
        state[f"{name}.conv.weight"] = (random.normal(size=(new, old, height, width)) * deviation).astype(np.float32)
        for part, ends in dict(
            weight=(0.5, 1.5), bias=(-0.3, 0.3), running_mean=(-0.3, 0.3), running_var=(0.5, 1.5)
        ).items():
            state[f"{name}.bn.{part}"] = random.uniform(*ends, new).astype(np.float32)
    state["fc.weight"] = (random.normal(size=(1008, 2048)) / 45).astype(np.float32)
    return state


def test_features_equal_those_of_torch_fidelity():
    random = np.random.default_rng(0)
    params = params_from_torch(random_weights(random))
    images = random.integers(0, 256, (2, 20, 33, 3)).astype(np.uint8)
    found = Extractor(Features("Inception", apply, params, "", ""), batch_size=2, devices=jax.devices()[:2])(images)
    assert {name: array.shape for name, array in found.items()} == {
        "pool": (2, 2048),
        "spatial": (2, 2023),
        "logits": (2, 1008),
    }
    for name, array in found.items():
        expected = np.array(VALUES[name])
        assert abs(array[:, ::32] - expected).max() < 1e-4 * expected.std()


def test_resize_is_that_of_tensorflow_1():
    images = jnp.asarray((np.arange(12).reshape(1, 2, 3, 2) * 37 % 101).astype(np.float32))
    assert np.abs(np.asarray(resize(images, 3, 5)) - np.array(VALUES["resized"])).max() < 1e-4

    big = np.random.default_rng(1).uniform(0, 255, (1, 40, 30, 1)).astype(np.float32)
    small = np.asarray(resize(jnp.asarray(big), 10, 10))
    assert np.array_equal(small, big[:, ::4, ::3])  # samples pixels, as TF1 does: neither averages nor centers them


def test_missing_and_other_weights_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"download https://\S+6726825d.pth \(96 MB\) into \S+/cache, or .*--weights"):
        load_inception()
    with pytest.raises(UserError, match="there is no file"):
        load_inception(tmp_path / "absent.pth")
    other = tmp_path / "cache" / "pt_inception-2015-12-05-6726825d.pth"
    other.parent.mkdir()
    other.write_bytes(b"an error page")
    with pytest.raises(UserError, match=r"SHA-256 begins with \w{8} instead of 6726825d"):
        load_inception()
