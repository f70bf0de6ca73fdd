"""The short form of the faults: one of each kind befalls one run, which ends bit for bit as the one without any."""

import importlib.util
import sys
from pathlib import Path

import pytest

from ddpm_jax.run.checkpoints import sealed, unsealed

HERE = Path(__file__).parent
SHORT = [
    "kill -9 while training",
    "SIGTERM twice",
    "a bit of a file of arrays flipped",
    "kill -9 while saving",
    "full disk",
    "folder made read-only while training",
    "a second process on the folder",
    "5 % of the images corrupted",
]


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("faults_program", HERE / "program.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["faults_program"] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench(program, tmp_path_factory):
    return program.Bench(tmp_path_factory.mktemp("faults") / "bench", 0, script=str(HERE / "linear.py"))


def test_a_run_that_everything_befalls_ends_as_the_one_without_faults(program, bench):
    by_name = {fault.name: fault for fault in program.FAULTS}
    seen = program.campaign(bench, [by_name[name] for name in SHORT])
    assert {name for name, _ in seen} == set(SHORT)
    assert sum(seen.values()) == len(SHORT)
    (outcome,) = [outcome for name, outcome in seen if name == "5 % of the images corrupted"]
    assert outcome == "one line that names them"


def test_what_is_other_than_it_was_would_be_seen(program, bench):
    run = bench.folder / "whole"
    bench.check(run)
    notes = run / "checkpoints" / str(program.STEPS) / "notes" / "metadata"
    before = notes.read_text()
    try:
        name = next(iter(bench.whole.saved[program.STEPS][0]))
        crc = bench.whole.saved[program.STEPS][0][name]["crc32"]
        notes.write_text(before.replace(str(crc), str(crc ^ 1)))
        with pytest.raises(program.Lost, match=f"step {program.STEPS} is damaged on disk: their checksum differs"):
            bench.check(run)
        others = unsealed(before)
        others["leaves"][name]["crc32"] ^= 1
        notes.write_text(sealed(others))
        with pytest.raises(program.Lost, match=f"step {program.STEPS} is damaged on disk: the checksum of .* differs"):
            bench.check(run)
        others = unsealed(before)
        others["window"] = [[0.5] * 11]
        notes.write_text(sealed(others))
        with pytest.raises(program.Lost, match=f"step {program.STEPS} is not that of the whole run"):
            bench.check(run)
    finally:
        notes.write_text(before)
    metrics = run / "metrics.jsonl"
    content = metrics.read_bytes()
    try:
        metrics.write_bytes(content.replace(b"0.", b"1.", 1))
        with pytest.raises(program.Lost, match="is not a part of the whole run's"):
            bench.check(run)
    finally:
        metrics.write_bytes(content)


def test_a_traceback_and_a_wrong_status_would_be_seen(program, bench):
    for words, said in ((["-c", "raise SystemExit(3)"], "status 3"), (["-c", "print('Traceback')"], "a traceback")):
        process = program.Process([sys.executable, *words], bench.environment)
        with pytest.raises(program.Lost, match=said):
            process.wait(0)
    process = program.Process([sys.executable, "-c", "print('oh'); raise SystemExit(2)"], bench.environment)
    with pytest.raises(program.Lost, match="no error line"):
        process.refused("oh")
