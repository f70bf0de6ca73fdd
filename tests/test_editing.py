"""What is done to given images: their levels, their noise, and the laws that the results follow."""

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from ddpm_jax.editing import (
    ChainStart,
    between,
    ddim_interpolate,
    decode,
    diffuse,
    encode,
    encode_decode,
    inpaint,
    interpolate,
    invert,
    mix,
    repaint,
    repaint_walk,
    share_latents,
    slerp,
)
from ddpm_jax.keys import image_keys, normal
from ddpm_jax.samplers.ancestral import ancestral
from ddpm_jax.samplers.chain import initial_noise, run_chain, sample
from ddpm_jax.samplers.ddim import ddim, ddim_inversion
from ddpm_jax.samplers.dpm_solver import dpm_solver_pp_2m
from ddpm_jax.schedules import make_schedule, schedule_from_betas

T, SHAPE, SIZE = 40, (2, 2, 2), 8
SCHEDULE = make_schedule("linear", T, beta_start=1e-3, beta_end=0.25)
KEY = jax.random.key(3)


class GaussianData:
    """Data N(mean, covariance) of 8 numbers, all correlated, and what the best network says of its noise."""

    mean = np.linspace(-0.6, 0.8, SIZE)

    def __init__(self):
        rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(SIZE, SIZE)))
        self.covariance = rotation @ np.diag(np.linspace(0.2, 1, SIZE) ** 2) @ rotation.T

    def predict_eps(self, schedule):
        alphas_bar = np.asarray(schedule.alphas_bar, np.float64)[:, None, None]
        gains = np.sqrt(1 - alphas_bar) * np.linalg.inv(alphas_bar * self.covariance + (1 - alphas_bar) * np.eye(SIZE))
        means = jnp.asarray(np.sqrt(alphas_bar[:, 0]) * self.mean, jnp.float32)
        gains = jnp.asarray(gains, jnp.float32)

        def predict(x_t, t):
            centred = x_t.reshape(-1, SIZE) - means[t[:1]]
            return (centred @ gains[t[0]].T).reshape(x_t.shape)  # all images of a batch are at one time

        return predict

    def draw(self, number, seed=0):
        images = np.random.default_rng(seed).multivariate_normal(self.mean, self.covariance, size=number)
        return jnp.asarray(images.reshape(number, *SHAPE), jnp.float32)

    def given(self, known, values):
        """Mean and covariance of the other numbers when those at `known` have these values."""
        free = ~known
        gain = self.covariance[np.ix_(free, known)] @ np.linalg.inv(self.covariance[np.ix_(known, known)])
        mean = self.mean[free] + gain @ (values - self.mean[known])
        return mean, self.covariance[np.ix_(free, free)] - gain @ self.covariance[np.ix_(known, free)]


DATA = GaussianData()
CHAIN = ancestral(SCHEDULE, DATA.predict_eps(SCHEDULE), clip_x0=False)


def flat(images):
    return np.asarray(images, np.float64).reshape(*images.shape[:-3], SIZE)


# Reconstruction


def test_at_depth_0_images_come_back_as_they_are():
    x0 = DATA.draw(3)
    back = encode_decode(KEY, SCHEDULE, CHAIN, x0, level=0, draws=2)
    np.testing.assert_array_equal(back, np.repeat(np.asarray(x0)[:, None], 2, axis=1))


def test_what_is_diffused_to_a_depth_has_the_marginal_of_the_paper_s_t():
    n, level = 20_000, 10
    x0 = jnp.broadcast_to(DATA.draw(1), (n, *SHAPE))
    x_t = flat(diffuse(image_keys(KEY, jnp.arange(n)), SCHEDULE, x0, jnp.full(n, level)))
    alphas_bar = float(np.prod(1 - np.linspace(1e-3, 0.25, T)[:level]))
    z = (x_t.mean(0) - np.sqrt(alphas_bar) * flat(x0)[0]) / np.sqrt((1 - alphas_bar) / n)
    assert abs(z).max() < 4
    # The variance of n draws scatters by sqrt(2 / n).
    assert abs(x_t.var(0) / (1 - alphas_bar) - 1).max() < 4 * np.sqrt(2 / n)


@jax.jit
def reconstruct(x0, level):
    """`encode_decode` of images at many levels in one batch."""
    start = encode(KEY, SCHEDULE, x0, level)
    chain = between(CHAIN, level, 0 * level)
    return run_chain(start.keys, chain, chain.init(start.x), 0, num_steps=T).x


