"""On 1 device or 8, by jit or pmap, the state whole or in parts: the same random numbers and the same training."""

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpm_jax.run.checkpoints import Checkpoints
from ddpm_jax.schedules import make_schedule
from ddpm_jax.system.errors import UserError
from ddpm_jax.time_sampling import loss_aware
from ddpm_jax.training.parallel import make_layout
from ddpm_jax.training.state import from_items, to_items
from ddpm_jax.training.step import step_keys

LAYOUTS = {
    "1 device": ("jit", 1, {}),
    "8 devices, jit": ("jit", 8, {}),
    "8 devices, fsdp 4": ("jit", 8, {"fsdp": 4}),
    "8 devices, pmap": ("pmap", 8, {}),
    "1 device, in 4 parts": ("jit", 1, {"parts": 4}),
    "4 devices, fsdp 2, in 2 parts": ("jit", 4, {"fsdp": 2, "parts": 2}),
}
OTHERS = list(LAYOUTS)[1:]
RUN_KEY = jax.random.key(11)
STEPS = 10


def layout_of(name):
    parallel, number, choices = LAYOUTS[name]
    return make_layout(parallel, batch_size=16, devices=jax.devices()[:number], **choices)


@contextlib.contextmanager
def quick_to_compile():
    """Half the seconds for the U-Net's step; the order of its sums stays that of the layout."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


def advance(training, layout, network, optimizer, state, steps, *, each=None, **choices):
    """Trains `steps` steps; gives the losses, what `each` says of every state, and the last state as it is saved."""
    step = layout.lift(lambda **device: training.step_of(network, optimizer, **choices, **device))
    state = layout.place_state(state)
    losses, said = [], []
    for number in range(steps):
        state, info = step(RUN_KEY, state, layout.place_batch(training.images_of(number)))
        losses.append(float(info.loss))
        if each is not None:
            said.append(each(jax.device_get(layout.saved_state(state))))
    return np.array(losses), said, jax.device_get(layout.saved_state(state))


def test_what_is_random_is_the_same_bit_by_bit(training):
    seen = {}
    for name in LAYOUTS:
        probe = training.Probe()
        start = training.state_of(jax.random.key(5), probe.network, optax.sgd(0.1))
        advance(training, layout_of(name), probe.network, optax.sgd(0.1), start, 3)
        seen[name] = probe.take()
    keys, x_t, times, masks = seen["1 device"]
    chex.assert_shape(x_t, (3 * 16, 8, 8, 1))
    expected = [step_keys(RUN_KEY, jnp.int32(number), jnp.arange(16)).dropout for number in range(3)]
    expected = np.concatenate([jax.random.key_data(each) for each in expected])
    np.testing.assert_array_equal(keys, expected[np.lexsort(expected.T[::-1])])
    assert len(np.unique(times)) > 10
    assert len(np.unique(masks.reshape(48, -1), axis=0)) == 48
    for name in OTHERS:
        for here, there, what in zip(seen["1 device"], seen[name], ("keys", "x_t", "times", "masks"), strict=True):
            np.testing.assert_array_equal(here, there, err_msg=f"{what}: 1 device and {name}")


def test_what_is_random_is_the_same_on_two_hosts(training, tmp_path):
    """Two real processes with four devices each are given, together, what one device is, bit by bit."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0",
    }
    command = [sys.executable, str(Path(__file__).with_name("host.py")), where]
    hosts = [
        subprocess.Popen([*command, str(index), str(tmp_path / f"{index}.npz")], env=environment) for index in range(2)
    ]
    assert [host.wait(timeout=240) for host in hosts] == [0, 0]

    probe = training.Probe()
    start = training.state_of(jax.random.key(5), probe.network, optax.sgd(0.1))
    advance(training, layout_of("1 device"), probe.network, optax.sgd(0.1), start, 3)
    together = training.Probe()
    for index in range(2):
        with np.load(tmp_path / f"{index}.npz") as seen:
            together.rows += zip(*(seen[name] for name in seen.files), strict=True)
    for here, there, what in zip(probe.take(), together.take(), ("keys", "x_t", "times", "masks"), strict=True):
        np.testing.assert_array_equal(here, there, err_msg=what)


