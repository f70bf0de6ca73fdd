"""Flips bits of the files of a finished run, edits its record, and counts what would be believed: nothing may be.

`python tests/faults/flips.py runs/digits` flips every bit of `config.json` and of one line of `metrics.jsonl`, edits
the record in 31 ways (by hand, and with a checksum that is right again), and flips bits all over a stored part and the
packed images of a sampling job. It works on a copy.
"""

import argparse
import collections
import json
import random
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.generation.store import StoredImages
from ddpm_jax.run.record import read_config
from ddpm_jax.run.trained import load_run
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import read_json, write_json
from ddpm_jax.system.progress import be_silent
from ddpm_jax.training.metrics import check_lines, read_lines, rewind

Outcomes = collections.Counter[str]
NAMED = "named in one line"
SET_ASIDE = "named and set aside"
# Values of a record: what a typing error, a damaged disk or an attacker might put there.
EDITS: Mapping[str, list[str]] = {
    "diffusion.num_steps": ["0", "-1", "1000000000000", "1e400", "12.5", "null", "true"],
    "diffusion.beta_start": ["NaN", "-0.1", "0"],
    "diffusion.beta_end": ["NaN", "1.5", "Infinity"],
    "diffusion.schedule": ['"lin"', "7"],
    "diffusion.variance": ['"learned"'],
    "model.width": ["1" + "0" * 30, "1e30", "0", "9" * 5000],
    "model.num_heads": ["0", "-3"],
    "model.channel_mult": ["[]", "[0]", '"1"', "[" * 20_000 + "]" * 20_000],
    "data.height": ["0", "1000000000"],
    "data": ["[]"],
    "train.seed": ["-1", '1, "seed": 2'],
}


def flipped(content: bytes, bits: range | list[int]) -> Iterator[bytes]:
    """Yields the content with one bit flipped, for each of the bits."""
    for bit in bits:
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


def _outcome(read: Callable[[], object], intact: object) -> str:
    try:
        return "the same" if read() == intact else "ANOTHER, BELIEVED"
    except UserError as error:
        return NAMED if "\n" not in str(error) else "SEVERAL LINES"
    except Exception as error:
        return f"A TRACEBACK: {type(error).__name__}"


def flip_record(run: Path) -> Outcomes:
    """Flips every bit of a record."""
    file, intact = run / "config.json", read_config(run / "config.json")
    content, seen = file.read_bytes(), Outcomes()
    for changed in flipped(content, range(8 * len(content))):
        file.write_bytes(changed)
        seen[_outcome(lambda: read_config(file), intact)] += 1
    file.write_bytes(content)
    return seen


def edit_record(run: Path) -> Outcomes:
    """Edits the values of a record, with the checksum that it had and with the right one, and loads the run."""
    file, intact = run / "config.json", read_config(run / "config.json")
    content, seen = file.read_bytes(), Outcomes()
    for name, values in EDITS.items():
        *sections, last = name.split(".")
        for number, value in enumerate(values):
            record: dict[str, Any] = read_json_of(file, content)
            section = record
            for each in sections:
                section = section[each]
            section[last] = mark = f"value {number}"
            write_json(file, record)
            sealed = file.read_text().replace(json.dumps(mark), value)
            file.write_text(sealed)
            seen[f"by hand: {_outcome(lambda: load_run(run).config, intact)}"] += 1
            file.write_bytes(with_right_checksum(sealed.encode()))
            seen[f"with a right checksum: {_outcome(lambda: load_run(run).config, intact)}"] += 1
    file.write_bytes(content)
    return seen


def read_json_of(file: Path, content: bytes) -> dict[str, Any]:
    """Puts a file's content back, and reads it."""
    file.write_bytes(content)
    return read_json(file)


def with_right_checksum(content: bytes) -> bytes:
    """Returns JSON text whose last entry is its checksum, with the checksum of the text as it is now."""
    head, key, tail = content.removesuffix(b"\n").rpartition(b'"checksum": "')
    crc = zlib.crc32(head + key + b"0" * 8 + tail[8:])
    return head + key + f"{crc:08x}".encode() + tail[8:] + b"\n"


def flip_metrics(run: Path) -> Outcomes:
    """Flips every bit of a line of metrics and its end, and rewinds the file as a start does."""
    file, seen = run / "metrics.jsonl", Outcomes()
    content, intact = file.read_bytes(), read_lines(file)
    begin = content.index(b"\n") + 1
    end = content.index(b"\n", begin) + 1
    for changed in flipped(content, range(8 * begin, 8 * end)):
        file.write_bytes(changed)
        said: list[str] = []
        rewind(file, intact[-1]["step"], warn=said.append)
        left = read_lines(file)
        if any(line not in intact for line in left):
            seen["ANOTHER NUMBER, BELIEVED"] += 1
        elif len(said) != 1 or len(intact) - len(left) not in (1, 2) or check_lines(file).damaged:
            seen["NOT NAMED ONCE"] += 1
        else:
            seen[SET_ASIDE] += 1
        for aside in run.glob("metrics.jsonl.damaged*"):
            aside.unlink()
    file.write_bytes(content)
    return seen


def flip_images(folder: Path, *, packed: bool, places: int) -> Outcomes:
    """Flips bits all over the images of a job, a part or the packed file, and packs them."""
    random_, seen = random.Random(0), Outcomes()
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), np.uint8)
    make = lambda: StoredImages(folder, (8, 8, 1), asked={"seed": 0})
    make().save(0, images)
    if packed:
        make().pack()
    (file,) = folder.rglob("*.npz")
    content = file.read_bytes()
    bits = sorted(random_.sample(range(8 * len(content)), places))
    headers_only = content[: content.index(images.tobytes()[:16])]
    for changed in (*flipped(content, bits), headers_only, b""):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(changed)
        stored = make()
        if stored.pack() or stored.done() != [(0, 0)]:
            seen["PACKED"] += 1
        else:
            seen[SET_ASIDE if [*folder.rglob("*.damaged")] else "NOT SET ASIDE"] += 1
        for aside in folder.rglob("*.damaged*"):
            aside.unlink()
    return seen


def is_harmless(seen: Outcomes) -> bool:
    """Returns whether everything was named, and nothing believed."""
    return bool(seen) and all(outcome.endswith((NAMED, SET_ASIDE)) for outcome in seen)


def sweep(run: Path, folder: Path, *, places: int = 500) -> dict[str, Outcomes]:
    """Damages a copy of a run in every way; returns how often each outcome was seen."""
    copy = folder / "run"
    shutil.copytree(run, copy)
    return {
        "every bit of config.json": flip_record(copy),
        "edited values of config.json": edit_record(copy),
        "every bit of a line of metrics.jsonl": flip_metrics(copy),
        f"{places} bits of a part, its header alone, nothing": flip_images(folder / "a", packed=False, places=places),
        f"{places} bits of samples.npz, its header alone, nothing": flip_images(
            folder / "b", packed=True, places=places
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Damages a copy of a run's files; exits with status 1 if it is believed."
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    run = parser.parse_args().run
    be_silent()
    with tempfile.TemporaryDirectory() as folder:
        seen = sweep(run, Path(folder))
    print("| damage | outcome | count |\n|---|---|---|")
    for damage, outcomes in seen.items():
        for outcome, count in sorted(outcomes.items()):
            print(f"| {damage} | {outcome} | {count:,} |")
    if not all(map(is_harmless, seen.values())):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
