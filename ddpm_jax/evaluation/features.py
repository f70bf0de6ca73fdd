"""Features of images: a network from uint8 pixels to numbers, run in batches over all devices of this process."""

import hashlib
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddpm_jax.system import user_code
from ddpm_jax.system.errors import UserError, printable
from ddpm_jax.system.exits import advice_for_memory
from ddpm_jax.system.mesh import batch_sharding, make_mesh, replicated

Tree = Any
"""A pytree of arrays."""

INCEPTION = "Inception"
"""Name of the features whose Frechet distance is called FID."""
EFFICIENTNET = "EfficientNetLite0"
"""Name of the features of EfficientNet-Lite0."""


class Features(typing.NamedTuple):
    """A function from images to features, of which scores are computed."""

    name: str
    """Scores carry it: FD-NAME. With the name "Inception" they are FID, sFID, IS and KID."""
    apply: Callable[[Tree, Any], Any]
    """(params, images) to a dictionary of float32 arrays of one row per image: "pool", (B, D), and where the network
    has them "spatial", (B, S), and "logits", (B, K). Images are (B, H, W, 3) float32 of the values 0 to 255, of any H
    and W; those of `on_host` (B, H, W, C) uint8 NumPy arrays."""
    params: Tree
    """The weights."""
    identity: str
    """SHA-256 of the file that it depends on: of the weights, or of the user's code."""
    resize: str
    """How images are resized and scaled, for the protocol."""
    on_host: bool = False
    """Whether `apply` is called as it is, with NumPy arrays, instead of compiled."""


class Extractor:
    """Computes features in batches of one size, sharded over all devices of this process."""

    def __init__(self, features: Features, *, batch_size: int, devices: Sequence[jax.Device] | None = None):
        """Places the weights.

        Args:
          features: which.
          batch_size: images per batch over all devices; rounded up to a multiple of their number.
          devices: those of this process if not given.
        """
        devices = jax.local_devices() if devices is None else devices
        self.features = features
        self.batch_size = math.ceil(batch_size / len(devices)) * len(devices)
        self._mesh = make_mesh(devices)
        self._params = features.params if features.on_host else jax.device_put(features.params, replicated(self._mesh))
        self._apply = features.apply if features.on_host else jax.jit(_on_float_rgb(features.apply))

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Computes the features of any number of images.

        Args:
          images: (N, H, W, C) uint8, with 1 (gray) or 3 channels.

        Returns:
          the arrays of `Features.apply`, (N, ...) float32.

        Raises:
          UserError: other channels, or a user's function that fails or returns something else.
        """
        if images.shape[-1] not in (1, 3) and not self.features.on_host:
            raise UserError(
                f"{self.features.name} takes images of 1 or 3 channels, not {images.shape[-1]}: use --features "
                "file.py:function with a network for these"
            )
        batches = [
            self._batch(images[first : first + self.batch_size]) for first in range(0, len(images), self.batch_size)
        ]
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    def _batch(self, images: np.ndarray) -> dict[str, np.ndarray]:
        if self.features.on_host:
            return self._apply(None, images)
        padded = np.concatenate([images, np.repeat(images[-1:], self.batch_size - len(images), axis=0)])
        advice = advice_for_memory(f"a batch of {self.batch_size} images", "use a smaller --batch-size")
        # TF32 and bfloat16 products, the default of accelerators, move FID.
        with advice, jax.default_matmul_precision("highest"):
            computed = self._apply(self._params, jax.device_put(padded, batch_sharding(self._mesh)))
            return {name: np.asarray(array)[: len(images)] for name, array in computed.items()}


def _on_float_rgb(apply: Callable[[Tree, Array], dict[str, Array]]) -> Callable[[Tree, Array], dict[str, Array]]:
    def on_float_rgb(params: Tree, images: Array) -> dict[str, Array]:
        return apply(params, jnp.broadcast_to(images, (*images.shape[:-1], 3)).astype(jnp.float32))

    return on_float_rgb


def users_features(name: str) -> Features:
    """Makes features of a user's function.

    Args:
      name: `file.py:function`; the function maps (B, H, W, C) uint8 NumPy arrays to (B, D) numbers, one row per image.

    Returns:
      the features, named after the function.

    Raises:
      UserError: the file is missing or fails, has no such function, or the function has the name of other features.
    """
    function = user_code.load("--features", name)
    label = name.rpartition(":")[2]
    if label in (INCEPTION, EFFICIENTNET):
        raise UserError(f"--features: {name}: {label} is the name of built-in features: rename the function")

    def apply(params: Tree, images: np.ndarray) -> dict[str, np.ndarray]:
        with user_code.clear_errors(f"--features: {name}", user_code.file_of(name)):
            rows = np.asarray(function(images), np.float32)
        if rows.ndim != 2 or len(rows) != len(images):
            raise UserError(f"--features: {name} must return ({len(images)}, D) numbers for them, not {rows.shape}")
        if not rows.shape[1]:
            raise UserError(f"--features: {name} must return at least one number per image, not {rows.shape}")
        if not np.isfinite(rows).all():
            raise UserError(f"--features: {name} must return finite float32 numbers, not NaN or infinity")
        return {"pool": rows}

    identity = user_code.checksum("--features", name)
    return Features(label, apply, None, identity, f"by {label}", on_host=True)


def check_sha256(file: Path, expected: str, *, what: str, remedy: str) -> None:
    """Checks that a file of weights is the published one.

    Raises:
      UserError: it cannot be read, or is another file.
    """
    try:
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {printable(file)} ({error.strerror}): {remedy}") from None
    if found != expected:
        raise UserError(
            f"{printable(file)} is not {what}: its SHA-256 begins with {found[:8]} instead of {expected[:8]}; {remedy}"
        )


def folded(state: Mapping[str, np.ndarray], conv: str, norm: str) -> dict[str, np.ndarray]:
    """Folds a batch normalization in evaluation mode into the convolution before it.

    Args:
      state: arrays by PyTorch's names; kernels are (out, in, height, width).
      conv: name of the convolution, which has no bias.
      norm: name of the batch normalization; its epsilon is 1e-3.

    Returns:
      the `kernel`, (height, width, in, out), and the `bias`, (out,), float32.
    """
    scale, shift, mean, variance = (
        state[f"{norm}.{part}"].astype(np.float64) for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = scale / np.sqrt(variance + 1e-3)
    kernel = state[f"{conv}.weight"].astype(np.float64).transpose(2, 3, 1, 0) * scale
    return {"kernel": kernel.astype(np.float32), "bias": (shift - mean * scale).astype(np.float32)}
