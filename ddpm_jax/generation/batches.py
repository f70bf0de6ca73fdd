"""The one driver of chains: batches of one size over all local devices."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from ddpm_jax.config import Config
from ddpm_jax.generation.sampler_config import MakeChain, SamplerConfig, labels_of, make_chain
from ddpm_jax.keys import image_keys
from ddpm_jax.networks import Params
from ddpm_jax.pixels import to_uint8
from ddpm_jax.run.build import image_shape
from ddpm_jax.samplers.chain import Chain, initial_noise, run_chain
from ddpm_jax.system.mesh import batch_sharding, gather, shardings, widest_mesh

# So often the host looks at the chain: it costs about 1 % and shows progress.
STEPS_AT_ONCE = 50


def cut(num_steps: int, *, longest: int) -> list[tuple[int, int]]:
    """Cuts a chain into ranges, of one length if there is a good one: each length is one program to compile.

    Args:
      num_steps: steps of the chain, >= 1.
      longest: how long a range may be, >= 1.

    Returns:
      (first, length) of each range.

    >>> cut(1000, longest=50)[-1], cut(128, longest=3)[-1], cut(7, longest=5)
    ((950, 50), (126, 2), [(0, 5), (5, 2)])
    """
    divisors = (length for length in range(min(longest, num_steps), longest // 2, -1) if num_steps % length == 0)
    length = next(divisors, min(longest, num_steps))
    return [(first, min(length, num_steps - first)) for first in range(0, num_steps, length)]


class BatchChain:
    """Draws batches of one size over all local devices, and lets the host look at the chain now and then.

    The parameters, the key and the place in the chain are arguments of what is compiled, so one program serves every
    seed and every checkpoint.
    """

    def __init__(
        self,
        make: MakeChain,
        image_shape: Sequence[int],
        *,
        batch_size: int,
        labels_of: Callable[[Array], Array | None] = lambda indices: None,
        fsdp: int = 1,
    ):
        """Makes the programs.

        Args:
          make: from the network's parameters and the images' labels to the rule of the chain.
          image_shape: (H, W, C).
          batch_size: images at a time, over all devices; a multiple of their number (see `whole_batch`).
          labels_of: the labels of images by their indices.
          fsdp: how many devices share one copy of the parameters, where their number allows it.
        """
        mesh = widest_mesh(jax.local_devices(), fsdp=fsdp)
        spread = lambda array: jax.lax.with_sharding_constraint(array, batch_sharding(mesh))

        def start(params: Params, key: Array, first: Array) -> tuple[Array, Array | None, Chain]:
            indices = first + jnp.arange(batch_size)
            keys, labels = spread(image_keys(key, indices)), labels_of(indices)
            return keys, labels, make(params, labels).init(spread(initial_noise(keys, image_shape)))

        def advance(
            params: Params, keys: Array, labels: Array | None, state: Chain, first: Array, *, num_steps: int
        ) -> Chain:
            sampler = make(gather(mesh, params), labels)
            state = run_chain(keys, sampler, state, first, num_steps=num_steps)
            return state._replace(x=spread(state.x))

        self.num_steps = make(None, labels_of(jnp.zeros(1, jnp.int32))).num_steps
        """Steps of the whole chain."""
        self._mesh = mesh
        self._start = jax.jit(start)
        self._advance = jax.jit(advance, static_argnames="num_steps")
        self._pixels = jax.jit(to_uint8)

    def draw(
        self, key: Array, params: Params, first: int, *, longest: int = STEPS_AT_ONCE
    ) -> Iterator[tuple[int, Array]]:
        """Draws the images first, first + 1, .. of a job.

        Args:
          key: the job's key.
          params: the network's parameters, as `place` gives them.
          first: the index of the batch's first image.
          longest: how many steps there may be between two looks.

        Yields:
          how many steps of the chain are done, first 0 and last all, and the images as they are then, (B, H, W, C)
          uint8.

        Ho et al. 2020, Algorithm 2.
        """
        keys, labels, state = self._start(params, key, first)
        yield 0, self._pixels(state.x)
        for begin, length in cut(self.num_steps, longest=longest):
            state = self._advance(params, keys, labels, state, begin, num_steps=length)
            yield begin + length, jax.block_until_ready(self._pixels(state.x))

    def place(self, params: Params) -> Params:
        """Copies parameters to every device, or shares them out."""
        return jax.device_put(params, shardings(self._mesh, params))


@functools.lru_cache(maxsize=4)
def batch_chain(config: Config, choice: SamplerConfig, *, batch_size: int) -> BatchChain:
    """Makes the chain of a run; the same one, already compiled, when it is asked for again.

    Args:
      config: of the run.
      choice: of the sampler.
      batch_size: see `BatchChain`.
    """
    return BatchChain(
        make_chain(config, choice),
        image_shape(config),
        batch_size=batch_size,
        labels_of=functools.partial(labels_of, config, choice),
        fsdp=config.train.fsdp,
    )


def whole_batch(batch_size: int) -> int:
    """Rounds a batch up to what the local devices can share."""
    devices = jax.local_device_count()
    return math.ceil(batch_size / devices) * devices