LEVELS = (1, 8, 16, 24, T)
EACH = 4000


@pytest.fixture(scope="module")
def reconstructed():
    """Data, and what became of it by way of each level: (5, EACH, 8)."""
    x0 = DATA.draw(len(LEVELS) * EACH)
    images = reconstruct(x0, jnp.repeat(jnp.array(LEVELS), EACH))
    return (flat(x).reshape(len(LEVELS), EACH, SIZE) for x in (x0, images))


def test_reconstructions_of_data_are_data_and_the_deeper_the_less_is_left_of_an_image(reconstructed):
    x0, images = reconstructed
    scatter = np.sqrt(np.diag(DATA.covariance) / EACH)
    # Forty steps are few: the chain's own mean is off by less than half the scatter of these draws.
    assert abs((images.mean(1) - DATA.mean) / scatter).max() < 4.5
    left = [
        np.corrcoef((a - DATA.mean).ravel(), (b - DATA.mean).ravel())[0, 1] for a, b in zip(x0, images, strict=True)
    ]
    assert left[0] > 0.98
    assert (np.diff(left) < 0).all()
    # 32,000 numbers, 8 of them correlated each: the correlation of independent images scatters by about 0.01; of the
    # signal sqrt(alphas_bar) = 0.06 is left at T.
    assert abs(left[-1]) < 0.1


def test_draws_of_one_image_share_x_t_and_nothing_else():
    x0, level = DATA.draw(4), jnp.full(4, 15)
    one, three = (encode(KEY, SCHEDULE, x0, level, draws=draws) for draws in (1, 3))
    np.testing.assert_array_equal(three.x, np.repeat(one.x, 3, axis=0))
    assert abs(three.x[::3] - x0).min() > 0
    keys = jax.random.key_data(three.keys)
    assert len(np.unique(keys, axis=0)) == 12
    # Draw j is the same whatever the number of draws.
    np.testing.assert_array_equal(keys[::3], jax.random.key_data(one.keys))


@pytest.mark.parametrize("level", [-1, T + 1])
def test_a_depth_outside_of_the_chain_is_refused(level):
    x0 = DATA.draw(1)
    with pytest.raises(ValueError, match=rf"level={level} is outside \[0, {T}\]"):
        encode_decode(KEY, SCHEDULE, CHAIN, x0, level=level)
    with pytest.raises(ValueError, match=rf"level={level} is outside"):
        interpolate(KEY, SCHEDULE, CHAIN, x0, x0, jnp.array([0.5]), level=level)
    with pytest.raises(ValueError, match=rf"level={level} is outside"):
        share_latents(KEY, CHAIN, (1, *SHAPE), level=level, draws=1)


def test_a_sampler_with_a_memory_is_refused():
    chain, x0 = dpm_solver_pp_2m(SCHEDULE, DATA.predict_eps(SCHEDULE)), DATA.draw(1)
    message = "a multistep sampler cannot start in the middle of its chain: use ancestral or ddim"
    with pytest.raises(ValueError, match=message):
        encode_decode(KEY, SCHEDULE, chain, x0, level=5)
    with pytest.raises(ValueError, match=message):
        inpaint(KEY, SCHEDULE, chain, x0, jnp.ones((1, 2, 2, 1)))
    ones = jnp.ones(1, jnp.int32)
    with pytest.raises(ValueError, match=message):
        run_chain(image_keys(KEY, ones), between(chain, ones, 0 * ones), chain.init(x0), 0, num_steps=1)


# Shared latents


def test_shared_latents_end_in_the_chain_s_own_images():
    shape = (4, *SHAPE)
    x_t, images = jax.jit(lambda key: share_latents(key, CHAIN, shape, level=0, draws=2))(KEY)
    np.testing.assert_array_equal(images[:, 0], x_t)
    own = jax.jit(lambda key: sample(key, CHAIN, shape))(jax.random.split(KEY)[0])
    np.testing.assert_allclose(x_t, own, atol=1e-5)
    x_T, _ = jax.jit(lambda key: share_latents(key, CHAIN, shape, level=T, draws=1))(KEY)
    np.testing.assert_array_equal(x_T, initial_noise(image_keys(jax.random.split(KEY)[0], jnp.arange(4)), SHAPE))


