"""The device, the host's memory, the disk: the same examples in the same order, and the same training."""

import dataclasses
import time

import chex
import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from ddpm_jax.config import CheckpointConfig, Config, DataConfig, DiffusionConfig, LogConfig, ModelConfig, TrainConfig
from ddpm_jax.data.order import batch_indices
from ddpm_jax.data.source import in_memory
from ddpm_jax.data.sources import load_source
from ddpm_jax.time_sampling import loss_aware
from ddpm_jax.training import loop, setup
from ddpm_jax.training.hooks import calls
from ddpm_jax.training.input_pipeline import RunKey, make_input_pipeline, with_inputs
from ddpm_jax.training.parallel import make_layout

RUN_KEY = jax.random.key(3)
LAYOUTS = {
    "1 device": {"parallel": "jit", "devices": 1},
    "8 devices": {"parallel": "jit", "devices": 8},
    "8 devices, fsdp 4": {"parallel": "jit", "devices": 8, "fsdp": 4},
    "pmap": {"parallel": "pmap", "devices": 8},
}


def layout_of(name, batch_size=8):
    choices = dict(LAYOUTS[name])
    return make_layout(batch_size=batch_size, **choices | {"devices": jax.devices()[: choices["devices"]]})


def pictures(number):
    """No two alike, and labels that say which is which."""
    images = np.random.default_rng(0).integers(0, 256, (number, 8, 8, 1), np.uint8)
    return in_memory(images, np.arange(number))


def batches_of(feed, first, last):
    take = jax.jit(lambda data, place, step: feed.take(data)(place, step))
    with feed.open(first, last, calls(first, last, periods=(), most=feed.most)) as opened:
        for steps, data in opened:
            for place, step in enumerate(steps):
                yield step, jax.device_get(take(data, np.int32(place), np.int32(step)))


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    st.integers(1, 40), st.integers(1, 12), st.integers(0, 30), st.integers(0, 2**32 - 1), st.integers(1, 4)
)
def test_the_device_finds_the_examples_of_the_order(number, batch_size, first, seed, most):
    source, layout = pictures(number), layout_of("1 device", batch_size)
    feed = make_input_pipeline(
        source, layout, seed=seed, batch_size=batch_size, labeled=True, device_gib=1.0, most=most
    )
    assert feed.kept == "kept on the device"
    steps = []
    for step, batch in batches_of(feed, first, first + 7):
        indices = batch_indices(seed, step, batch_size=batch_size, num_examples=number)
        np.testing.assert_array_equal(batch.labels, indices)
        np.testing.assert_array_equal(batch.images, source.images[indices])
        np.testing.assert_array_equal(batch.indices, np.arange(batch_size))
        steps.append(step)
    assert steps == list(range(first, first + 7))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_feed_gives_what_was_asked_for(name):
    source, layout = pictures(20), layout_of(name)
    options = {"seed": 5, "batch_size": 8, "device_gib": 20 * 64 / 2**30}
    told, untold = (make_input_pipeline(source, layout, labeled=labeled, **options) for labeled in (True, False))
    assert told.kept == ("kept in memory" if name == "pmap" else "kept on the device")
    smaller = make_input_pipeline(source, layout, labeled=True, **options | {"device_gib": 19.9 * 64 / 2**30})
    assert smaller.kept == "kept in memory"
    on_disk = dataclasses.replace(source, images=None)
    assert make_input_pipeline(on_disk, layout, labeled=True, **options).kept == "streamed from disk"
    with untold.open(0, 1) as opened:
        [item] = opened
    data = item.data[0] if name == "pmap" else item.data
    assert data.labels is None


def test_closing_does_not_wait_for_the_rest_of_a_call():
    source, read = pictures(20), []
    slow = lambda indices: time.sleep(0.01) or read.append(1) or source.images[indices]
    options = {"seed": 5, "batch_size": 8, "labeled": False, "device_gib": 0.0, "most": 300}
    feed = make_input_pipeline(dataclasses.replace(source, read_images=slow), layout_of("1 device"), **options)
    feed.open(0, 300, [range(300)]).close()
    assert len(read) < 300


@pytest.mark.parametrize("name", ["8 devices", "8 devices, fsdp 4"])
def test_an_epoch_is_trained_without_a_copy_from_the_host_and_compiled_once(training, name):
    source, layout, optimizer = pictures(80), layout_of(name), training.adam()
    feed = make_input_pipeline(source, layout, seed=1, batch_size=8, labeled=False, device_gib=1.0)
    traces = []

    def make_step(**device):
        step = training.step_of(training.Linear(), optimizer, **device)
        return lambda *arguments: traces.append(1) or step(*arguments)

    step = layout.lift(with_inputs(make_step, feed))
    state = layout.init(lambda key: training.state_of(key, training.Linear(), optimizer), jax.random.key(0))
    with feed.open(0, 30) as opened:
        items = list(opened)
    assert all(item.data is items[0].data for item in items[:10])
    assert items[10].data is not items[0].data
    assert items[10].data.images is items[0].data.images
    state, _ = step(RUN_KEY, state, items[0].data)
    jax.block_until_ready(state)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **more: compiled.append(event))
    with jax.transfer_guard_host_to_device("disallow_explicit"):
        for item in items[1:]:
            old, (state, _) = state, step(RUN_KEY, state, item.data)
            assert jax.tree.leaves(old.params)[0].is_deleted()  # donated
    jax.block_until_ready(state)
    assert int(state.step) == 30
    assert len(traces) == 1
    assert not [event for event in compiled if "backend_compile" in event]


