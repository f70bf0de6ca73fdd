"""What a run's network does to images that are given: `editing` in batches of one size over all local devices.

Images go in and come out as uint8 NumPy arrays. Whatever is drawn for image i comes from the key and i alone.
"""

import functools
import itertools
import math
import typing
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddpm_jax.data.decode import open_picture, to_array
from ddpm_jax.editing import Start, between, branch, encode, mix, mix_latents, repaint, unused_keys
from ddpm_jax.generation.batches import cut, whole_batch
from ddpm_jax.generation.job import Job
from ddpm_jax.generation.sampler_config import SamplerConfig, labels_of, make_chain
from ddpm_jax.keys import image_keys
from ddpm_jax.networks import Params, predict_with
from ddpm_jax.pixels import to_float, to_uint8
from ddpm_jax.run.build import build_betas, build_network, image_shape, matmul_precision
from ddpm_jax.samplers.by_name import default_spacing, x0_of_mean
from ddpm_jax.samplers.chain import Chain, Sampler, Trajectory, initial_noise, run_chain
from ddpm_jax.samplers.ddim import ddim_inversion
from ddpm_jax.samplers.respacing import choose_times, respace
from ddpm_jax.schedules import Schedule
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.mesh import batch_sharding, make_mesh, replicated
from ddpm_jax.system.progress import Progress

# So often the host looks at a chain: to show progress, and for the frames of the reverse process.
_STEPS_AT_ONCE, _LOOKS = 50, 40
# Where no number of steps is asked for: enough for the inversion to take images back; RePaint as its authors run it,
# but in half the passes.
_DDIM_STEPS, _REPAINT_STEPS = 250, 250
_JUMP, _RESAMPLES = 10, 5


# Each one program, where step by step it would be dozens.
_encode = jax.jit(encode, static_argnames="draws")
_branch = jax.jit(branch, static_argnames="draws")
_mix, _mix_latents, _image_keys = jax.jit(mix), jax.jit(mix_latents), jax.jit(image_keys)
_initial_noise = jax.jit(initial_noise, static_argnums=1)
_to_float, _to_uint8 = jax.jit(to_float), jax.jit(to_uint8)


def _to_host(leaf: Array | np.ndarray) -> np.ndarray:
    typed = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if typed else leaf)


class _Rule:
    """A kind of chain, compiled once for all batches and all ranges of its steps."""

    def __init__(self, make: Callable[[Params, Any], Sampler], num_steps: int):
        def advance(params: Params, about: Any, start: Start, first: Array, *, num_steps: int) -> Array:
            keys = jax.random.wrap_key_data(start.keys)
            return run_chain(keys, make(params, about), Chain(start.x), first, num_steps=num_steps).x

        def predict(params: Params, about: Any, start: Start, first: Array) -> Array:
            keys = jax.random.wrap_key_data(start.keys)
            return make(params, about).step(keys, Chain(start.x), first)[1].x0

        self.num_steps = num_steps
        self.advance = jax.jit(advance, static_argnames="num_steps")
        self.predict = jax.jit(predict)
        """The clean images that a step believes in, from the images before it."""

    def ranges(self, stops: Sequence[int] = ()) -> list[tuple[int, int]]:
        """Cuts the chain at the steps given, and between them into ranges of at most so many steps: (first, length)."""
        longest = min(_STEPS_AT_ONCE, math.ceil(self.num_steps / _LOOKS))
        edges = sorted({0, *stops, self.num_steps})
        return [
            (begin + at, length)
            for begin, end in itertools.pairwise(edges)
            for at, length in cut(end - begin, longest=longest)
        ]


# Told the first image of a batch, the step that it stands before, the batch, and what it is about.
_Watch = Callable[[int, int, Start, Any], object]

# Host arrays as they are made, device arrays where a chain is traced.
_Either = typing.Any


class _Span(typing.NamedTuple):
    """Which steps of the chain images take part in, and what they are told to be."""

    labels: _Either
    depth: _Either
    until: _Either


class _Hole(typing.NamedTuple):
    """What is known of images, and what they are told to be."""

    labels: _Either
    x0: _Either
    mask: _Either


