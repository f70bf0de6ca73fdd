"""Fault injection: breaks real training processes in every way we know, and checks that the run recovers exactly.

A reference run trains to completion without faults. Others with the same config are killed, run out of disk space, have
their files damaged or lose their images, and are restarted with the same command. After each fault, the process has
been killed or has exited with one clear error line, and every checkpoint it left holds the same bits as the reference
run at that step. At the end, every array and every byte of `metrics.jsonl` equal those of the reference run.

`make faults` runs every fault several times and prints a table; `test_faults.py` is a short version.
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

from ddpm_jax.run.checkpoints import silence_orbax, verify

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 60
# Many checkpoints, all retention rules, a timestep sampler with memory, and a network that compiles quickly.
WORDS = (
    "--model.width 4 --model.num-groups 2 --model.channel-mult 1 --model.num-res-blocks 1 "
    "--model.attention-resolutions "
    "--diffusion.schedule cosine --diffusion.num-steps 20 --train.batch-size 8 --train.warmup-steps 5 "
    "--train.learning-rate 1e-3 --train.ema-decay 0.9 --data.source folder --log.every 7 --log.samples-every 0 "
    f"--log.sample-steps 0 --loss.kind vlb --loss.time-sampling loss_aware --train.steps {STEPS}"
).split()
KEPT = [f"--checkpoints.{rule}" for rule in ("every=10", "keep=2", "keep-every=20", "keep-best=1")]
STREAMED = ["--data.memory-gib", "0", "--data.device-gib", "0"]
ARRAYS = "*/d/*"  # where in a checkpoint Orbax puts arrays this small; it writes more files than it reads
TWICE_TERMINATED = 128 + signal.SIGTERM
# Makes root obey file modes: drops the Linux capability CAP_DAC_OVERRIDE with PR_CAPBSET_DROP.
_WITHOUT_PRIVILEGE = "import ctypes, os; os.geteuid() or ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)"


class Lost(AssertionError):
    """Saved data is missing or has changed, or a fault was not reported in one line."""


def require(condition: object, message: str) -> None:
    """Raises `Lost` unless a condition is true."""
    if not condition:
        raise Lost(message)


class Process:
    """A training process."""

    may_find_damage = False
    """Whether it may report a damaged checkpoint."""

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
        # Read continuously: a full pipe would block the process.
        self._reader = threading.Thread(target=lambda: self._lines.extend(self._process.stdout), daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        """Everything it has printed so far."""
        return "".join(self._lines)

    def running(self) -> bool:
        return self._process.poll() is None

    def send(self, number: int) -> None:
        """Sends a signal."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Waits until a condition is true or the process has exited."""
        end = time.monotonic() + 300
        while self.running() and not happened():
            require(time.monotonic() < end, f"the process hangs:\n{self.output}")
            time.sleep(0.002)

    def wait(self, *statuses: int) -> int:
        """Waits for the process to exit, which it must do with one of the given statuses."""
        try:
            status = self._process.wait(timeout=300)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise Lost(f"the process hangs:\n{self.output}") from None
        self._reader.join(timeout=60)
        require(status in statuses, f"exited with status {status}, not one of {statuses}:\n{self.output}")
        require("Traceback" not in self.output, f"a traceback:\n{self.output}")
        if not self.may_find_damage:
            require("is damaged" not in self.output, f"reported damage where there is none:\n{self.output}")
        return status

    def refused(self, *patterns: str) -> str:
        """Waits for an exit with status 2 and one error line that matches one of the patterns; returns the line."""
        self.wait(2)
        line = self.output.strip().splitlines()[-1]
        require(line.startswith("train.py: error: "), f"no error line at the end:\n{self.output}")
        require(self.output.count("train.py: error: ") == 1, f"more than one error line:\n{self.output}")
        require(any(re.search(pattern, line) for pattern in patterns), f"none of {patterns} in: {line}")
        return line


