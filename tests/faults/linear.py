"""Trains like train.py, but with an elementwise linear network, so that the process starts in half the time."""

import runpy
import sys
from pathlib import Path

import flax.linen as nn

from ddpm_jax.networks import from_linen
from ddpm_jax.run.build import image_shape
from ddpm_jax.training import setup


class Linear(nn.Module):
    """Predicts eps = scale x_t + offset, with one scale per pixel."""

    num_classes: int = 0

    @nn.compact
    def __call__(self, x, t, labels=None, *, dropout_keys=None):
        scale = self.param("scale", nn.initializers.constant(0.3), x.shape[1:])
        offset = self.param("offset", nn.initializers.constant(-0.1), (1,))
        return scale[None] * x + offset[None, None, None]


if __name__ == "__main__":
    setup.build_network = lambda config: from_linen(Linear(), image_shape(config))
    sys.argv[0] = "train.py"
    runpy.run_path(str(Path(__file__).parents[2] / "train.py"), run_name="__main__")
