"""One training step: Algorithm 1 worked out by hand, the average behind it, and nothing hidden."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_jax.config import LossConfig
from ddpm_jax.keys import normal
from ddpm_jax.pixels import flip, to_float
from ddpm_jax.schedules import make_schedule
from ddpm_jax.time_sampling import uniform_times
from ddpm_jax.training.objective import make_objective
from ddpm_jax.training.step import Batch, StepKeys, quartile_losses, step_keys, update_ema
from ddpm_jax.unet import UNet

RUN_KEY = jax.random.key(3)


def bits(keys):
    return np.asarray(jax.random.key_data(keys))


def batch_of(training, step=0):
    images = training.images_of(step)
    return Batch(images, np.arange(len(images), dtype=np.int32))


class TestKeys:
    @given(
        seed=st.integers(0, 2**32 - 1),
        step=st.integers(0, 2**31 - 1),
        indices=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=8, unique=True),
    )
    def test_of_an_image_follow_from_seed_step_and_place_alone(self, seed, step, indices):
        key, places = jax.random.key(seed), jnp.array(indices)
        together = step_keys(key, jnp.int32(step), places)
        alone = step_keys(key, jnp.int32(step), places[-1:])
        for name in StepKeys._fields:
            np.testing.assert_array_equal(bits(getattr(together, name))[-1:], bits(getattr(alone, name)))

    def test_of_all_uses_images_and_steps_differ(self):
        rows = [bits(keys) for step in range(5) for keys in step_keys(RUN_KEY, jnp.int32(step), jnp.arange(8))]
        rows = np.concatenate(rows)
        assert len(np.unique(rows, axis=0)) == len(rows) == 5 * 8 * len(StepKeys._fields)


class TestAverage:
    def test_first_update_copies(self):
        ema, params = {"w": jnp.array([jnp.pi, 1e30])}, {"w": jnp.array([1.25, -3.0])}
        chex.assert_trees_all_equal(update_ema(ema, params, jnp.int32(0), decay=0.9999), params)

    def test_later_updates_decay(self):
        ema, params = {"w": jnp.array([4.0, -8.0])}, {"w": jnp.array([0.0, 8.0])}
        moved = update_ema(ema, params, jnp.int32(1), decay=0.75)
        np.testing.assert_array_equal(moved["w"], [3.0, -4.0])

    def test_half_life_of_the_papers_decay(self):
        steps = 20_000
        forget = lambda ema, step: (update_ema(ema, jnp.float32(0), step, decay=0.9999),) * 2
        _, course = jax.lax.scan(forget, jnp.float32(1), jnp.arange(1, steps + 1))
        course = np.asarray(course, np.float64)
        half_life = np.log(0.5) / (np.log(course[-1]) / steps)
        # float32 holds 0.9999 to 6e-8, 1 - 0.9999 so to 3e-4 of itself; 20,000 roundings add less.
        np.testing.assert_allclose(half_life, 6931.1, rtol=5e-4)
        assert abs(np.argmax(course < 0.5) + 1 - 6932) <= 3

    def test_of_a_constant_stays_it(self):
        keep = lambda ema, step: (update_ema(ema, jnp.float32(0.1), step, decay=0.9999), None)
        last, _ = jax.lax.scan(keep, jnp.float32(0.1), jnp.arange(1, 1000))
        np.testing.assert_allclose(last, 0.1, rtol=1e-6)


def by_hand(training, random_flip):
    """Loss and gradient of the linear network at the first step, in float64 from the formulas."""
    schedule, keys = make_schedule("linear", training.T), step_keys(RUN_KEY, jnp.int32(0), jnp.arange(16))
    x0 = to_float(batch_of(training).images)
    x0 = np.asarray(flip(keys.flip, x0) if random_flip else x0, np.float64)
    t = np.asarray(uniform_times(keys.time, training.T))
    eps = np.asarray(normal(keys.noise, training.IMAGE), np.float64)
    alphas_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, training.T))[t][:, None, None, None]
    np.testing.assert_allclose(schedule.alphas_bar[t], alphas_bar[:, 0, 0, 0], rtol=1e-6)
    x_t = np.sqrt(alphas_bar) * x0 + np.sqrt(1 - alphas_bar) * eps
    error = 0.3 * x_t - 0.1 - eps
    gradient = {"scale": 2 * (error * x_t).sum(0) / error.size, "offset": np.array([2 * error.mean()])}
    return (error**2).mean(), gradient


@pytest.mark.parametrize("random_flip", [False, True])
def test_is_algorithm_1(training, random_flip):
    network, optimizer = training.Linear(), optax.sgd(0.5)
    state = training.state_of(jax.random.key(0), network, optimizer)
    step = training.step_of(network, optimizer, random_flip=random_flip, ema_decay=0.75)
    after, info = jax.jit(step)(RUN_KEY, state, batch_of(training))
    loss, gradient = by_hand(training, random_flip)
    np.testing.assert_allclose(info.loss, loss, rtol=1e-5)
    expected = {"scale": 0.3 - 0.5 * gradient["scale"], "offset": -0.1 - 0.5 * gradient["offset"]}
    chex.assert_trees_all_close(after.params, jax.tree.map(np.float32, expected), atol=1e-6)
    chex.assert_trees_all_equal(after.ema, after.params)  # the first update copies
    norm = lambda tree: np.sqrt(sum((leaf**2).sum() for leaf in tree.values()))
    np.testing.assert_allclose(info.grad_norm, norm(gradient), rtol=1e-4)
    np.testing.assert_allclose(info.param_norm, norm(expected), rtol=1e-5)
    assert after.step == 1
    second, _ = jax.jit(step)(RUN_KEY, after, batch_of(training, 1))
    average = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, after.ema, second.params)
    chex.assert_trees_all_close(second.ema, average, rtol=1e-6)


def test_flips_about_half_of_the_images_and_none_when_told_so(training):
    schedule = make_schedule("const", 2, beta_end=1e-12)  # x_t is the image itself
    first = np.asarray(to_float(training.images_of(0)))
    seen = {}
    for random_flip in (False, True):
        probe = training.Probe()
        state = training.state_of(jax.random.key(0), probe.network, optax.sgd(0.0))
        step = training.step_of(probe.network, optax.sgd(0.0), schedule=schedule, random_flip=random_flip)
        step(RUN_KEY, state, batch_of(training))
        keys, x_t, _, _ = probe.take()
        places = bits(step_keys(RUN_KEY, jnp.int32(0), jnp.arange(16)).dropout)
        order = np.lexsort(places.T[::-1])
        np.testing.assert_array_equal(keys, places[order])
        seen[random_flip] = np.empty_like(x_t)
        seen[random_flip][order] = x_t
    np.testing.assert_allclose(seen[False], first, atol=1e-4)
    mirrored = [np.allclose(image, before[:, ::-1], atol=1e-4) for image, before in zip(seen[True], first, strict=True)]
    kept = [np.allclose(image, before, atol=1e-4) for image, before in zip(seen[True], first, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 3 <= sum(mirrored) <= 13  # of 16 at probability a half; 99.8 % of seeds


def test_is_a_pure_function(training):
    network, optimizer = training.Linear(), training.adam()
    state = training.state_of(jax.random.key(0), network, optimizer)
    before = jax.device_get(state)
    step = jax.jit(training.step_of(network, optimizer))
    first, second = (jax.device_get(step(RUN_KEY, state, batch_of(training))) for _ in range(2))
    chex.assert_trees_all_equal(first, second)
    chex.assert_trees_all_equal(before, jax.device_get(state))
    other, _ = jax.device_get(step(jax.random.key(4), state, batch_of(training)))
    assert not np.array_equal(other.params["scale"], first[0].params["scale"])


@given(data=st.data(), num_steps=st.integers(1, 1000))
def test_quarters_of_the_chain_hold_all_losses_once(data, num_steps):
    t = np.array(data.draw(st.lists(st.integers(0, num_steps - 1), min_size=8, max_size=8)), np.int32)
    losses = np.linspace(0.5, 2.0, 8, dtype=np.float32)
    sums, counts = map(np.asarray, quartile_losses(jnp.asarray(t), jnp.asarray(losses), num_steps=num_steps))
    np.testing.assert_allclose(sums.sum(), losses.sum(), rtol=1e-6)
    for quarter in range(4):
        inside = (quarter * num_steps <= 4 * t) & (4 * t < (quarter + 1) * num_steps)
        assert counts[quarter] == inside.sum()
        np.testing.assert_allclose(sums[quarter], losses[inside].sum(), rtol=1e-6)


def test_a_loss_that_is_not_finite_spoils_its_own_quarter_alone():
    sums, _ = quartile_losses(jnp.array([0, 99]), jnp.array([jnp.nan, 1.0]), num_steps=100)
    np.testing.assert_array_equal(sums, [np.nan, 0, 0, 1])


def test_steps_see_other_noises(training):
    network, optimizer = training.Linear(), optax.sgd(0.0)
    state = training.state_of(jax.random.key(0), network, optimizer)
    step = jax.jit(training.step_of(network, optimizer))
    losses = []
    for _ in range(5):
        state, info = step(RUN_KEY, state, batch_of(training))
        losses.append(float(info.loss))
    assert len(set(losses)) == 5


def test_loss_of_the_untrained_network_is_one(training):
    """The network says nothing yet, so what is left is the noise's own size."""
    network = UNet(width=8, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4, out_channels=1)
    objective = make_objective(
        LossConfig(), make_schedule("linear", training.T), prediction="eps", variance="fixed_large"
    )

    @jax.jit
    def loss(key):
        params = training.state_of(key, network, optax.sgd(0.0)).params
        keys = step_keys(RUN_KEY, jnp.int32(0), jnp.arange(64))
        predict = lambda x_t, t: network.apply({"params": params}, x_t, t, dropout_keys=keys.dropout)
        return objective(keys.noise, predict, to_float(training.images_of(0, 64)), uniform_times(keys.time, training.T))

    # The square of a normal has variance 2: 4 standard deviations of the mean of 4096 of them.
    assert abs(loss(jax.random.key(0)).mean() - 1) < 4 * np.sqrt(2 / 4096)


def test_is_traced_once(training):
    network, optimizer = training.Linear(), training.adam()
    step = jax.jit(chex.assert_max_traces(training.step_of(network, optimizer), n=1))
    state = training.state_of(jax.random.key(0), network, optimizer)
    for number in range(4):
        state, _ = step(jax.random.key(number), state, batch_of(training, number))
    step(RUN_KEY, training.state_of(jax.random.key(9), network, optimizer), batch_of(training))
