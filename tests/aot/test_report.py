"""Programs compiled ahead of time, on simulated devices: the figures of sound ones, and what is wrong with others."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from ddpm_jax.aot import report as reporting
from ddpm_jax.aot.chains import chain_program, likelihood_program
from ddpm_jax.aot.program import faults
from ddpm_jax.aot.report import OF_PEAK, check, compile_for, describe, report
from ddpm_jax.aot.training import training_program
from ddpm_jax.networks import parameter_shapes
from ddpm_jax.system.errors import UserError
from ddpm_jax.training.setup import make_setup
from ddpm_jax.training.speed import forward_flops
from ddpm_jax.training.step import Batch


@pytest.fixture(scope="module")
def compiled(broken, config, topology):
    program = training_program(config, topology, network=broken("", topology))
    return program, report(program, topology)


def test_the_training_step_is_reported(compiled):
    program, found = compiled
    shapes = jax.tree.leaves(parameter_shapes(program.network))
    size = 4 * sum(leaf.size for leaf in shapes)
    assert (found.fits, found.faults) == (True, ())
    # Parameters, their average and Adam's two moments, all donated, and the images.
    assert 4 * size < found.memory.aliased <= found.memory.outputs
    assert found.memory.aliased < found.memory.arguments < 4 * size + 2000
    assert found.needed == sum(found.memory) - 2 * found.memory.aliased
    assert sum(each.bytes for each in found.collectives if each.kind == "all-reduce") >= size  # the gradient
    assert found.network_flops == 3 * forward_flops(program.network, (8, 8, 3)) * 24 / 8
    assert found.estimated_seconds == pytest.approx(found.network_flops / (OF_PEAK * 1e9))
    assert found.images_per_second == pytest.approx(24 / found.estimated_seconds)
    text = describe(found)
    assert "training step of 24 images, streamed from disk on 8 CPU (cpu:8), float32" in text
    assert "of 1.00 GiB: fits" in text
    assert "not known here: XLA's estimate" in text
    check(found, program)


def test_several_steps_in_a_call_are_one_program_and_the_precision_is_that_of_the_products(
    broken, config, with_train, topology
):
    config = with_train(config, steps_per_call=3, matmul_precision="highest")
    program = training_program(config, topology, network=broken("", topology))
    assert program.precision == "float32, highest"
    assert program.name == "training step of 24 images, streamed from disk, 3 steps in a call"
    assert "stablehlo.while" in program.lowered.as_text()


def test_what_does_not_fit_is_refused_with_a_remedy(compiled):
    program, found = compiled
    tight = dataclasses.replace(found, fits=False, available=found.needed - 1)
    assert "does not fit" in describe(tight)
    with pytest.raises(UserError, match=r"needs 0.0\d MiB of the 0.0\d MiB of a device .* --train.grad-accum-steps 2"):
        check(tight, program)


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 25.50G of 15.75G hbm. Exceeded by 9.75G.",
        "Ran out of memory on HBM, total memory required for HLO temporaries (25.5G) exceeds available HBM (15.75G)",
    ],
)
def test_memory_errors_of_the_tpu_compiler_are_figures(compiled, topology, message):
    class Lowered:
        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError(message)

    found = report(compiled[0]._replace(lowered=Lowered()), topology)
    assert (found.fits, found.needed, found.available) == (False, int(25.5 * 2**30), int(15.75 * 2**30))
    assert "25.50 GiB of 15.75 GiB: does not fit" in describe(found)


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("", None),
        ("gathered batch", r"^all-gather moves 0\.\d+ MB of activations between the devices: \[24, 8, 8, 3\]$"),
        ("float32 convolution", r"^2 convolutions are in float32, and the precision is bfloat16$"),
    ],
)
def test_what_is_wrong_with_a_step_is_found(broken, config, topology, with_train, fault, line):
    network = broken(fault, topology)
    program = training_program(with_train(config, precision="bfloat16"), topology, network=network)
    found = report(program, topology)
    if line is None:
        assert found.faults == ()
        return
    assert found.faults
    assert all(re.search(line, fault) for fault in found.faults)
    with pytest.raises(UserError, match="is wrong on cpu:8"):
        check(found, program)


def test_a_state_that_is_not_donated_is_found(compiled, config, topology):
    program, _ = compiled
    parts = make_setup(config, network=program.network, devices=topology.devices[:1])
    key, state = jax.eval_shape(lambda: parts.keys.run), jax.eval_shape(parts.init, parts.keys.init)
    batch = Batch(jax.ShapeDtypeStruct((24, 8, 8, 3), np.uint8), jax.ShapeDtypeStruct((24,), np.int32))
    kept = jax.jit(parts.make_step()).lower(key, state, batch).compile().as_text()
    assert faults(program, program.lowered.compile().as_text()) == []
    number = program.donated
    assert faults(program, kept) == [
        f"{number} of the {number} arrays of the state are not donated, and are there twice"
    ]


def test_an_empty_batch_is_one_line(runs, topology):
    job = runs.make_job()
    with pytest.raises(UserError, match="--batch-size and --num must be at least 1, not 0"):
        chain_program(job, topology, batch_size=0)
    with pytest.raises(UserError, match="--batch-size and --num must be at least 1, not -1"):
        likelihood_program(job.trained, topology, batch_size=-1)
    with pytest.raises(UserError, match="--num-strata must be in"):
        likelihood_program(job.trained, topology, batch_size=8, num_strata=1)


def test_what_cannot_be_lowered_is_one_line(broken, config, topology, monkeypatch):
    monkeypatch.setattr(reporting, "find_topology", lambda name: topology)
    network = broken("cannot be lowered", topology)
    with pytest.raises(UserError, match=r"does not run on cpu:8: .*unknown"):
        compile_for("cpu:8", lambda topology: training_program(config, topology, network=network))


def test_chains_are_reported_by_the_step(runs, topology):
    job = runs.make_job()
    found = report(chain_program(job, topology, batch_size=10), topology)
    assert (found.fits, found.faults, found.unit) == (True, (), "step of the chain")
    assert found.name.startswith("ancestral chain of 12 steps on 16 images")  # a multiple of the devices
    likelihood = report(likelihood_program(job.trained, topology, batch_size=8), topology)
    assert (likelihood.fits, likelihood.faults) == (True, ())
    assert likelihood.name == "bound at 12 timesteps on 8 images, 12 in a call"
    assert likelihood.images_per_second == pytest.approx(8 / (12 * likelihood.estimated_seconds))
