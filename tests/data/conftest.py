"""What the tests of the sources share."""

import types

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.config import DataConfig
from ddpm_jax.data import sources
from ddpm_jax.system.errors import UserError


def config(source, path="", size=(8, 8), channels=None, **others):
    return DataConfig(source=source, path=str(path), height=size[0], width=size[1], channels=channels, **others)


def refused(wanted):
    """Loads what must be refused, and gives the message, which must be one line."""
    with pytest.raises(UserError) as raised:
        sources.load_source(wanted)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def noise(height, width, channels, seed=0):
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **options)
    return path


def everything(source):
    return source.read(np.arange(source.num_examples))


@pytest.fixture(scope="session")
def sets():
    """The helpers of this file: tests are no package, so they cannot import it."""
    return types.SimpleNamespace(config=config, refused=refused, noise=noise, save=save, everything=everything)
