"""The fast samplers: their order of convergence, their law, and that an image is the same however it is drawn.

Step by step they are held against an independent implementation in `test_peers_samplers.py`.
"""

import importlib.util
import itertools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.forward import at
from ddpm_jax.keys import image_keys
from ddpm_jax.reverse import DynamicThreshold, from_x0
from ddpm_jax.samplers.ancestral import ancestral
from ddpm_jax.samplers.by_name import SAMPLERS, make_sampler
from ddpm_jax.samplers.chain import initial_noise, run_chain, sample, sample_trajectory
from ddpm_jax.samplers.ddim import ddim, ddim_inversion
from ddpm_jax.samplers.dpm_solver import dpm_solver_pp_2m
from ddpm_jax.samplers.multistep import path
from ddpm_jax.samplers.respacing import choose_timesteps, default_spacing, evenly_spaced, leading, respace
from ddpm_jax.samplers.unipc import unipc
from ddpm_jax.schedules import make_betas, schedule_from_betas, zero_terminal_snr

_spec = importlib.util.spec_from_file_location(
    "sampler_order", pathlib.Path(__file__).parents[2] / "benchmarks" / "sampler_order.py"
)
sampler_order = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sampler_order)

BETAS = make_betas("linear", 1000)
NAMES = tuple(SAMPLERS)
SHAPE = (4, 4, 4, 2)


def curved(x_t, t):
    """A network of no closed form, about as large as noise."""
    return jnp.sin(2 * x_t + t.astype(jnp.float32)[:, None, None, None] / 200) + 0.3 * x_t


def curved_of(scale):
    """The network with a parameter."""
    return lambda x_t, t: scale * curved(x_t, t)


def images_of(sampler, seed=0, shape=SHAPE):
    return np.asarray(jax.jit(lambda key: sample(key, sampler, shape))(jax.random.key(seed)))


class TestOrder:
    """The benchmark's own numbers: exact, of float64, so that the bounds are of the theory and not of chance."""

    @pytest.mark.parametrize(
        ("name", "lowest", "highest"),
        [
            ("ancestral", 0.9, 1.15),
            ("ddim", 0.9, 1.1),
            ("dpm++2m", 1.85, 2.15),
            # Of second order in law: its mean follows the same formula, and its noise is exact for constant x0.
            ("dpm++2m_sde", 1.85, 2.15),
            # Of third order: the corrector makes four of it, the first steps, of lower order, three.
            ("unipc", 2.9, 4.2),
        ],
    )
    def test_is_that_of_the_theory(self, name, lowest, highest):
        steps = (20, 40)
        errors = sampler_order.order_errors(SAMPLERS[name], steps)
        assert errors[1] < errors[0] < 0.2
        assert lowest < sampler_order.slope(steps, errors) < highest

    def test_of_unipc_rises_with_its_own(self):
        steps = (20, 40)
        slopes = [sampler_order.slope(steps, sampler_order.order_errors(unipc, steps, order=order)) for order in (1, 2)]
        assert 1.8 < slopes[0] < 2.2
        assert 2.6 < slopes[1] < 3.4


