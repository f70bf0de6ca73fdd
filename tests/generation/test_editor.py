"""Chains that start at given images, in batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import editing
from ddpm_jax.data.sources import load_held_out
from ddpm_jax.evaluation.figures import real_images
from ddpm_jax.generation.chains import make_chain
from ddpm_jax.generation.editor import Editor
from ddpm_jax.generation.job import SamplingJob, run_job
from ddpm_jax.generation.sampler_config import SamplerConfig
from ddpm_jax.pixels import to_float, to_uint8
from ddpm_jax.run.build import build_betas, build_schedule
from ddpm_jax.samplers.ancestral import ancestral
from ddpm_jax.samplers.chain import sample_trajectory
from ddpm_jax.samplers.ddim import ddim, ddim_inversion
from ddpm_jax.samplers.respacing import evenly_spaced, respace


@pytest.fixture(scope="module")
def job(runs):
    return runs.make_job(num_classes=10)


@pytest.fixture(scope="module")
def whole(job):
    return Editor(job, batch_size=16)


@pytest.fixture(scope="module")
def real(job):
    return real_images(job, load_held_out(job.trained.config.data), 6)


def assert_close(images, expected):
    """Within one level: the order of sums may differ."""
    assert abs(images.astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_samples_are_those_of_the_sampling_job(runs, job, whole, tmp_path):
    images, frames = whole.sample(5, [0, 1, 2, 3, 4], watched=3)
    run_job(job, tmp_path / "job", number=5, batch_size=8, format="npz")
    with np.load(tmp_path / "job" / "samples.npz") as file:
        assert_close(images, file["arr_0"])
    assert frames.shape == (runs.T + 1, 3, 8, 8, 1)
    np.testing.assert_array_equal(frames[-1], images[:3])


@pytest.mark.parametrize("sampler", [SamplerConfig(), SamplerConfig("ddim", steps=7, labels=(3, 1))])
def test_the_chain_over_time_is_that_of_the_definition(job, sampler):
    editor, trained = Editor(job._replace(sampler=sampler), batch_size=8), job.trained
    labels, levels = editor.job_labels(11), [editor.num_steps, 2, 5, 1]
    images, frames = editor.trajectory(11, labels, levels=levels)
    chain = make_chain(trained.config, trained.network, sampler)(None, jnp.asarray(labels))
    expected, expected_frames = sample_trajectory(
        jax.random.key(job.seed), chain, (11, 8, 8, 1), at=[level - 1 for level in levels]
    )
    np.testing.assert_allclose(images, expected, atol=1e-4)
    np.testing.assert_array_equal(frames.timesteps, expected_frames.timesteps)
    np.testing.assert_allclose(frames.x_t, expected_frames.x_t, atol=1e-4)
    np.testing.assert_allclose(frames.x0, expected_frames.x0, atol=1e-4)


def test_the_chain_over_time_is_compiled_once_and_shows_progress(runs, job, capsys):
    traces = []

    def counted(*arguments, **options):
        traces.append(1)
        return runs.closed_form(*arguments, **options)

    trained = job.trained._replace(network=job.trained.network._replace(apply=counted))
    editor = Editor(SamplingJob(trained, 0), batch_size=8)
    first = editor.trajectory(4, editor.job_labels(4), levels=[12, 8, 4])
    assert "sampling 4 images over time: 12/12 steps" in capsys.readouterr().err
    number = len(traces)
    editor.job = editor.job._replace(seed=1)
    other = editor.trajectory(4, editor.job_labels(4), levels=[12, 8, 4])
    assert len(traces) == number
    assert abs(first[1].x_t[0] - other[1].x_t[0]).max() > 1


def test_with_fsdp_weights_are_sharded_and_images_the_same(runs, real):
    config = runs.make_config(num_classes=10)
    made = []
    for fsdp in (1, 2):
        trained = runs.make_trained(dataclasses.replace(config, train=dataclasses.replace(config.train, fsdp=fsdp)))
        shape = trained.params["conv_in"]["kernel"].shape
        editor = Editor(SamplingJob(trained, 0, SamplerConfig(steps=2)), batch_size=8)
        kernels = [array for array in jax.live_arrays() if array.shape == shape and len(array.sharding.device_set) == 8]
        sharded = [kernel for kernel in kernels if not kernel.is_fully_replicated]
        assert [kernel.sharding.shard_shape(shape)[-1] for kernel in sharded] == [shape[-1] // 2] * (fsdp - 1)
        made.append(editor.reconstruct(jax.random.key(5), real.images, real.labels, np.full(6, 2)))
    np.testing.assert_array_equal(*made)


def test_no_image_depends_on_the_batch(job, whole, real):
    key, level = jax.random.key(5), np.array([12, 3, 0, 7, 7, 1])
    labels = real.labels
    few = Editor(job, batch_size=8).reconstruct(key, real.images, labels, level, draws=3)
    many = whole.reconstruct(key, real.images, labels, level, draws=3)
    assert few.shape == (6, 3, 8, 8, 1)
    assert_close(few, many)
    np.testing.assert_array_equal(many[2], real.images[2][None].repeat(3, axis=0))
    assert abs(many[0, 0].astype(int) - many[0, 1]).max() > 20


def test_images_depend_on_their_labels(whole, real):
    key, level = jax.random.key(5), np.full(6, 6)
    own, other, none = (
        whole.reconstruct(key, real.images, labels, level)
        for labels in (real.labels, [(label + 1) % 10 for label in real.labels], [None] * 6)
    )
    assert min(abs(own.astype(int) - each).max() for each in (other, none)) > 5


def test_t_and_levels_of_a_shorter_chain(runs):
    few = Editor(runs.make_job(sampler=SamplerConfig(steps=4, spacing="linspace")))
    assert few.num_steps == 4
    assert [few.paper_t(level) for level in range(5)] == [0, 1, 5, 8, 12]
    assert [few.level_at(time) for time in (0, 1, 5, 8, 12)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="skips t = 4"):
        few.level_at(4)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_the_requested_t_are_included_and_no_others_moved(runs, sampler):
    few = Editor(runs.make_job(sampler=SamplerConfig(sampler, steps=4, spacing="linspace")), extra_t=[4, 0, 12, 9])
    assert [few.paper_t(level) for level in range(7)] == [0, 1, 4, 5, 8, 9, 12]
    assert few.paper_t(few.level_at(4)) == 4
    alphas_bar = build_schedule(few.job.trained.config).alphas_bar[np.array([0, 3, 4, 7, 8, 11])]
    np.testing.assert_allclose(few.schedule.alphas_bar, alphas_bar, rtol=1e-6)
    assert few.num_steps == 6


def test_a_picture_is_noised_to_the_requested_t(runs, real):
    # The chain of one step has t = T alone; with t = 5 requested it includes it instead of rounding to 0 or T.
    job, key = runs.make_job(sampler=SamplerConfig(steps=1)), jax.random.key(3)
    few = Editor(job, extra_t=[5])
    made = few.reconstruct(key, real.images[:2], None, np.full(2, few.level_at(5)), draws=2)
    schedule = respace(build_betas(job.trained.config), [4, 11])
    chain = ancestral(schedule, lambda x_t, t: runs.closed_form(None, x_t, t))
    expected = editing.encode_decode(key, schedule, chain, to_float(jnp.asarray(real.images[:2])), level=1, draws=2)
    assert_close(made, to_uint8(expected))
    assert abs(made.astype(int) - real.images[:2, None]).max() > 5


@pytest.mark.parametrize(("requested", "used"), [(None, 250), (20, 20), (300, 300)])
def test_ddim_and_repaint_take_as_many_steps_as_requested(runs, requested, used):
    config = runs.make_config(num_steps=300, beta_start=1e-3, beta_end=0.06)
    editor = Editor(runs.make_job(config, sampler=SamplerConfig(steps=requested)))
    assert (editor.ddim_steps, editor.repaint_steps) == (used, used)
    assert all(f"{used} steps" in settings for settings in editor.settings.values())


def test_interpolation_by_ddim_in_few_steps_is_that_of_the_definition(runs, real, capsys):
    job, lambdas = runs.make_job(sampler=SamplerConfig("ddim", steps=5)), np.array([0, 0.5, 1])
    made = Editor(job, batch_size=8).ddim_interpolate(real.images[:1], real.images[1:2], lambdas)
    said = capsys.readouterr().err
    assert "inverting: 5/5 steps" in said
    assert "interpolating by DDIM: 5/5 steps" in said
    schedule = respace(build_betas(job.trained.config), evenly_spaced(runs.T, 5))
    predict = lambda x_t, t: runs.closed_form(None, x_t, t)
    a, b = (to_float(jnp.asarray(real.images[i : i + 1])) for i in range(2))
    expected = editing.ddim_interpolate(
        ddim_inversion(schedule, predict),
        ddim(schedule, predict, clip_x0=False),
        a,
        b,
        jnp.asarray(lambdas, jnp.float32),
    )
    assert_close(made, to_uint8(expected))


def test_both_pictures_of_an_interpolation_have_the_label(whole, real):
    a, b, lambdas = real.images[:1], real.images[1:2], np.array([0, 0.5, 1])
    key, level = jax.random.key(5), np.full(1, 6)
    by_label = [
        (
            whole.interpolate(key, a, b, lambdas, level, labels=[label]),
            whole.ddim_interpolate(a, b, lambdas, labels=[label]),
        )
        for label in (3, 8, None)
    ]
    for own, other, none in zip(*by_label, strict=True):
        assert min(abs(own.astype(int) - each).max() for each in (other, none)) > 5
    # The default is no label.
    np.testing.assert_array_equal(by_label[2][1], whole.ddim_interpolate(a, b, lambdas))


def test_a_network_of_means_skips_steps_in_ddim_and_repaint(runs, real):
    schedule = build_schedule(runs.make_config())

    def x0(params, x_t, t, labels=None, **options):
        return jnp.tanh(0.7 * x_t)

    def mean(params, x_t, t, labels=None, **options):
        at = lambda table: table[t][:, None, None, None]
        return at(schedule.posterior_mean_coef_x0) * x0(params, x_t, t) + at(schedule.posterior_mean_coef_x_t) * x_t

    made = []
    for prediction, apply in (("mean", mean), ("x0", x0)):
        job = runs.make_job(prediction=prediction, sampler=SamplerConfig(steps=5))
        job = job._replace(trained=job.trained._replace(network=job.trained.network._replace(apply=apply)))
        editor = Editor(job)
        assert (editor.ddim_steps, editor.repaint_steps) == (5, 5)
        known = np.arange(64).reshape(1, 8, 8) < 32
        made.append(
            (
                editor.ddim_interpolate(real.images[:1], real.images[1:2], np.array([0, 0.5])),
                editor.inpaint(jax.random.key(0), real.images[:1], known, None),
            )
        )
    for of_mean, of_x0 in zip(*made, strict=True):
        assert_close(of_mean, of_x0)
