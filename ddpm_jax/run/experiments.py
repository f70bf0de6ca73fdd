"""Experiments: Python files that set `config`, such as those in `configs/`."""

import dataclasses
import difflib
import runpy
import traceback
from collections.abc import Iterator
from pathlib import Path

from ddpm_jax.config import Config
from ddpm_jax.run.fields import nearest, sections, with_kinds
from ddpm_jax.system.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]
# The wheel has the experiments inside the package; the repository has them beside it.
CONFIGS = (_PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent) / "configs"


def _candidates(path: str) -> Iterator[Path]:
    for base in (Path(), Path("configs"), CONFIGS, CONFIGS.parent):
        yield base / path
        yield base / f"{path}.py"


def load_config(path: str | Path) -> Config:
    """Loads an experiment: runs a Python file and returns its `config`.

    Args:
      path: the file, or the name of one in `configs/`: `configs/cifar10.py` and `cifar10` are the same.

    Returns:
      its `Config`, with every field of its declared type; `validate` checks the values.

    Raises:
      UserError: there is no such file, it fails, or it does not set `config`.
    """
    found = next((candidate for candidate in _candidates(str(path)) if candidate.is_file()), None)
    if found is None and Path(path).is_dir():
        raise UserError(
            f"{path} is not the folder of a run: it has no config.json; give such a folder, or a config file"
        )
    if found is None:
        folders = (Path("configs"), CONFIGS)
        known = dict.fromkeys(file.stem for folder in folders for file in sorted(folder.glob("*.py")))
        near = difflib.get_close_matches(Path(path).stem, known, n=1, cutoff=0.5)
        hint = f"did you mean configs/{near[0]}.py?" if near else f"choose one of {', '.join(known)}, or give a file"
        raise UserError(f"there is no config file {path}: {hint}")
    try:
        names = runpy.run_path(str(found))
    except Exception as error:
        raise UserError(_fault(found, error)) from error
    config = names.get("config")
    if not isinstance(config, Config):
        raise UserError(f"{found} does not set a configuration: it must contain `config = Config(...)`")
    try:
        return with_kinds(config)
    except UserError as error:
        raise UserError(f"{found}: {error}") from None


def _fault(path: Path, error: Exception) -> str:
    """Describes an error in a config file, with its line."""
    if isinstance(error, SyntaxError):
        return f"{path}, line {error.lineno}: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    what = " ".join(str(error).split())
    # Python names the constructor and the unknown keyword, but not the nearest field.
    if isinstance(error, TypeError) and "unexpected keyword argument '" in what:
        wrong = what.split("'")[1]
        section = next((kind for kind in (Config, *sections().values()) if what.startswith(kind.__name__ + ".")), None)
        if section is not None:
            what = f"{section.__name__} has no {wrong}" + nearest(wrong, [f.name for f in dataclasses.fields(section)])
            return f"{path}, line {lines[-1]}: {what}"
    where = f", line {lines[-1]}" if lines else ""
    return f"{path}{where}: {type(error).__name__}: {what}"
