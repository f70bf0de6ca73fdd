"""What the readers of other programs' files return."""

import typing

from ddpm_jax.config import Config
from ddpm_jax.networks import Params


class Pretrained(typing.NamedTuple):
    """A trained network from another program's files."""

    config: Config
    """The configuration that its files describe."""
    params: Params
    """Its weights: NumPy arrays, float32."""
    step: int = 0
    """Number of training steps; 0 if the files do not record it."""
    class_names: tuple[str, ...] = ()
    """Names of its classes in order; empty if it is unconditional, or they are not known."""
    averaged: bool | None = None
    """Whether the weights are averages over training (EMA); None if that is not recorded."""
