"""Chains begun in their middle, in batches, of images that are given."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import editing
from ddpm_jax.data.sources import load_held_out
from ddpm_jax.editing import repaint_walk
from ddpm_jax.evaluation.figures import real_images
from ddpm_jax.generation import editor, sampler_config
from ddpm_jax.generation.editor import Editor
from ddpm_jax.generation.job import run_job
from ddpm_jax.generation.sampler_config import SamplerConfig, make_chain
from ddpm_jax.pixels import to_float, to_uint8
from ddpm_jax.run.build import build_betas, build_schedule
from ddpm_jax.samplers.ancestral import ancestral
from ddpm_jax.samplers.chain import sample_trajectory
from ddpm_jax.samplers.ddim import ddim, ddim_inversion
from ddpm_jax.samplers.respacing import evenly_spaced, respace
from ddpm_jax.system.progress import Progress


@pytest.fixture(scope="module")
def job(drawing):
    return drawing.make_job(num_classes=10)


@pytest.fixture(scope="module")
def whole(job):
    return Editor(job, batch_size=16)


@pytest.fixture(scope="module")
def real(job):
    return real_images(job, load_held_out(job.config.data), 6)


def test_samples_are_those_of_the_sampling_job(drawing, job, whole, tmp_path):
    images, frames = whole.sample(5, whole.labels([0, 1, 2, 3, 4]), watched=3)
    run_job(job, tmp_path / "job", number=5, batch_size=8, format="npz")
    with np.load(tmp_path / "job" / "samples.npz") as file:
        assert abs(images.astype(int) - file["arr_0"].astype(int)).max() <= 1
    assert frames.shape == (drawing.T + 1, 3, 8, 8, 1)
    np.testing.assert_array_equal(frames[-1], images[:3])


@pytest.mark.parametrize("choice", [SamplerConfig(), SamplerConfig("ddim", steps=7, labels=(3, 1))])
def test_the_chain_over_time_is_that_of_the_definition(job, choice):
    drawn_by = Editor(job._replace(choice=choice), batch_size=8)
    labels, depths = drawn_by.labels_in_turn(11), [drawn_by.num_steps, 2, 5, 1]
    images, frames = drawn_by.trajectory(11, labels, depths=depths)
    chain, key = make_chain(job.config, choice)(None, jnp.asarray(labels)), jax.random.key(job.seed)
    expected, expected_frames = sample_trajectory(key, chain, (11, 8, 8, 1), at=[depth - 1 for depth in depths])
    np.testing.assert_allclose(images, expected, atol=1e-4)
    np.testing.assert_array_equal(frames.timesteps, expected_frames.timesteps)
    np.testing.assert_allclose(frames.x_t, expected_frames.x_t, atol=1e-4)
    np.testing.assert_allclose(frames.x0, expected_frames.x0, atol=1e-4)


def test_the_chain_over_time_is_compiled_once_shared_out_and_shows_progress(job, monkeypatch, capsys):
    monkeypatch.setattr(editor, "Progress", functools.partial(Progress, seconds_between_lines=0))
    drawn_by, placed = Editor(job, batch_size=8), set()
    predict = drawn_by._reverse.predict

    def watched(params, told, batch, at):
        placed.add(len(batch.x.sharding.device_set))
        return predict(params, told, batch, at)

    monkeypatch.setattr(drawn_by._reverse, "predict", watched)
    first = drawn_by.trajectory(4, drawn_by.labels_in_turn(4), depths=[12, 8, 4])
    programs = (drawn_by._reverse.advance._cache_size(), predict._cache_size())
    drawn_by.job = job._replace(seed=1)
    other = drawn_by.trajectory(4, drawn_by.labels_in_turn(4), depths=[12, 8, 4])
    assert (drawn_by._reverse.advance._cache_size(), predict._cache_size()) == programs
    assert abs(first[1].x_t[0] - other[1].x_t[0]).max() > 1
    assert placed == {jax.local_device_count()}
    assert "sampling 4 images over time: 12/12 steps" in capsys.readouterr().err


def test_no_image_depends_on_the_batch(job, whole, real):
    key, depth = jax.random.key(5), np.array([12, 3, 0, 7, 7, 1])
    labels = whole.labels(real.labels)
    few = Editor(job, batch_size=8).reconstruct(key, real.images, labels, depth, draws=3)
    many = whole.reconstruct(key, real.images, labels, depth, draws=3)
    assert few.shape == (6, 3, 8, 8, 1)
    assert abs(few.astype(int) - many.astype(int)).max() <= 1
    np.testing.assert_array_equal(many[2], real.images[2][None].repeat(3, axis=0))
    assert abs(many[0, 0].astype(int) - many[0, 1]).max() > 20


def test_labels_are_told(whole, real):
    key, depth = jax.random.key(5), np.full(6, 6)
    told, other, none = (
        whole.reconstruct(key, real.images, whole.labels(labels), depth)
        for labels in (real.labels, [(label + 1) % 10 for label in real.labels], [None] * 6)
    )
    assert min(abs(told.astype(int) - each).max() for each in (other, none)) > 5


def test_times_and_depths_of_a_shorter_chain(drawing):
    few = Editor(drawing.make_job(choice=SamplerConfig(steps=4, spacing="linspace")))
    assert few.num_steps == 4
    assert [few.paper_time(depth) for depth in range(5)] == [0, 1, 5, 8, 12]
    assert [few.depth_of(time) for time in (0, 1, 5, 8, 12)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="does not visit t = 4"):
        few.depth_of(4)
    assert few.labels([None, None]) is None


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_the_times_asked_for_are_visited_and_no_others_moved(drawing, sampler):
    few = Editor(drawing.make_job(choice=SamplerConfig(sampler, steps=4)), times=[4, 0, 12, 9])
    assert [few.paper_time(depth) for depth in range(7)] == [0, 1, 4, 5, 8, 9, 12]
    assert few.paper_time(few.depth_of(4)) == 4
    alphas_bar = build_schedule(few.job.config).alphas_bar[np.array([0, 3, 4, 7, 8, 11])]
    np.testing.assert_allclose(few.schedule.alphas_bar, alphas_bar, rtol=1e-6)
    assert few._make(None, None).num_steps == 6


def test_a_picture_is_diffused_to_the_time_asked_for(drawing, real):
    # The chain of one step visits t = T alone; asked for t = 5 it goes there, not to the nearest of 0 and T.
    job, key = drawing.make_job(choice=SamplerConfig(steps=1)), jax.random.key(3)
    few = Editor(job, times=[5])
    made = few.reconstruct(key, real.images[:2], None, np.full(2, few.depth_of(5)), draws=2)
    schedule = respace(build_betas(job.config), [4, 11])
    chain = ancestral(schedule, sampler_config.predict_with(None, None, None))
    expected = editing.encode_decode(key, schedule, chain, to_float(jnp.asarray(real.images[:2])), depth=1, draws=2)
    assert abs(made.astype(int) - np.asarray(to_uint8(expected)).astype(int)).max() <= 1
    assert abs(made.astype(int) - real.images[:2, None]).max() > 5


def long(drawing, **choice):
    """A job of a run of 300 steps."""
    job = drawing.make_job(choice=SamplerConfig(**choice))
    diffusion = dataclasses.replace(job.config.diffusion, num_steps=300, beta_start=1e-3, beta_end=0.06)
    return job._replace(config=dataclasses.replace(job.config, diffusion=diffusion))


@pytest.mark.parametrize(("asked", "used"), [(None, 250), (20, 20), (300, 300)])
def test_ddim_and_repaint_take_as_many_steps_as_are_asked_for(drawing, asked, used):
    edits = Editor(long(drawing, steps=asked))
    assert (edits.ddim_steps, edits.repaint_steps) == (used, used)
    assert (edits._invert.num_steps, edits._ddim.num_steps) == (used, used)
    assert edits._repaint.num_steps == len(repaint_walk(used, jump=edits.jump, resamples=5).depth)
    assert all(f"{used} steps" in said for said in edits.settings.values())


def test_interpolation_by_ddim_in_few_steps_is_that_of_the_definition(drawing, real):
    job, lambdas = drawing.make_job(choice=SamplerConfig("ddim", steps=5)), np.array([0, 0.5, 1])
    made = Editor(job).ddim_interpolate(real.images[:1], real.images[1:2], lambdas)
    betas, predict = build_betas(job.config), sampler_config.predict_with(None, None, None)
    schedule = respace(betas, evenly_spaced(drawing.T, 5))
    a, b = (to_float(jnp.asarray(real.images[i : i + 1])) for i in range(2))
    expected = editing.ddim_interpolate(
        ddim_inversion(schedule, predict),
        ddim(schedule, predict, clip_x0=False),
        a,
        b,
        jnp.asarray(lambdas, jnp.float32),
    )
    assert abs(made.astype(int) - np.asarray(to_uint8(expected)).astype(int)).max() <= 1


def test_both_pictures_of_an_interpolation_are_of_the_label(whole, real):
    a, b, lambdas = real.images[:1], real.images[1:2], np.array([0, 0.5, 1])
    key, depth = jax.random.key(5), np.full(1, 6)
    by_label = [
        (
            whole.interpolate(key, a, b, lambdas, depth, labels=whole.labels([label])),
            whole.ddim_interpolate(a, b, lambdas, labels=whole.labels([label])),
        )
        for label in (3, 8, None)
    ]
    for told, other, none in zip(*by_label, strict=True):
        assert min(abs(told.astype(int) - each).max() for each in (other, none)) > 5
    # Not told is what is told where there is no label.
    np.testing.assert_array_equal(by_label[2][1], whole.ddim_interpolate(a, b, lambdas))


def test_a_network_of_means_skips_steps_in_ddim_and_repaint(drawing, real, monkeypatch):
    job = drawing.make_job(choice=SamplerConfig(steps=5))
    schedule = build_schedule(job.config)

    def clean(x_t):
        return jnp.tanh(0.7 * x_t)

    def mean(x_t, t):
        at = lambda table: table[t][:, None, None, None]
        return at(schedule.posterior_mean_coef_x0) * clean(x_t) + at(schedule.posterior_mean_coef_x_t) * x_t

    made = []
    for prediction, predict in (("mean", mean), ("x0", lambda x_t, t: clean(x_t))):
        for module in (sampler_config, editor):
            monkeypatch.setattr(module, "predict_with", lambda *told, predict=predict, **options: predict)
        diffusion = dataclasses.replace(job.config.diffusion, prediction=prediction)
        edits = Editor(job._replace(config=dataclasses.replace(job.config, diffusion=diffusion)))
        assert (edits.ddim_steps, edits.repaint_steps) == (5, 5)
        known = np.arange(64).reshape(1, 8, 8) < 32
        made.append(
            (
                edits.ddim_interpolate(real.images[:1], real.images[1:2], np.array([0, 0.5])),
                edits.inpaint(jax.random.key(0), real.images[:1], known, None),
            )
        )
    for of_mean, of_x0 in zip(*made, strict=True):
        assert abs(of_mean.astype(int) - of_x0.astype(int)).max() <= 1