@pytest.fixture(scope="module")
def runs(training):
    """Ten steps of SGD and ten of Adam on each layout, from one state; compiled once a layout."""
    network = training.OneOfEach()
    optimizer = training.sgd_or_adam(training.paper_optimizer(learning_rate=1e-3, warmup_steps=5))
    start = training.drawn_state(network, optimizer)
    by_adam = dataclasses.replace(start, opt_state={**start.opt_state, "use_adam": np.array(True)})
    found = {}
    for name in LAYOUTS:
        layout = layout_of(name)
        step = layout.lift(lambda **device: training.step_of(network, optimizer, **device))
        kept = dataclasses.replace(layout, lift=lambda make_step, step=step: step)
        with quick_to_compile():
            found[name] = {
                what: advance(training, kept, network, optimizer, state, STEPS)
                for what, state in (("sgd", start), ("adam", by_adam))
            }
            _, _, first = advance(training, kept, network, optimizer, start, 1)
            found[name]["gradient"] = first.opt_state["gradient"]
    return found


@pytest.mark.parametrize("name", OTHERS)
def test_gradient_of_the_first_step_is_the_same(runs, name, record_property):
    here, there = runs["1 device"]["gradient"], runs[name]["gradient"]
    difference = float(optax.tree.norm(jax.tree.map(jnp.subtract, here, there)) / optax.tree.norm(here))
    record_property("difference of the gradient, as a share of its norm", difference)
    assert max(abs(leaf).max() for leaf in jax.tree.leaves(here)) > 1e-3

    def same(path, a, b):
        # A sum of 16 parts that nearly cancel has no relative precision: what is left is that of its parts.
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6 * optax.tree.norm(here), err_msg=str(path))

    jax.tree_util.tree_map_with_path(same, here, there)


@pytest.mark.parametrize("name", OTHERS)
def test_ten_steps_of_sgd_end_alike(runs, name, record_property):
    (losses, _, state), (losses_there, _, state_there) = runs["1 device"]["sgd"], runs[name]["sgd"]
    record_property("largest difference of a loss", float(abs(losses - losses_there).max()))
    assert len(set(losses)) == STEPS
    np.testing.assert_allclose(losses_there, losses, rtol=1e-5)
    for tree, there in ((state.params, state_there.params), (state.ema, state_there.ema)):
        worst = max(abs(a - b).max() for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(there), strict=True))
        record_property("largest difference of a parameter", float(worst))
        assert worst < 1e-6
    assert state_there.step == STEPS


@pytest.mark.parametrize("name", OTHERS)
def test_ten_steps_of_adam_end_in_the_same_losses(runs, name, record_property):
    losses, losses_there = runs["1 device"]["adam"][0], runs[name]["adam"][0]
    record_property("largest difference of a loss", float(abs(losses - losses_there).max()))
    np.testing.assert_allclose(losses_there, losses, rtol=1e-5)


def test_the_history_of_losses_is_that_of_the_whole_batch(training):
    times, network, optimizer = loss_aware(6, history=2), training.Linear(), optax.sgd(0.1)
    choices = {"times": times, "schedule": make_schedule("linear", 6)}
    start = jax.device_get(training.state_of(jax.random.key(5), network, optimizer, time_sampler=times))
    histories = {}
    for name in LAYOUTS:
        _, said, last = advance(
            training, layout_of(name), network, optimizer, start, 6, each=lambda state: state.time_sampling, **choices
        )
        assert last.time_sampling.counts.sum() == 6 * 16
        assert last.time_sampling.counts.min() >= 2  # the later steps draw by what the earlier ones saw
        histories[name] = said
    for name in OTHERS:
        chex.assert_trees_all_close(histories[name], histories["1 device"], rtol=1e-5)