class TestLaw:
    @pytest.mark.parametrize("name", NAMES)
    def test_comes_to_the_data_as_steps_grow(self, name):
        few, many = (
            sampler_order.chain_errors(SAMPLERS[name], (count,), spacing=default_spacing(name, count))[0]
            for count in (10, 100)
        )
        assert many < 0.25 * few
        assert many < {"ancestral": 0.02, "ddim": 0.06}.get(name, 0.01)

    def test_of_a_few_steps_is_best_by_the_solvers(self):
        errors = {
            name: sampler_order.chain_errors(SAMPLERS[name], (15,), spacing=default_spacing(name, 15))[0]
            for name in ("ddim", "dpm++2m", "unipc")
        }
        assert errors["unipc"] < errors["dpm++2m"] < errors["ddim"]

    @pytest.mark.parametrize(
        ("name", "num_steps", "others"),
        [
            ("unipc", 5, ("linspace", "trailing", "log_snr")),
            ("unipc", 10, ("linspace",)),
            ("ancestral", 5, ("linspace", "log_snr")),
            ("ancestral", 10, ("linspace",)),
        ],
    )
    def test_of_few_steps_needs_the_default_spacing(self, name, num_steps, others):
        default, *errors = (
            sampler_order.chain_errors(SAMPLERS[name], (num_steps,), spacing=spacing)[0]
            for spacing in (default_spacing(name, num_steps), *others)
        )
        assert default < 0.8 * min(errors)

    @pytest.mark.parametrize(("num_steps", "other_order"), [(10, 3), (20, 2)])
    def test_of_unipc_needs_the_order_that_suits_the_number_of_steps(self, num_steps, other_order):
        default, other = (
            sampler_order.chain_errors(unipc, (num_steps,), spacing="log_snr", **options)[0]
            for options in ({}, {"order": other_order})
        )
        assert default < 0.8 * other

    @pytest.mark.parametrize("name", NAMES)
    def test_chains_have_the_default_spacing(self, name):
        keys = image_keys(jax.random.key(0), jnp.arange(1))
        for num_steps in (5, 8):
            visited = []
            record = lambda x_t, t, visited=visited: visited.append(int(t[0])) or jnp.zeros_like(x_t)
            sampler = make_sampler(name, BETAS, record, num_steps=num_steps)
            state = sampler.init(jnp.ones((1, 1, 1, 1)))
            for k in range(num_steps):
                state, _ = sampler.step(keys, state, jnp.int32(k))
            spacing = default_spacing(name, num_steps)
            assert visited[::-1] == choose_timesteps(BETAS, num_steps=num_steps, spacing=spacing).tolist()

    def test_on_leading_times_is_as_on_even_ones_in_many_steps(self):
        leading, even = (
            sampler_order.chain_errors(SAMPLERS["ddim"], (334, 501), spacing=spacing)
            for spacing in ("leading", "linspace")
        )
        np.testing.assert_allclose(leading, even, rtol=0.1)


class TestDdim:
    @pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
    def test_with_all_the_noise_takes_the_steps_of_the_strided_ancestral_chain(self, prediction):
        schedule = respace(BETAS, evenly_spaced(1000, 30))
        keys = image_keys(jax.random.key(0), jnp.arange(SHAPE[0]))
        x = jax.random.normal(jax.random.key(1), SHAPE)

        def ends(sampler):
            step = jax.jit(lambda k: sampler.step(keys, sampler.init(x), k)[0].x)
            return np.stack([step(k) for k in range(30)])

        stochastic = ends(ddim(schedule, curved, eta=1.0, prediction=prediction))
        expected = ends(ancestral(schedule, curved, variance="fixed_small", prediction=prediction))
        np.testing.assert_allclose(stochastic, expected, rtol=0, atol=1e-6)
        if prediction == "eps":  # the noise counts: a little less of it ends elsewhere
            assert np.abs(stochastic - ends(ddim(schedule, curved, eta=0.9, prediction=prediction))).max() > 1e-2

    def test_fact_14(self):
        schedule = respace(BETAS, [960, 980])
        pixel = lambda value: jnp.full((1, 1, 1, 1), value, jnp.float32)
        keys = image_keys(jax.random.key(0), jnp.arange(1))
        for clip_x0, expected in ((False, 0.21326904), (True, 0.29832973)):
            sampler = ddim(schedule, lambda x_t, t: pixel(0.7), clip_x0=clip_x0)
            state, _ = sampler.step(keys, sampler.init(pixel(0.3)), jnp.int32(0))
            # x0 = -50 without clipping: so many digits are lost.
            np.testing.assert_allclose(state.x, pixel(expected), rtol=0, atol=1e-7 if clip_x0 else 1e-6)

    def test_without_noise_is_a_map_of_the_latents(self):
        sampler = ddim(respace(BETAS, leading(1000, 5)), curved)
        start = initial_noise(image_keys(jax.random.key(0), jnp.arange(4)), SHAPE[1:])
        run = jax.jit(
            lambda key: run_chain(image_keys(key, jnp.arange(4)), sampler, sampler.init(start), 0, num_steps=5)
        )
        chex.assert_trees_all_equal(run(jax.random.key(1)).x, run(jax.random.key(2)).x)

    def test_inversion_finds_the_noise_that_gives_the_images(self):
        data = sampler_order.make_data()
        predict = sampler_order.best_network(data, np.cumprod(1 - BETAS))
        drawn = np.random.default_rng(0).multivariate_normal(data.mean, data.covariance, 64)
        images = jnp.asarray(drawn.reshape(64, *sampler_order.IMAGE), jnp.float32)
        keys = image_keys(jax.random.key(0), jnp.arange(64))

        def there_and_back(num_steps):
            schedule = respace(BETAS, choose_timesteps(BETAS, num_steps=num_steps, spacing="log_snr"))
            there = ddim_inversion(schedule, predict, prediction="x0")
            back = ddim(schedule, predict, prediction="x0", clip_x0=False)

            @jax.jit
            def run(images):
                latents = run_chain(keys, there, there.init(images), 0, num_steps=num_steps).x
                return latents, run_chain(keys, back, back.init(latents), 0, num_steps=num_steps).x

            latents, returned = run(images)
            return np.asarray(latents), float(jnp.sqrt(jnp.mean((returned - images) ** 2)))

        (_, coarse), (latents, fine) = there_and_back(50), there_and_back(400)
        assert fine < 0.25 * coarse
        assert fine < 0.02
        # Latents are standard normal: the sum of squares of 256 numbers, within 4.5 of its standard deviations.
        assert abs((latents**2).sum() - 256) < 4.5 * np.sqrt(2 * 256)

    @pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
    def test_refuses_an_eta_outside(self, eta):
        with pytest.raises(ValueError, match="outside \\[0, 1\\]"):
            ddim(respace(BETAS, [0, 999]), curved, eta=eta)


