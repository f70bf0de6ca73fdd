"""The mesh of devices: batches are sharded over all of it, large arrays over its second axis.

A mesh has the axes `data` and `fsdp`. Every device holds its own images; the devices along `fsdp` share one copy of the
parameters, their EMA and the optimizer's moments, and gather the parameters where a network needs them. With `fsdp` 1
every device has a copy of its own.
"""

import re
import typing
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ddpm_jax.system.errors import UserError

Tree = Any
"""A pytree of arrays, or of their shapes."""

AXES = ("data", "fsdp")


class Rule(typing.NamedTuple):
    """How leaves are sharded over `fsdp`."""

    path: str
    """A regular expression, searched for in the leaf's path, such as `.params['conv_in']['kernel']`."""
    axes: tuple[int, ...]
    """The first of these axes that `fsdp` divides is sharded; if there is none, the leaf is replicated."""


RULES = (
    Rule(r"\['(kernel|embedding)'\]$", (-1, -2)),  # nearly all of a network, with its EMA and moments
    Rule(r"", ()),
)
"""The first rule that matches a leaf's path applies."""


def make_mesh(devices: Sequence[jax.Device] | None = None, *, fsdp: int = 1) -> Mesh:
    """Makes a mesh of shape (devices / fsdp, fsdp).

    Args:
      devices: all devices of all hosts if None.
      fsdp: number of devices that share one copy of the sharded arrays.

    Returns:
      the mesh; neighbors along `fsdp` are neighbors in `devices`, so they are on one host where possible.

    Raises:
      UserError: `fsdp` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    number = len(devices)
    if number % fsdp:
        divisors = [str(each) for each in range(1, number + 1) if number % each == 0]
        raise UserError(f"train.fsdp={fsdp} does not divide the {number} devices: use {' or '.join(divisors)}")
    # Automatic axes: with explicit ones, now the default, jax 0.12 refuses some gradients.
    return jax.make_mesh((number // fsdp, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def widest_mesh(devices: Sequence[jax.Device] | None = None, *, fsdp: int) -> Mesh:
    """Makes the mesh with the largest `fsdp`, up to the one requested, that divides the number of devices.

    For using a run on other devices than those it was trained on.
    """
    devices = jax.devices() if devices is None else devices
    return make_mesh(devices, fsdp=max(each for each in range(1, fsdp + 1) if len(devices) % each == 0))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that replicates an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """Returns the sharding that splits one axis, with an entry per image, over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXES))


def shardings(mesh: Mesh, tree: Tree, *, rules: Sequence[Rule] = RULES) -> Tree:
    """Returns the sharding of each leaf of a state or of parameters.

    Args:
      mesh: from `make_mesh`.
      tree: arrays or their shapes.
      rules: which leaves are sharded, and how.

    Returns:
      the tree with a `NamedSharding` for each leaf.
    """
    size = mesh.shape["fsdp"]

    def sharding_of(path: jax.tree_util.KeyPath, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path)
        rule = next((rule for rule in rules if re.search(rule.path, name)), Rule("", ()))
        axis = next((axis for axis in rule.axes if -leaf.ndim <= axis and leaf.shape[axis] % size == 0), None)
        if size == 1 or axis is None:
            return replicated(mesh)
        spec: list[str | None] = [None] * leaf.ndim
        spec[axis] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


def gather(mesh: Mesh, params: Tree, *, rules: Sequence[Rule] = RULES) -> Tree:
    """Gathers sharded parameters within a compiled function; their gradient is sharded again.

    Explicitly, because the partitioner alone would split some layers by channels, and move activations instead of
    weights.

    Args:
      mesh: the mesh they are sharded over.
      params: the parameters.
      rules: as in `shardings`.

    Returns:
      the parameters, replicated.
    """
    if mesh.shape["fsdp"] == 1:
        return params
    sharded = shardings(mesh, params, rules=rules)

    @jax.custom_vjp
    def together(params: Tree) -> Tree:
        return jax.lax.with_sharding_constraint(params, replicated(mesh))

    together.defvjp(
        lambda params: (together(params), None),
        lambda _, gradient: (jax.lax.with_sharding_constraint(gradient, sharded),),
    )
    return together(params)


def to_this_host(tree: Tree) -> Tree:
    """Returns arrays over all hosts as whole arrays of this one; every host must call it."""

    def whole(leaf: jax.Array) -> Any:
        if leaf.is_fully_addressable:
            return leaf
        if leaf.is_fully_replicated:
            return leaf.addressable_data(0)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, tree)
