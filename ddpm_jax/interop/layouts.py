"""The layouts of weights: PyTorch's and Flax's."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ddpm_jax.system.errors import UserError


def from_torch(weight: np.ndarray) -> np.ndarray:
    """Turns a weight of PyTorch into one of Flax, float32.

    (out, in, kh, kw) becomes (kh, kw, in, out), and (out, in) becomes (in, out). What is a convolution of size 1 there
    is a matrix here; vectors stay as they are.
    """
    while weight.ndim > 2 and weight.shape[-1] == 1:
        weight = weight[..., 0]
    turned = weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T
    return np.ascontiguousarray(turned, np.float32)


class Converter:
    """Takes the arrays of a file one by one, and builds nested parameters of them; no array is left over."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._left = dict(arrays)
        self._params: dict[tuple[str, ...], np.ndarray] = {}

    def take(self, name: str) -> np.ndarray:
        """Returns an array of the file, which must have it, of floating-point numbers."""
        if name not in self._left:
            raise UserError(f"the weights lack the array {name[:80]}")
        array = self._left.pop(name)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"the array {name[:80]} is of {array.dtype}, not of floating-point numbers")
        return array

    def put(self, path: tuple[str, ...], array: np.ndarray) -> None:
        """Adds a parameter."""
        self._params[path] = array

    def move(self, theirs: str, *ours: str) -> None:
        """Moves the weight and the bias of a layer of PyTorch, if the file has both."""
        weight = self.take(f"{theirs}.weight")
        self.put((*ours, "scale" if weight.ndim == 1 else "kernel"), from_torch(weight))
        self.put((*ours, "bias"), from_torch(self.take(f"{theirs}.bias")))

    def finish(self) -> dict[str, Any]:
        """Returns the parameters.

        Raises:
          UserError: an array is left over; the message names it.
        """
        if self._left:
            raise UserError(f"the weights have the array {next(iter(self._left))[:80]}, which the network does not")
        return traverse_util.unflatten_dict(self._params)