class TestSolvers:
    def test_path_ends_in_the_clean_image(self):
        places = path(respace(BETAS, [100, 999]))
        alphas_bar = np.cumprod(1 - BETAS)[[999, 100]]
        np.testing.assert_allclose(places.alpha, [*np.sqrt(alphas_bar), 1], rtol=1e-7)
        np.testing.assert_allclose(places.sigma, [*np.sqrt(1 - alphas_bar), 0], rtol=1e-7)
        np.testing.assert_allclose(places.log_ratio[:2], 0.5 * np.log(alphas_bar / (1 - alphas_bar)), rtol=1e-6)
        assert places.log_ratio[2] == np.inf

    @pytest.mark.parametrize("name", ["linear", "cosine"])
    def test_path_is_of_float64(self, name):
        betas = make_betas(name, 1000)
        log_alphas_bar = np.cumsum(np.log1p(-betas))  # down to -19.8, where 1 - alphas_bar is 1 in float32
        for times, whole in itertools.product(([999], [249, 999], [0, 3, 500, 998, 999]), (False, True)):
            places = path(respace(schedule_from_betas(betas) if whole else betas, times))
            expected = log_alphas_bar[times[::-1]]
            np.testing.assert_allclose(places.alpha[:-1], np.exp(0.5 * expected), rtol=1e-12)
            np.testing.assert_allclose(places.sigma[:-1], np.sqrt(-np.expm1(expected)), rtol=1e-12)
            snr = np.exp(expected) / -np.expm1(expected)
            np.testing.assert_allclose(np.exp(2 * places.log_ratio[:-1]), snr, rtol=1e-11)

    @pytest.mark.parametrize(
        "make", [dpm_solver_pp_2m, lambda *arguments, **options: unipc(*arguments, order=1, **options)]
    )
    def test_of_two_steps_begin_as_ddim(self, make):
        schedule = respace(BETAS, evenly_spaced(1000, 2))
        keys, x = image_keys(jax.random.key(0), jnp.arange(4)), jax.random.normal(jax.random.key(1), SHAPE)
        first = [
            sampler.step(keys, sampler.init(x), jnp.int32(0))[0].x
            for sampler in (make(schedule, curved, prediction="v"), ddim(schedule, curved, prediction="v"))
        ]
        np.testing.assert_allclose(*first, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("name", NAMES)
    def test_end_in_what_the_network_says_last(self, name):
        keys, x = image_keys(jax.random.key(0), jnp.arange(4)), jax.random.normal(jax.random.key(1), SHAPE)
        for num_steps in (1, 2, 5):
            sampler = make_sampler(
                name, BETAS, lambda x_t, t: jnp.full_like(x_t, 0.25), num_steps=num_steps, prediction="x0"
            )
            state, _ = sampler.step(keys, sampler.init(x), jnp.int32(num_steps - 1))
            np.testing.assert_allclose(state.x, 0.25, atol=2e-6, err_msg=f"{num_steps} steps")

    @pytest.mark.parametrize("order", [0, 4])
    def test_unipc_has_three_orders(self, order):
        with pytest.raises(ValueError, match=f"not {order}"):
            unipc(respace(BETAS, [0, 999]), curved, order=order)


@pytest.mark.parametrize("name", NAMES)
class TestEverySampler:
    def test_draws_an_image_alike_in_any_batch(self, name):
        sampler = make_sampler(name, BETAS, curved, num_steps=6)
        draw = lambda indices: jax.jit(
            lambda indices: sample(jax.random.key(3), sampler, (len(indices), *SHAPE[1:]), indices=indices)
        )(jnp.asarray(indices))
        together = draw([0, 1, 2, 3, 4])
        np.testing.assert_allclose(draw([3]), together[3:4], rtol=0, atol=1e-5)
        np.testing.assert_allclose(draw([4, 0]), together[jnp.array([4, 0])], rtol=0, atol=1e-5)
        assert np.abs(together[0] - together[1]).max() > 0.1

    def test_runs_in_ranges_bit_for_bit_and_in_one_trace(self, name):
        keys = image_keys(jax.random.key(3), jnp.arange(SHAPE[0]))
        traces = []

        @jax.jit
        def advance(scale, keys, state, first):
            traces.append(name)
            return run_chain(keys, make_sampler(name, BETAS, curved_of(scale), num_steps=6), state, first, num_steps=3)

        sampler = make_sampler(name, BETAS, curved, num_steps=6)
        start = sampler.init(initial_noise(keys, SHAPE[1:]))
        ranges = advance(1.0, keys, advance(1.0, keys, start, 0), 3)
        whole = jax.jit(lambda: run_chain(keys, sampler, start, 0, num_steps=6))()
        chex.assert_trees_all_equal(ranges.x, whole.x)
        other = advance(0.5, image_keys(jax.random.key(4), jnp.arange(SHAPE[0])), start, 0)
        assert np.abs(other.x - ranges.x).max() > 0.1
        assert len(traces) == 1

    def test_dynamic_thresholding_leaves_few_pixels_at_the_limits(self, name):
        static, dynamic = (
            images_of(make_sampler(name, BETAS, lambda x_t, t: 3 * jnp.tanh(x_t), num_steps=7, **options))
            for options in (
                dict(prediction="x0", clip_x0=True),
                dict(prediction="x0", clip_x0=DynamicThreshold(0.75)),
            )
        )
        at_the_limits = [(np.abs(images) > 1 - 1e-5).mean() for images in (static, dynamic)]
        assert np.abs(dynamic).max() <= 1 + 1e-5
        assert at_the_limits[1] < 0.5 * at_the_limits[0]

    def test_copes_with_a_schedule_that_ends_in_noise_alone(self, name):
        betas = make_betas("jsd", 1000)
        images = images_of(make_sampler(name, betas, lambda x_t, t: jnp.tanh(x_t), num_steps=7, prediction="x0"))
        assert np.isfinite(images).all()
        assert np.abs(images).max() <= 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_gaussian_data_come_from_a_schedule_without_signal_at_its_end(name, prediction):
    mean, variance = 0.3, 0.04
    schedule = schedule_from_betas(zero_terminal_snr(BETAS))

    def predict(x_t, t):
        alphas_bar = at(schedule.alphas_bar, t, x_t)
        gain = jnp.sqrt(alphas_bar) * variance / (1 - alphas_bar + alphas_bar * variance)
        x0 = mean + gain * (x_t - jnp.sqrt(alphas_bar) * mean)
        return from_x0(schedule, x0, x_t, t, target=prediction)

    options = dict(prediction=prediction, variance="fixed_small", clip_x0=False)
    images = images_of(
        make_sampler(name, np.asarray(zero_terminal_snr(BETAS)), predict, **options), shape=(1000, 2, 2, 2)
    )
    # 8,000 pixels: 4 standard errors are 0.009 for the mean, and 0.0063 for the deviation.
    assert images.mean() == pytest.approx(mean, abs=0.009)
    # Chains that add noise by beta or its posterior lose 1.6% of the deviation in 1000 steps.
    assert images.std() == pytest.approx(variance**0.5, abs=0.0063 + 0.0035)


def test_a_chain_with_memory_is_handed_back_at_chosen_steps():
    sampler = make_sampler("unipc", BETAS, curved, num_steps=6)
    images, frames = jax.jit(lambda key: sample_trajectory(key, sampler, SHAPE, at=(5, 0)))(jax.random.key(0))
    np.testing.assert_allclose(images, images_of(sampler), rtol=0, atol=1e-5)
    keys = image_keys(jax.random.key(0), jnp.arange(SHAPE[0]))
    np.testing.assert_array_equal(frames.x_t[0], initial_noise(keys, SHAPE[1:]))
    np.testing.assert_allclose(frames.x0[1], images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["ancestral", "unipc"])
def test_every_prediction_gives_the_same_images_of_a_chain_that_skips_steps(name):
    schedule = schedule_from_betas(BETAS)

    def draw(prediction):
        def predict(x_t, t):
            output = from_x0(schedule, jnp.tanh(x_t), x_t, t, target=prediction)
            return jnp.concatenate([output, jnp.sin(x_t)], axis=-1)

        options = dict(num_steps=6, variance="learned_range", clip_x0=False)
        return images_of(make_sampler(name, BETAS, predict, prediction=prediction, **options))

    of_x0 = draw("x0")
    np.testing.assert_allclose(draw("eps"), of_x0, rtol=0, atol=1e-3)
    # The mean of x_{t-1} says x0 with a weight of 1.3e-4 at the last time: float32 leaves so many digits of it.
    np.testing.assert_allclose(draw("mean"), of_x0, rtol=0, atol=5e-3)


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "options", "line"),
        [
            ("dmp++2m", {}, "unknown sampler 'dmp\\+\\+2m': did you mean 'dpm\\+\\+2m'"),
            ("", {}, "unknown sampler ''"),
            ("unipc", dict(num_steps=0), "1 to 1000 steps, not in 0"),
            ("ddim", dict(num_steps=1001), "1 to 1000 steps, not in 1001"),
            ("ddim", dict(eta=1.5), "eta=1.5 is outside"),
            ("ancestral", dict(eta=0.0), "eta=0.0 applies only to the sampler 'ddim'"),
            ("dpm++2m_sde", dict(eta=1.0), "applies only to the sampler 'ddim', not to 'dpm\\+\\+2m_sde'"),
            ("unipc", dict(spacing="uniform"), "unknown spacing 'uniform'"),
            ("ancestral", dict(num_steps=10, variance="learned"), "use all timesteps, or another sampler"),
        ],
    )
    def test_are_one_clear_line(self, name, options, line):
        with pytest.raises(ValueError, match=line) as caught:
            make_sampler(name, BETAS, curved, **options)
        assert "\n" not in str(caught.value)

    def test_a_mean_on_a_schedule_that_skips_times(self):
        for make in (*[SAMPLERS[name] for name in NAMES[1:]], ddim_inversion):
            with pytest.raises(ValueError, match="single steps"):
                make(respace(BETAS, [0, 999]), curved, prediction="mean")
