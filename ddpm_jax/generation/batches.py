"""The driver of chains: batches of images over all local devices, in ranges of steps, each one compiled program.

Sampling, editing and likelihood run their long loops through it. Between two ranges the host shows progress and may
look at the state; no image depends on the ranges, the batch size or the devices.
"""

import itertools
import math
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from ddpm_jax.config import Config
from ddpm_jax.generation.chains import labels_of, make_chain
from ddpm_jax.generation.sampler_config import SamplerConfig
from ddpm_jax.networks import Network, Params
from ddpm_jax.pixels import to_uint8
from ddpm_jax.run.build import image_shape, matmul_precision
from ddpm_jax.samplers.chain import Chain, Sampler, run_chain, sample
from ddpm_jax.system import environment
from ddpm_jax.system.exits import advice_for_memory
from ddpm_jax.system.mesh import batch_sharding, gather, replicated, shardings, widest_mesh
from ddpm_jax.system.progress import Progress, say

STEPS_PER_CALL = 50
"""Most steps of one compiled call. Returning to the host this often costs about 1 % and shows progress."""

Tree = Any
"""A pytree of arrays."""

Watch = Callable[[int, int, Tree, Tree], object]
"""Called before each range as (first image index, step, batch, state)."""


def cut(num_steps: int, *, longest: int = STEPS_PER_CALL, stops: Sequence[int] = ()) -> list[tuple[int, int]]:
    """Cuts a chain into ranges of one length where possible: each length is one program to compile.

    Args:
      num_steps: steps of the chain, >= 1.
      longest: most steps of a range, >= 1.
      stops: steps, each in [0, num_steps], that a range must begin at.

    Returns:
      (first, length) of each range.

    >>> cut(1000)[-1], cut(128, longest=3)[-1], cut(7, longest=5), cut(6, stops=[2])
    ((950, 50), (126, 2), [(0, 5), (5, 2)], [(0, 2), (2, 4)])
    """
    ranges = []
    for begin, end in itertools.pairwise(sorted({0, *stops, num_steps})):
        most = min(longest, end - begin)
        divisors = (length for length in range(most, longest // 2, -1) if (end - begin) % length == 0)
        length = next(divisors, most)
        ranges += [(first, min(length, end - first)) for first in range(begin, end, length)]
    return ranges


class Compiled(typing.NamedTuple):
    """A function that is compiled in the precision of a run."""

    function: jax.stages.Wrapped
    config: Config

    def __call__(self, *arguments: Tree, **static: Any) -> Tree:
        with matmul_precision(self.config):
            return self.function(*arguments, **static)

    def lower(self, *arguments: Tree, **static: Any) -> jax.stages.Lowered:
        """Lowers it for the shapes and shardings of its arguments."""
        with matmul_precision(self.config):
            return self.function.lower(*arguments, **static)


class Program(typing.NamedTuple):
    """A loop of steps on a batch of images: two compiled functions of `Driver.program`."""

    num_steps: int
    """Steps of the whole loop."""
    start: Compiled
    """(params, shared, batch) to the state before the first step."""
    advance: Compiled
    """(params, shared, batch, state, first, *, num_steps) to the state after the range."""


class Driver:
    """Runs programs on batches of one size.

    The parameters lie on a mesh of the devices as `train.fsdp` asks, replicated or sharded, and are gathered inside the
    compiled functions. Batches are sharded over all devices; the last one is padded. Parameters, `shared` arrays and
    batches are arguments of what is compiled, so one program serves every seed and every checkpoint.
    """

    def __init__(self, config: Config, *, batch_size: int, devices: Sequence[jax.Device] | None = None):
        """Makes the mesh.

        Args:
          config: of the run; its `train.fsdp` (as far as the number of devices allows) and precision are used.
          batch_size: images per batch over all devices, >= 1; rounded up to a multiple of their number.
          devices: those of this process if not given.
        """
        devices = jax.local_devices() if devices is None else devices
        self.mesh = widest_mesh(devices, fsdp=config.train.fsdp)
        self.batch_size = math.ceil(batch_size / len(devices)) * len(devices)
        self._config = config
        self._compiled: set[Program] = set()

    def place(self, params: Params) -> Params:
        """Copies parameters to the devices, replicated or sharded."""
        return jax.device_put(params, shardings(self.mesh, params))

    def shard(self, array: Array, *, axis: int = 0) -> Array:
        """Shards an array over all devices along its axis of images, inside a program."""
        return jax.lax.with_sharding_constraint(array, batch_sharding(self.mesh, axis=axis))

    def compile(self, function: Callable[..., Tree], *, static_argnames: Sequence[str] = ()) -> "Compiled":
        """Compiles a function of (params, ...), which receives the whole parameters, in the run's precision."""

        def gathered(params: Params, *arguments: Tree, **static: Any) -> Tree:
            return function(gather(self.mesh, params), *arguments, **static)

        return Compiled(jax.jit(gathered, static_argnames=static_argnames), self._config)

    def program(self, num_steps: int, start: Callable[..., Tree], advance: Callable[..., Tree]) -> Program:
        """Makes a program of the pure functions `start` and `advance`, see `Program`."""
        return Program(num_steps, self.compile(start), self.compile(advance, static_argnames=("num_steps",)))

    def lower(
        self,
        program: Program,
        params: Tree,
        batch: Tree,
        *,
        shared: Tree = (),
        num_steps: int,
        compiler_options: dict[str, Any] | None = None,
    ) -> jax.stages.Lowered:
        """Lowers a range of a program, as `run` compiles it, for devices that need not be there.

        Args:
          program: of this driver.
          params: shapes and types of the parameters.
          batch: shapes and types of what `read` returns.
          shared: shapes and types of the arrays for all batches.
          num_steps: steps of the range.
          compiler_options: for compiling the start of the program, which decides where its state lies.
        """
        place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        params = jax.tree.map(place, params, shardings(self.mesh, params))
        shared = jax.tree.map(lambda leaf: place(leaf, replicated(self.mesh)), shared)
        batch = jax.tree.map(lambda leaf: place(leaf, batch_sharding(self.mesh)), batch)
        start = program.start.lower(params, shared, batch)
        compiled = start.compile(compiler_options=compiler_options)
        state = jax.tree.map(place, start.out_info, compiled.output_shardings)
        return program.advance.lower(params, shared, batch, state, 0, num_steps=num_steps)

    def chain(
        self,
        num_steps: int,
        make: Callable[[Params, Tree], Sampler],
        begin: Callable[[Tree, Tree], tuple[Array, Array, Tree]],
    ) -> Program:
        """Makes the program of a sampler, whose state is a `Chain`.

        Args:
          num_steps: steps of the sampler.
          make: (params, conditioning) to the sampler.
          begin: (shared, batch) to the keys, (B,), the images before the first step, (B, H, W, C), and the
            conditioning.
        """

        def start(params: Params, shared: Tree, batch: Tree) -> Chain:
            _, x, conditioning = begin(shared, batch)
            return make(params, conditioning).init(self.shard(x))

        def advance(params: Params, shared: Tree, batch: Tree, state: Chain, first: Array, *, num_steps: int) -> Chain:
            keys, _, conditioning = begin(shared, batch)
            state = run_chain(keys, make(params, conditioning), state, first, num_steps=num_steps)
            return state._replace(x=self.shard(state.x))

        return self.program(num_steps, start, advance)

    def run(
        self,
        program: Program,
        params: Params,
        images: Sequence[tuple[int, int]],
        read: Callable[[np.ndarray], Tree],
        *,
        shared: Tree = (),
        ranges: Sequence[tuple[int, int]] | None = None,
        watch: Watch | None = None,
        description: str,
    ) -> Iterator[tuple[int, int, Tree]]:
        """Runs a program batch by batch.

        Args:
          program: of this driver.
          params: of the network; if they lie as placed by `place`, they are not copied.
          images: (first, stop) of the images of each batch, at most `batch_size` of them.
          read: from the indices of a whole batch, (batch_size,), to its arrays, whose first axis is the images. A batch
            of fewer images is padded with its last one.
          shared: arrays for all batches.
          ranges: (first, length) of the steps to run, see `cut`; all steps if not given.
          watch: see `Watch`.
          description: of the work, for the progress.

        Yields:
          first, stop, and the final state of the whole batch, padding included.
        """
        if not images:
            return
        ranges = cut(program.num_steps) if ranges is None else ranges
        params = self.place(params)
        shared = jax.device_put(shared, replicated(self.mesh))
        if program not in self._compiled:
            self._compiled.add(program)
            size = sum(leaf.size for leaf in jax.tree.leaves(params))
            say(f"{description} on {environment.devices()}, with {size:,} parameters; compiling")
        advice = advice_for_memory(
            f"a batch of {self.batch_size} images", "use a smaller --batch-size, or draw fewer images"
        )
        with advice, Progress(len(images) * sum(length for _, length in ranges), description=description) as progress:
            for first, stop in images:
                indices = np.minimum(np.arange(first, first + self.batch_size, dtype=np.int32), stop - 1)
                batch = jax.device_put(read(indices), batch_sharding(self.mesh))
                state = program.start(params, shared, batch)
                for step, length in ranges:
                    if watch is not None:
                        watch(first, step, batch, state)
                    state = program.advance(params, shared, batch, state, step, num_steps=length)
                    jax.block_until_ready(state)
                    progress.update(length)
                yield first, stop, state


def grid_drawer(config: Config, network: Network, key: Array, *, mesh: Mesh) -> Callable[[Params], np.ndarray]:
    """Makes the function from EMA weights to the images of a training run's grid, always of the same noise.

    It is one program over all devices of all hosts.

    Args:
      config: of the run: `log.sample_steps` steps, T at most (0: Algorithm 2, else DDIM), `log.num_samples` images.
      network: of the run.
      key: of the grids.
      mesh: where the weights lie.

    Returns:
      `draw(params)`, which returns (N, H, W, C) uint8.
    """
    steps, number = min(config.log.sample_steps, config.diffusion.num_steps), config.log.num_samples
    sampler_config = SamplerConfig(sampler="ddim", steps=steps) if steps else SamplerConfig()
    make = make_chain(config, network, sampler_config)
    drawn = math.ceil(number / mesh.size) * mesh.size

    def draw(params: Params, key: Array) -> Array:
        indices = jax.lax.with_sharding_constraint(jnp.arange(drawn), batch_sharding(mesh))
        sampler = make(gather(mesh, params), labels_of(config, sampler_config, indices))
        return to_uint8(sample(key, sampler, (drawn, *image_shape(config)), indices=indices))

    compiled = jax.jit(draw, out_shardings=replicated(mesh))

    def draw_images(params: Params) -> np.ndarray:
        with advice_for_memory(f"a grid of {number} images", "use a smaller --log.num-samples"):
            return np.asarray(compiled(params, key))[:number]

    return draw_images
