"""The file system that keeps no promise but that of fsync, and a sample of the power cuts that are replayed on it."""

import importlib.util
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "power_cut.py"


@pytest.fixture(scope="module")
def power_cut():
    spec = importlib.util.spec_from_file_location("power_cut", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["power_cut"] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def replace(power_cut, tmp_path):
    """Replaces a file by another that is written beside it and renamed, with the syncs that are asked for."""

    def of(*synced):
        (tmp_path / "file").write_bytes(b"old")
        disk = power_cut.Disk(tmp_path)
        node = power_cut.File()
        disk.add(power_cut.Names(None, (disk.root, "part", node)))
        disk.add(power_cut.Write(node, 0, b"new one"))
        if "file" in synced:
            disk.add(power_cut.Sync(node))
        disk.add(power_cut.Names((disk.root, "part"), (disk.root, "file", node)))
        if "folder" in synced:
            disk.add(power_cut.Sync(disk.root))
        return {cut: [tree.get("file") for _, tree in disk.states(cut, random.Random(0))] for cut in disk.cuts()}

    return of


def test_what_is_not_synced_may_be_lost_or_torn(replace):
    (left,) = replace().values()
    assert {b"old", b"new one", b"", b"new"} == set(left)
    left = replace("folder")
    assert {b"", b"new"} < set(left[max(left)])  # the name is lasting, its content is not
    for states in replace("file").values():
        assert set(states) <= {b"old", b"new one"}


def test_what_is_synced_stays(replace):
    left = replace("file", "folder")
    assert set(left[max(left)]) == {b"new one"}
    assert {b"old", b"new one"} == {state for states in left.values() for state in states}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_power_cut_at_a_sync_is_resumed_to_the_same_bits():
    one_device = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    command = [sys.executable, str(SCRIPT), "--share", "0.1"]
    done = subprocess.run(command, env=one_device, cwd=SCRIPT.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| train | " in done.stdout
