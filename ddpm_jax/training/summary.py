"""What a network is made of: its layers or arrays, their shapes and parameters, and its cost."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from flax import traverse_util

from ddpm_jax.keys import make_key
from ddpm_jax.networks import Network, parameter_shapes
from ddpm_jax.training.speed import forward_flops


def summary(network: Network, image_shape: Sequence[int]) -> str:
    """Returns a table of a network's layers (of a Linen module) or arrays (of another), and a line with its cost.

    Nothing is computed: the network is traced on shapes alone.

    Args:
      network: the network.
      image_shape: (H, W, C).
    """
    arrays = traverse_util.flatten_dict(parameter_shapes(network), sep=".")
    if network.module is None:
        width = max(map(len, arrays), default=0)
        rows = [f"{name:<{width}}  {str(leaf.shape):>20}  {leaf.size:>12,}" for name, leaf in arrays.items()]
        table = "\n".join(["", *rows, ""])
    else:
        tabulate = nn.tabulate(
            network.module, make_key(0), depth=1, console_kwargs={"width": 120, "force_terminal": False}
        )
        table = tabulate(jnp.zeros((1, *image_shape)), jnp.zeros((1,), jnp.int32))
    flops = forward_flops(network, image_shape)
    cost = "unknown" if flops is None else f"{flops / 1e6:,.1f} MFLOPs"
    parameters = sum(leaf.size for leaf in arrays.values())
    return f"{table}\n{parameters:,} parameters; forward pass of one image: {cost}, training step: 3 times that"
