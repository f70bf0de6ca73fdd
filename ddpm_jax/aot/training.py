"""The training step of a run, lowered for devices that are not there."""

import jax
import numpy as np

from ddpm_jax.aot.program import Program, precision_of
from ddpm_jax.config import Config
from ddpm_jax.data.source import Source
from ddpm_jax.data.sources import load_source
from ddpm_jax.networks import Network
from ddpm_jax.run.build import image_shape, matmul_precision
from ddpm_jax.run.validation import most_steps
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.topologies import Topology
from ddpm_jax.training.input_pipeline import RunKey, make_input_pipeline, with_inputs
from ddpm_jax.training.setup import make_setup
from ddpm_jax.training.speed import forward_flops


def training_program(
    config: Config, topology: Topology, *, network: Network | None = None, source: Source | None = None
) -> Program:
    """Lowers the training step, as `train` compiles it, over all devices of a topology.

    Args:
      config: of the run, valid.
      topology: the devices.
      network: the network; the one that `config` describes if not given.
      source: the images; if None, those that `config` names. If they are not here, they are taken to be streamed.

    Raises:
      UserError: the batch cannot be shared out evenly over the devices, or something in the step cannot run on them.
    """
    train = config.train
    parts = make_setup(config, network=network, devices=topology.devices)
    layout = parts.layout
    if layout.lower is None:
        raise UserError("--aot compiles for a mesh of devices: use --train.parallel jit, whose numbers are the same")
    source = _images(config) if source is None else source
    pipeline = make_input_pipeline(
        source,
        layout,
        seed=train.seed,
        batch_size=train.batch_size,
        labeled=config.model.num_classes > 0,
        device_gib=config.data.device_gib,
        most=most_steps(config),
    )
    key = jax.eval_shape(lambda: parts.keys.run if pipeline.most == 1 else RunKey(parts.keys.run, np.int32(0)))
    state = layout.abstract_state(parts.init, parts.keys.init)
    with matmul_precision(config):
        lowered = layout.lower(with_inputs(parts.make_step, pipeline), key, state, pipeline.shapes())
    number, flops = layout.mesh.size, forward_flops(parts.network, image_shape(config))
    calls = f", {pipeline.most} steps in a call" if pipeline.most > 1 else ""
    return Program(
        name=f"training step of {train.batch_size} images, {pipeline.kept}{calls}",
        lowered=lowered,
        network=parts.network,
        precision=precision_of(train),
        batch_size=train.batch_size,
        devices=number,
        sharded=train.fsdp > 1,
        flops=None if flops is None else 3 * flops * train.batch_size / number,
        unit="step",
        units=1,
        donated=len(jax.tree.leaves(state)),
        advice=f"use --train.grad-accum-steps {2 * train.grad_accum_steps}, --train.remat, --train.precision bfloat16, "
        "or a smaller --train.batch-size",
    )


def _images(config: Config) -> Source:
    """Returns the images of a configuration, or a set on disk in their place if they are not here."""
    try:
        return load_source(config.data)
    except UserError:
        return Source(config.train.batch_size, image_shape(config), _read_nothing, _read_nothing)


def _read_nothing(indices: np.ndarray) -> np.ndarray:
    raise UserError("the images are not here")