def test_the_later_a_latent_is_shared_the_more_images_have_in_common():
    apart = []
    for level in (T, 3):
        draw = jax.jit(lambda key, level=level: share_latents(key, CHAIN, (200, *SHAPE), level=level, draws=2))
        _, images = draw(KEY)
        apart.append(float(jnp.square(images[:, 0] - images[:, 1]).mean()))
    # Two independent images are 2 tr(covariance) / 8 apart; 200 pairs scatter by about 10 %.
    assert apart[0] == pytest.approx(2 * np.trace(DATA.covariance) / SIZE, rel=0.25)
    assert apart[-1] < 0.1 * apart[0]


# Interpolation

LAMBDAS = jnp.linspace(0, 1, 5)


@pytest.fixture(scope="module")
def interpolated():
    """400 pairs, and the images between them by way of level 6."""
    a, b = DATA.draw(400, 1), DATA.draw(400, 2)
    return a, b, jax.jit(lambda a, b: interpolate(KEY, SCHEDULE, CHAIN, a, b, LAMBDAS, level=6))(a, b)


def test_at_depth_0_pixels_are_mixed():
    a, b = DATA.draw(3, 1), DATA.draw(3, 2)
    mixed = jax.jit(lambda a, b: interpolate(KEY, SCHEDULE, CHAIN, a, b, LAMBDAS, level=0))(a, b)
    for j, share in enumerate(np.asarray(LAMBDAS)):
        np.testing.assert_allclose(mixed[:, j], (1 - share) * a + share * b, atol=1e-6)


def test_the_noise_of_a_pair_is_the_same_for_every_lambda(interpolated):
    # For Gaussian data every step is affine in x and noise, and so is lambda -> image if the noise is held fixed.
    _, _, images = interpolated
    np.testing.assert_allclose(images[:, 2], (images[:, 0] + images[:, 4]) / 2, atol=2e-5)
    np.testing.assert_allclose(images[:, 1], 0.75 * images[:, 0] + 0.25 * images[:, 4], atol=2e-5)
    assert abs(images[:, 0] - images[:, 4]).max() > 0.1


def test_the_ends_of_an_interpolation_are_reconstructions_of_the_two_images(interpolated):
    a, b, images = interpolated
    for end, own, other in ((images[:, 0], a, b), (images[:, 4], b, a)):
        assert jnp.square(end - own).mean() < 0.2 * jnp.square(end - other).mean()


def test_an_image_depends_on_the_key_and_its_index_alone():
    x0 = DATA.draw(20, 4)
    known = jnp.ones((20, 2, 2, 1)).at[:, 0].set(0)

    @jax.jit
    def edit(i):
        level = jnp.full(len(i), 7)
        return (
            encode(KEY, SCHEDULE, x0[i], level, indices=i).x,
            mix(KEY, SCHEDULE, x0[i], x0[i + 5], LAMBDAS[1:2], level, indices=i).x,
            share_latents(KEY, CHAIN, (len(i), *SHAPE), level=7, draws=1, indices=i)[1],
            inpaint(KEY, SCHEDULE, CHAIN, x0[i], known[i], jump=5, resamples=2, indices=i),
        )

    alone, together = edit(jnp.array([5])), edit(jnp.arange(3, 7))
    for one, many in zip(alone, together, strict=True):
        np.testing.assert_allclose(one[0], many[2], atol=1e-4)
        assert abs(one[0] - many[3]).max() > 1e-2


def test_a_batch_of_many_depths_is_what_each_alone_is():
    keys, x = image_keys(KEY, jnp.arange(5)), normal(image_keys(KEY, 9 + jnp.arange(5)), SHAPE)
    level, end_level = jnp.array([T, 30, 7, 1, 0]), jnp.array([10, 0, 3, 1, 0])
    chain = between(CHAIN, level, end_level)
    images = jax.jit(lambda keys, x: run_chain(keys, chain, chain.init(x), 0, num_steps=T).x)(keys, x)
    for i in range(3):
        span = dict(level=int(level[i]), end_level=int(end_level[i]))
        alone = jax.jit(lambda keys, x, span=span: decode(ChainStart(keys, x), CHAIN, **span))(
            keys[i : i + 1], x[i : i + 1]
        )
        np.testing.assert_allclose(images[i : i + 1], alone, atol=1e-5)
    np.testing.assert_array_equal(images[3:], x[3:])


# DDIM