def test_a_shared_state_lies_in_parts_and_stays_so(training):
    network, optimizer = training.OneOfEach(), optax.sgd(0.1, momentum=0.9)
    layout = layout_of("8 devices, fsdp 4")
    state = layout.init(lambda key: training.state_of(key, network, optimizer), jax.random.key(0))
    parts = lambda leaf: {shard.data.size * 4 for shard in leaf.addressable_shards} == {leaf.size}

    def check(state):
        for tree in (state.params, state.ema, state.opt_state[0].trace):
            assert parts(tree["block"]["conv1"]["kernel"])
            assert parts(tree["conv_out"]["kernel"])  # one channel out: cut along those that come in
            assert tree["block"]["conv1"]["bias"].is_fully_replicated
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))

    there = check(state)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert there < 0.3 * whole
    compiled = jax.tree.map(lambda leaf: leaf.sharding, state)
    with quick_to_compile():
        step = layout.lift(lambda **device: training.step_of(network, optimizer, **device))
        state, _ = step(RUN_KEY, state, layout.place_batch(training.images_of(0)))
    assert check(state) == there
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == compiled


@pytest.mark.parametrize(
    ("saved_by", "restored_by"),
    [("8 devices, pmap", "8 devices, jit"), ("8 devices, jit", "8 devices, pmap"), ("8 devices, fsdp 4", "1 device")],
)
def test_a_state_saved_by_one_way_goes_on_by_the_other(training, tmp_path, saved_by, restored_by):
    network, optimizer, gammas = training.Linear(), training.adam(), {"gammas": (16.97, 6.94)}
    init = lambda key: training.state_of(key, network, optimizer, power_averages=2)
    first, second = layout_of(saved_by), layout_of(restored_by)
    _, _, state = advance(training, first, network, optimizer, jax.jit(init)(jax.random.key(0)), 2, **gammas)
    with Checkpoints(tmp_path, keep=1, warn=pytest.fail) as checkpoints:
        checkpoints.save(2, to_items(first.saved_state(first.place_state(state))), notes={})
        checkpoints.wait()
        abstract = second.abstract_state(init, jax.random.key(1))
        read = checkpoints.restore(to_items(abstract))
    restored = from_items(read.step, read.items, abstract.step.sharding)
    chex.assert_trees_all_equal(jax.device_get(restored), state)
    _, _, never_stopped = advance(training, first, network, optimizer, state, 2, **gammas)
    _, _, went_on = advance(training, second, network, optimizer, restored, 2, **gammas)
    chex.assert_trees_all_close(went_on, never_stopped, rtol=1e-5, atol=1e-6)
    assert went_on.step == 4


@pytest.mark.parametrize("name", OTHERS)
def test_a_compiled_step_is_not_compiled_again(training, name):
    """Neither another seed nor another checkpoint nor the step's own output makes the step compile anew."""
    network, optimizer = training.Linear(), training.adam()
    init = lambda key: training.state_of(key, network, optimizer)
    layout = layout_of(name)
    traces = []

    def make_step(**device):
        step = training.step_of(network, optimizer, **device)

        def counted(key, state, batch):
            traces.append(1)
            return step(key, state, batch)

        return counted

    step = layout.lift(make_step)
    state, _ = step(RUN_KEY, layout.init(init, jax.random.key(0)), layout.place_batch(training.images_of(0)))
    saved = jax.device_get(layout.saved_state(state))
    others = [state, layout.init(init, jax.random.key(1)), layout.place_state(jax.device_put(saved, jax.devices()[0]))]
    compiled = []
    note = lambda event, seconds, **more: compiled.append(event)
    jax.block_until_ready(others)
    jax.monitoring.register_event_duration_secs_listener(note)
    for number, other in enumerate(others):
        jax.block_until_ready(step(jax.random.key(number), other, layout.place_batch(training.images_of(number))))
    assert len(traces) == 1
    assert not [event for event in compiled if "backend_compile" in event]


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_a_batch_that_cannot_be_shared_out_is_refused_in_one_line(parallel):
    """What the line suggests works."""
    with pytest.raises(
        UserError, match=r"^train.batch_size=12 cannot .* over 8 devices: use --train.devices 6, or, fo"
    ):
        make_layout(parallel, batch_size=12)
    make_layout(parallel, batch_size=12, devices=jax.devices()[:6])
    line = (
        r"^train.batch_size=24 cannot .* 8 devices in 2 parts: use --train.grad-accum-steps 3, or, .* multiple of 16$"
    )
    with pytest.raises(UserError, match=line):
        make_layout(parallel, batch_size=24, parts=2)
    make_layout(parallel, batch_size=24, parts=3)
