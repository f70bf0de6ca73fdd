"""What the steps of a run were computed on, as far as the rounding of numbers depends on it: kept in its checkpoints.

A run is a function of its config and seed to the last bit on one kind and number of devices, and on CPUs with the same
cores and instruction set: elsewhere sums are taken in another order, and numbers agree to rounding.
"""

import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from ddpm_jax.config import Config
from ddpm_jax.run.fields import value_of
from ddpm_jax.system import environment
from ddpm_jax.system.errors import UserError

# What a step computes does not depend on these, but in which order.
_ORDERING = ("train.parallel", "train.fsdp", "train.grad_accum_steps", "train.steps_per_call", "train.remat")


class ComputedOn(typing.NamedTuple):
    """The environment of a run from a step on."""

    step: int
    """Number of steps done before it."""
    environment: dict[str, str]
    """As `describe` returns it."""


def describe(config: Config) -> dict[str, str]:
    """Returns what the rounding of a run's numbers depends on here and now, beside its config and seed."""
    ordering = {name: str(value_of(config, name)) for name in _ORDERING}
    return {**describe_environment(config.train.devices), **ordering}


def describe_environment(devices: int = 0) -> dict[str, str]:
    """Returns what the rounding of numbers depends on here and now, on a number of devices (0: all)."""
    number = devices or jax.device_count()
    return {**environment.rounding(), "devices": f"{number} {jax.devices()[0].device_kind}"}


def resumed(
    past: Iterable[Sequence[Any]], step: int, now: dict[str, str], *, exact: bool = False
) -> tuple[list[ComputedOn], str]:
    """Returns what the steps of a run were computed on, when it is resumed from a step.

    Args:
      past: what the checkpoint remembers; empty at the beginning of a run.
      step: number of steps done.
      now: the environment that computes the following ones.
      exact: refuse to continue unless all steps were computed in it.

    Returns:
      the environments in order; and a line for the user, if the run continues in another one than before, else "".

    Raises:
      UserError: `exact`, and it is another one.

    >>> resumed([(0, {"cores": "2"})], 45, {"cores": "1"})[1]
    'cores 2 before, 1 now: the steps from 45 on agree with those of an uninterrupted run to rounding only'
    """
    so_far = [ComputedOn(*each) for each in past]
    if exact:
        for each, stop in zip(so_far, [*(later.step for later in so_far[1:]), step], strict=False):
            if line := differences(each.environment, now):
                raise UserError(
                    f"--exact: steps {each.step + 1} to {stop} were computed in a different environment ({line}): the "
                    "run would agree with an uninterrupted one to rounding only; resume in the original one, or drop "
                    "--exact"
                )
    changed = differences(so_far[-1].environment, now) if so_far else ""
    if changed or not so_far:
        so_far = [*(each for each in so_far if each.step < step), ComputedOn(step, now)]
    line = f"{changed}: the steps from {step} on agree with those of an uninterrupted run to rounding only"
    return so_far, line if changed else ""


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Returns in what two environments differ, in words; "" if in nothing.

    >>> differences({"cpu_features": "avx2 fma", "jax": "0.10.2"}, {"cpu_features": "avx2 avx512f", "jax": "0.10.2"})
    'cpu_features without fma, with avx512f'
    """
    found = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name, ""), now.get(name, "")
        if old == new:
            continue
        if name in environment.LISTS:
            words = {"without": set(old.split()) - set(new.split()), "with": set(new.split()) - set(old.split())}
            found.append(f"{name} " + ", ".join(f"{word} {_few(those)}" for word, those in words.items() if those))
        else:
            found.append(f"{name} {old or 'not set'} before, {new or 'not set'} now")
    return "; ".join(found)


def _few(words: set[str]) -> str:
    shown = sorted(words)[:4]
    return " ".join(shown) + (f" and {len(words) - len(shown)} more" if len(words) > len(shown) else "")
