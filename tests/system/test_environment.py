"""What the environment of a process can change: nothing in a script, and otherwise it is recorded."""

import importlib.metadata
import os
import runpy
import types

import jax
import pytest

from ddpm_jax.keys import make_key
from ddpm_jax.system import environment


@pytest.fixture(autouse=True)
def _set_back(default_precision):
    """Sets back every option that a test sets."""
    yield
    for name in ("jax_enable_x64", "jax_debug_nans"):
        jax.config.update(name, False)
    jax.config.update("jax_threefry_partitionable", True)
    jax.config.update("jax_default_prng_impl", "threefry2x32")
    jax.config.update("jax_random_seed_offset", 0)


def test_a_script_fixes_what_changes_numbers_and_names_it(capsys):
    hostile = {
        "jax_default_prng_impl": "rbg",
        "jax_threefry_partitionable": False,
        "jax_random_seed_offset": 3,
        "jax_enable_x64": True,
        "jax_default_matmul_precision": "highest",
        "jax_debug_nans": True,
    }
    before = {name: getattr(jax.config, name) for name in hostile}
    bits = jax.random.bits(make_key(5), (3,))
    for name, value in hostile.items():
        jax.config.update(name, value)
    environment.fix_options()
    assert {name: getattr(jax.config, name) for name in hostile} == before
    assert (jax.random.bits(make_key(5), (3,)) == bits).all()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "warning: JAX_DEFAULT_PRNG_IMPL=rbg is ignored: a run depends on its config and seed alone"
    assert len(lines) == len(hostile)
    assert any(line.endswith(": use --train.matmul-precision") for line in lines)
    environment.fix_options()
    assert capsys.readouterr().err == ""


def test_the_keys_of_a_seed_follow_no_default_generator():
    data = jax.random.key_data(make_key(7))
    jax.config.update("jax_default_prng_impl", "rbg")
    assert (jax.random.key_data(make_key(7)) == data).all()


def test_settings_are_what_the_library_cannot_fix(monkeypatch):
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    assert environment.settings() == {}
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_prng_impl", "rbg")
    assert environment.settings() == {"JAX_ENABLE_X64": "True", "NVIDIA_TF32_OVERRIDE": "0"}
    assert set(environment.settings()) <= environment.names_of_settings()


def test_what_rounding_depends_on(monkeypatch):
    for name in ("NPROC", "PJRT_NPROC", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    found = environment.rounding()
    assert {"backend", "jax", "jaxlib", "cores", "cpu", "cpu_features"} <= set(found)
    assert found["cores"] == str(len(os.sched_getaffinity(0)))
    assert "XLA_FLAGS" not in found
    flags = "--xla_b=0 --xla_a=1 --xla_dump_to=here --xla_b=2 --xla_force_host_platform_device_count=3"
    for name, value in {"NPROC": "7", "XLA_FLAGS": flags, "LIBTPU_INIT_ARGS": "--x"}.items():
        monkeypatch.setenv(name, value)
    changed = {"cores": "7", "XLA_FLAGS": "--xla_a=1 --xla_b=2", "LIBTPU_INIT_ARGS": "--x"}
    assert environment.rounding() == {**found, **changed}
    monkeypatch.setenv("PJRT_NPROC", "3")  # comes first for XLA, too
    assert environment.rounding()["cores"] == "3"


def test_devices_in_words():
    assert environment.devices() == "8 CPU devices"


def test_versions_are_those_that_are_imported(monkeypatch):
    """A second one later on the path is not, nor is another backend's; what a broken installation left has no name."""
    there = [(None, "1"), ("jaxlib", "2"), ("jax", "3"), ("jax", "4"), ("libtpu", "5"), ("jax-cuda13-plugin", "6")]
    found = [types.SimpleNamespace(name=name, version=version) for name, version in there]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)
    fresh = runpy.run_path(environment.__file__)  # they are looked up once
    found = fresh["rounding"]()
    assert {"jax": "3", "jaxlib": "2"}.items() <= found.items()
    assert not {"libtpu", "jax-cuda13-plugin"} & set(found)
