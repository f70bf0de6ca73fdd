"""The Inception network of FID: TensorFlow's graph of 2015-12-05, in float32, from the weights that PyTorch users have.

It differs from the usual Inception v3 where the graph does: the resize of TensorFlow 1, average pools that do not count
their padding, a max pool in the last block, and 1008 classes.
"""

import functools
from collections.abc import Mapping
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddpm_jax.evaluation.features import INCEPTION, Features, Tree, check_sha256, folded
from ddpm_jax.interop.torch_files import read_torch
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import cache_folder

SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of the file of weights."""

_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
# The same file as pytorch-fid and as torch-fidelity name it.
_FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
_SIDE = 299
_SPATIAL_CHANNELS = 7


class Inception(nn.Module):
    """The network, with batch normalizations folded into convolutions, which have PyTorch's names."""

    @nn.compact
    def __call__(self, x: Array) -> dict[str, Array]:
        """Computes features.

        Args:
          x: (B, 299, 299, 3) float32 in [-1, 1).

        Returns:
          "pool", (B, 2048), the mean over the last block; "spatial", (B, 2023), the first 7 channels of `mixed_6/conv`;
          "logits", (B, 1008), without their bias, as Inception Scores use them.
        """
        x = self.conv("Conv2d_1a_3x3", x, 32, (3, 3), stride=2)
        x = self.conv("Conv2d_2a_3x3", x, 32, (3, 3), padding="VALID")
        x = self.conv("Conv2d_2b_3x3", x, 64, (3, 3))
        x = _shrink(x)
        x = self.conv("Conv2d_3b_1x1", x, 80)
        x = self.conv("Conv2d_4a_3x3", x, 192, (3, 3), padding="VALID")
        x = _shrink(x)
        for name, width in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = self.block_35(name, x, width)
        x = self.to_17("Mixed_6a", x)
        spatial = x
        for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x = self.block_17(name, x, width)
            if name == "Mixed_6d":
                spatial = x[..., :_SPATIAL_CHANNELS]  # the block begins with the output of its first branch
        x = self.to_8("Mixed_7a", x)
        x = self.block_8("Mixed_7b", x, _mean_of_neighbors(x))
        x = self.block_8("Mixed_7c", x, nn.max_pool(x, (3, 3), (1, 1), "SAME"))
        pool = x.mean(axis=(1, 2))
        logits = nn.Dense(1008, use_bias=False, name="fc")(pool)
        return {"pool": pool, "spatial": spatial.reshape(len(spatial), -1), "logits": logits}

    def conv(
        self, name: str, x: Array, width: int, kernel: tuple[int, int] = (1, 1), *, stride: int = 1, padding: str = ""
    ) -> Array:
        """Applies a convolution and a ReLU; with a stride it has no padding."""
        padding = padding or ("SAME" if stride == 1 else "VALID")
        return nn.relu(nn.Conv(width, kernel, (stride, stride), padding, name=name)(x))

    def chain(self, name: str, x: Array, *layers: tuple[str, int, tuple[int, int]], stride: int = 1) -> Array:
        """Applies convolutions one after the other, the last with a stride."""
        for i, (part, width, kernel) in enumerate(layers):
            x = self.conv(f"{name}.{part}", x, width, kernel, stride=stride if i == len(layers) - 1 else 1)
        return x

    def block_35(self, name: str, x: Array, pool: int) -> Array:
        """Applies a block at 35x35."""
        chain = functools.partial(self.chain, name)
        return _join(
            chain(x, ("branch1x1", 64, (1, 1))),
            chain(x, ("branch5x5_1", 48, (1, 1)), ("branch5x5_2", 64, (5, 5))),
            chain(x, ("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3)), ("branch3x3dbl_3", 96, (3, 3))),
            chain(_mean_of_neighbors(x), ("branch_pool", pool, (1, 1))),
        )

    def to_17(self, name: str, x: Array) -> Array:
        """Applies the block from 35x35 to 17x17."""
        chain = functools.partial(self.chain, name, stride=2)
        return _join(
            chain(x, ("branch3x3", 384, (3, 3))),
            chain(x, ("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3)), ("branch3x3dbl_3", 96, (3, 3))),
            _shrink(x),
        )

    def block_17(self, name: str, x: Array, width: int) -> Array:
        """Applies a block at 17x17."""
        chain = functools.partial(self.chain, name)
        return _join(
            chain(x, ("branch1x1", 192, (1, 1))),
            chain(x, ("branch7x7_1", width, (1, 1)), ("branch7x7_2", width, (1, 7)), ("branch7x7_3", 192, (7, 1))),
            chain(
                x,
                ("branch7x7dbl_1", width, (1, 1)),
                ("branch7x7dbl_2", width, (7, 1)),
                ("branch7x7dbl_3", width, (1, 7)),
                ("branch7x7dbl_4", width, (7, 1)),
                ("branch7x7dbl_5", 192, (1, 7)),
            ),
            chain(_mean_of_neighbors(x), ("branch_pool", 192, (1, 1))),
        )

    def to_8(self, name: str, x: Array) -> Array:
        """Applies the block from 17x17 to 8x8."""
        chain = functools.partial(self.chain, name, stride=2)
        return _join(
            chain(x, ("branch3x3_1", 192, (1, 1)), ("branch3x3_2", 320, (3, 3))),
            chain(
                x,
                ("branch7x7x3_1", 192, (1, 1)),
                ("branch7x7x3_2", 192, (1, 7)),
                ("branch7x7x3_3", 192, (7, 1)),
                ("branch7x7x3_4", 192, (3, 3)),
            ),
            _shrink(x),
        )

    def block_8(self, name: str, x: Array, pooled: Array) -> Array:
        """Applies a block at 8x8."""
        chain = functools.partial(self.chain, name)
        single = chain(x, ("branch3x3_1", 384, (1, 1)))
        double = chain(x, ("branch3x3dbl_1", 448, (1, 1)), ("branch3x3dbl_2", 384, (3, 3)))
        return _join(
            chain(x, ("branch1x1", 320, (1, 1))),
            chain(single, ("branch3x3_2a", 384, (1, 3))),
            chain(single, ("branch3x3_2b", 384, (3, 1))),
            chain(double, ("branch3x3dbl_3a", 384, (1, 3))),
            chain(double, ("branch3x3dbl_3b", 384, (3, 1))),
            chain(pooled, ("branch_pool", 192, (1, 1))),
        )


def _join(*branches: Array) -> Array:
    return jnp.concatenate(branches, axis=-1)


def _shrink(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), (2, 2))


def _mean_of_neighbors(x: Array) -> Array:
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def resize(images: Array, height: int, width: int) -> Array:
    r"""Resizes images bilinearly as TensorFlow 1 did: no half-pixel offset, no antialiasing.

    Output pixel i lies at input :math:`i \cdot n_{in} / n_{out}`, between its floor and the pixel after that, or the
    last.

    Args:
      images: (B, H, W, C) float32.
      height: of the result.
      width: of the result.

    Returns:
      (B, height, width, C).

    TensorFlow 1.x, `tf.image.resize_bilinear(align_corners=False)`.
    """
    for axis, size in ((2, width), (1, height)):
        old = images.shape[axis]
        at = np.arange(size, dtype=np.float32) * np.float32(old / size)
        low = at.astype(np.int32)
        shape = [1] * images.ndim
        shape[axis] = size
        begin, end = (jnp.take(images, i, axis=axis) for i in (low, np.minimum(low + 1, old - 1)))
        images = begin + (end - begin) * (at - low.astype(np.float32)).reshape(shape)
    return images


def apply(params: Tree, images: Array) -> dict[str, Array]:
    """Computes the features of images, (B, H, W, 3) float32 of the values 0 to 255, see `Inception`."""
    return Inception().apply({"params": params}, (resize(images, _SIDE, _SIDE) - 128) / 128)  # type: ignore[return-value]


def params_from_torch(state: Mapping[str, np.ndarray]) -> Tree:
    """Returns the parameters of `Inception` from arrays under PyTorch's names."""
    convs = [name.removesuffix(".conv.weight") for name in state if name.endswith(".conv.weight")]
    params: Tree = {name: folded(state, f"{name}.conv", f"{name}.bn") for name in convs}
    return params | {"fc": {"kernel": np.asarray(state["fc.weight"].T, np.float32)}}


def load_inception(file: Path | None = None) -> Features:
    """Loads the network of FID.

    Args:
      file: the weights; if not given, they are looked for in the cache folder, and where PyTorch's hub keeps what
        pytorch-fid downloads.

    Returns:
      the features.

    Raises:
      UserError: there is no such file (the message says where to get it and where to put it), or it is another one.
    """
    advice = f"download {_URL} (96 MB) into {cache_folder()}, or name the file with --weights"
    if file is None:
        folders = (cache_folder(), Path("~/.cache/torch/hub/checkpoints").expanduser())
        found = [folder / name for folder in folders for name in _FILES if (folder / name).is_file()]
        if not found:
            raise UserError(
                f"FID needs the weights of its Inception network: {advice}; or use --features efficientnet-lite0"
            )
        file = found[0]
    elif not file.is_file():
        raise UserError(f"--weights: there is no file {file}: {advice}")
    check_sha256(file, SHA256, what="the Inception network of FID", remedy=advice)
    return Features(
        INCEPTION,
        apply,
        params_from_torch(read_torch(file)),
        SHA256,
        "TensorFlow 1 bilinear to 299x299, (x - 128) / 128, float32",
    )
