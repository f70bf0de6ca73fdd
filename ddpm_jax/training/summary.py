"""What a network is made of: its blocks, their shapes, parameters and cost."""

import collections
import math
import typing
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.unet import UNet


class Block(typing.NamedTuple):
    """One row of the table."""

    name: str
    """Such as `down_0_block_1`."""
    shape: tuple[int, ...]
    """(H, W, C) of what comes out of it, or (C,) for a vector."""
    parameters: int
    """How many numbers are trained in it."""
    macs: int
    """Multiply-accumulate operations for one image, of its matrix products and convolutions."""


def blocks_of(unet: UNet, image_shape: Sequence[int]) -> list[Block]:
    """Lists the blocks of a network in the order in which an image passes them.

    Nothing is computed: the network is traced on shapes alone.

    Args:
      unet: the network.
      image_shape: (H, W, C).

    Returns:
      the rows. A convolution counts its padding as work, as papers do.
    """
    image, time = jnp.zeros((1, *image_shape)), jnp.zeros((1,), jnp.int32)
    names: list[str] = []

    def trace() -> tuple[Any, Any]:
        _, variables = unet.init_with_output(
            jax.random.key(0), image, time, capture_intermediates=True, mutable=["params", "intermediates"]
        )
        names.extend(variables["params"])  # in the order of the calls; a pytree that is returned is sorted
        return variables["params"], variables["intermediates"]

    params, outputs = jax.eval_shape(trace)
    rows = []
    for name in names:
        block = params[name]
        macs: collections.Counter[str] = collections.Counter()
        for path, leaf in jax.tree_util.tree_leaves_with_path({name: block}):
            *module, kind = (key.key for key in path)
            if kind == "kernel":
                macs[name] += leaf.size * math.prod(_output(outputs, module).shape[:-1])
        _, *shape = _output(outputs, [name]).shape
        if "_attn_" in name:  # logits and weighted values: every pixel with every pixel
            height, width, channels = shape
            macs[name] += 2 * (height * width) ** 2 * channels
        parameters = sum(leaf.size for leaf in jax.tree.leaves(block))
        rows.append(Block(name, tuple(shape), parameters, macs[name]))
    return rows


def _output(outputs: Any, module: Sequence[str]) -> jax.ShapeDtypeStruct:
    for name in module:
        outputs = outputs[name]
    return outputs["__call__"][0]


def summary(unet: UNet, image_shape: Sequence[int]) -> str:
    """Says `blocks_of` as a table of text, with a last line of sums.

    FLOPs are two a multiply-accumulate operation, forward, for one image; a training step takes about three times
    that an image.
    """
    blocks = blocks_of(unet, image_shape)
    parameters, macs = sum(block.parameters for block in blocks), sum(block.macs for block in blocks)
    cells = [("block", "output", "parameters", "MFLOPs")]
    for block in blocks:
        shape = " x ".join(map(str, block.shape))
        cells.append((block.name, shape, f"{block.parameters:,}", f"{2e-6 * block.macs:,.1f}"))
    cells.append(("all", " x ".join(map(str, image_shape)) + " in", f"{parameters:,}", f"{2e-6 * macs:,.1f}"))
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    lines = [
        f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {count:>{widths[2]}}  {cost:>{widths[3]}}"
        for name, shape, count, cost in cells
    ]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])
