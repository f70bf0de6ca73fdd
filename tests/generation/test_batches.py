"""The driver of chains: ranges, batches, where arrays lie, and what is compiled."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from ddpm_jax.generation.batches import Driver, cut, grid_drawer
from ddpm_jax.keys import image_keys
from ddpm_jax.samplers.ancestral import ancestral
from ddpm_jax.samplers.chain import initial_noise, sample
from ddpm_jax.schedules import make_schedule
from ddpm_jax.system.mesh import make_mesh

SHAPE = (4, 6, 1)


@given(num_steps=st.integers(1, 3000), longest=st.integers(1, 100), stops=st.lists(st.integers(0, 3000), max_size=4))
def test_ranges_follow_one_another_and_begin_at_the_stops(num_steps, longest, stops):
    stops = [stop for stop in stops if stop <= num_steps]
    ranges = cut(num_steps, longest=longest, stops=stops)
    assert [step for first, length in ranges for step in range(first, first + length)] == list(range(num_steps))
    assert {*stops} <= {num_steps, *(first for first, _ in ranges)}
    assert max(length for _, length in ranges) <= longest
    if not stops:
        lengths = {length for _, length in ranges}
        one_fits = any(num_steps % length == 0 for length in range(longest // 2 + 1, longest + 1))
        assert len(lengths) == 1 if one_fits else len(lengths) <= 2


def test_the_papers_chain_is_one_program():
    assert cut(1000) == [(first, 50) for first in range(0, 1000, 50)]


SCHEDULE = make_schedule("linear", 10, beta_start=0.05, beta_end=0.6)


def make_program(driver, traces=None):
    """A chain of a network with one weight, drawn from (key, indices)."""

    def network(params, x_t, t):
        if traces is not None:
            traces.append(x_t.shape)
        return params["kernel"][0, 0] * x_t

    make = lambda params, _: ancestral(SCHEDULE, lambda x_t, t: network(params, x_t, t))
    begin = lambda key, indices: (keys := image_keys(key, indices), initial_noise(keys, SHAPE), None)
    return driver.chain(10, make, begin)


def run(driver, program, key, weight, images, **options):
    params = {"kernel": jnp.full((2, 8), weight, jnp.float32)}
    results = driver.run(program, params, images, lambda indices: indices, shared=key, description="drawing", **options)
    return [(first, stop, np.asarray(state.x)[: stop - first]) for first, stop, state in results]


KEY = jax.random.key(5)


@pytest.mark.parametrize(("batch_size", "devices", "rounded"), [(5, 1, 5), (5, 3, 6), (16, 8, 16)])
def test_neither_batches_nor_devices_change_an_image(runs, batch_size, devices, rounded):
    driver = Driver(runs.make_config(), batch_size=batch_size, devices=jax.devices()[:devices])
    assert driver.batch_size == rounded
    images = [(first, min(first + rounded, 13)) for first in range(0, 13, rounded)]
    drawn = run(driver, make_program(driver), KEY, 0.1, images)
    assert [(first, stop) for first, stop, _ in drawn] == images
    chain = ancestral(SCHEDULE, lambda x_t, t: 0.1 * x_t)
    expected = jax.jit(lambda key: sample(key, chain, (13, *SHAPE)))(KEY)
    np.testing.assert_allclose(np.concatenate([x for *_, x in drawn]), expected, atol=1e-5)


def test_ranges_do_not_change_an_image_and_are_watched(runs):
    driver, seen = Driver(runs.make_config(), batch_size=8), {1: [], 5: [], 50: []}
    program = make_program(driver)
    for longest, looks in seen.items():
        watch = lambda first, step, batch, state, looks=looks: looks.append((first, step, np.asarray(state.x)))
        ((_, _, x),) = run(driver, program, KEY, 0.1, [(16, 24)], ranges=cut(10, longest=longest), watch=watch)
        looks.append((16, 10, x))
    assert [(first, step) for first, step, _ in seen[5]] == [(16, 0), (16, 5), (16, 10)]
    assert len(seen[50]) == 2
    for first, step, x in [*seen[5], *seen[50]]:
        assert first == 16
        np.testing.assert_array_equal(x, seen[1][step][2])


def test_one_program_serves_every_seed_checkpoint_and_batch(runs):
    driver, traces = Driver(runs.make_config(), batch_size=8), []
    program = make_program(driver, traces)
    images = [
        run(driver, program, jax.random.key(seed), weight, [(first, first + 8)])[0][2]
        for seed, weight, first in [(0, 0.1, 0), (1, 0.1, 0), (0, 0.9, 0), (0, 0.1, 8)]
    ]
    assert traces == [(8, *SHAPE)]
    assert len({image.tobytes() for image in images}) == 4


def test_batches_lie_on_all_devices_and_parameters_as_fsdp_asks(runs):
    config = runs.make_config()
    for fsdp, shard in ((1, (2, 8)), (2, (2, 4)), (3, (2, 4))):  # 3 does not divide 8 devices
        driver = Driver(dataclasses.replace(config, train=dataclasses.replace(config.train, fsdp=fsdp)), batch_size=16)
        params = driver.place({"kernel": jnp.ones((2, 8))})
        assert params["kernel"].sharding.shard_shape((2, 8)) == shard

        def watch(first, step, batch, state):
            for array in (batch, state.x):
                assert {each.data.shape[0] for each in array.addressable_shards} == {2}

        ((_, _, x),) = run(driver, make_program(driver), KEY, 0.1, [(0, 16)], watch=watch)
        expected = x if fsdp == 1 else expected  # noqa: F821
        np.testing.assert_array_equal(x, expected)


def test_what_is_left_is_shown(runs, capsys):
    driver = Driver(runs.make_config(), batch_size=8)
    run(driver, make_program(driver), KEY, 0.1, [(0, 8), (8, 9)])
    assert "drawing: 20/20 steps" in capsys.readouterr().err
    assert run(driver, make_program(driver), KEY, 0.1, []) == []


def test_a_grid_is_of_the_same_images_on_any_devices(runs):
    config = runs.make_config(num_classes=3)
    config = dataclasses.replace(config, log=dataclasses.replace(config.log, num_samples=6, sample_steps=4))
    network = runs.make_job(config).trained.network
    grids = [
        grid_drawer(config, network, KEY, mesh=make_mesh(jax.devices()[:devices], fsdp=fsdp))({"kernel": jnp.ones(())})
        for devices, fsdp in ((1, 1), (8, 1), (8, 2))
    ]
    assert grids[0].shape == (6, 8, 8, 1)
    for grid in grids[1:]:
        assert abs(grid.astype(int) - grids[0].astype(int)).max() <= 1