slerp_in_one_program = jax.jit(slerp)


@given(seed=st.integers(0, 100), lam=st.floats(0, 1))
def test_slerp_stays_on_the_circle(seed, lam):
    a, b = np.random.default_rng(seed).normal(size=(2, 3, 2, 3, 4)).astype(np.float32)
    norm = lambda x: np.sqrt(np.square(x).sum((1, 2, 3)))
    b = b * (norm(a) / norm(b))[:, None, None, None]
    on_the_way = np.asarray(slerp_in_one_program(a, b, np.full(3, lam, np.float32)))
    np.testing.assert_allclose(norm(on_the_way), norm(a), rtol=1e-4)
    angle = lambda x, y: np.arccos(np.clip((x * y).sum((1, 2, 3)) / (norm(x) * norm(y)), -1, 1))
    np.testing.assert_allclose(angle(a, on_the_way), lam * angle(a, b), atol=2e-3)


def test_slerp_of_equal_noises_is_that_noise():
    a = normal(image_keys(KEY, jnp.arange(2)), SHAPE)
    np.testing.assert_allclose(slerp(a, a, jnp.array([0.3, 0.9])), a, rtol=1e-5)
    np.testing.assert_array_equal(slerp(0 * a, 0 * a, jnp.array([0.3, 0.9])), 0 * a)


def test_ddim_interpolation_begins_and_ends_in_the_images():
    schedule = make_schedule("linear", 400, beta_start=1e-4, beta_end=0.03)
    predict = DATA.predict_eps(schedule)
    inversion, chain = ddim_inversion(schedule, predict), ddim(schedule, predict, clip_x0=False)
    a, b = DATA.draw(4, 1), DATA.draw(4, 2)
    images = jax.jit(lambda a, b: ddim_interpolate(inversion, chain, a, b, LAMBDAS))(a, b)
    chex.assert_shape(images, (4, 5, *SHAPE))
    # The inversion's error falls with the number of steps; at 400 it is below 0.05 for images of spread 0.6.
    np.testing.assert_allclose(images[:, 0], a, atol=0.05)
    np.testing.assert_allclose(images[:, 4], b, atol=0.05)
    # Noises of data are normal, so slerp's midpoint is too: its images have the spread of data.
    a, b = DATA.draw(3000, 3), DATA.draw(3000, 4)
    latents = flat(jax.jit(lambda x: invert(inversion, x))(a))
    assert abs(latents.mean(0)).max() < 4.5 / np.sqrt(3000) + 0.02
    assert abs(latents.var(0) - 1).max() < 4.5 * np.sqrt(2 / 3000) + 0.03


# Inpainting

KNOWN = np.array([1, 1, 0, 0], bool)  # of 4 pixels
MASK = jnp.asarray(KNOWN.reshape(1, 2, 2, 1), jnp.float32)


def inpaint_many(number, resamples, *, jump=4):
    x0 = DATA.draw(1, seed=8)
    chain = jax.jit(
        lambda key, x0: inpaint(
            key,
            SCHEDULE,
            CHAIN,
            jnp.broadcast_to(x0, (number, *SHAPE)),
            jnp.broadcast_to(MASK, (number, 2, 2, 1)),
            jump=jump,
            resamples=resamples,
        )
    )
    return x0, chain(KEY, x0)


def test_what_is_known_comes_back_exactly():
    x0, images = inpaint_many(3, 2)
    np.testing.assert_array_equal(images[:, 0], jnp.broadcast_to(x0[:, 0], images[:, 0].shape))
    assert abs(images[0, 1] - images[1, 1]).min() > 0


def test_what_is_not_known_is_not_looked_at():
    x0, mask = DATA.draw(2), jnp.broadcast_to(MASK, (2, 2, 2, 1))
    hidden = jnp.where(mask == 1, x0, jnp.nan)
    fill = jax.jit(lambda x: inpaint(KEY, SCHEDULE, CHAIN, x, mask, jump=3, resamples=2))
    whole, blind = fill(x0), fill(hidden)
    np.testing.assert_array_equal(whole, blind)


