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
work, images, asked = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
cpu.set_flags(work)
cpu.set_devices(work, images, asked=asked)
flags = environment.rounding().get("XLA_FLAGS", "")
print(json.dumps([jax.device_count(), flags, float(jax.jit(lambda x: x + 1)(1.0))]))
"""


def chosen(work="sampling", images=64, asked=0, *, before=(), **variables):
    """What a new process has chosen: the number of devices, and the flags in its record."""
    names = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    words = [*before, sys.executable, "-c", PROGRAM, work, str(images), str(asked)]
    done = subprocess.run(words, cwd=ROOT, env=clean | variables, capture_output=True, text=True, check=True)
    devices, flags, two = json.loads(done.stdout)
    assert two == 2.0
    return devices, flags


def test_a_process_computes_with_the_flags_and_devices_that_were_chosen_and_records_them():
    cores = len(os.sched_getaffinity(0))
    flags = " ".join(cpu.flags_for("sampling", cpu.importlib.metadata.version("jaxlib")))
    assert chosen() == (cpu.number_of_devices("sampling", 64, cores=cores), flags)
    assert chosen("training", asked=3)[0] == 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_a_process_on_one_core_has_one_device():
    assert chosen(before=["taskset", "-c", str(min(os.sched_getaffinity(0)))])[0] == 1


@pytest.mark.parametrize("name", ["XLA_FLAGS", "JAX_NUM_CPU_DEVICES"])
def test_what_the_user_has_set_wins(name):
    own = "--xla_cpu_experimental_ynn_fusion_type=+dot"
    value = {"XLA_FLAGS": f"--xla_force_host_platform_device_count=3 {own}", "JAX_NUM_CPU_DEVICES": "3"}[name]
    devices, flags = chosen(asked=2, **{name: value})
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
    assert cpu.is_alone() == is_alone
    if not is_alone:
        before = os.environ["XLA_FLAGS"]
        cpu.set_flags("training")
        cpu.set_devices("training", 64, asked=2)  # the configuration is not touched: it has no update
        assert os.environ["XLA_FLAGS"] == before


@pytest.mark.parametrize("version", ["0.10.2", "0.12.0", "0.12.0.1"])
def test_training_never_uses_onednn(version):
    """The kernel gradient of its bfloat16 convolutions is silently wrong, of jaxlib 0.12.0."""
    assert cpu.flags_for("training", version)
    assert not [flag for flag in cpu.flags_for("training", version) if "onednn" in flag]


def test_only_versions_that_were_measured_have_flags():
    assert cpu.flags_for("training", "0.10.2.1") == cpu.flags_for("training", "0.10.2")
    assert [cpu.flags_for("training", version) for version in ("0.10.20", "0.11.0", "1.0")] == 3 * [()]
