"""A small step and chain, compiled for a TPU slice and for GPUs; skipped where the plug-in is missing."""

import importlib.util

import jax
import pytest

from ddpm_jax.aot.chains import chain_program
from ddpm_jax.aot.program import faults
from ddpm_jax.aot.report import report
from ddpm_jax.aot.training import training_program
from ddpm_jax.networks import parameter_shapes
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.topologies import SLICES, find_topology

PLUGINS = {"v5e:2x4": "libtpu", "h100:8": "jax_plugins.xla_cuda13"}


def is_there(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def needs(name, *values):
    missing = not is_there(PLUGINS[name])
    return pytest.param(name, *values, marks=pytest.mark.skipif(missing, reason=f"no {PLUGINS[name]}"))


@pytest.mark.parametrize("name", [needs(name) for name in PLUGINS])
def test_the_step_is_sound_in_bfloat16(config, with_train, name):
    topology = find_topology(name)
    program = training_program(with_train(config, precision="bfloat16"), topology)
    found = report(program, topology)
    assert (found.fits, found.faults, found.devices) == (True, (), 8)
    # The gradient, which TPUs sum in the type in which it is computed.
    size = 2 * sum(leaf.size for leaf in jax.tree.leaves(parameter_shapes(program.network)))
    assert sum(each.bytes for each in found.collectives if each.kind == "all-reduce") >= size
    assert (found.optimal_seconds is None) == (topology.platform == "gpu")
    assert found.images_per_second > 0


@pytest.mark.parametrize("name", [needs(name) for name in PLUGINS])
def test_a_gathered_batch_and_a_state_that_is_kept_are_found(broken, config, name):
    topology = find_topology(name)
    program = training_program(config, topology, network=broken("gathered batch", topology))
    text = program.lowered.compile(compiler_options=topology.compiler_options).as_text()
    assert any("moves" in fault for fault in faults(program, text))
    assert faults(program._replace(donated=program.donated + 1), text)[-1].startswith("1 of the ")


@pytest.mark.parametrize("name", [needs(name) for name in PLUGINS])
def test_a_chain_compiles(runs, name):
    topology = find_topology(name)
    found = report(chain_program(runs.make_job(), topology, batch_size=16), topology)
    assert (found.fits, found.faults) == (True, ())


@pytest.mark.parametrize("name", [needs("v5e:2x4")])
def test_every_slice_is_known_to_the_compiler(name):
    for version, shapes in SLICES.items():
        for shape in shapes:
            topology = find_topology(f"{version}:{shape}")
            assert topology.memory >= 7 * 2**30
            assert topology.tflops["float32, highest"] == pytest.approx(topology.tflops["bfloat16"] / 6)
            assert len(topology.one_host) == topology.per_host


@pytest.mark.parametrize("name", [needs(name) for name in PLUGINS])
def test_a_batch_that_does_not_divide_the_slice_is_one_line(config, with_train, name):
    with pytest.raises(UserError, match="train.batch_size=20 cannot be shared out evenly over 8 devices"):
        training_program(with_train(config, batch_size=20), find_topology(name))
