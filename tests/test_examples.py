"""The examples run, each in its short form."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]


def run_example(name, *words, cwd):
    """Runs an example as a user does; returns what it prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)  # one device, as a user has it
    command = [sys.executable, str(ROOT / "examples" / name), *words]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_minimal(tmp_path):
    printed = run_example("minimal.py", "3", "10", cwd=tmp_path)
    assert float(printed.removeprefix("step 0: loss ")) < 1.3
    assert np.asarray(Image.open(tmp_path / "minimal.png")).std() > 0
