"""The long loops of sampling and evaluation, lowered for devices that are not there."""

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.aot.program import Program, precision_of
from ddpm_jax.bound import Cdf
from ddpm_jax.evaluation import bits_per_dim
from ddpm_jax.generation import batches
from ddpm_jax.generation.batches import Driver, cut
from ddpm_jax.generation.job import SamplingJob, sampling_program
from ddpm_jax.keys import make_key
from ddpm_jax.run.build import image_shape
from ddpm_jax.run.trained import TrainedRun
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.topologies import Topology
from ddpm_jax.training.speed import forward_flops


def chain_program(job: SamplingJob, topology: Topology, *, batch_size: int) -> Program:
    """Lowers the chain of a sampling job, as `run_job` compiles it, over the devices of one host.

    Args:
      job: the run and the sampler.
      topology: the devices; of several hosts each draws batches of its own.
      batch_size: images per batch of a host; rounded up to a multiple of its devices.

    Raises:
      UserError: the batch is below 1.
    """
    _check(batch_size)
    trained = job.trained
    driver, program = sampling_program(
        trained.config, trained.network, job.sampler, batch_size=batch_size, devices=topology.one_host
    )
    return _lowered(
        f"{job.sampler.sampler} chain of {program.num_steps} steps",
        trained,
        topology,
        driver,
        program,
        jax.ShapeDtypeStruct((driver.batch_size,), np.int32),
        shared=jax.eval_shape(lambda: make_key(0)),
        unit="step of the chain",
        passes=1 if job.sampler.guidance_scale == 1 else 2,
    )


def likelihood_program(
    trained: TrainedRun,
    topology: Topology,
    *,
    batch_size: int,
    num_strata: int = 0,
    cdf: Cdf = "tanh",
    given_variances: bool = False,
) -> Program:
    """Lowers the bound of a batch of images, as `bits_per_dim.run_job` compiles it, over the devices of one host.

    Args:
      trained: the run.
      topology: the devices; of several hosts each evaluates batches of its own.
      batch_size: images per batch of a host; rounded up to a multiple of its devices.
      num_strata: see `bound_program`.
      cdf: likewise.
      given_variances: whether the variances are arguments of the program, and not the model's.

    Raises:
      UserError: the batch is below 1, or there are too few strata.
    """
    _check(batch_size)
    bits_per_dim.check_strata(trained.config, num_strata)
    config = trained.config
    bounds = bits_per_dim.bound_program(
        config, trained.network, batch_size=batch_size, num_strata=num_strata, cdf=cdf, devices=topology.one_host
    )
    number = bounds.driver.batch_size
    labels = jax.ShapeDtypeStruct((number,), np.int32) if bounds.labeled else None
    pixels = jax.ShapeDtypeStruct((number, *image_shape(config)), np.uint8)
    variances = jax.ShapeDtypeStruct((config.diffusion.num_steps,), jnp.float32) if given_variances else None
    return _lowered(
        f"bound at {bounds.program.num_steps} timesteps",
        trained,
        topology,
        bounds.driver,
        bounds.program,
        (jax.ShapeDtypeStruct((number,), np.uint32), pixels, labels),
        shared=(jax.eval_shape(lambda: make_key(0)), variances),
        unit="timestep",
        passes=1,
    )


def _check(batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"--batch-size and --num must be at least 1, not {batch_size}")


def _lowered(
    name: str,
    trained: TrainedRun,
    topology: Topology,
    driver: Driver,
    program: batches.Program,
    batch: batches.Tree,
    *,
    shared: batches.Tree,
    unit: str,
    passes: int,
) -> Program:
    config = trained.config
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), trained.params)
    ((_, length), *_) = cut(program.num_steps)
    lowered = driver.lower(
        program, shapes, batch, shared=shared, num_steps=length, compiler_options=topology.compiler_options
    )
    flops, number = forward_flops(trained.network, image_shape(config)), driver.mesh.size
    return Program(
        name=f"{name} on {driver.batch_size} images, {length} in a call",
        lowered=lowered,
        network=trained.network,
        precision=precision_of(config.train),
        batch_size=driver.batch_size,
        devices=number,
        sharded=driver.mesh.shape["fsdp"] > 1,
        flops=None if flops is None else passes * flops * driver.batch_size / number,
        unit=unit,
        units=program.num_steps,
        advice="use a smaller --batch-size",
    )