class Reference(NamedTuple):
    """The results of a run without faults, which other runs must match."""

    saved: dict[int, tuple[object, object]]
    """`Bench.bits` of each saved step."""
    metrics: bytes
    """The contents of metrics.jsonl."""


class Bench:
    """Trains the reference run, starts others, and checks them against it."""

    KEEP_ALL = ("--checkpoints.keep", str(STEPS))

    def __init__(self, folder: Path, seed: int, *, script: str = "train.py"):
        """Makes images and trains the reference run, which keeps all its checkpoints.

        Args:
          folder: where everything is written.
          seed: determines when and where the faults strike.
          script: the training script.
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
        reference = folder / "reference"
        self.start(reference, *self.KEEP_ALL).wait(0)
        self.reference = self._read_reference(reference)
        self.checkpoint_bytes = sum(
            file.stat().st_size for file in (reference / "checkpoints" / str(STEPS)).rglob("*") if file.is_file()
        )

    def start(self, run: Path, *words: str, before: str = "") -> Process:
        """Starts the training command of a run; the process first executes `before`, a line of Python."""
        command = [sys.executable, self.script, "--workdir", str(run), "--data.path", str(self.images)]
        if before:
            then = "import os, sys; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
            command[1:1] = ["-c", f"{before}; {then}"]
        return Process([*command, *WORDS, *KEPT, *words], self.environment)

    def start_hosts(self, run: Path, *words: str) -> list[Process]:
        """Starts the training command of a run on two hosts that train it together."""
        # Each host holds half of the state, in arrays large enough to be saved by the host that holds them: neither
        # saves what the other does.
        words = (*words, "--train.fsdp", "2", "--model.width", "16")
        return [self.start(run, *words, *joined) for joined in self._joined()]

    @staticmethod
    def _joined() -> list[list[str]]:
        """Returns the options with which each of two hosts joins the other."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = f"127.0.0.1:{free.getsockname()[1]}"
        common = ["--hosts.coordinator", where, "--hosts.count", "2", "--hosts.silence", "10", "--hosts.index"]
        return [[*common, str(index)] for index in range(2)]

    def start_sampling(self, out: Path) -> list[Process]:
        """Starts a sampling job of the reference run on two hosts."""
        command = [sys.executable, "sample.py", str(self.folder / "reference"), "--step", str(STEPS), "--out", str(out)]
        words = ["--num", "2000", "--batch-size", "16", "--format", "npz"]
        return [Process([*command, *words, *joined], self.environment) for joined in self._joined()]

    @functools.cached_property
    def reference_samples(self) -> bytes:
        """The file of a sampling job on two hosts without faults."""
        out = self.folder / "reference_samples"
        for process in self.start_sampling(out):
            process.wait(0)
        return (out / "samples.npz").read_bytes()

    @functools.cached_property
    def reference_of_hosts(self) -> Reference:
        """The reference run on two hosts: it sums in a different order than one process does."""
        run = self.folder / "reference_of_hosts"
        for process in self.start_hosts(run, *self.KEEP_ALL):
            process.wait(0)
        return self._read_reference(run)

    def _read_reference(self, run: Path) -> Reference:
        saved = {step: self.bits(run, step) for step in self.steps(run)}
        require(list(saved) == list(range(10, STEPS + 1, 10)), f"{run} did not save every tenth step")
        return Reference(saved, (run / "metrics.jsonl").read_bytes())

    @staticmethod
    def steps(run: Path) -> list[int]:
        """Lists the steps that a run has saved."""
        folder = run / "checkpoints"
        return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit()) if folder.exists() else []

    @staticmethod
    def bits(run: Path, step: int) -> tuple[object, object]:
        """Reads shape, dtype and CRC-32 of every array of a checkpoint, and its losses since the last metrics line."""
        notes = json.loads((run / "checkpoints" / str(step) / "notes" / "metadata").read_text())
        return notes["leaves"], notes["window"]

    def check(self, run: Path, reference: Reference | None = None) -> None:
        """Checks a run's files against a reference run; by default, that of one process."""
        reference = reference or self.reference
        for verdict in verify(run) if self.steps(run) else ():
            require(verdict.damage is None, f"step {verdict.step} is damaged on disk: {verdict.damage}")
        for step in set(self.steps(run)) & set(reference.saved):  # others were saved when it was stopped
            require(self.bits(run, step) == reference.saved[step], f"step {step} differs from the reference run")
        file = run / "metrics.jsonl"
        written = file.read_bytes() if file.exists() else b""
        require(
            reference.metrics.startswith(written[: written.rfind(b"\n") + 1]), f"{file} is no prefix of the reference"
        )

    def finish(self, run: Path) -> None:
        """Trains a run to completion, and checks every array and the metrics against the reference run."""
        self.start(run).wait(0)
        self.check_end(run)

    def check_end(self, run: Path, reference: Reference | None = None) -> None:
        """Checks a completed run against a reference run; by default, that of one process."""
        self.check(run, reference)
        require(self.steps(run)[-1] == STEPS, f"the last checkpoint is step {self.steps(run)[-1]}")
        require((run / "metrics.jsonl").read_bytes() == (reference or self.reference).metrics, "metrics.jsonl differs")

    def advance(self, run: Path, *, damaged: bool = False) -> Process:
        """Resumes until another checkpoint exists, then stops gracefully, which saves one more."""
        process, before = self.start(run), set(self.steps(run))
        process.may_find_damage = damaged
        process.wait_until(lambda: bool(set(self.steps(run)) - before))
        process.send(signal.SIGTERM)
        process.wait(TWICE_TERMINATED, 0)
        return process

    def ready(self, run: Path) -> None:
        """Makes sure that a run has two checkpoints and steps left to train."""
        if self.steps(run) and self.steps(run)[-1] > STEPS - 20:
            self.finish(run)
            shutil.rmtree(run)
        while len(self.steps(run)) < 2:
            self.advance(run)


