"""Where results go: into the default folder, the folder that `--out` names, or the file that it names."""

import typing
from collections.abc import Sequence
from pathlib import Path

from ddpm_jax.system.errors import UserError

# Endings of files that one may expect to be written; other names with a dot are folders (`runs/v1.5`).
_PICTURES = (".png", ".gif", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".pdf", ".svg")
_FILES = (*_PICTURES, ".mp4", ".npz", ".npy", ".zip", ".json", ".csv", ".md", ".txt", ".html")


class Output(typing.NamedTuple):
    """What `--out` asks for."""

    folder: Path | None
    """Of the results; None: the default one."""
    file: Path | None
    """A copy of what is shown; None: none is asked for."""


def read_out(out: str | None, *, files: Sequence[str] = (), overwrite: bool = False) -> Output:
    """Reads the option `--out`.

    Args:
      out: the folder of the results, or a file.
      files: the endings of files that the command can write.
      overwrite: whether the file may exist.

    Raises:
      UserError: it names a file of a kind that the command does not write, or one that exists.
    """
    if out is None:
        return Output(None, None)
    path = Path(out)
    ending = path.suffix.lower()
    if path.is_dir() or ending not in _FILES:
        return Output(path, None)
    if ending not in files:
        written = f"writes files of {', '.join(files)}, or a folder" if files else "writes a folder"
        raise UserError(f"--out {out}: this command {written}: choose another name")
    if path.exists() and not overwrite:
        raise UserError(f"--out {out}: this file exists: choose another name, or replace it with --overwrite")
    return Output(None, path)
