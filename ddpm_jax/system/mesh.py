"""The mesh of devices: images are shared out over all of it, and large arrays over its second axis.

A mesh has the axes `data` and `fsdp`. Every device holds its own images; the devices along `fsdp` share one copy of the
parameters, their average and the optimizer's moments, and bring the parameters together where a network needs them.
With `fsdp` 1 every device has a copy of its own.
"""

import re
import typing
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ddpm_jax.system.errors import UserError

Tree = Any
"""A pytree of arrays, or of their shapes."""

AXES = ("data", "fsdp")


class Rule(typing.NamedTuple):
    """How leaves are shared out over `fsdp`."""

    path: str
    """A regular expression, searched for in the leaf's path, such as `.params['conv_in']['kernel']`."""
    axes: tuple[int, ...]
    """Along which axis: the first of these that `fsdp` divides; where there is none, the leaf lies whole everywhere."""


RULES = (
    Rule(r"\['(kernel|embedding)'\]$", (-1, -2)),  # nearly all of a network, with its average and its moments
    Rule(r"", ()),
)
"""The first rule whose expression is found in a leaf's path counts."""


def make_mesh(devices: Sequence[jax.Device] | None = None, *, fsdp: int = 1) -> Mesh:
    """Makes a mesh of shape (devices / fsdp, fsdp).

    Args:
      devices: which; all there are, of all hosts, if not given.
      fsdp: how many devices share one copy of what `RULES` share out.

    Returns:
      the mesh; neighbors along `fsdp` are neighbors in `devices`, so that they are of one host where they can be.

    Raises:
      UserError: `fsdp` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    number = len(devices)
    if number % fsdp:
        divisors = [str(each) for each in range(1, number + 1) if number % each == 0]
        raise UserError(f"train.fsdp={fsdp} does not divide the {number} devices: use {' or '.join(divisors)}")
    # Automatic axes: the default became explicit ones, under which jax 0.12 refuses some gradients.
    return jax.make_mesh((number // fsdp, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def widest_mesh(devices: Sequence[jax.Device] | None = None, *, fsdp: int) -> Mesh:
    """Makes the mesh with `fsdp` as near to what is asked for as the number of devices allows: it may be another one.

    For what is done with a run elsewhere than where it was trained.
    """
    devices = jax.devices() if devices is None else devices
    return make_mesh(devices, fsdp=max(each for each in range(1, fsdp + 1) if len(devices) % each == 0))


def replicated(mesh: Mesh) -> NamedSharding:
    """Says of an array that it lies whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """Says of an array that one of its axes, with one entry an image, is shared out over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXES))


def shardings(mesh: Mesh, tree: Tree, *, rules: Sequence[Rule] = RULES) -> Tree:
    """Says where each leaf of a state, or of parameters, lies.

    Args:
      mesh: from `make_mesh`.
      tree: arrays or their shapes.
      rules: which leaves are shared out.

    Returns:
      the tree with a `NamedSharding` for each leaf.
    """
    size = mesh.shape["fsdp"]

    def lies(path: jax.tree_util.KeyPath, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path)
        rule = next((rule for rule in rules if re.search(rule.path, name)), Rule("", ()))
        axis = next((axis for axis in rule.axes if -leaf.ndim <= axis and leaf.shape[axis] % size == 0), None)
        if size == 1 or axis is None:
            return replicated(mesh)
        spec: list[str | None] = [None] * leaf.ndim
        spec[axis] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(lies, tree)


def gather(mesh: Mesh, params: Tree, *, rules: Sequence[Rule] = RULES) -> Tree:
    """Brings parameters together that are shared out, in a compiled function; their gradient is shared out again.

    Said outright, because the partitioner left to itself would cut some layers by their channels instead, and move
    activations where it should move weights.

    Args:
      mesh: where they lie.
      params: the parameters.
      rules: as in `shardings`.

    Returns:
      the same parameters, whole on every device.
    """
    if mesh.shape["fsdp"] == 1:
        return params
    apart = shardings(mesh, params, rules=rules)

    @jax.custom_vjp
    def together(params: Tree) -> Tree:
        return jax.lax.with_sharding_constraint(params, replicated(mesh))

    together.defvjp(
        lambda params: (together(params), None),
        lambda _, gradient: (jax.lax.with_sharding_constraint(gradient, apart),),
    )
    return together(params)
