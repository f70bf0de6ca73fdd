"""Power cuts: replays what a run and a sampling job write, cut at every sync, and restarts from what could be left.

A small run is trained, and images are drawn from it, under strace, which sees every write of every thread. From the
recorded calls a file system is modelled that keeps no promise but that of fsync: a write is lasting once its file was
synced after it, a name (created, renamed, removed) once its folder was; renaming is atomic. What is not lasting at a
cut may be lost, torn or reordered. Before and after each sync, some of the possible states are laid out in a folder,
and the same work is done again there: it must end in the same bits, report no damage, and not go back behind a
checkpoint that was already lasting.

As ALICE (Pillai et al. 2014) and CrashMonkey (Mohan et al. 2018) do it, in small. `python tests/faults/power_cut.py`
replays all states and prints a table; `test_power_cut.py` replays a sample of them.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import io
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.config import CheckpointConfig, Config, DataConfig, DiffusionConfig, LogConfig, ModelConfig, TrainConfig
from ddpm_jax.data.source import in_memory
from ddpm_jax.generation.job import SamplingJob, run_job
from ddpm_jax.generation.sampler_config import SamplerConfig
from ddpm_jax.networks import Network
from ddpm_jax.run.checkpoints import silence_orbax
from ddpm_jax.run.trained import load_run
from ddpm_jax.training.loop import train

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 7
CONFIG = Config(
    name="tiny",
    data=DataConfig(height=4, width=4, channels=1),
    diffusion=DiffusionConfig(num_steps=4, schedule="cosine"),
    model=ModelConfig(width=4, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=2),
    train=TrainConfig(steps=STEPS, batch_size=4, warmup_steps=2, ema_decay=0.5),
    checkpoints=CheckpointConfig(every=2, keep=1),
    log=LogConfig(every=3, samples_every=0),
)
SOURCE = in_memory(np.random.default_rng(0).integers(0, 256, (8, 4, 4, 1), np.uint8))
NETWORK = Network(
    lambda key: {"scale": jnp.float32(0.3), "offset": jnp.float32(-0.1)},
    lambda params, x_t, t, labels=None, *, dropout_keys=None: params["scale"] * x_t + params["offset"],
)
IMAGES = 6
_CALLS = (
    "open,openat,creat,write,pwrite64,writev,pwritev,lseek,ftruncate,truncate,rename,renameat,renameat2,"
    "unlink,unlinkat,rmdir,mkdir,mkdirat,link,linkat,symlink,fsync,fdatasync,sync_file_range,copy_file_range,sendfile"
)


class Lost(AssertionError):
    """A state from which the work does not end as it would have without the power cut."""


# What is traced and restarted


def train_tiny(folder: Path) -> None:
    """Trains the run in a folder, or resumes it."""
    train(CONFIG, folder / "run", network=NETWORK, source=SOURCE)


def sample_tiny(folder: Path) -> None:
    """Draws images from the run in a folder, or resumes drawing them."""
    trained = load_run(folder / "run", network=NETWORK)
    job = SamplingJob(trained, 0, SamplerConfig())
    run_job(job, folder / "job", number=IMAGES, batch_size=jax.device_count() * 2, format="npz")


WORK: dict[str, Callable[[Path], None]] = {"train": train_tiny, "sample": sample_tiny}


def results(folder: Path) -> dict[str, object]:
    """Returns what must be the same: checksums of all arrays, the metrics, the images."""
    found: dict[str, object] = {}
    notes = folder / "run" / "checkpoints" / str(STEPS) / "notes" / "metadata"
    if notes.exists():
        found["arrays"] = json.loads(notes.read_text())["leaves"]
        found["metrics"] = (folder / "run" / "metrics.jsonl").read_bytes()
    if (folder / "job" / "samples.npz").exists():
        found["images"] = (folder / "job" / "samples.npz").read_bytes()
    return found


# The file system


class File:
    """A file, or what is to become of it."""


class Folder:
    """A folder."""


Node = File | Folder


@dataclasses.dataclass(frozen=True, eq=False)
class Write:
    """Bytes written to a file; None cuts it off."""

    node: File
    at: int
    data: bytes | None


@dataclasses.dataclass(frozen=True, eq=False)
class Names:
    """Names that are removed and created at once: one of each for a rename."""

    removed: tuple[Folder, str] | None
    created: tuple[Folder, str, Node] | None

    def folders(self) -> set[Folder]:
        return {each[0] for each in (self.removed, self.created) if each is not None}


@dataclasses.dataclass(frozen=True, eq=False)
class Sync:
    """A file or folder that was synced."""

    node: Node


Operation = Write | Names | Sync
Tree = dict[str, "bytes | Tree"]


class Disk:
    """A file system, by the operations on it since it was as `start` is."""

    def __init__(self, start: Path):
        self.root = Folder()
        self.entries: dict[Folder, dict[str, Node]] = {}
        self.contents: dict[File, bytes] = {}
        self._load(self.root, start)
        self.operations: list[Operation] = []
        self._now = {folder: dict(names) for folder, names in self.entries.items()}

    def _load(self, folder: Folder, path: Path) -> None:
        self.entries[folder] = {}
        for each in path.iterdir():
            node: Node = Folder() if each.is_dir() else File()
            self.entries[folder][each.name] = node
            if isinstance(node, Folder):
                self._load(node, each)
            else:
                self.contents[node] = each.read_bytes()

    def find(self, parts: tuple[str, ...]) -> Node | None:
        """Returns what has a path now."""
        node: Node | None = self.root
        for part in parts:
            node = self._now.get(node, {}).get(part) if isinstance(node, Folder) else None
        return node

    def parent(self, parts: tuple[str, ...]) -> tuple[Folder, str]:
        folder = self.find(parts[:-1])
        assert isinstance(folder, Folder), parts
        return folder, parts[-1]

    def add(self, operation: Operation) -> None:
        self.operations.append(operation)
        if isinstance(operation, Names):
            _rename(self._now, operation)

    def lasting(self, cut: int) -> set[int]:
        """Returns which of the operations before a cut no power cut undoes: synced after they were done."""
        kept, synced = set(), set()
        for index in reversed(range(cut)):
            operation = self.operations[index]
            match operation:
                case Sync(node):
                    synced.add(node)
                case Write(node):
                    if node in synced:
                        kept.add(index)
                case Names():
                    if operation.folders() <= synced:
                        kept.add(index)
        return kept

    def tree(self, kept: dict[int, Operation]) -> Tree:
        """Returns the files that some of the operations leave."""
        entries = {folder: dict(names) for folder, names in self.entries.items()}
        contents = {node: bytearray(content) for node, content in self.contents.items()}
        for _, operation in sorted(kept.items()):
            match operation:
                case Names():
                    _rename(entries, operation)
                case Write(node, at, data):
                    content = contents.setdefault(node, bytearray())
                    if data is None:
                        del content[at:]
                    else:
                        content.extend(bytes(max(0, at - len(content))))
                        content[at : at + len(data)] = data

        def of(folder: Folder) -> Tree:
            return {
                name: of(node) if isinstance(node, Folder) else bytes(contents.get(node, b""))
                for name, node in sorted(entries.get(folder, {}).items())
            }

        return of(self.root)

    def cuts(self) -> list[int]:
        """Returns where the power is cut: before and after each sync, and at the end."""
        syncs = [index for index, operation in enumerate(self.operations) if isinstance(operation, Sync)]
        return sorted({*syncs, *(index + 1 for index in syncs), len(self.operations)})

    def states(self, cut: int, chance: random.Random) -> Iterator[tuple[str, Tree]]:
        """Yields what a power cut may leave: the extremes, and at every fifth cut or so one of the other states."""
        done = dict(enumerate(self.operations[:cut]))
        lasting = self.lasting(cut)
        kept = {index: done[index] for index in lasting}
        open_ = {index: each for index, each in done.items() if index not in lasting and not isinstance(each, Sync)}
        names = {index: each for index, each in open_.items() if isinstance(each, Names)}
        writes = {index: each for index, each in open_.items() if isinstance(each, Write)}
        torn = {
            index: dataclasses.replace(each, data=each.data and each.data[: len(each.data) // 2])
            for index, each in writes.items()
        }
        yield "all lost", self.tree(kept)
        if not open_:
            return
        yield "all kept", self.tree(kept | open_)
        yield "names kept, content lost", self.tree(kept | names)
        yield "names kept, content torn", self.tree(kept | names | torn)
        yield "content kept, names lost", self.tree(kept | writes)
        yield "only what was removed", self.tree(kept | {i: each for i, each in names.items() if not each.created})
        yield "only what was created", self.tree(kept | {i: each for i, each in names.items() if each.created})
        if chance.random() < 0.2:
            some = {index: each for index, each in open_.items() if chance.random() < 0.5}
            yield "some of them", self.tree(kept | some)


def _rename(entries: dict[Folder, dict[str, Node]], operation: Names) -> None:
    if operation.removed is not None:
        folder, name = operation.removed
        entries.setdefault(folder, {}).pop(name, None)
    if operation.created is not None:
        folder, name, node = operation.created
        entries.setdefault(folder, {})[name] = node


# Recording


def record(name: str, folder: Path) -> Disk:
    """Runs a piece of work in a folder under strace, and returns the operations on the folder."""
    disk = Disk(folder)
    with tempfile.TemporaryDirectory() as traces:
        command = ["strace", "-ff", "-ttt", "-T", "-y", "-xx", "-s", str(2**26), "-e", f"trace={_CALLS}"]
        script = [sys.executable, __file__, "--work", name, str(folder)]
        subprocess.run([*command, "-o", f"{traces}/trace", *script], check=True, cwd=REPOSITORY, capture_output=True)
        _replay(Path(traces), folder.resolve(), disk)
    assert disk.tree(dict(enumerate(disk.operations))) == read_tree(folder), "the trace does not give the files"
    return disk


_LINE = re.compile(r"([\d.]+) (\w+)\((.*)\)\s+= (-?\d+)[^<]*(?:<([^>]*)>)?[^<]*<([\d.]+)>")
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_PATH = re.compile(r"(\d+|AT_FDCWD)<((?:\\x[0-9a-f]{2}|[^>])*)>")


def _decode(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", "")) if text.startswith("\\x") else text.encode()


def _replay(traces: Path, root: Path, disk: Disk) -> None:
    calls = []
    for trace in traces.iterdir():
        for line in trace.read_text().splitlines():
            if found := _LINE.fullmatch(line.strip()):
                began, call, arguments, result, _, took = found.groups()
                # Not the beginning: a sync covers only what is done before it ends.
                calls.append((float(began) + float(took), call, arguments, int(result)))
    offsets: dict[tuple[str, str], int] = {}
    for _, call, arguments, result in sorted(calls, key=lambda each: each[0]):
        if result >= 0:
            _apply(call, arguments, result, root, disk, offsets)


def _apply(call: str, arguments: str, result: int, root: Path, disk: Disk, offsets: dict) -> None:
    is_write = call in ("write", "writev", "pwrite64", "pwritev")
    texts = [] if is_write else [_decode(text).decode(errors="surrogateescape") for text in _TEXT.findall(arguments)]
    opened = [(number, Path(_decode(path).decode())) for number, path in _PATH.findall(arguments)]

    def parts(path: Path) -> tuple[str, ...] | None:
        full = Path(path)
        return full.relative_to(root).parts if full.is_relative_to(root) else None

    def named(index: int) -> tuple[str, ...] | None:
        path = Path(texts[index])
        if not path.is_absolute():
            path = (opened[min(index, len(opened) - 1)][1] if opened else REPOSITORY) / path
        return parts(path)

    if call in ("open", "openat", "creat"):
        where = named(0)
        if where is None or not where:
            return
        node = disk.find(where)
        offsets[str(result), str(root.joinpath(*where))] = 0
        if node is None and "O_CREAT" in arguments:
            node = File()
            disk.add(Names(None, (*disk.parent(where), node)))
        if isinstance(node, File) and "O_TRUNC" in arguments:
            disk.add(Write(node, 0, None))
        if isinstance(node, File) and "O_APPEND" in arguments:
            offsets[str(result), str(root.joinpath(*where))] = -1
    elif is_write or call in ("lseek", "ftruncate", "fsync", "fdatasync"):
        number, path = opened[0]
        where = parts(path)
        node = None if where is None else disk.find(where)
        if node is None:
            return
        key = number, str(path)
        if call in ("fsync", "fdatasync"):
            disk.add(Sync(node))
            return
        if call == "lseek":
            offsets[key] = result
            return
        assert isinstance(node, File), path
        if call == "ftruncate":
            disk.add(Write(node, int(arguments.rpartition(",")[2], 0), None))
        else:
            data = b"".join(_decode(text) for text in _TEXT.findall(arguments))[:result]
            if call in ("pwrite64", "pwritev"):
                at = int(arguments.rpartition(",")[2], 0)
            else:
                at = offsets.get(key, 0)
                if at < 0:
                    at = _size(disk, node)
                else:
                    offsets[key] = at + result
            disk.add(Write(node, at, data))
    elif call in ("rename", "renameat", "renameat2"):
        old, new = named(0), named(1)
        if old is None and new is None:
            return
        assert old is not None, arguments
        assert new is not None, arguments
        node = disk.find(old)
        assert node is not None, old
        disk.add(Names(disk.parent(old), (*disk.parent(new), node)))
    elif call in ("unlink", "unlinkat", "rmdir"):
        where = named(0)
        if where is not None:
            disk.add(Names(disk.parent(where), None))
    elif call in ("mkdir", "mkdirat"):
        where = named(0)
        if where:
            disk.add(Names(None, (*disk.parent(where), Folder())))
    else:
        paths = [*map(Path, texts), *(path for _, path in opened)]
        if any(parts(path) is not None for path in paths):
            raise NotImplementedError(f"{call}({arguments[:200]})")


def _size(disk: Disk, node: File) -> int:
    size = len(disk.contents.get(node, b""))
    for operation in disk.operations:
        if isinstance(operation, Write) and operation.node is node:
            size = operation.at if operation.data is None else max(size, operation.at + len(operation.data))
    return size


# Restarting


def read_tree(folder: Path) -> Tree:
    """Reads a folder."""
    return {path.name: read_tree(path) if path.is_dir() else path.read_bytes() for path in sorted(folder.iterdir())}


def write_tree(tree: Tree, folder: Path) -> None:
    """Writes a folder."""
    folder.mkdir()
    for name, content in tree.items():
        if isinstance(content, dict):
            write_tree(content, folder / name)
        else:
            (folder / name).write_bytes(content)


def _kind(tree: Tree) -> str:
    """Returns a checksum of a tree; what is in folders and files that were not finished counts as the same."""
    text = hashlib.sha256()
    for name, content in tree.items():
        unfinished = ".orbax-checkpoint-tmp" in name or name == "deleted" or name.endswith(".part")
        text.update(re.sub(r"tmp-\d+", "tmp", name).encode() + b"\0")
        if unfinished:
            continue
        text.update(_kind(content).encode() if isinstance(content, dict) else hashlib.sha256(content).digest())
    return text.hexdigest()


def _steps(tree: Tree) -> list[int]:
    run = tree.get("run", {})
    checkpoints = run.get("checkpoints", {}) if isinstance(run, dict) else {}
    return sorted(int(name) for name in checkpoints if name.isdigit())


@dataclasses.dataclass
class Report:
    """What was replayed."""

    cuts: int = 0
    states: int = 0
    different: int = 0
    restarted: collections.Counter = dataclasses.field(default_factory=collections.Counter)


def check(name: str, disk: Disk, whole: dict[str, object], *, share: float = 1.0, seed: int = 0) -> Report:
    """Cuts a piece of work at every sync, and does it again from each state that could be left.

    Args:
      name: of the work.
      disk: what it did.
      whole: `results` without a power cut.
      share: of the states to restart from.
      seed: of the choice, and of random states.

    Raises:
      Lost: it does not end in the same bits, reports damage, or goes back behind a checkpoint that was lasting.
    """
    chance, report, seen = random.Random(seed), Report(), set()
    todo: list[tuple[int, str, Tree, list[int]]] = []
    for cut in disk.cuts():
        report.cuts += 1
        lasting = disk.tree({index: disk.operations[index] for index in disk.lasting(cut)})
        for words, tree in disk.states(cut, chance):
            report.states += 1
            if (kind := _kind(tree)) not in seen:
                seen.add(kind)
                todo.append((cut, words, tree, _steps(lasting)))
    report.different = len(todo)
    for cut, words, tree, lasting_steps in todo:
        if chance.random() >= share:
            continue
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "disk"
            write_tree(tree, place)
            said = io.StringIO()
            try:
                with contextlib.redirect_stderr(said):
                    WORK[name](place)
            except Exception as error:
                raise Lost(f"{name}, cut {cut}, {words}: {type(error).__name__}: {error}\n{said.getvalue()}") from error
            found = results(place)
        where = f"{name}, cut {cut}, {words}"
        for what, value in whole.items():
            if found.get(what) != value:
                raise Lost(f"{where}: {what} differ\n{said.getvalue()}")
        if "damaged" in said.getvalue():
            raise Lost(f"{where}: reports damage\n{said.getvalue()}")
        resumed = re.search(r"resuming from step (\d+)|has done its (\d+) steps", said.getvalue())
        step = int(resumed[1] or resumed[2]) if resumed else 0
        if name == "train" and step < max(lasting_steps, default=0):
            raise Lost(f"{where}: resumed from step {step}, but {max(lasting_steps)} was saved for good")
        report.restarted[words] += 1
    return report


def run(folder: Path, *, share: float = 1.0, seed: int = 0) -> dict[str, Report]:
    """Records and checks training and then sampling in a folder; raises as `check`."""
    reports = {}
    disk = record("train", folder)
    reports["train"] = check("train", disk, results(folder), share=share, seed=seed)
    disk = record("sample", folder)
    reports["sample"] = check("sample", disk, results(folder), share=share, seed=seed)
    return reports


def main() -> None:
    parser = argparse.ArgumentParser(description="Cuts the power at every sync of a small run.")
    parser.add_argument("--work", nargs=2, metavar=("NAME", "FOLDER"), help="only do this, in the folder")
    parser.add_argument("--share", type=float, default=1.0, help="share of the states to restart from")
    parser.add_argument("--seed", type=int, default=0, help="of the states that are chosen by chance")
    options = parser.parse_args()
    silence_orbax()
    if options.work:
        WORK[options.work[0]](Path(options.work[1]))
        return
    if shutil.which("strace") is None:
        raise SystemExit("strace is needed: apt-get install strace")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        reports = run(Path(folder), share=options.share, seed=options.seed)
    print("| work | cuts | states | different | restarted, same bits |\n|---|---|---|---|---|")
    for name, report in reports.items():
        print(f"| {name} | {report.cuts} | {report.states} | {report.different} | {report.restarted.total()} |")
    restarted = sum((report.restarted for report in reports.values()), collections.Counter())
    print(f"\n{time.monotonic() - began:.0f} s; {', '.join(f'{words}: {n}' for words, n in restarted.items())}")


if __name__ == "__main__":
    main()