# Each fault leaves a run that can be restarted, and returns a description of the outcome.


def kill(bench: Bench, run: Path, moment: str, *words: str) -> str:
    """Kills a process with SIGKILL at a random moment of a stage."""
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
    return "killed; the next start resumes"


def sigterm_twice(bench: Bench, run: Path) -> str:
    """Sends SIGTERM, and again before the first has been handled."""
    process, before = bench.start(run), set(bench.steps(run))
    process.wait_until(lambda: bool(set(bench.steps(run)) - before))
    process.send(signal.SIGTERM)
    time.sleep(bench.random.uniform(0, 0.1))
    process.send(signal.SIGTERM)
    process.wait(TWICE_TERMINATED, 0)
    saved = "stopped by SIGTERM at step" in process.output
    return f"{'saves and exits' if saved else 'exits at once'}; the next start resumes"


def interrupt(bench: Bench, run: Path) -> str:
    """Sends one Ctrl-C at a random moment of the start."""
    process = bench.start(run)
    time.sleep(bench.random.uniform(0, 2))
    process.send(signal.SIGINT)
    status = process.wait(-signal.SIGINT, 128 + signal.SIGINT)
    return f"{'exits at once' if status < 0 else 'exits after its step'}; the next start resumes"


def damage(bench: Bench, run: Path, how: str, files: str = "**/*") -> str:
    """Truncates a random file of the newest checkpoint or flips a bit in it; resuming does not read all files."""
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
    if f"checkpoint {newest} is damaged" in process.output:
        require((run / "checkpoints" / f"damaged_{newest}_0").is_dir(), "the damaged step was not set aside")
        shutil.rmtree(run / "checkpoints" / f"damaged_{newest}_0")
        return "reported and set aside; the previous checkpoint used"
    return "harmless, every array intact"


def damage_all(bench: Bench, run: Path) -> str:
    """Truncates every file of every checkpoint."""
    copy = run.with_name(f"{run.name}_copy")
    shutil.copytree(run, copy)
    for file in (run / "checkpoints").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    for _ in range(2):  # the second must not start from scratch
        bench.start(run).refused("no checkpoint in .* is intact")
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(copy / "checkpoints", run / "checkpoints")
    shutil.rmtree(copy)
    return "one error line; resumes from a copy"


