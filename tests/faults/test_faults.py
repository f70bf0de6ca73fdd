"""A short fault campaign: one run suffers one fault of each kind and ends bit-identical to the run without faults."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest

from ddpm_jax.system.files import dump_checked, load_checked

HERE = Path(__file__).parent
SHORT = [
    "kill -9 while training",
    "SIGTERM twice",
    "a bit flipped in an array file",
    "a bit flipped in config.json",
    "a bit flipped in a line of metrics.jsonl",
    "kill -9 while saving",
    "full disk",
    "folder made read-only during training",
    "a second process in the folder",
    "5% of the images corrupted",
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


def test_a_run_with_every_fault_ends_as_the_run_without_faults(program, bench):
    by_name = {fault.name: fault for fault in program.FAULTS}
    seen = program.campaign(bench, [by_name[name] for name in SHORT])
    assert {name for name, _ in seen} == set(SHORT)
    assert sum(seen.values()) == len(SHORT)
    (outcome,) = [outcome for name, outcome in seen if name == "5% of the images corrupted"]
    assert outcome == "one error line naming them"


@pytest.mark.slow
def test_no_damage_to_a_runs_files_is_believed(program, bench, tmp_path):
    flips = runpy.run_path(str(HERE / "flips.py"), run_name="flips")
    seen = flips["sweep"](bench.folder / "reference", tmp_path)
    assert all(map(flips["is_harmless"], seen.values())), seen


def test_changed_data_would_be_detected(program, bench):
    run = bench.folder / "reference"
    bench.check(run)
    notes = run / "checkpoints" / str(program.STEPS) / "notes" / "metadata"
    before = notes.read_bytes()
    try:
        name = next(iter(bench.reference.saved[program.STEPS][0]))
        crc = bench.reference.saved[program.STEPS][0][name]["crc32"]
        notes.write_bytes(before.replace(str(crc).encode(), str(crc ^ 1).encode()))
        with pytest.raises(program.Lost, match=f"step {program.STEPS} is damaged on disk: its checksum differs"):
            bench.check(run)
        others = load_checked(before)
        others["leaves"][name]["crc32"] ^= 1
        notes.write_bytes(dump_checked(others))
        with pytest.raises(program.Lost, match=f"step {program.STEPS} is damaged on disk: the checksum of .* differs"):
            bench.check(run)
        others = load_checked(before)
        others["window"] = [[0.5] * 11]
        notes.write_bytes(dump_checked(others))
        with pytest.raises(program.Lost, match=f"step {program.STEPS} differs from the reference run"):
            bench.check(run)
    finally:
        notes.write_bytes(before)
    metrics = run / "metrics.jsonl"
    content = metrics.read_bytes()
    try:
        metrics.write_bytes(content.replace(b"0.", b"1.", 1))
        with pytest.raises(program.Lost, match="is no prefix of the reference"):
            bench.check(run)
    finally:
        metrics.write_bytes(content)


def test_a_traceback_and_a_wrong_status_would_be_detected(program, bench):
    for words, message in ((["-c", "raise SystemExit(3)"], "status 3"), (["-c", "print('Traceback')"], "a traceback")):
        process = program.Process([sys.executable, *words], bench.environment)
        with pytest.raises(program.Lost, match=message):
            process.wait(0)
    process = program.Process([sys.executable, "-c", "print('oh'); raise SystemExit(2)"], bench.environment)
    with pytest.raises(program.Lost, match="no error line"):
        process.refused("oh")
