"""What a run says of itself, one JSON line at a time.

`metrics.jsonl` holds what follows from the configuration alone: a resumed run writes, byte for byte, what a run never
stopped writes. What depends on the machine and the hour (speed) goes to `timing.jsonl`.
"""

import json
from pathlib import Path
from typing import Any

from ddpm_jax.errors import UserError
from ddpm_jax.files import write_whole


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the whole lines of a file of metrics; a last line cut off by a crash is left out; [] if there is none."""
    lines = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return lines


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Appends one line.

    Raises:
      UserError: the disk is full, or the file may not be written to.
    """
    try:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def rewind(path: Path, step: int) -> None:
    """Drops the lines after `step`, which a run resumed from there will write again."""
    kept = [line for line in read_lines(path) if line["step"] <= step]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    write_whole(path, lambda file: file.write(text.encode()))