def _flip(bench: Bench, file: Path, begin: int, end: int) -> None:
    content = bytearray(file.read_bytes())
    content[bench.random.randrange(begin, end)] ^= 1 << bench.random.randrange(8)
    file.write_bytes(content)


def damage_record(bench: Bench, run: Path) -> str:
    """Flips a bit in config.json."""
    file = run / "config.json"
    content = file.read_bytes()
    _flip(bench, file, 0, len(content))
    process = bench.start(run)
    process.may_find_damage = True
    process.refused("config.json is damaged, was changed by hand")
    file.write_bytes(content)
    return "one error line; put back, the run resumes"


def damage_metrics(bench: Bench, run: Path) -> str:
    """Flips a bit in a line of metrics.jsonl that was written before the newest checkpoint."""
    file = run / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    kept = sum(json.loads(line)["step"] <= bench.steps(run)[-1] for line in lines)
    number = bench.random.randrange(kept)
    begin = sum(map(len, lines[:number]))
    _flip(bench, file, begin, begin + len(lines[number]) - 1)  # not its end: that would damage the next as well
    process = bench.advance(run, damaged=True)
    require("damaged and dropped" in process.output, f"the damaged line was not named:\n{process.output}")
    (aside,) = run.glob("metrics.jsonl.damaged")
    aside.unlink()
    found = file.read_bytes().splitlines(keepends=True)
    # What it was cannot be known any more: with the line put back, the file is that of the reference run.
    file.write_bytes(b"".join([*found[:number], lines[number], *found[number:]]))
    return "the line named once and dropped; the run continues with the others"


def rename_step(bench: Bench, run: Path) -> str:
    """Renames the newest checkpoint to a later step."""
    newest = bench.steps(run)[-1]
    (run / "checkpoints" / str(newest)).rename(run / "checkpoints" / str(newest + 3))
    process = bench.advance(run, damaged=True)
    reason = f"checkpoint {newest + 3} is damaged (it was saved at step {newest}, and its folder was renamed)"
    require(reason in process.output, f"the renamed step was not named:\n{process.output}")
    shutil.rmtree(run / "checkpoints" / f"damaged_{newest + 3}_0")
    return "named and set aside; the previous checkpoint used"


@functools.cache
def can_mount() -> bool:
    """Returns whether an in-memory file system can be mounted."""
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
    return "one error line: cannot save" if "cannot save" in line else "one error line: cannot write"


