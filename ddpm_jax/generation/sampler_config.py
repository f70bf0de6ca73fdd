"""How images are drawn from a run: options, and the classes that they name. Parsed before JAX is imported."""

import dataclasses
import math
import typing
from collections.abc import Sequence

from ddpm_jax.config import Config
from ddpm_jax.names import EpsAfterClipping, SamplerName
from ddpm_jax.run.fields import nearest
from ddpm_jax.system.errors import UserError

_MOST_COLUMNS = 32
_MOST_SHOWN = 200  # characters of a list of classes in one line


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How images are drawn from a trained network."""

    sampler: SamplerName = "ancestral"
    """Algorithm 2 of the paper, or a sampler for fewer steps."""
    steps: int | None = None
    """Number of steps; all T of the schedule if not given."""
    spacing: str | None = None
    """Timesteps of a shorter chain: linspace, leading, trailing, quadratic, cubic, log_snr, karras, or sections
    ("10,20,30"); if not given, the run's diffusion.spacing, or what suits the sampler and the number of steps."""
    eta: float | None = None
    """Share of noise in DDIM, 0 (default) to 1."""
    clip: typing.Literal["on", "off", "dynamic"] | None = None
    """Clip the predicted x0 at every step: to [-1, 1] (on), not at all (off), or by dynamic thresholding, for large
    guidance scales; as in training's configuration if not given."""
    dynamic_quantile: float = 0.995
    """Quantile of the magnitudes of an image's pixels that --clip dynamic clips to."""
    eps_after_clipping: EpsAfterClipping | None = None
    """How DDIM gets eps after x0 is clipped: recompute (from the clipped x0; default) or network (the network's own
    eps)."""
    guidance_scale: float = 1.0
    """Scale s of classifier-free guidance, s eps(x, label) - (s - 1) eps(x); 1: none."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only at noise levels sigma = sqrt(1 / alphas_bar - 1) above the first number and up to the second (images
    are in [-1, 1]); at all levels if not given."""
    labels: tuple[str | int, ...] = ()
    """Classes of the images of a class-conditional run, by number or name, repeated in turn; all classes if none are
    given. "help" prints the classes."""

    def alone(self) -> "SamplerConfig":
        """Returns the sampler's part of a script's options, which extend it."""
        return SamplerConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(SamplerConfig)})


def cycle_of(config: Config, sampler_config: SamplerConfig) -> tuple[int, ...]:
    """Returns the class labels that the images of a job take in turn; none if the run is unconditional."""
    return tuple(map(int, sampler_config.labels)) or tuple(range(config.model.num_classes))


def list_classes(names: Sequence[str], numbers: Sequence[int] | None = None) -> str:
    """Returns classes with their names, all of them if none are given.

    >>> list_classes(["cat", "dog"])
    '0 (cat), 1 (dog)'
    """
    numbers = range(len(names)) if numbers is None else numbers
    return ", ".join(
        f"{number} ({names[number]})" if names[number] != f"{number}" else f"{number}" for number in numbers
    )


def default_columns(config: Config, sampler_config: SamplerConfig, number: int) -> int:
    """Returns the columns of a grid of a job's first images: about as many as rows, and each of a single class."""
    square, classes = math.ceil(math.sqrt(number)), len(cycle_of(config, sampler_config))
    return classes * max(1, round(square / classes)) if 1 < classes <= min(number, _MOST_COLUMNS) else square


def number_of_class(given: str | int, names: Sequence[str], num_classes: int, *, option: str) -> int:
    """Returns the number of the class that a user named.

    Args:
      given: its number, or its name. A name that is the number of another class is refused; "name:3" and "number:3" say
        which of the two is meant.
      names: of the classes in order; may be empty.
      num_classes: of the run; 0 if it is unconditional.
      option: for messages.

    Raises:
      UserError: there is no such class; the message names the nearest.

    >>> number_of_class("dog", ["cat", "dog"], 2, option="--label"), number_of_class("0", [], 2, option="--label")
    (1, 0)
    """
    if not num_classes:
        raise UserError(f"{option} needs a class-conditional run; this one is unconditional (model.num_classes=0)")
    kind, _, rest = str(given).partition(":")
    if str(given) in names or kind not in ("name", "number"):
        kind, rest = "", str(given)
    by_name = [number for number, name in enumerate(names) if name == rest and kind != "number"]
    # Only a class has a number: -1 and 10 of 10 classes are refused, as words are.
    by_number = [int(rest)] if kind != "name" and rest.isdecimal() and int(rest) < num_classes else []
    if isinstance(given, int):
        by_name = []
    found = sorted({*by_name, *by_number})
    if len(found) == 1:
        return found[0]
    if found:
        known = " and ".join(f"class {number} ({names[number]})" for number in found)
        raise UserError(f"{option} {given} may be {known}: write name:{rest} or number:{rest}")
    every = f"0 to {num_classes - 1}"
    if [*names] != [str(number) for number in range(len(names))]:
        shown = list_classes(names)
        every = shown if len(shown) <= _MOST_SHOWN else f"{every}; {option} help lists their names"
    hint = nearest(rest, names) if names and not rest.lstrip("-").isdecimal() else ""
    raise UserError(f"{option} {given}: the run's classes are {every}{hint}")


def check_unlabeled(config: Config, what: str, remedy: str) -> None:
    """Checks that the network of a class-conditional run has learned to predict without a label.

    Args:
      config: of the run.
      what: needs this, for the message.
      remedy: what to do instead, for the message.

    Raises:
      UserError: it was trained without label dropout.
    """
    if config.model.num_classes and not config.train.label_dropout:
        raise UserError(
            f"{what} needs a run trained with label dropout; this one never learned to predict without a label "
            f"(train.label_dropout=0): {remedy}, or train a run with --train.label-dropout 0.1"
        )