def test_the_more_it_is_resampled_the_closer_to_the_conditional_law():
    known = np.repeat(KNOWN, 2)
    off, spread = {}, {}
    for resamples in (1, 20):
        x0, images = inpaint_many(3000, resamples)
        mean, covariance = DATA.given(known, flat(x0)[0][known])
        unknown = flat(images)[:, ~known]
        assert abs(mean - DATA.mean[~known]).max() > 0.3  # what is known says much of what is not
        off[resamples] = (unknown.mean(0) - mean) / np.sqrt(np.diag(covariance))
        spread[resamples] = unknown.var(0) / np.diag(covariance)
    # In units of the conditional law's own spread, of which the mean of 3000 draws scatters by 0.018, the variance by
    # 0.026. RePaint is not exact: the known part of a step down is drawn without regard to the unknown one, an error
    # that resampling wears off, but in finitely many steps not to nothing.
    assert abs(off[20]).max() < 0.25
    assert abs(off[1]).max() > 3 * abs(off[20]).max()
    assert abs(np.log(spread[20])).max() < 0.25


@given(num_steps=st.integers(1, 60), jump=st.integers(1, 12), resamples=st.integers(1, 4))
def test_a_walk_leads_from_noise_to_images(num_steps, jump, resamples):
    level, down = repaint_walk(num_steps, jump=jump, resamples=resamples)
    after = level + np.where(down, -1, 1)
    np.testing.assert_array_equal(after[:-1], level[1:])
    assert level[0] == num_steps
    assert after[-1] == 0
    assert after.max() <= num_steps
    assert (after[:-1] > 0).all()
    stretches = max(0, num_steps - jump + jump - 1) // jump if num_steps > jump else 0
    assert (~down).sum() == stretches * jump * (resamples - 1)


def test_the_walk_is_that_of_the_authors():
    # Their get_schedule_jump for t_T = 6, jump_length = 2, jump_n_sample = 2; their -1 is the clean image.
    theirs = [5, 4, 3, 2, 3, 4, 3, 2, 1, 0, 1, 2, 1, 0, -1]
    level, down = repaint_walk(6, jump=2, resamples=2)
    assert level.tolist() == [time + 1 for time in theirs[:-1]]
    assert (level[-1] + np.where(down, -1, 1)[-1]) == 0


@pytest.mark.parametrize("wrong", [dict(jump=0, resamples=1), dict(jump=1, resamples=0)])
def test_a_walk_of_nothing_is_refused(wrong):
    (name,) = [name for name, value in wrong.items() if value == 0]
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        repaint_walk(5, **wrong)


def test_a_range_of_moves_after_another_is_the_whole_walk():
    x0, mask = DATA.draw(3), jnp.broadcast_to(MASK, (3, 2, 2, 1))
    chain = repaint(SCHEDULE, CHAIN, x0, mask, jump=7, resamples=2)
    keys, half = image_keys(KEY, jnp.arange(3)), chain.num_steps // 2
    run = jax.jit(lambda state, first: run_chain(keys, chain, state, first, num_steps=half))
    first = run(chain.init(initial_noise(keys, SHAPE)), 0)
    second = run(first, half)
    whole = jax.jit(lambda x0: inpaint(KEY, SCHEDULE, CHAIN, x0, mask, jump=7, resamples=2))(x0)
    assert chain.num_steps == 2 * half
    np.testing.assert_allclose(second.x, whole, atol=1e-5)
    assert len(chain.timesteps) == chain.num_steps
    assert chain.timesteps.min() == 0


def test_going_up_adds_the_noise_of_the_steps_between():
    betas = np.array([0.1, 0.3, 0.5])
    schedule = schedule_from_betas(betas)
    kept = ancestral(schedule, lambda x_t, t: x_t, prediction="mean", variance="fixed_small", clip_x0=False)
    still = kept._replace(step=lambda keys, state, k: (state, kept.step(keys, state, k)[1]))
    number = 20_000
    x0, mask = jnp.ones((number, 1, 1, 1)), jnp.zeros((number, 1, 1, 1))
    chain = repaint(schedule, still, x0, mask, jump=2, resamples=2)  # level 3 2 1, up to 3, and down again
    keys = image_keys(KEY, jnp.arange(number))
    x = jax.jit(lambda x: run_chain(keys, chain, chain.init(x), 0, num_steps=chain.num_steps).x)(x0)
    x = np.asarray(x).ravel()
    kept_signal = 0.7 * 0.5
    assert abs(x.mean() - np.sqrt(kept_signal)) < 4.5 * np.sqrt((1 - kept_signal) / number)
    assert abs(x.var() / (1 - kept_signal) - 1) < 4.5 * np.sqrt(2 / number)