def too_large(bench: Bench, run: Path) -> str:
    """Trains with a limit on file size below that of the largest checkpoint file."""
    largest = max(file.stat().st_size for file in (run / "checkpoints").rglob("*") if file.is_file())
    limit = bench.random.randrange(largest // 2, largest)
    limits = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    line = bench.start(run, before=limits).refused("cannot save step", "cannot write")
    return "one error line: cannot save" if "cannot save" in line else "one error line: cannot write"


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
    """Removes write permission from a run's folder, before or during training."""
    if when == "before":
        with _read_only(run):
            bench.start(run, before=_WITHOUT_PRIVILEGE).refused("cannot write to")
        return "one error line: cannot write"
    process, before = bench.start(run, before=_WITHOUT_PRIVILEGE), set(bench.steps(run))
    process.wait_until(lambda: bool(set(bench.steps(run)) - before))
    process.send(signal.SIGSTOP)  # files it is writing must not appear or vanish meanwhile
    with _read_only(run):
        process.send(signal.SIGCONT)
        line = process.refused("cannot save step", "cannot write")
    return "one error line: cannot save" if "cannot save" in line else "one error line: cannot write"


def second_process(bench: Bench, run: Path) -> str:
    """Starts the same command while it is running."""
    process, before = bench.start(run), set(bench.steps(run))
    process.wait_until(lambda: bool(set(bench.steps(run)) - before))
    process.send(signal.SIGSTOP)  # so that it cannot finish before the other has started
    try:
        bench.start(run).refused("another process is writing")
    finally:
        process.send(signal.SIGCONT)
        process.send(signal.SIGTERM)
    process.wait(TWICE_TERMINATED, 0)
    return "refused with one error line; the first process continues"


def kill_host(bench: Bench, run: Path, *, first: bool) -> str:
    """Kills one of two hosts that train their own run together, then resumes the run to completion."""
    del run  # that of one process
    reference, run = bench.reference_of_hosts, bench.folder / "run_of_hosts"
    shutil.rmtree(run, ignore_errors=True)
    hosts, before = bench.start_hosts(run), set(bench.steps(run))
    killed, other = hosts if first else hosts[::-1]
    killed.wait_until(lambda: bool(set(bench.steps(run)) - before))
    time.sleep(bench.random.uniform(0, 0.3))
    killed.send(signal.SIGKILL)
    if killed.wait(-signal.SIGKILL, 0) == 0:
        other.wait(0)
        return "finished before the kill"
    # JAX's own library may abort the other before we exit.
    if other.wait(2, -signal.SIGABRT) == 2:
        require(other.output.count("train.py: error: ") == 1, f"not one error line:\n{other.output}")
        ending = "the other exits with one error line"
    else:
        ending = "JAX aborts the other with its own message"
    bench.check(run, reference)
    for process in bench.start_hosts(run):
        process.wait(0)
    bench.check_end(run, reference)
    return f"{ending}; both resume"


def kill_sampling_host(bench: Bench, run: Path) -> str:
    """Kills one of two hosts that draw the samples of the reference run, then resumes the job to completion."""
    del run
    reference, out = bench.reference_samples, bench.folder / "samples_of_hosts"
    shutil.rmtree(out, ignore_errors=True)
    hosts, kept = bench.start_sampling(out), bench.random.randrange(1, 100)
    killed, other = bench.random.sample(hosts, 2)
    killed.wait_until(lambda: len(list(out.glob("parts/*.npz"))) >= kept)
    killed.send(signal.SIGKILL)
    require(killed.wait(-signal.SIGKILL, 0), "finished before the kill")
    if other.wait(2, -signal.SIGABRT) == 2:
        require(other.output.count("sample.py: error: ") == 1, f"not one error line:\n{other.output}")
        ending = "the other exits with one error line"
    else:
        ending = "JAX aborts the other with its own message"
    parts = {path.name: path.stat().st_mtime_ns for path in out.glob("parts/*.npz")}
    require(len(parts) >= kept, "saved images are gone")
    hosts, found = bench.start_sampling(out), {}
    while any(host.running() for host in hosts) and not (out / "samples.npz").exists():
        with contextlib.suppress(FileNotFoundError):
            found |= {path.name: path.stat().st_mtime_ns for path in out.glob("parts/*.npz")}
    for host in hosts:
        host.wait(0)
    require({name: found.get(name) for name in parts} == parts, "saved images were drawn again")
    require((out / "samples.npz").read_bytes() == reference, "the samples differ from those of the job without faults")
    return f"{ending}; the job resumes and ends with the same bytes"


def damage_of_one_host(bench: Bench, run: Path) -> str:
    """Truncates the files that one of two hosts has saved of their own run; the other's files stay intact."""
    del run  # that of one process
    reference, run = bench.reference_of_hosts, bench.folder / "run_of_hosts"
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
    bench.check_end(run, reference)
    found = f"checkpoint {newest} is damaged" in hosts[0].output
    return "reported and set aside; both use the previous checkpoint" if found else "harmless, every array intact"


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
    """Truncates 5% of the image files, before training or while they are streamed."""
    if when == "before":
        with _corrupted(bench) as names:
            bench.start(run).refused(*map(re.escape, names))
        return "one error line naming them"
    process, before = bench.start(run, *STREAMED), set(bench.steps(run))
    process.wait_until(lambda: bool(set(bench.steps(run)) - before))
    with _corrupted(bench) as names:
        if process.wait(2, 0) == 0:
            return "already read: the run finishes normally"
        process.refused(*map(re.escape, names))
    return "one error line naming one"


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault, and how often it is injected."""

    name: str
    apply: Callable[[Bench, Path], str]
    long: int
    """Number of repetitions in the full campaign."""


FAULTS = [
    *(
        Fault(f"kill -9 while {stage}", functools.partial(kill, moment=stage), times)
        for stage, times in (("starting", 5), ("training", 10), ("saving", 10), ("deleting an old checkpoint", 5))
    ),
    Fault("SIGTERM twice", sigterm_twice, 5),
    Fault("Ctrl-C while starting", interrupt, 10),
    Fault("an array file truncated", functools.partial(damage, how="truncated", files=ARRAYS), 5),
    Fault("a bit flipped in an array file", functools.partial(damage, how="flipped", files=ARRAYS), 5),
    Fault("any checkpoint file truncated", functools.partial(damage, how="truncated"), 8),
    Fault("a bit flipped in any checkpoint file", functools.partial(damage, how="flipped"), 8),
    Fault("all checkpoints damaged", damage_all, 2),
    Fault("a bit flipped in config.json", damage_record, 5),
    Fault("a bit flipped in a line of metrics.jsonl", damage_metrics, 5),
    Fault("a checkpoint renamed to another step", rename_step, 3),
    Fault("full disk", full_disk, 5),
    Fault("file size limit", too_large, 3),
    Fault("read-only folder", functools.partial(read_only, when="before"), 2),
    Fault("folder made read-only during training", functools.partial(read_only, when="while"), 3),
    Fault("a second process in the folder", second_process, 2),
    Fault("host 0 of two killed", functools.partial(kill_host, first=True), 2),
    Fault("host 1 of two killed", functools.partial(kill_host, first=False), 3),
    Fault("one of two hosts killed while sampling", kill_sampling_host, 3),
    Fault("files saved by one of two hosts truncated", damage_of_one_host, 3),
    Fault("5% of the images corrupted", functools.partial(corrupt_images, when="before"), 2),
    Fault("5% of the images corrupted while streaming", functools.partial(corrupt_images, when="while"), 3),
]


def campaign(bench: Bench, faults: list[Fault], *, report: Callable[[str], object] = print) -> collections.Counter:
    """Injects faults in the given order, into one run after another; each run must end bit-identical to the reference.

    Args:
      bench: the reference run.
      faults: the faults.
      report: called with the outcome of each.

    Returns:
      The number of times each (fault, outcome) was seen.

    Raises:
      Lost: saved data was lost, or a fault was not reported in one line; the message names the fault.
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
        report(f"{fault.name}: {outcome}")
    bench.finish(run)
    return seen


def table(seen: collections.Counter) -> str:
    """Formats the counts as a table."""
    lines = ["| fault | count | outcome |", "|---|---|---|"]
    order = [fault.name for fault in FAULTS]
    for (name, outcome), times in sorted(seen.items(), key=lambda entry: (order.index(entry[0][0]), entry[0][1])):
        lines.append(f"| {name} | {times} | {outcome} |")
    return "\n".join(lines)


def main() -> None:
    silence_orbax()
    parser = argparse.ArgumentParser(
        description="Breaks training runs in every way we know; exits with status 1 if data is lost."
    )
    parser.add_argument("--seed", type=int, default=0, help="determines when and where the faults strike")
    parser.add_argument("--only", default="", help="only faults whose names contain this")
    parser.add_argument("--times", type=float, default=1.0, help="multiplies the number of repetitions")
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
    print(
        f"\n{len(faults)} faults in {time.monotonic() - began:.0f} s; every run ended bit-identical to the reference\n"
    )
    print(table(seen))


if __name__ == "__main__":
    main()
