"""Faults: real training processes, broken in every way we know, and what became of the run.

One run is trained to its end without a fault. Others, of the same configuration, are killed, starved of disk, damaged
and robbed of their images, and started again by the same command. After each fault the process has either been killed,
or has ended with one clear line; every checkpoint that it left holds the bits that the whole run had at that step; and
at the end every array and every byte of `metrics.jsonl` are those of the whole run.

`make faults` goes through all of it many times and prints a table; `test_faults.py` has a short form.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ddpm_jax.run.checkpoints import verify

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 60
# Many saves, each rule of what is kept, a sampler of times with a memory, and a network that compiles in no time.
WORDS = (
    "--model.width 4 --model.num-groups 2 --model.channel-mult 1 --model.num-res-blocks 1 "
    "--model.attention-resolutions "
    "--diffusion.schedule cosine --diffusion.num-steps 20 --train.batch-size 8 --train.warmup-steps 5 "
    "--train.learning-rate 1e-3 --train.ema-decay 0.9 --data.source folder --log.every 7 --log.samples-every 0 "
    f"--log.sample-steps 0 --loss.kind vlb --loss.time-sampling loss_aware --train.steps {STEPS}"
).split()
KEPT = [f"--checkpoints.{rule}" for rule in ("every=10", "keep=2", "keep-every=20", "keep-best=1")]
STREAMED = ["--data.memory-gib", "0", "--data.device-gib", "0"]
ARRAYS = "*/d/*"  # in a checkpoint: where Orbax has arrays as small as these; it keeps more files than it reads
TWICE_TERMINATED = 128 + signal.SIGTERM
# Takes from root what modes do not hold back: of Linux, the capability CAP_DAC_OVERRIDE by PR_CAPBSET_DROP.
_WITHOUT_PRIVILEGE = "import ctypes, os; os.geteuid() or ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)"


class Lost(AssertionError):
    """Something that was saved is gone or other than it was, or a fault was not told of in one line."""


def hold(condition: object, what: str) -> None:
    """Raises `Lost` unless a condition holds."""
    if not condition:
        raise Lost(what)


class Process:
    """A training process."""

    may_find_damage = False
    """Whether it may say that a checkpoint is damaged."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self._process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._lines: list[str] = []
        # Read as it comes: a full pipe would stop the process.
        self._reader = threading.Thread(target=lambda: self._lines.extend(self._process.stdout), daemon=True)
        self._reader.start()

    @property
    def said(self) -> str:
        """All that it has written."""
        return "".join(self._lines)

    def running(self) -> bool:
        return self._process.poll() is None

    def send(self, number: int) -> None:
        """Sends a signal."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Waits until something has happened, or the process has ended."""
        end = time.monotonic() + 300
        while self.running() and not happened():
            hold(time.monotonic() < end, f"the process hangs:\n{self.said}")
            time.sleep(0.002)

    def wait(self, *statuses: int) -> int:
        """Waits for the end, which must be with one of some statuses."""
        try:
            status = self._process.wait(timeout=300)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise Lost(f"the process hangs:\n{self.said}") from None
        self._reader.join(timeout=60)
        hold(status in statuses, f"ended with status {status}, not {' or '.join(map(str, statuses))}:\n{self.said}")
        hold("Traceback" not in self.said, f"a traceback:\n{self.said}")
        if not self.may_find_damage:
            hold("is damaged" not in self.said, f"damage that nobody did:\n{self.said}")
        return status

    def refused(self, *words: str) -> str:
        """Waits for the end with status 2 and one line, which has some words in it; gives the line."""
        self.wait(2)
        line = self.said.strip().splitlines()[-1]
        hold(line.startswith("train.py: error: "), f"no error line at the end:\n{self.said}")
        hold(self.said.count("train.py: error: ") == 1, f"more than one error line:\n{self.said}")
        hold(any(re.search(word, line) for word in words), f"none of {words} in: {line}")
        return line


class Whole(NamedTuple):
    """A run without a fault: what others are held against."""

    saved: dict[int, tuple[object, object]]
    """What `Bench.bits` gives, by step."""
    metrics: bytes
    """All of metrics.jsonl."""


