"""`--aot` of the scripts: what cannot be compiled for is one clear line."""

import os
import sys

import pytest

from ddpm_jax.aot import report as reporting
from ddpm_jax.aot.training import training_program
from ddpm_jax.system.errors import UserError


@pytest.fixture(autouse=True)
def refused_starts_end(monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda status: sys.exit(status))


@pytest.mark.parametrize(
    "words",
    [
        ("train.py", "configs/digits.py"),
        ("sample.py", "runs/none"),
        ("evaluate.py", "likelihood", "runs/none"),
        ("evaluate.py", "fid", "runs/none"),
    ],
)
def test_an_unknown_topology_is_one_line(run_script, words):
    status, _, err = run_script(*words, "--aot", "v5e-8")
    assert status == 2
    assert err.count("\n") == 1
    assert "--aot 'v5e-8' is unknown: give a TPU slice or a number of GPUs, such as" in err


@pytest.mark.parametrize(
    ("option", "line"),
    [
        (["--train.batch-size", "20"], "train.batch_size=20 cannot be shared out evenly over 8 devices"),
        (["--train.parallel", "pmap"], "--aot compiles for a mesh of devices: use --train.parallel jit"),
        (["--train.fsdp", "3"], "train.fsdp=3 does not divide the 8 devices"),
        (["--summary"], "--summary and --aot: each prints something and exits; give one of them"),
    ],
)
def test_what_does_not_divide_the_slice_is_one_line(run_script, monkeypatch, topology, option, line):
    monkeypatch.setattr(reporting, "find_topology", lambda name: topology)
    status, _, err = run_script("train.py", "configs/digits.py", "--aot", "cpu:8", *option)
    assert (status, err.count("\n")) == (2, 1)
    assert line in err


def test_the_report_is_printed_before_it_is_refused(monkeypatch, capsys, broken, config, with_train, topology):
    monkeypatch.setattr(reporting, "find_topology", lambda name: topology)
    config, network = with_train(config, precision="bfloat16"), broken("gathered batch", topology)
    with pytest.raises(UserError, match=r"step of 24 images, .* is wrong on cpu:8: all-gather moves"):
        reporting.compile_for("cpu:8", lambda topology: training_program(config, topology, network=network))
    assert "wrong: all-gather moves" in capsys.readouterr().out
