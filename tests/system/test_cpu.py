"""What a script chooses on a CPU, before XLA starts: flags by version, and devices; what the user has set wins."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from ddpm_jax.system import cpu

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
import jax
from ddpm_jax.system import cpu, environment
cpu.set_flags("sampling")
cpu.set_devices(int(sys.argv[1]))
flags = environment.rounding().get("XLA_FLAGS", "")
print(json.dumps([jax.device_count(), flags, float(jax.jit(lambda x: x + 1)(1.0))]))
"""


def chosen(number=2, **variables):
    """What a new process has chosen: the number of devices, and the flags in its record."""
    names = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    words = [sys.executable, "-c", PROGRAM, str(number)]
    done = subprocess.run(words, cwd=ROOT, env=clean | variables, capture_output=True, text=True, check=True)
    devices, flags, two = json.loads(done.stdout)
    assert two == 2.0
    return devices, flags


def test_a_process_computes_with_the_flags_and_devices_that_were_chosen_and_records_them():
    flags = " ".join(cpu.flags_for("sampling", cpu.importlib.metadata.version("jaxlib")))
    assert chosen(3) == (3, flags)


@pytest.mark.parametrize("name", ["XLA_FLAGS", "JAX_NUM_CPU_DEVICES"])
def test_what_the_user_has_set_wins(name):
    own = "--xla_cpu_experimental_ynn_fusion_type=+dot"
    value = {"XLA_FLAGS": f"--xla_force_host_platform_device_count=3 {own}", "JAX_NUM_CPU_DEVICES": "3"}[name]
    devices, flags = chosen(**{name: value})
    assert devices == 3
    assert name != "XLA_FLAGS" or flags == own


@pytest.mark.parametrize(
    ("asked", "installed", "file", "is_alone"),
    [
        ("cuda,cpu", "", "", False),
        ("cpu", "libtpu", "accel0", True),
        ("", "libtpu", "accel0", False),
        ("", "libtpu", "", True),
        ("", "", "accel0", True),
    ],
)
def test_nothing_is_chosen_where_an_accelerator_may_be(asked, installed, file, is_alone, monkeypatch, tmp_path):
    if file:
        (tmp_path / file).touch()
    monkeypatch.setattr(cpu, "Path", lambda _: tmp_path)
    config = types.SimpleNamespace(values={"jax_platforms": asked, "jax_num_cpu_devices": -1})
    monkeypatch.setattr(cpu, "jax", types.SimpleNamespace(config=config))
    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda name: name == installed or None)
    monkeypatch.setattr(cpu.importlib.metadata, "entry_points", lambda group: ())
    assert cpu.is_alone() == is_alone
    if not is_alone:
        before = os.environ["XLA_FLAGS"]
        cpu.set_flags("training")
        cpu.set_devices(2)  # the configuration is not touched: it has no update
        assert os.environ["XLA_FLAGS"] == before


def test_flags_in_a_file_are_left_alone(monkeypatch):
    """XLA reads the file only where the variable is its name alone; it may name the devices, too."""
    monkeypatch.setenv("XLA_FLAGS", "flags.txt")
    monkeypatch.setattr(cpu, "is_alone", lambda: True)
    config = types.SimpleNamespace(values={"jax_platforms": "cpu", "jax_num_cpu_devices": -1})
    monkeypatch.setattr(cpu, "jax", types.SimpleNamespace(config=config))  # it has no update
    cpu.set_flags("training")
    cpu.set_devices(2)
    assert os.environ["XLA_FLAGS"] == "flags.txt"


def test_an_accelerators_package_without_one_is_not_asked_for_it(monkeypatch):
    updates = {}
    config = types.SimpleNamespace(values={"jax_platforms": ""}, update=updates.__setitem__)
    monkeypatch.setattr(cpu, "jax", types.SimpleNamespace(config=config))
    monkeypatch.setattr(cpu, "is_alone", lambda: True)
    monkeypatch.setenv("XLA_FLAGS", "flags.txt")
    for installed in (False, True):  # where no package is, JAX names one for the GPU that it sees
        monkeypatch.setattr(cpu, "_has_plugin", lambda installed=installed: installed)
        cpu.set_flags("training")
        assert updates == {"jax_platforms": "cpu"} if installed else not updates


@pytest.mark.parametrize("version", ["0.10.2", "0.12.0", "0.12.0.1"])
def test_training_never_uses_onednn(version):
    """The kernel gradient of its bfloat16 convolutions is silently wrong, of jaxlib 0.12.0."""
    assert cpu.flags_for("training", version)
    assert not [flag for flag in cpu.flags_for("training", version) if "onednn" in flag]


def test_only_versions_that_were_measured_have_flags():
    assert cpu.flags_for("training", "0.10.2.1") == cpu.flags_for("training", "0.10.2")
    assert [cpu.flags_for("training", version) for version in ("0.10.20", "0.11.0", "1.0")] == 3 * [()]
