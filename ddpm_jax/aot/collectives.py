"""What a compiled program sends between devices, read from its text."""

import collections
import math
import re
import typing
from collections.abc import Collection, Iterable

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
# name = SHAPE kind(operands: asynchronous ones are a start and a done, and count at their start.
_INSTRUCTION = re.compile(rf"^[^=\n]*= (.*?) ({_KINDS})(-start)?\(", re.MULTILINE)
_NUMBERS_OF_AN_IMAGE = 16  # that a step may gather: its place, timestep, loss, and the keys of its random numbers
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


class Array(typing.NamedTuple):
    """An array that a collective results in, on one device."""

    shape: tuple[int, ...]
    bytes: int


class Collective(typing.NamedTuple):
    """One collective operation; in a loop it counts once."""

    kind: str
    """As XLA calls it, such as "all-reduce"."""
    results: tuple[Array, ...]

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.results)


def find_collectives(text: str) -> tuple[Collective, ...]:
    """Returns the collectives of a compiled program.

    Args:
      text: of the program, as `jax.stages.Compiled.as_text` returns it.

    >>> find_collectives("%a = f32[8,4]{1,0} all-reduce(%b), to_apply=%add")
    (Collective(kind='all-reduce', results=(Array(shape=(8, 4), bytes=128),)),)
    """
    return tuple(
        Collective(kind, _results(shape, kind, is_start=bool(start)))
        for shape, kind, start in _INSTRUCTION.findall(text)
    )


def _results(text: str, kind: str, *, is_start: bool) -> tuple[Array, ...]:
    arrays = []
    for name, bits, dimensions in _ARRAY.findall(text):
        shape = tuple(map(int, filter(None, dimensions.split(","))))
        size = 1 if name == "pred" else int(bits) / 8
        arrays.append(Array(shape, math.ceil(math.prod(shape) * size)))
    if is_start and kind == "collective-permute":
        return tuple(arrays[1:2])  # operand, result, and two counters
    if is_start and kind != "all-reduce":
        return tuple(arrays[len(arrays) // 2 :])  # operands, then results
    return tuple(arrays)


def describe_collectives(collectives: Iterable[Collective]) -> str:
    """Returns kinds, numbers and sizes in words, such as "2 all-reduce of 143.0 MB"; "none" if there are none."""
    kinds: dict[str, list[int]] = collections.defaultdict(list)
    for each in collectives:
        kinds[each.kind].append(each.bytes)
    words = [f"{len(sizes)} {kind} of {in_figures(sum(sizes) / 1e6)} MB" for kind, sizes in sorted(kinds.items())]
    return ", ".join(words) or "none"


def in_figures(value: float) -> str:
    """Returns a number with one decimal, or three significant figures if it is small.

    >>> in_figures(1234.56), in_figures(0.0123456)
    ('1,234.6', '0.0123')
    """
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


def moved_activations(
    collectives: Iterable[Collective], *, batch_size: int, parameter_sizes: Collection[int]
) -> list[Collective]:
    """Returns the collectives that move images or features between devices, which no step should.

    What a step may move are its parameters, where they are sharded, and a few numbers of each image.

    Args:
      collectives: of the program.
      batch_size: images of the whole batch.
      parameter_sizes: numbers of elements of the parameters that are sharded.
    """
    moving = ("all-gather", "all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast")

    def is_activation(array: Array) -> bool:
        size = math.prod(array.shape)
        return size > _NUMBERS_OF_AN_IMAGE * batch_size and size not in parameter_sizes

    return [each for each in collectives if each.kind in moving and any(map(is_activation, each.results))]
