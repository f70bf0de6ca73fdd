"""A gradient in parts: what a batch is too large for at once is done one part after the other, with the same result."""

import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Params = Any
Rows = Any
"""A pytree whose leaves have one entry an image on their first axis."""

Gradient = Callable[[Params, Rows], tuple[tuple[Array, Array], Params]]
"""(params, rows) to ((mean loss, losses of the images), gradient of the mean loss)."""


def in_parts(gradient: Gradient, params: Params, rows: Rows, *, parts: int) -> Any:
    r"""Computes a mean loss and its gradient part by part.

    .. math:: L = \frac{1}{k} \sum_{j<k} L_j, \quad \text{part } j = \text{rows } j, j + k, j + 2k, \dots

    Part j takes every k-th row, not B/k neighbors: so each device has its share of every part among its own rows. The
    parts are a loop, so that they are in memory one at a time.

    Args:
      gradient: of one part.
      params: the parameters.
      rows: the whole batch's, or one device's share of them; B of them.
      parts: k, which divides B (and, over a mesh, B / devices).

    Returns:
      ((mean loss, (B,) losses in the order of the rows), gradient), as `gradient` of the whole batch.
    """
    if parts == 1:
        return gradient(params, rows)

    def cut(leaf: Array) -> Array:
        return jnp.swapaxes(leaf.reshape(-1, parts, *leaf.shape[1:]), 0, 1)

    def add(sums: Any, rows: Rows) -> tuple[Any, Array]:
        (loss, losses), slope = gradient(params, rows)
        return jax.tree.map(lambda total, new: total + new / parts, sums, (loss, slope)), losses

    nothing = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    (loss, slope), losses = jax.lax.scan(add, nothing, jax.tree.map(cut, rows))
    return (loss, typing.cast(Array, jnp.swapaxes(losses, 0, 1).reshape(-1))), slope