class Editor:
    """Edits images with the network of a run."""

    def __init__(self, job: Job, *, batch_size: int = 64, times: Sequence[int] = ()):
        """Makes the chains.

        Args:
          job: the weights, the seed, and the chain: any number of steps of "ancestral" or "ddim". The number, if it is
            given, and the guidance are those of RePaint and of DDIM's way to noise and back too.
          batch_size: images at a time, >= 1; rounded up to a multiple of the devices. No image depends on it.
          times: of the paper's t, each in [0, T], those that the chain visits in any case: it has a step more for each
            that is new to it.

        Raises:
          UserError: the run cannot be sampled so.
        """
        config, diffusion = job.config, job.config.diffusion
        mesh = make_mesh(jax.local_devices())
        self._shared_out = batch_sharding(mesh)
        self._params = jax.device_put(job.params, replicated(mesh))
        self._batch_size = whole_batch(batch_size)
        self.job, self.shape = job, image_shape(config)

        self._visited = [time - 1 for time in times if time]
        self._make = make_chain(config, job.choice, visited=self._visited)
        self.schedule = self._schedule(job.choice, visited=self._visited)
        self._reverse = _Rule(
            lambda params, span: between(self._make(params, span.labels), span.depth, span.until), self.num_steps
        )

        asked, guidance_scale = job.choice.steps, job.choice.guidance_scale
        self._there_and_back = SamplerConfig(
            "ddim", asked or min(_DDIM_STEPS, diffusion.num_steps), clip="off", guidance_scale=guidance_scale
        )
        # A learned variance is of single steps.
        usual = None if diffusion.variance == "learned" else min(_REPAINT_STEPS, diffusion.num_steps)
        self._filling = SamplerConfig(steps=asked or usual, guidance_scale=guidance_scale)
        self.ddim_steps = self._there_and_back.steps
        """Steps of DDIM to the noise, and as many back."""
        self.repaint_steps = self._filling.steps or diffusion.num_steps
        """Steps of the chain that RePaint goes up and down."""
        self.jump = max(1, min(_JUMP, self.repaint_steps // 4))
        self.settings = {
            "ddim": f"DDIM, eta = 0, without clipping, {self.ddim_steps} steps each way",
            "repaint": f"RePaint, {self.repaint_steps} steps, jumps of {self.jump}, {_RESAMPLES} passes",
        }

    def _schedule(self, choice: SamplerConfig, *, visited: Sequence[int] = ()) -> Schedule:
        """Makes the tables of the chain of `make_chain`."""
        betas = build_betas(self.job.config)
        spacing = default_spacing(choice.sampler, choice.steps) if choice.spacing is None else choice.spacing
        return respace(betas, choose_times(betas, num_steps=choice.steps, spacing=spacing, visited=visited))

    @functools.cached_property
    def _invert(self) -> _Rule:
        """DDIM from images to noise."""
        config, choice = self.job.config, self._there_and_back
        schedule, network, betas = self._schedule(choice), build_network(config), build_betas(config)
        prediction, variance = config.diffusion.prediction, config.diffusion.variance

        def invert(params: Params, labels: Array | None) -> Sampler:
            predict = predict_with(network, params, labels, guidance_scale=choice.guidance_scale, variance=variance)
            if prediction == "mean":
                predict = x0_of_mean(betas, predict, variance=variance)
            target = "x0" if prediction == "mean" else prediction
            return ddim_inversion(schedule, predict, prediction=target, variance=variance)

        return _Rule(invert, schedule.num_steps)

    @functools.cached_property
    def _ddim(self) -> _Rule:
        """DDIM from that noise to images."""
        make = make_chain(self.job.config, self._there_and_back)
        return _Rule(make, self._schedule(self._there_and_back).num_steps)

    @functools.cached_property
    def _repaint(self) -> _Rule:
        """The walk of RePaint."""
        schedule, make = self._schedule(self._filling), make_chain(self.job.config, self._filling)

        def fill(params: Params, hole: _Hole) -> Sampler:
            return repaint(
                schedule, make(params, hole.labels), hole.x0, hole.mask, jump=self.jump, resamples=_RESAMPLES
            )

        one = np.zeros((1, *self.shape), np.float32)
        return _Rule(fill, fill(None, _Hole(self.labels([0]), one, one[..., :1])).num_steps)

    @property
    def num_steps(self) -> int:
        """Steps of the reverse chain."""
        return self.schedule.num_steps

    def paper_time(self, depth: int) -> int:
        """Gives the paper's t, 0 to T, of a depth of the chain."""
        return int(self.schedule.timesteps[depth - 1]) + 1 if depth else 0

    def depths(self, parts: int) -> list[int]:
        """Cuts the chain into equal parts, as far as it has the steps: the depth that each begins at, deepest first."""
        return sorted({math.ceil(self.num_steps * part / parts) for part in range(1, parts + 1)}, reverse=True)

    def depth_of(self, time: int) -> int:
        """Gives the depth of the chain at one of the paper's t that it visits, as those that it was made for.

        Raises:
          ValueError: the chain does not visit it.
        """
        times = [0, *(np.asarray(self.schedule.timesteps) + 1).tolist()]
        if time not in times:
            raise ValueError(f"a chain of {self.num_steps} steps does not visit t = {time}: name it in `times`")
        return times.index(time)

    def labels(self, labels: typing.Iterable[int | None] | None, *, each: int = 1) -> np.ndarray | None:
        """Makes labels of a list; None in it is "not told". None for an unconditional run.

        Args:
          labels: one an image.
          each: how often each is repeated.
        """
        classes = self.job.config.model.num_classes
        if not classes or labels is None:
            return None
        told = [classes if label is None else label for label in labels]
        return np.repeat(np.asarray(told, np.int32), each)

    def labels_in_turn(self, number: int) -> np.ndarray | None:
        """Gives the labels of the images 0 .. number-1 of the sampling job; None for an unconditional run."""
        labels = labels_of(self.job.config, self.job.choice, jnp.arange(number))
        return None if labels is None else np.asarray(labels)

    def _run(
        self,
        rule: _Rule,
        start: Start,
        about: Any,
        *,
        doing: str,
        steps: tuple[int, int] | None = None,
        stops: Sequence[int] = (),
        watch: _Watch | None = None,
    ) -> np.ndarray:
        """Runs chains batch by batch; `watch` is called at every look, before each of the `stops` in any case."""
        number, size = len(start.x), self._batch_size
        first, stop = steps or (0, rule.num_steps)
        ranges = [(at, length) for at, length in rule.ranges(stops) if first < at + length and at < stop]
        whole, done = jax.tree.map(_to_host, (start, about)), []
        with (
            matmul_precision(self.job.config),
            Progress(math.ceil(number / size) * sum(length for _, length in ranges), description=doing) as progress,
        ):
            for begin in range(0, number, size):
                rows = np.minimum(np.arange(begin, begin + size), number - 1)
                batch: Start
                batch, told = jax.device_put(jax.tree.map(lambda leaf, rows=rows: leaf[rows], whole), self._shared_out)
                for at, length in ranges:
                    if watch is not None:
                        watch(begin, at, batch, told)
                    x = rule.advance(self._params, told, batch, np.int32(at), num_steps=length)
                    batch = batch._replace(x=jax.block_until_ready(x))
                    progress.update(length)
                done.append(np.asarray(batch.x)[: number - begin])
        return np.concatenate(done)

    def decode(
        self, start: Start, labels: np.ndarray | None, depth: np.ndarray, *, until: int = 0, doing: str = "decoding"
    ) -> np.ndarray:
        """Runs the reverse chain of each image from its own depth.

        Args:
          start: of N chains.
          labels: (N,), see `labels`.
          depth: (N,) int32.
          until: where all end.
          doing: what progress says.

        Returns:
          (N, H, W, C) float32.
        """
        steps = (self.num_steps - int(depth.max()), self.num_steps - until)
        span = _Span(labels, depth, np.full_like(depth, until))
        return self._run(self._reverse, start, span, doing=doing, steps=steps)

    def sample(self, number: int, labels: np.ndarray | None, *, watched: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws the images 0 .. number-1 of the sampling job.

        Args:
          number: how many.
          labels: (number,).
          watched: of how many to keep what they were on the way.

        Returns:
          the images, (number, H, W, C) uint8, and the frames, (F, watched, H, W, C) uint8.
        """
        start, span = self._whole_chain(number, labels)
        seen: dict[int, list[np.ndarray]] = {}

        def watch(begin: int, at: int, batch: Start, span: _Span) -> None:
            if begin < watched:
                seen.setdefault(begin, []).append(np.asarray(_to_uint8(batch.x))[: watched - begin])

        images = self._run(self._reverse, start, span, doing=f"sampling {number} images", watch=watch)
        pixels = np.asarray(_to_uint8(images))
        frames = np.concatenate([np.stack(looks) for looks in seen.values()], axis=1)[:, :watched]
        return pixels, np.concatenate([frames, pixels[None, :watched]])

    def trajectory(
        self, number: int, labels: np.ndarray | None, *, depths: Sequence[int]
    ) -> tuple[np.ndarray, Trajectory]:
        """Draws the images 0 .. number-1 of the sampling job, with x_t and the predicted x_0 at some depths.

        Args:
          number: how many.
          labels: (number,).
          depths: K of them, each in [1, T], no two the same.

        Returns:
          the images, (number, H, W, C) float32, and the frames, as of `samplers.sample_trajectory`.
        """
        start, span = self._whole_chain(number, labels)
        stops = [self.num_steps - depth for depth in depths]
        x_t = np.empty((len(depths), *start.x.shape), np.float32)
        x0 = np.empty_like(x_t)

        def watch(begin: int, at: int, batch: Start, told: _Span) -> None:
            if at in stops:
                predicted = self._reverse.predict(self._params, told, batch, np.int32(at))
                for frames, seen in ((x_t, batch.x), (x0, predicted)):
                    frame = frames[stops.index(at), begin : begin + self._batch_size]
                    frame[:] = np.asarray(seen)[: len(frame)]

        doing = f"sampling {number} images over time"
        images = self._run(self._reverse, start, span, doing=doing, stops=stops, watch=watch)
        return images, Trajectory(np.asarray(depths, np.int32) - 1, x_t, x0)  # type: ignore[arg-type]

    def _whole_chain(self, number: int, labels: np.ndarray | None) -> tuple[Start, _Span]:
        """Gives the noise of the images 0 .. number-1 of the sampling job, and the span of all steps."""
        keys = _image_keys(jax.random.key(self.job.seed), np.arange(number))
        whole = np.full(number, self.num_steps, np.int32)
        return Start(keys, _initial_noise(keys, self.shape)), _Span(labels, whole, np.zeros_like(whole))

    def share_latents(
        self, key: Array, labels: np.ndarray | None, *, depths: Sequence[int], draws: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draws one chain, stops it at each depth, and goes on from there several times (Ho et al. 2020, Fig. 7).

        Args:
          key: of the figure.
          labels: (1,), of all images.
          depths: D of them, each in [0, T].
          draws: images from each.

        Returns:
          (D, H, W, C) the latents and (D, draws, H, W, C) the images, uint8.
        """
        number = len(depths)
        latent_key, chain_key = jax.random.split(key)
        keys = _image_keys(latent_key, np.zeros(number, int))
        depth, whole = np.asarray(depths, np.int32), np.full(number, self.num_steps, np.int32)
        start = Start(keys, _initial_noise(keys, self.shape))
        x_t = self._run(self._reverse, start, _Span(_repeat(labels, number), whole, depth), doing="drawing latents")
        start = _branch(_image_keys(chain_key, np.arange(number)), x_t, draws=draws)
        images = self.decode(start, _repeat(labels, number * draws), np.repeat(depth, draws), doing="sharing latents")
        return np.asarray(_to_uint8(x_t)), self._pixels(images, number, draws)

    def reconstruct(
        self, key: Array, images: np.ndarray, labels: np.ndarray | None, depth: np.ndarray, *, draws: int = 1
    ) -> np.ndarray:
        """Diffuses images and takes them back: `editing.encode_decode`, each from its own depth.

        Args:
          key: of the figure.
          images: (B, H, W, C) uint8.
          labels: (B,).
          depth: (B,) integers.
          draws: of each image.

        Returns:
          (B, draws, H, W, C) uint8.
        """
        depth = np.asarray(depth, np.int32)
        start = _encode(key, self.schedule, _to_float(images), depth, draws=draws)
        decoded = self.decode(start, _repeat(labels, draws), np.repeat(depth, draws), doing="reconstructing")
        return self._pixels(decoded, len(images), draws)

    def interpolate(
        self,
        key: Array,
        images_a: np.ndarray,
        images_b: np.ndarray,
        lambdas: np.ndarray,
        depth: np.ndarray,
        *,
        labels: np.ndarray | None = None,
        indices: np.ndarray | None = None,
    ) -> np.ndarray:
        """Interpolates between pairs: `editing.interpolate`, each from its own depth.

        Args:
          key: of the figure.
          images_a: (B, H, W, C) uint8.
          images_b: likewise.
          lambdas: (L,).
          depth: (B,) integers.
          labels: (B,) of both images of each pair; not told if not given.
          indices: (B,) whose noise each pair has; 0..B-1 if not given.

        Returns:
          (B, L, H, W, C) uint8.
        """
        depth, lambdas = np.asarray(depth, np.int32), np.asarray(lambdas, np.float32)
        start = _mix(
            key,
            self.schedule,
            _to_float(images_a),
            _to_float(images_b),
            lambdas,
            depth,
            indices=indices,
        )
        told = _repeat(self._told(labels, len(depth)), len(lambdas))
        decoded = self.decode(start, told, np.repeat(depth, len(lambdas)), doing="interpolating")
        return self._pixels(decoded, len(images_a), len(lambdas))

    def ddim_interpolate(
        self, images_a: np.ndarray, images_b: np.ndarray, lambdas: np.ndarray, *, labels: np.ndarray | None = None
    ) -> np.ndarray:
        """Interpolates between pairs along the great circle of their noises: `editing.ddim_interpolate`.

        Args:
          images_a: (B, H, W, C) uint8.
          images_b: likewise.
          lambdas: (L,).
          labels: (B,) of both images of each pair; not told if not given.

        Returns:
          (B, L, H, W, C) uint8.
        """
        x0, told = _to_float(np.concatenate([images_a, images_b])), self._told(labels, len(images_a))
        both = None if told is None else np.tile(told, 2)
        x_a, x_b = np.split(self._run(self._invert, Start(unused_keys(len(x0)), x0), both, doing="inverting"), 2)
        return self.ddim_between(x_a, x_b, lambdas, labels=labels)

    def ddim_between(
        self,
        x_a: Array | np.ndarray,
        x_b: Array | np.ndarray,
        lambdas: np.ndarray,
        *,
        labels: np.ndarray | None = None,
    ) -> np.ndarray:
        """Decodes what lies on the great circle between pairs of noises, (B, H, W, C) each, as `ddim_interpolate`."""
        x, told = _mix_latents(x_a, x_b, np.asarray(lambdas, np.float32)), self._told(labels, len(x_a))
        start = Start(unused_keys(len(x)), x)
        decoded = self._run(self._ddim, start, _repeat(told, len(lambdas)), doing="interpolating by DDIM")
        return self._pixels(decoded, len(x_a), len(lambdas))

    def inpaint(
        self, key: Array, images: np.ndarray, known: np.ndarray, labels: np.ndarray | None, *, draws: int = 1
    ) -> np.ndarray:
        """Fills in what is not known of images: `editing.inpaint`.

        Args:
          key: of the figure.
          images: (B, H, W, C) uint8.
          known: (B, H, W) bool.
          labels: (B,).
          draws: of each image.

        Returns:
          (B, draws, H, W, C) uint8, equal to `images` where they are known.
        """
        x0, mask = (np.repeat(each, draws, axis=0) for each in (_to_float(images), known[..., None]))
        keys = _branch(_image_keys(key, np.arange(len(images))), _to_float(images), draws=draws).keys
        hole = _Hole(_repeat(labels, draws), x0, mask)
        filled = self._run(self._repaint, Start(keys, _initial_noise(keys, self.shape)), hole, doing="inpainting")
        return self._pixels(filled, len(images), draws)

    def _told(self, labels: np.ndarray | None, number: int) -> np.ndarray | None:
        """Says "not told" to a conditional network where there are no labels."""
        return self.labels([None] * number) if labels is None else labels

    def _pixels(self, images: np.ndarray, number: int, each: int) -> np.ndarray:
        return np.asarray(_to_uint8(images)).reshape(number, each, *self.shape)


def _repeat(labels: np.ndarray | None, each: int) -> np.ndarray | None:
    return None if labels is None else np.repeat(labels, each)


def read_mask(file: str, shape: tuple[int, int, int], *, size: tuple[int, int]) -> np.ndarray:
    """Reads a mask: white is known and kept, black is drawn anew.

    Args:
      file: a picture of the aspect ratio of the image that it is for, and cropped as that one; or of the size of the
        run's images.
      shape: (H, W, C) of the run's images.
      size: (H, W) of the image that it is for, as it was given.

    Returns:
      (H, W) bool, True where white.

    Raises:
      UserError: it is no picture, of another aspect ratio, or nothing of it is black.
    """
    mask = open_picture(file)
    width, height = mask.size
    # A picture made smaller has its sides rounded to whole pixels.
    alike = abs(width / size[1] - height / size[0]) <= 0.5 / size[1] + 0.5 / size[0]
    if not alike and (height, width) != shape[:2]:
        raise UserError(
            f"the mask {file} is {width}x{height}, and the picture that it is for {size[1]}x{size[0]}: "
            f"make it of the same aspect ratio, or {shape[1]}x{shape[0]} as the run's images"
        )
    known = to_array(mask, (*shape[:2], 1))[..., 0] >= 128
    if known.all():
        raise UserError(
            f"the mask {file} is white all over: paint black what is to be drawn anew, leave white the rest"
        )
    return known
