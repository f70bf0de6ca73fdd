"""Names of topologies, and plug-ins that are missing or of another version: one clear line each."""

import importlib.metadata

import pytest

from ddpm_jax.system.accelerators import find_accelerator
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.gpu_targets import GPU_TARGETS
from ddpm_jax.system.topologies import find_topology

JAX = importlib.metadata.version("jax")


@pytest.fixture
def installed(monkeypatch):
    """Packages in versions of the test's choice, beside the others."""
    versions, version_of = {}, importlib.metadata.version

    def version(name):
        if name in ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin") and name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions.get(name) or version_of(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    return versions


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("v9:2x2", r"'v9:2x2' is unknown: .* v5e:2x2, v5p:2x2x1, .* h100:8"),
        ("v5e-8", "is unknown"),
        ("v5e:3x3", "the slices of v5e are 1x1, 2x2, 2x4"),
        ("v5p:2x2", "the slices of v5p are 1x1x1, 2x2x1"),
        ("h100:none", "give the number of devices, such as h100:8"),
        ("h100:0", "give the number of devices"),
        ("v5e:2x4", rf'needs the compiler\'s plug-in libtpu: pip install "jax\[tpu\]=={JAX}"$'),
        ("h100:8", rf'needs the compiler\'s plug-in jax-cuda13-plugin: pip install "jax\[cuda13-local\]=={JAX}"$'),
    ],
)
def test_what_cannot_be_compiled_for_is_one_line(installed, name, line):
    with pytest.raises(UserError, match=line):
        find_topology(name)


@pytest.mark.parametrize(("name", "package"), [("v5e:2x4", "libtpu"), ("h100:8", "jax-cuda13-plugin")])
def test_a_plugin_of_another_version_is_refused(installed, name, package):
    installed[package] = "0.0.1"
    with pytest.raises(UserError, match=rf'needs {package} \S+ for jax {JAX}, not 0.0.1: pip install "jax\['):
        find_topology(name)


def test_gpus_beyond_a_host_are_whole_hosts(installed):
    installed["jax-cuda13-plugin"] = JAX
    with pytest.raises(UserError, match="use h100:8 or h100:16"):
        find_topology("h100:12")


@pytest.mark.parametrize("name", GPU_TARGETS)
def test_every_card_is_in_the_table_of_speeds(name):
    target, card = GPU_TARGETS[name], find_accelerator(GPU_TARGETS[name].name)
    assert card.gigabytes_per_second * 1e9 == pytest.approx(target.bandwidth, rel=0.01)
    assert 0.95 * card.gib < target.memory / 2**30 <= card.gib * 1.07
