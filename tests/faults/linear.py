"""Trains like train.py, but with an elementwise linear network, so that the process starts in half the time."""

import runpy
import sys
from pathlib import Path

import flax.linen as nn

from ddpm_jax.training import loop, setup


class Linear(nn.Module):
    """Predicts eps = scale x_t + offset, with one scale per pixel."""

    num_classes: int = 0

    @nn.compact
    def __call__(self, x, t, labels=None, *, dropout_keys=None):
        scale = self.param("scale", nn.initializers.constant(0.3), x.shape[1:])
        offset = self.param("offset", nn.initializers.constant(-0.1), (1,))
        return scale[None] * x + offset[None, None, None]


if __name__ == "__main__":
    setup.build_unet = lambda config: Linear()
    loop.training_flops = lambda unet, image_shape: 1.0
    sys.argv[0] = "train.py"
    runpy.run_path(str(Path(__file__).parents[2] / "train.py"), run_name="__main__")