class Bench:
    """The run without a fault, and what others are held against."""

    KEEP_ALL = ("--checkpoints.keep", str(STEPS))

    def __init__(self, folder: Path, seed: int, *, script: str = "train.py"):
        """Makes images and trains the whole run, which keeps all that it saves.

        Args:
          folder: for all that is written.
          seed: of the moments and places of the faults.
          script: what trains.
        """
        self.folder, self.random, self.script = folder, random.Random(seed), script
        self.images = folder / "images"
        self.images.mkdir(parents=True)
        draw = np.random.default_rng(0)
        for each in range(64):
            pixels = (np.add.outer(np.arange(8), np.arange(8)) * draw.integers(4, 18)).astype(np.uint8)
            Image.fromarray(pixels).save(self.images / f"{each:02}.png")
        self.environment = {
            **os.environ,
            "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "OMP_NUM_THREADS": "1",
        }
        whole = folder / "whole"
        self.start(whole, *self.KEEP_ALL).wait(0)
        self.whole = self._read_whole(whole)
        self.checkpoint_bytes = sum(
            file.stat().st_size for file in (whole / "checkpoints" / str(STEPS)).rglob("*") if file.is_file()
        )

    def start(self, run: Path, *words: str, before: str = "") -> Process:
        """Starts the command of a run; the process first does `before`, a line of Python."""
        command = [sys.executable, self.script, "--workdir", str(run), "--data.path", str(self.images)]
        if before:
            then = "import os, sys; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
            command[1:1] = ["-c", f"{before}; {then}"]
        return Process([*command, *WORDS, *KEPT, *words], self.environment)

    def start_hosts(self, run: Path, *words: str) -> list[Process]:
        """Starts the command of a run on two hosts that train it together."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = f"127.0.0.1:{free.getsockname()[1]}"
        # Each has a half of the state, of arrays large enough to be written where they are: what one saves the other
        # does not.
        words = (*words, "--train.fsdp", "2", "--model.width", "16")
        joined = ["--hosts.coordinator", where, "--hosts.count", "2", "--hosts.silence", "10", "--hosts.index"]
        return [self.start(run, *words, *joined, str(index)) for index in range(2)]

    @functools.cached_property
    def whole_of_hosts(self) -> Whole:
        """The run of two hosts without a fault: its sums are in another order than those of one."""
        run = self.folder / "whole_of_hosts"
        for process in self.start_hosts(run, *self.KEEP_ALL):
            process.wait(0)
        return self._read_whole(run)

    def _read_whole(self, run: Path) -> Whole:
        saved = {step: self.bits(run, step) for step in self.steps(run)}
        hold(list(saved) == list(range(10, STEPS + 1, 10)), f"{run} did not save every tenth step")
        return Whole(saved, (run / "metrics.jsonl").read_bytes())

    @staticmethod
    def steps(run: Path) -> list[int]:
        """Says which steps a run has saved."""
        folder = run / "checkpoints"
        return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit()) if folder.exists() else []

    @staticmethod
    def bits(run: Path, step: int) -> tuple[object, object]:
        """Gives shape, type and CRC-32 of every array of a step, and its losses since the last line of metrics."""
        notes = json.loads((run / "checkpoints" / str(step) / "notes" / "metadata").read_text())
        return notes["leaves"], notes["window"]

    def check(self, run: Path, whole: Whole | None = None) -> None:
        """Holds what a run has on disk against the whole run, of one process if not given."""
        whole = whole or self.whole
        for verdict in verify(run) if self.steps(run) else ():
            hold(verdict.damage is None, f"step {verdict.step} is damaged on disk: {verdict.damage}")
        for step in set(self.steps(run)) & set(whole.saved):  # others were saved when it was told to stop
            hold(self.bits(run, step) == whole.saved[step], f"step {step} is not that of the whole run")
        file = run / "metrics.jsonl"
        written = file.read_bytes() if file.exists() else b""
        hold(whole.metrics.startswith(written[: written.rfind(b"\n") + 1]), f"{file} is not a part of the whole run's")

    def finish(self, run: Path) -> None:
        """Trains a run to its end, and holds every array and the metrics against the whole run."""
        self.start(run).wait(0)
        self.check_end(run)

    def check_end(self, run: Path, whole: Whole | None = None) -> None:
        """Holds the end of a run against that of the whole run, of one process if not given."""
        self.check(run, whole)
        hold(self.steps(run)[-1] == STEPS, f"the last checkpoint is step {self.steps(run)[-1]}")
        hold((run / "metrics.jsonl").read_bytes() == (whole or self.whole).metrics, "metrics.jsonl differs")

    def advance(self, run: Path, *, damaged: bool = False) -> Process:
        """Goes on until another checkpoint is there, and stops in order, which saves one more."""
        process, before = self.start(run), set(self.steps(run))
        process.may_find_damage = damaged
        process.wait_until(lambda: bool(set(self.steps(run)) - before))
        process.send(signal.SIGTERM)
        process.wait(TWICE_TERMINATED, 0)
        return process

    def ready(self, run: Path) -> None:
        """Sees to it that a run has two checkpoints and steps left to do."""
        if self.steps(run) and self.steps(run)[-1] > STEPS - 20:
            self.finish(run)
            shutil.rmtree(run)
        while len(self.steps(run)) < 2:
            self.advance(run)


# Each fault leaves a run that can be started again, and says in words what came of it.


def kill(bench: Bench, run: Path, moment: str, *words: str) -> str:
    """Ends a process by SIGKILL at a random moment of a stage."""
    checkpoints = run / "checkpoints"
    draw, before = bench.random.uniform, set(bench.steps(run))
    process = bench.start(run, *words)
    if moment == "starting":
        time.sleep(draw(0, 4))
    elif moment == "training":
        process.wait_until(lambda: bool(set(bench.steps(run)) - before))
        time.sleep(draw(0, 0.3))
    elif moment == "saving":
        begun = int(draw(1, 3))
        process.wait_until(lambda: len(set(bench.steps(run)) - before) >= begun)
        process.wait_until(lambda: any(checkpoints.glob("*orbax-checkpoint-tmp*")))
        time.sleep(draw(0, 0.05))
    else:
        process.wait_until(lambda: any(checkpoints.glob("deleted/*")))
    process.send(signal.SIGKILL)
    process.wait(-signal.SIGKILL, 0)
    return "killed; the next start goes on"


def sigterm_twice(bench: Bench, run: Path) -> str:
    """Sends SIGTERM, and again before the first is done with."""
    process, before = bench.start(run), set(bench.steps(run))
    process.wait_until(lambda: bool(set(bench.steps(run)) - before))
    process.send(signal.SIGTERM)
    time.sleep(bench.random.uniform(0, 0.1))
    process.send(signal.SIGTERM)
    process.wait(TWICE_TERMINATED, 0)
    return "saved in time" if "saved: the same command goes on" in process.said else "ended at once"


def damage(bench: Bench, run: Path, how: str, files: str = "**/*") -> str:
    """Cuts off a random file of the newest checkpoint, or flips a bit of it; not all of them are read again."""
    newest = bench.steps(run)[-1]
    found = (run / "checkpoints" / str(newest)).glob(files)
    candidates = [path for path in found if path.is_file() and path.stat().st_size]
    file = bench.random.choice(sorted(candidates))
    content = bytearray(file.read_bytes())
    at = bench.random.randrange(len(content))
    if how == "truncated":
        del content[at:]
    else:
        content[at] ^= 1 << bench.random.randrange(8)
    file.write_bytes(content)
    process = bench.advance(run, damaged=True)
    if f"checkpoint {newest} is damaged" in process.said:
        hold((run / "checkpoints" / f"damaged_{newest}_0").is_dir(), "the damaged step was not set aside")
        shutil.rmtree(run / "checkpoints" / f"damaged_{newest}_0")
        return "named, set aside, the one before it used"
    return "harmless: every array whole"


def damage_all(bench: Bench, run: Path) -> str:
    """Cuts off every file of every checkpoint."""
    copy = run.with_name(f"{run.name}_copy")
    shutil.copytree(run, copy)
    for file in (run / "checkpoints").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    for _ in range(2):  # the second must not begin anew
        bench.start(run).refused("no checkpoint in .* is whole")
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(copy / "checkpoints", run / "checkpoints")
    shutil.rmtree(copy)
    return "one line; goes on from a copy"


@functools.cache
def can_mount() -> bool:
    """Says whether a file system in memory can be mounted."""
    with tempfile.TemporaryDirectory() as folder:
        mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
        return mount.returncode == 0 and subprocess.run(["umount", folder]).returncode == 0


def full_disk(bench: Bench, run: Path) -> str:
    """Trains on a disk with less room than a checkpoint needs."""
    if not can_mount():
        return too_large(bench, run)
    place = bench.folder / "disk"
    place.mkdir(exist_ok=True)
    megabytes = 4 + sum(file.stat().st_size for file in run.rglob("*") if file.is_file()) // 2**20
    size = f"size={megabytes}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", place], check=True)
    try:
        on_disk = place / "run"
        shutil.copytree(run, on_disk)
        free = shutil.disk_usage(place).free
        ballast = place / "ballast"
        ballast.write_bytes(bytes(max(0, free - bench.random.randrange(bench.checkpoint_bytes))))
        line = bench.start(on_disk).refused("cannot save step", "cannot write")
        bench.check(on_disk)
        ballast.unlink()
        shutil.rmtree(run)
        shutil.copytree(on_disk, run)
    finally:
        subprocess.run(["umount", "-l", place], check=True)
    return "one line: cannot save" if "cannot save" in line else "one line: cannot write"


def too_large(bench: Bench, run: Path) -> str:
    """Trains where no file may be larger than a part of a checkpoint's largest."""
    largest = max(file.stat().st_size for file in (run / "checkpoints").rglob("*") if file.is_file())
    limit = bench.random.randrange(largest // 2, largest)
    limits = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    line = bench.start(run, before=limits).refused("cannot save step", "cannot write")
    return "one line: cannot save" if "cannot save" in line else "one line: cannot write"


@contextlib.contextmanager
def _read_only(folder: Path) -> Iterator[None]:
    modes = {path: path.stat().st_mode for path in [folder, *folder.rglob("*")] if not path.is_symlink()}
    for path, mode in modes.items():
        path.chmod(mode & ~0o222)
    try:
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


def read_only(bench: Bench, run: Path, when: str) -> str:
    """Takes the right to write a run's folder, before or while it trains."""
    if when == "before":
        with _read_only(run):
            bench.start(run, before=_WITHOUT_PRIVILEGE).refused("cannot write to")
        return "one line: cannot write"
    process, before = bench.start(run, before=_WITHOUT_PRIVILEGE), set(bench.steps(run))
    process.wait_until(lambda: bool(set(bench.steps(run)) - before))
    process.send(signal.SIGSTOP)  # what it writes just now must not come and go meanwhile
    with _read_only(run):
        process.send(signal.SIGCONT)
        line = process.refused("cannot save step", "cannot write")
    return "one line: cannot save" if "cannot save" in line else "one line: cannot write"


def second_process(bench: Bench, run: Path) -> str:
    """Starts the same command while it runs."""
    process, before = bench.start(run), set(bench.steps(run))
    process.wait_until(lambda: bool(set(bench.steps(run)) - before))
    process.send(signal.SIGSTOP)  # so that it cannot be done before the other has started
    try:
        bench.start(run).refused("another process is writing")
    finally:
        process.send(signal.SIGCONT)
        process.send(signal.SIGTERM)
    process.wait(TWICE_TERMINATED, 0)
    return "one line; the first goes on"


def kill_host(bench: Bench, run: Path, *, first: bool) -> str:
    """Kills one of two hosts that train a run of their own together, which then goes on to its end."""
    del run  # is of one process
    whole, run = bench.whole_of_hosts, bench.folder / "run_of_hosts"
    shutil.rmtree(run, ignore_errors=True)
    hosts, before = bench.start_hosts(run), set(bench.steps(run))
    killed, other = hosts if first else hosts[::-1]
    killed.wait_until(lambda: bool(set(bench.steps(run)) - before))
    time.sleep(bench.random.uniform(0, 0.3))
    killed.send(signal.SIGKILL)
    if killed.wait(-signal.SIGKILL, 0) == 0:
        other.wait(0)
        return "done before"
    # The library of jax may end the other by an abort before we do.
    if other.wait(2, -signal.SIGABRT) == 2:
        hold(other.said.count("train.py: error: ") == 1, f"not one error line:\n{other.said}")
        ending = "the other ends with one line"
    else:
        ending = "jax ends the other, with its own words"
    bench.check(run, whole)
    for process in bench.start_hosts(run):
        process.wait(0)
    bench.check_end(run, whole)
    return f"{ending}; both go on"


def damage_of_one_host(bench: Bench, run: Path) -> str:
    """Cuts off what one of two hosts has saved of a run of their own; the other's files are whole."""
    del run  # is of one process
    whole, run = bench.whole_of_hosts, bench.folder / "run_of_hosts"
    shutil.rmtree(run, ignore_errors=True)
    hosts = bench.start_hosts(run)
    hosts[0].wait_until(lambda: len(bench.steps(run)) >= 2)
    for host in hosts:
        host.send(signal.SIGTERM)
    for host in hosts:
        host.wait(TWICE_TERMINATED, 0)
    newest, index = bench.steps(run)[-1], bench.random.randrange(2)
    for file in (run / "checkpoints" / str(newest)).glob(f"*/ocdbt.process_{index}/d/*"):
        os.truncate(file, file.stat().st_size // 2)
    hosts = bench.start_hosts(run)
    for host in hosts:
        host.may_find_damage = True
        host.wait(0)
    bench.check_end(run, whole)
    found = f"checkpoint {newest} is damaged" in hosts[0].said
    return "named, set aside, the one before it used by both" if found else "harmless: every array whole"


@contextlib.contextmanager
def _corrupted(bench: Bench) -> Iterator[list[str]]:
    files = sorted(bench.images.glob("*.png"))
    chosen = bench.random.sample(files, max(1, round(0.05 * len(files))))
    contents = {file: file.read_bytes() for file in chosen}
    try:
        for file, content in contents.items():
            file.write_bytes(content[: len(content) // 2])
        yield [str(file) for file in chosen]
    finally:
        for file, content in contents.items():
            file.write_bytes(content)


def corrupt_images(bench: Bench, run: Path, when: str) -> str:
    """Cuts off 5 % of the images, before or while they are streamed."""
    if when == "before":
        with _corrupted(bench) as names:
            bench.start(run).refused(*map(re.escape, names))
        return "one line that names them"
    process, before = bench.start(run, *STREAMED), set(bench.steps(run))
    process.wait_until(lambda: bool(set(bench.steps(run)) - before))
    with _corrupted(bench) as names:
        if process.wait(2, 0) == 0:
            return "read before: the run ends as it should"
        process.refused(*map(re.escape, names))
    return "one line that names one"


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault, and how often it is tried."""

    name: str
    apply: Callable[[Bench, Path], str]
    long: int
    """Times in the long form."""


FAULTS = [
    *(
        Fault(f"kill -9 while {stage}", functools.partial(kill, moment=stage), times)
        for stage, times in (("starting", 5), ("training", 10), ("saving", 10), ("deleting", 5))
    ),
    Fault("SIGTERM twice", sigterm_twice, 5),
    Fault("a checkpoint's file cut off", functools.partial(damage, how="truncated"), 8),
    Fault("a file of arrays cut off", functools.partial(damage, how="truncated", files=ARRAYS), 5),
    Fault("a checkpoint's bit flipped", functools.partial(damage, how="flipped"), 8),
    Fault("a bit of a file of arrays flipped", functools.partial(damage, how="flipped", files=ARRAYS), 5),
    Fault("all checkpoints damaged", damage_all, 2),
    Fault("full disk", full_disk, 5),
    Fault("files limited in size", too_large, 3),
    Fault("read-only folder", functools.partial(read_only, when="before"), 2),
    Fault("folder made read-only while training", functools.partial(read_only, when="while"), 3),
    Fault("a second process on the folder", second_process, 2),
    Fault("host 0 of two killed", functools.partial(kill_host, first=True), 2),
    Fault("host 1 of two killed", functools.partial(kill_host, first=False), 3),
    Fault("what one of two hosts saved cut off", damage_of_one_host, 3),
    Fault("5 % of the images corrupted", functools.partial(corrupt_images, when="before"), 2),
    Fault("5 % of the images corrupted while streamed", functools.partial(corrupt_images, when="while"), 3),
]


def campaign(bench: Bench, faults: list[Fault], *, tell: Callable[[str], object] = print) -> collections.Counter:
    """Lets faults befall one run after the other, in the order given; each ends bit for bit as the whole run.

    Args:
      bench: the whole run.
      faults: which.
      tell: is told what came of each.

    Returns:
      how often each (fault, outcome) was seen.

    Raises:
      Lost: something saved was lost, or a fault was not told of in one line; says of which fault.
    """
    run = bench.folder / "run"
    seen: collections.Counter = collections.Counter()
    for fault in faults:
        try:
            bench.ready(run)
            outcome = fault.apply(bench, run)
            bench.check(run)
        except Lost as lost:
            raise Lost(f"{fault.name}: {lost}") from None
        seen[fault.name, outcome] += 1
        tell(f"{fault.name}: {outcome}")
    bench.finish(run)
    return seen


def table(seen: collections.Counter) -> str:
    """Writes what was seen as a table."""
    lines = ["| fault | times | outcome |", "|---|---|---|"]
    order = [fault.name for fault in FAULTS]
    for (name, outcome), times in sorted(seen.items(), key=lambda entry: (order.index(entry[0][0]), entry[0][1])):
        lines.append(f"| {name} | {times} | {outcome} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Breaks training runs in every way we know; ends with 1 if one is lost."
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places of the faults")
    parser.add_argument("--only", default="", help="faults whose names have this in them")
    parser.add_argument("--times", type=float, default=1.0, help="so many times as often")
    options = parser.parse_args()
    faults = [
        fault
        for fault in FAULTS
        if options.only in fault.name
        for _ in range(max(1, round(options.times * fault.long)))
    ]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder) / "bench", options.seed)
        bench.random.shuffle(faults)
        seen = campaign(bench, faults)
    print(f"\n{len(faults)} faults in {time.monotonic() - began:.0f} s; every run ended bit for bit as the whole one\n")
    print(table(seen))


if __name__ == "__main__":
    main()
