"""Edits given images with a trained run: the functions of `editing`, in batches over all local devices.

Images are uint8 NumPy arrays. All noise of image i depends only on the key and on i.
"""

import functools
import math
import typing
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddpm_jax.config import DataConfig
from ddpm_jax.data.decode import open_picture, to_array
from ddpm_jax.editing import ChainStart, between, branch, encode, mix, mix_latents, repaint, unused_keys
from ddpm_jax.generation.batches import STEPS_PER_CALL, Driver, Program, Watch, cut
from ddpm_jax.generation.chains import labels_of, make_chain, spacing_of
from ddpm_jax.generation.job import SamplingJob
from ddpm_jax.generation.sampler_config import SamplerConfig
from ddpm_jax.generation.store import missing_ranges
from ddpm_jax.keys import image_keys, make_key
from ddpm_jax.networks import Params, predict_with
from ddpm_jax.pixels import to_float, to_uint8
from ddpm_jax.run.build import build_betas, image_shape
from ddpm_jax.samplers.by_name import x0_of_mean
from ddpm_jax.samplers.chain import Chain, Sampler, Trajectory, initial_noise
from ddpm_jax.samplers.ddim import ddim_inversion
from ddpm_jax.samplers.respacing import choose_timesteps, respace
from ddpm_jax.schedules import Schedule
from ddpm_jax.system.errors import UserError

# Images start at levels of their own: shorter ranges waste fewer steps before the first. Also the frames of the GIF.
_MIN_RANGES = 40
# Default steps: enough for DDIM's inversion to reproduce images; RePaint as its authors run it, with half the passes.
_DDIM_STEPS, _REPAINT_STEPS = 250, 250
_JUMP, _RESAMPLES = 10, 5

# Each is one program; called step by step they would be dozens.
_encode = jax.jit(encode, static_argnames="draws")
_branch = jax.jit(branch, static_argnames="draws")
_mix, _mix_latents, _image_keys = jax.jit(mix), jax.jit(mix_latents), jax.jit(image_keys)
_initial_noise = jax.jit(initial_noise, static_argnums=1)
_to_float, _to_uint8 = jax.jit(to_float), jax.jit(to_uint8)

Labels = Sequence[int | None] | np.ndarray | None
"""Class labels of N images, None for no label; None instead of all if no image has one."""

# Arrays of the host before a program, traced in it.
_Array = typing.Any


class _Levels(typing.NamedTuple):
    """Labels of images, and the noise levels between which their reverse chains run."""

    labels: _Array
    start: _Array
    end: _Array


class _Known(typing.NamedTuple):
    """Labels of images, and their known pixels."""

    labels: _Array
    x0: _Array
    mask: _Array


