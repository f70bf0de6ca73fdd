"""A program of a run that is lowered for devices that are not there, and what must hold of it."""

import re
import typing

import jax

from ddpm_jax.aot.collectives import find_collectives, in_figures, moved_activations
from ddpm_jax.config import TrainConfig
from ddpm_jax.networks import Network, parameter_shapes


class Program(typing.NamedTuple):
    """A program, lowered for a topology, and what to compare it with."""

    name: str
    """What it computes, in words."""
    lowered: jax.stages.Lowered
    network: Network
    precision: str
    """See `precision_of`."""
    batch_size: int
    """Images of one call, over all devices that it runs on."""
    devices: int
    """Number of these devices."""
    sharded: bool
    """Whether the parameters are sharded over some of them."""
    flops: float | None
    """Floating-point operations of the network for one unit of the work, on one device, counted from its layers."""
    unit: str
    """What one unit is: what XLA counts, whose loops count once."""
    units: int
    """Number of these units until the images of a batch are done."""
    donated: int = 0
    """Number of arrays of the state, all of which are donated."""
    advice: str = ""
    """What to change if it does not fit."""


def precision_of(train: TrainConfig) -> str:
    """Returns the type of the network's computation, and of float32 the precision of products: "float32, highest"."""
    if train.precision == "bfloat16" or train.matmul_precision == "default":
        return train.precision
    return f"{train.precision}, {train.matmul_precision}"


def faults(program: Program, compiled: str | None = None) -> list[str]:
    """Returns what is wrong with a program, a line each.

    Args:
      program: the program.
      compiled: its text after compiling; without it, only what is lowered is looked at.
    """
    found = []
    if program.precision == "bfloat16":
        wide = float32_convolutions(program.lowered.as_text())
        if wide:
            found.append(f"{wide} convolutions are in float32, and the precision is bfloat16")
    if compiled is None:
        return found
    sizes = {leaf.size for leaf in jax.tree.leaves(parameter_shapes(program.network))} if program.sharded else set()
    for each in moved_activations(find_collectives(compiled), batch_size=program.batch_size, parameter_sizes=sizes):
        arrays = ", ".join(str(list(array.shape)) for array in each.results[:3])
        found.append(
            f"{each.kind} moves {in_figures(each.bytes / 1e6)} MB of activations between the devices: {arrays}"
        )
    kept = program.donated - donated_arrays(compiled)
    if kept > 0:
        found.append(f"{kept} of the {program.donated} arrays of the state are not donated, and are there twice")
    return found


def float32_convolutions(lowered: str) -> int:
    """Returns how many convolutions of a lowered program have a float32 operand."""
    operands = re.findall(r"stablehlo\.convolution\(.*?\) *dim_numbers.*? : \((.*?)\) ->", lowered)
    return sum("xf32>" in each for each in operands)


def donated_arrays(compiled: str) -> int:
    """Returns how many arguments of a compiled program share their memory with a result."""
    return len(re.findall(r"\{[\d, ]*\}: \(\d+, \{[\d, ]*\}, (?:may|must)-alias\)", compiled.partition("\n")[0]))
