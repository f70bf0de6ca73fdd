"""Where images come from, by the name in the configuration.

Which images a training step reads is the pipeline's business.

Sources of another size or shape than the configuration's are cropped in the middle to its aspect ratio, then
resized with an antialiasing bicubic filter; the digits, CIFAR-10, arrays and idx files, which are pixels already, are
not.
"""

import dataclasses
import difflib
import pathlib
import types

from ddpm_jax.config import FROM_PYTHON, DataConfig
from ddpm_jax.data import arrays, cifar10, digits, folder, holdout, idx, own, prepared
from ddpm_jax.data.source import Source
from ddpm_jax.system import user_code
from ddpm_jax.system.errors import NoSuchSplit, UserError

_KINDS: dict[str, types.ModuleType] = {
    "digits": digits,
    "folder": folder,
    "npz": arrays,
    "npy": arrays,
    "idx": idx,
    "cifar10": cifar10,
    "tfds": prepared,
}
_NAMED = "tfds"  # the kind that a name follows, as in tfds:cifar10


def load_source(config: DataConfig) -> Source:
    """Opens the images that a configuration names, and checks that all of them can be read.

    Args:
      config: which images; `channels` may be None.

    Returns:
      The source.

    Raises:
      NoSuchSplit: the images have no split of that name.
      UserError: there is no such source or file, it cannot be read, or its images do not fit the configuration.
    """
    if not config.holdout or config.split not in ("train", "test"):
        return _kind(config).load(resolve(config))
    if has_test_split(config):
        raise UserError(
            f"data.holdout={config.holdout:g} is for sets without a test split, and {config.source} has one: use"
            " --data.holdout 0"
        )
    whole = _kind(config).load(resolve(dataclasses.replace(config, split="train")))
    return holdout.part(whole, config.holdout, held_out=config.split == "test", memory_gib=config.memory_gib)


def has_test_split(config: DataConfig) -> bool:
    """Returns whether the images have a test split of their own, `data.holdout` aside."""
    try:
        _kind(config).probe(dataclasses.replace(config, split="test"))
    except NoSuchSplit:
        return False
    except UserError:
        pass  # there is one, and what is wrong with it is said by whoever reads it
    return True


def load_held_out(config: DataConfig) -> Source:
    """Opens the test split of the images that a configuration names, or its `holdout`; without one, those themselves.

    Args:
      config: which images; `channels` may be None.

    Returns:
      The source, whose name says which of the two it is.

    Raises:
      UserError: as `load_source`; also where there is a test split and it cannot be read.
    """
    try:
        return load_source(dataclasses.replace(config, split="test"))
    except NoSuchSplit:
        return load_source(config)


def resolve(config: DataConfig) -> DataConfig:
    """Fills in what a configuration leaves open: from where its path is, and the number of channels of the files.

    Args:
      config: which images.

    Returns:
      The configuration with an absolute `path`, if it has one, and `channels` a number.

    Raises:
      UserError: as `probe_channels`.
    """
    if config.path and "://" not in config.path:
        config = dataclasses.replace(config, path=str(pathlib.Path(config.path).expanduser().absolute()))
    return config if config.channels is not None else dataclasses.replace(config, channels=probe_channels(config))


def probe_channels(config: DataConfig) -> int:
    """Finds how many channels the images have, without decoding them.

    Args:
      config: which images; its `channels` is not looked at.

    Returns:
      1 for gray, 3 for color, 4 for color with alpha.

    Raises:
      UserError: there are no such images, or they do not agree.
    """
    if config.holdout and config.split == "test":
        config = dataclasses.replace(config, split="train")
    return _kind(config).probe(config)


def _kind(config: DataConfig) -> types.ModuleType:
    if config.source == FROM_PYTHON:
        raise UserError(
            "data.source: the images of this run were given to train() in Python, and its folder does not have them"
        )
    if user_code.is_named(config.source):
        return own
    kind, _, name = config.source.partition(":")
    if kind in _KINDS and bool(name) == (kind == _NAMED):
        return _KINDS[kind]
    near = difflib.get_close_matches(kind.lower(), _KINDS, n=1, cutoff=0.5)
    forms = {kind: "tfds:NAME" if kind == _NAMED else kind for kind in _KINDS}
    hint = f"; did you mean {forms[near[0]]}?" if near else ""
    known = f"{', '.join(forms.values())}, or your own my_data.py:function"
    raise UserError(f"data.source: there is no {config.source!r}{hint} ({known})")