class Editor:
    """Edits images with the network of a run.

    Noise levels are those of `editing`: the number of steps of the job's chain that are left.
    """

    def __init__(self, job: SamplingJob, *, batch_size: int = 64, extra_t: Sequence[int] = ()):
        """Makes the chains.

        Args:
          job: the run, the seed, and the chain: "ancestral" or "ddim" of any number of steps. The number, if given, and
            the guidance are also used for RePaint and for DDIM's way to noise and back.
          batch_size: at least 1; rounded up to a multiple of the devices. It does not change the images.
          extra_t: values of the paper's t, each in [0, T], that the chain includes in any case, as extra steps where it
            would skip them.

        Raises:
          UserError: the run cannot be sampled this way.
        """
        self.job, self.shape = job, image_shape(job.trained.config)
        self._config, self._network = job.trained.config, job.trained.network
        self._driver = Driver(self._config, batch_size=batch_size)
        self._params = self._driver.place(job.trained.params)

        extra_timesteps = [t - 1 for t in extra_t if t]
        self.schedule = self._schedule(job.sampler, extra_timesteps=extra_timesteps)
        make = make_chain(self._config, self._network, job.sampler, extra_timesteps=extra_timesteps)
        self._reverse = self._program(
            self.num_steps, lambda params, levels: between(make(params, levels.labels), levels.start, levels.end)
        )

        def predict_x0(params: Params, batch: tuple[ChainStart, _Levels], state: Chain, step: Array) -> Array:
            start, levels = batch
            return make(params, levels.labels).step(start.keys, state, step)[1].x0

        self._predict_x0 = self._driver.compile(predict_x0)

        steps, guidance_scale = job.sampler.steps, job.sampler.guidance_scale
        num_steps, variance = self._config.diffusion.num_steps, self._config.diffusion.variance
        self._ddim_config = SamplerConfig(
            "ddim", steps or min(_DDIM_STEPS, num_steps), clip="off", guidance_scale=guidance_scale
        )
        # A learned variance is of single steps.
        default = None if variance == "learned" else min(_REPAINT_STEPS, num_steps)
        self._repaint_config = SamplerConfig(steps=steps or default, guidance_scale=guidance_scale)
        self.ddim_steps = self._ddim_config.steps
        """Steps of DDIM to the noise, and as many back."""
        self.repaint_steps = self._repaint_config.steps or num_steps
        """Steps of the chain on which RePaint jumps."""
        self.jump = max(1, min(_JUMP, self.repaint_steps // 4))
        self.settings = {
            "ddim": f"DDIM, eta = 0, without clipping, {self.ddim_steps} steps each way",
            "repaint": f"RePaint, {self.repaint_steps} steps, jumps of {self.jump}, {_RESAMPLES} passes",
        }

    def _schedule(self, sampler_config: SamplerConfig, *, extra_timesteps: Sequence[int] = ()) -> Schedule:
        """Makes the tables of the chain of `make_chain`."""
        betas, steps = build_betas(self._config), sampler_config.steps
        spacing = spacing_of(self._config, sampler_config)
        return respace(
            betas, choose_timesteps(betas, num_steps=steps, spacing=spacing, extra_timesteps=extra_timesteps)
        )

    def _program(self, num_steps: int, make: Callable[[Params, Any], Sampler]) -> Program:
        """Makes the program of a sampler on batches of (`ChainStart`, conditioning)."""
        return self._driver.chain(num_steps, make, lambda shared, batch: (batch[0].keys, batch[0].x, batch[1]))

    @functools.cached_property
    def _invert(self) -> Program:
        """DDIM from images to noise."""
        sampler_config, diffusion = self._ddim_config, self._config.diffusion
        schedule, betas = self._schedule(sampler_config), build_betas(self._config)
        prediction, variance = diffusion.prediction, diffusion.variance

        def invert(params: Params, labels: Array | None) -> Sampler:
            predict = predict_with(
                self._network, params, labels, guidance_scale=sampler_config.guidance_scale, variance=variance
            )
            if prediction == "mean":
                predict = x0_of_mean(betas, predict, variance=variance)
            target = "x0" if prediction == "mean" else prediction
            return ddim_inversion(schedule, predict, prediction=target, variance=variance)

        return self._program(schedule.num_steps, invert)

    @functools.cached_property
    def _ddim(self) -> Program:
        """DDIM from that noise to images."""
        make = make_chain(self._config, self._network, self._ddim_config)
        return self._program(self._schedule(self._ddim_config).num_steps, make)

    @functools.cached_property
    def _repaint(self) -> Program:
        """RePaint from noise to images."""
        schedule, make = (
            self._schedule(self._repaint_config),
            make_chain(self._config, self._network, self._repaint_config),
        )

        def fill(params: Params, known: _Known) -> Sampler:
            chain = make(params, known.labels)
            return repaint(schedule, chain, known.x0, known.mask, jump=self.jump, resamples=_RESAMPLES)

        one = np.zeros((1, *self.shape), np.float32)
        return self._program(fill(None, _Known(self._labels(None, 1), one, one[..., :1])).num_steps, fill)

    @property
    def num_steps(self) -> int:
        """Steps of the reverse chain."""
        return self.schedule.num_steps

    def paper_t(self, level: int) -> int:
        """Returns the paper's t, 0 to T, of a noise level."""
        return int(self.schedule.timesteps[level - 1]) + 1 if level else 0

    def level_at(self, t: int) -> int:
        """Returns the noise level at one of the paper's t.

        Raises:
          ValueError: the chain skips this t.
        """
        included = [0, *(np.asarray(self.schedule.timesteps) + 1).tolist()]
        if t not in included:
            raise ValueError(f"a chain of {self.num_steps} steps skips t = {t}: name it in `extra_t`")
        return included.index(t)

    def levels(self, parts: int) -> list[int]:
        """Returns the levels at which equal parts of the chain start, noisiest first; fewer in a shorter chain."""
        return sorted({math.ceil(self.num_steps * part / parts) for part in range(1, parts + 1)}, reverse=True)

    def job_labels(self, number: int) -> list[int] | None:
        """Returns the labels of the images 0 .. number-1 of the sampling job; None for an unconditional run."""
        labels = labels_of(self._config, self.job.sampler, jnp.arange(number))
        return None if labels is None else labels.tolist()

    def _labels(self, labels: Labels, number: int, each: int = 1) -> np.ndarray | None:
        """Returns the labels of N images as the network takes them, each repeated; None for an unconditional run."""
        classes = self._config.model.num_classes
        if not classes:
            return None
        labels = [None] * number if labels is None else labels
        return np.repeat(np.array([classes if label is None else label for label in labels], np.int32), each)

    def _run(
        self,
        program: Program,
        start: ChainStart,
        conditioning: Any,
        *,
        description: str,
        steps: tuple[int, int] | None = None,
        stops: Sequence[int] = (),
        watch: Watch | None = None,
    ) -> np.ndarray:
        """Runs chains, or the ranges that cover their steps [first, stop): (N, H, W, C) float32."""
        first, stop = steps or (0, program.num_steps)
        longest = min(STEPS_PER_CALL, math.ceil(program.num_steps / _MIN_RANGES))
        ranges = cut(program.num_steps, longest=longest, stops=stops)
        results = self._driver.run(
            program,
            self._params,
            missing_ranges([], len(start.x), longest=self._driver.batch_size),
            lambda indices: jax.tree.map(lambda leaf: leaf[indices], (start, conditioning)),
            ranges=[(at, length) for at, length in ranges if first < at + length and at < stop],
            watch=watch,
            description=description,
        )
        return np.concatenate([np.asarray(state.x)[: stop - first] for first, stop, state in results])

    def _decode(
        self, start: ChainStart, labels: np.ndarray | None, level: np.ndarray, *, description: str
    ) -> np.ndarray:
        """Runs the reverse chain of each image from its own level to the clean image."""
        levels = _Levels(labels, level, np.zeros_like(level))
        steps = (self.num_steps - int(level.max()), self.num_steps)
        return self._run(self._reverse, start, levels, steps=steps, description=description)

    def sample(self, number: int, labels: Labels, *, watched: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws the images 0 .. number-1 of the sampling job.

        Args:
          number: of images.
          labels: (number,).
          watched: of how many images to keep frames of the reverse process.

        Returns:
          the images, (number, H, W, C) uint8, and the frames, (F, watched, H, W, C) uint8.
        """
        frames: dict[int, list[np.ndarray]] = {}

        def watch(first: int, step: int, batch: Any, state: Chain) -> None:
            if first < watched:
                frames.setdefault(first, []).append(np.asarray(_to_uint8(state.x)))

        images = self._run(
            self._reverse, *self._whole_chain(number, labels), watch=watch, description=f"sampling {number} images"
        )
        pixels = np.asarray(_to_uint8(images))
        over_time = np.concatenate([np.stack(batch) for batch in frames.values()], axis=1)[:, :watched]
        return pixels, np.concatenate([over_time, pixels[None, :watched]])

    def trajectory(self, number: int, labels: Labels, *, levels: Sequence[int]) -> tuple[np.ndarray, Trajectory]:
        """Draws the images 0 .. number-1 of the sampling job, with x_t and the predicted x_0 at some noise levels.

        Args:
          number: of images.
          labels: (number,).
          levels: K different ones, each in [1, N].

        Returns:
          the images, (number, H, W, C) float32, and the frames, as `sample_trajectory` returns them.
        """
        start, conditioning = self._whole_chain(number, labels)
        stops = [self.num_steps - level for level in levels]
        x_t = np.empty((len(levels), *start.x.shape), np.float32)
        x0 = np.empty_like(x_t)

        def watch(first: int, step: int, batch: Any, state: Chain) -> None:
            if step in stops:
                predicted = self._predict_x0(self._params, batch, state, step)
                for frames, values in ((x_t, state.x), (x0, predicted)):
                    frame = frames[stops.index(step), first : first + self._driver.batch_size]
                    frame[:] = np.asarray(values)[: len(frame)]

        description = f"sampling {number} images over time"
        images = self._run(self._reverse, start, conditioning, stops=stops, watch=watch, description=description)
        return images, Trajectory(np.asarray(levels, np.int32) - 1, x_t, x0)  # type: ignore[arg-type]

    def _whole_chain(self, number: int, labels: Labels) -> tuple[ChainStart, _Levels]:
        """Returns the noise of the images 0 .. number-1 of the sampling job, and the levels of all steps."""
        keys = _image_keys(make_key(self.job.seed), np.arange(number))
        level = np.full(number, self.num_steps, np.int32)
        return ChainStart(keys, _initial_noise(keys, self.shape)), _Levels(
            self._labels(labels, number), level, np.zeros_like(level)
        )

    def share_latents(
        self, key: Array, labels: Labels, *, levels: Sequence[int], draws: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draws x_t of one chain at each noise level, and several images from each (Ho et al. 2020, Fig. 7).

        Args:
          key: of the figure.
          labels: (1,) of all images.
          levels: L of them, each in [0, N].
          draws: images per level.

        Returns:
          the latents, (L, H, W, C), and the images, (L, draws, H, W, C), uint8.
        """
        number = len(levels)
        latent_key, chain_key = jax.random.split(key)
        keys = _image_keys(latent_key, np.zeros(number, int))
        level, whole = np.asarray(levels, np.int32), np.full(number, self.num_steps, np.int32)
        start = ChainStart(keys, _initial_noise(keys, self.shape))
        conditioning = _Levels(self._labels(labels, 1, number), whole, level)
        x_t = self._run(self._reverse, start, conditioning, description="drawing latents")
        start = _branch(_image_keys(chain_key, np.arange(number)), x_t, draws=draws)
        all_labels = self._labels(labels, 1, number * draws)
        images = self._decode(start, all_labels, np.repeat(level, draws), description="sharing latents")
        return np.asarray(_to_uint8(x_t)), self._pixels(images, number, draws)

    def reconstruct(
        self, key: Array, images: np.ndarray, labels: Labels, level: np.ndarray, *, draws: int = 1
    ) -> np.ndarray:
        """Noises images to levels of their own and denoises them, see `editing.encode_decode`.

        Args:
          key: of the figure.
          images: (B, H, W, C) uint8.
          labels: (B,).
          level: (B,) integers.
          draws: reconstructions per image.

        Returns:
          (B, draws, H, W, C) uint8.
        """
        level = np.asarray(level, np.int32)
        start = _encode(key, self.schedule, _to_float(images), level, draws=draws)
        all_labels = self._labels(labels, len(images), draws)
        decoded = self._decode(start, all_labels, np.repeat(level, draws), description="reconstructing")
        return self._pixels(decoded, len(images), draws)

    def interpolate(
        self,
        key: Array,
        images_a: np.ndarray,
        images_b: np.ndarray,
        lambdas: np.ndarray,
        level: np.ndarray,
        *,
        labels: Labels = None,
        indices: np.ndarray | None = None,
    ) -> np.ndarray:
        """Interpolates between pairs of images, each at a noise level of its own, see `editing.interpolate`.

        Args:
          key: of the figure.
          images_a: (B, H, W, C) uint8.
          images_b: likewise.
          lambdas: (L,).
          level: (B,) integers.
          labels: (B,) of both images of each pair.
          indices: (B,) indices of the pairs' noises; 0..B-1 if not given.

        Returns:
          (B, L, H, W, C) uint8.
        """
        number, level, lambdas = len(images_a), np.asarray(level, np.int32), np.asarray(lambdas, np.float32)
        start = _mix(key, self.schedule, _to_float(images_a), _to_float(images_b), lambdas, level, indices=indices)
        all_labels = self._labels(labels, number, len(lambdas))
        decoded = self._decode(start, all_labels, np.repeat(level, len(lambdas)), description="interpolating")
        return self._pixels(decoded, number, len(lambdas))

    def ddim_interpolate(
        self, images_a: np.ndarray, images_b: np.ndarray, lambdas: np.ndarray, *, labels: Labels = None
    ) -> np.ndarray:
        """Interpolates between pairs along the great circle between their noises, see `editing.ddim_interpolate`.

        Args:
          images_a: (B, H, W, C) uint8.
          images_b: likewise.
          lambdas: (L,).
          labels: (B,) of both images of each pair.

        Returns:
          (B, L, H, W, C) uint8.
        """
        x0 = _to_float(np.concatenate([images_a, images_b]))
        both = self._labels(None if labels is None else [*labels, *labels], len(x0))
        noises = self._run(self._invert, ChainStart(unused_keys(len(x0)), x0), both, description="inverting")
        x_a, x_b = np.split(noises, 2)
        return self.ddim_between(x_a, x_b, lambdas, labels=labels)

    def ddim_between(
        self, x_a: Array | np.ndarray, x_b: Array | np.ndarray, lambdas: np.ndarray, *, labels: Labels = None
    ) -> np.ndarray:
        """Draws the images of points on the great circle between pairs of noises, (B, H, W, C), by DDIM."""
        x = _mix_latents(x_a, x_b, np.asarray(lambdas, np.float32))
        start, all_labels = ChainStart(unused_keys(len(x)), x), self._labels(labels, len(x_a), len(lambdas))
        decoded = self._run(self._ddim, start, all_labels, description="interpolating by DDIM")
        return self._pixels(decoded, len(x_a), len(lambdas))

    def inpaint(
        self, key: Array, images: np.ndarray, known: np.ndarray, labels: Labels, *, draws: int = 1
    ) -> np.ndarray:
        """Fills in unknown pixels, see `editing.inpaint`.

        Args:
          key: of the figure.
          images: (B, H, W, C) uint8.
          known: (B, H, W) bool.
          labels: (B,).
          draws: results per image.

        Returns:
          (B, draws, H, W, C) uint8, equal to `images` at known pixels.
        """
        x0, mask = (np.repeat(each, draws, axis=0) for each in (_to_float(images), known[..., None]))
        keys = _branch(_image_keys(key, np.arange(len(images))), _to_float(images), draws=draws).keys
        start = ChainStart(keys, _initial_noise(keys, self.shape))
        conditioning = _Known(self._labels(labels, len(images), draws), x0, mask)
        filled = self._run(self._repaint, start, conditioning, description="inpainting")
        return self._pixels(filled, len(images), draws)

    def _pixels(self, images: np.ndarray, number: int, each: int) -> np.ndarray:
        return np.asarray(_to_uint8(images)).reshape(number, each, *self.shape)


def read_mask(
    file: str,
    shape: tuple[int, int, int],
    *,
    size: tuple[int, int],
    max_megapixels: float = DataConfig.max_megapixels,
) -> np.ndarray:
    """Reads a mask: white is kept, black is filled in.

    Args:
      file: a picture of the aspect ratio of its image, and cropped like it; or of the size of the run's images.
      shape: (H, W, C) of the run's images.
      size: (H, W) of the mask's image as given.
      max_megapixels: larger masks are refused; 0: none.

    Returns:
      (H, W) bool, True where white.

    Raises:
      UserError: it is not a picture, is too large, has another aspect ratio, or has no black.
    """
    mask = open_picture(file, max_megapixels=max_megapixels)
    width, height = mask.size
    # The sides of a scaled picture are rounded to whole pixels.
    alike = abs(width / size[1] - height / size[0]) <= 0.5 / size[1] + 0.5 / size[0]
    if not alike and (height, width) != shape[:2]:
        raise UserError(
            f"the mask {file} is {width}x{height}, but its image is {size[1]}x{size[0]}: use the same aspect ratio, or "
            f"{shape[1]}x{shape[0]} as the run's images"
        )
    known = to_array(mask, (*shape[:2], 1))[..., 0] >= 128
    if known.all():
        raise UserError(f"the mask {file} is all white: paint black what is to be filled in, and leave the rest white")
    return known