@pytest.mark.parametrize(
    ("parallel", "devices", "choices", "kept"),
    [
        ("jit", 1, {"parts": 2}, "device"),
        ("jit", 4, {"fsdp": 2}, "device"),
        ("jit", 2, {}, "memory"),
        ("pmap", 2, {}, "memory"),
    ],
)
def test_the_steps_of_one_call_are_those_of_many(training, parallel, devices, choices, kept):
    """To the last bit however they are cut into calls, and to rounding where each is a program of its own."""
    layout = make_layout(parallel, batch_size=8, devices=jax.devices()[:devices], **choices)
    network, optimizer, times = training.Linear(), training.adam(), loss_aware(100, history=1)
    start = jax.device_get(training.state_of(jax.random.key(0), network, optimizer, time_sampler=times))

    def run(feed, program, periods):
        state, found = layout.place_state(start), []
        with feed.open(0, 7, calls(0, 7, periods=periods, most=feed.most)) as opened:
            for steps, data in opened:
                key = RUN_KEY if feed.most == 1 else RunKey(RUN_KEY, np.int32(len(steps)))
                old, (state, infos) = state, program(key, state, data)
                assert jax.tree.leaves(old.params)[0].is_deleted()  # donated
                assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(lambda leaf: leaf.sharding, old)
                found += zip(*(value.tolist()[: len(steps)] for value in jax.device_get(infos)), strict=True)
        return found, jax.device_get(layout.saved_state(state))

    def prepared(most):
        feed = make_input_pipeline(
            pictures(20), layout, seed=1, batch_size=8, labeled=False, device_gib=1.0 * (kept == "device"), most=most
        )
        make_step = lambda **device: training.step_of(network, optimizer, times=times, **device)
        return feed, layout.lift(with_inputs(make_step, feed))

    expected, last = run(*prepared(1), ())
    several = prepared(3)
    (found, end), other = run(*several, (5,)), run(*several, (2,))
    assert len({loss for loss, *_ in found}) == 7
    assert (found, end.step) == (other[0], 7)
    chex.assert_trees_all_equal(end, other[1])
    for here, there in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.hstack(here), np.hstack(there), rtol=1e-5)
    chex.assert_trees_all_close(end.time_sampling, last.time_sampling, rtol=1e-5)


@pytest.fixture(scope="module")
def set_on_disk(tmp_path_factory):
    digits = load_source(DataConfig())
    file = tmp_path_factory.mktemp("arrays") / "digits.npy"
    np.save(file, digits.images[:50])
    np.save(file.with_name("digits_labels.npy"), digits.labels[:50])
    return str(file)


def test_a_run_is_the_same_wherever_its_set_is_kept(training, set_on_disk, tmp_path, monkeypatch):
    """Begun from the device, gone on with from memory and from the disk: the bytes of one that never stopped."""
    data = DataConfig(source="npy", path=set_on_disk, flip=True)
    config = Config(
        data=data,
        diffusion=DiffusionConfig(num_steps=20, schedule="cosine"),
        model=ModelConfig(width=4, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=2),
        train=TrainConfig(steps=24, batch_size=8, learning_rate=1e-3, warmup_steps=2, ema_decay=0.5),
        checkpoints=CheckpointConfig(every=100, keep=2),
        log=LogConfig(every=1, samples_every=0),
    )
    monkeypatch.setattr(setup, "build_network", training.linear_network)
    kept = {"device": {}, "memory": {"device_gib": 0.0}, "disk": {"device_gib": 0.0, "memory_gib": 0.0}}
    metrics = {}
    with jax.numpy_dtype_promotion("standard"):
        for name, choice in kept.items():
            chosen = dataclasses.replace(config, data=dataclasses.replace(data, **choice))
            loop.train(chosen, tmp_path / name)
            metrics[name] = (tmp_path / name / "metrics.jsonl").read_bytes()
        for steps, choice in ((7, kept["disk"]), (16, kept["device"]), (24, kept["memory"])):
            chosen = dataclasses.replace(
                config,
                data=dataclasses.replace(data, **choice),
                train=dataclasses.replace(config.train, steps=steps),
            )
            loop.train(chosen, tmp_path / "mixed")
    assert metrics["device"] == metrics["memory"] == metrics["disk"]
    assert (tmp_path / "mixed" / "metrics.jsonl").read_bytes() == metrics["device"]
