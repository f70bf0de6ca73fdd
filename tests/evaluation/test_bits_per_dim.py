import csv
import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig
from ddpm_jax.data.sources import load_source
from ddpm_jax.evaluation import bits_per_dim
from ddpm_jax.evaluation.bits_per_dim import BatchBound, Likelihood, Request, conclude, default_folder, run_job, sums_of
from ddpm_jax.generation.job import Job
from ddpm_jax.generation.sampler_config import SamplerConfig
from ddpm_jax.keys import image_keys
from ddpm_jax.likelihood import Bound, bound_at, bound_terms, optimal_log_variances, strata
from ddpm_jax.networks import parameter_shapes
from ddpm_jax.pixels import to_float
from ddpm_jax.run.build import build_network, build_schedule
from ddpm_jax.run.checkpoints import Checkpoints
from ddpm_jax.run.record import save_config
from ddpm_jax.system.errors import UserError

T = 10
WHOLE = Request("test", 0, "model", "tanh")
EVERY_TIME = strata(T, T)
FILES = ("likelihood.json", "terms.csv", "rate_distortion.csv")


def make_config(**diffusion):
    return Config(
        data=DataConfig(source="digits", height=8, width=8, channels=1),
        diffusion=DiffusionConfig(num_steps=T, beta_start=0.01, beta_end=0.6, **diffusion),
        model=ModelConfig(width=8, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4),
    )


def make_job(config, seed=0):
    """A network that says something: as initialized it says almost 0."""
    shapes = parameter_shapes(build_network(config))
    leaves, structure = jax.tree.flatten(shapes)
    random = np.random.default_rng(seed)
    params = structure.unflatten([jnp.asarray(0.2 * random.normal(size=leaf.shape), jnp.float32) for leaf in leaves])
    return Job(config, params, checkpoint=7, seed=3, choice=SamplerConfig())


@pytest.fixture(scope="module")
def job():
    return make_job(make_config())


@pytest.fixture(scope="module")
def test_set(job):
    return load_source(dataclasses.replace(job.config.data, split="test"))


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    """The job over all 359 test images, never stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return run_job(job, out, WHOLE, batch_size=64), out


def plain_bound(job, source, indices, use=0, **settings):
    """The bound of all images at once on one device, with nothing of the job but its key."""
    config, key = job.config, jax.random.fold_in(jax.random.key(job.seed), use)
    predict = lambda x_t, t: build_network(config).apply(job.params, x_t, t)
    compute = jax.jit(
        lambda x0: bound_terms(
            image_keys(key, jnp.asarray(indices)),
            build_schedule(config),
            predict,
            x0,
            prediction=config.diffusion.prediction,
            variance=config.diffusion.variance,
            **settings,
        )
    )
    return compute(to_float(source.read(indices)))


def table(path):
    with path.open() as file:
        rows = list(csv.reader(file))
    return {
        name: np.array(column, np.float64) for name, column in zip(rows[0], zip(*rows[1:], strict=True), strict=True)
    }


def assert_same(one, other):
    """The same numbers, but for the order of sums."""
    for name, value in dataclasses.asdict(one).items():
        assert value == pytest.approx(getattr(other, name), rel=1e-5), name


def test_the_job_says_what_the_bound_of_the_whole_set_says(job, test_set, whole):
    likelihood, out = whole
    bound = Bound(*(np.asarray(numbers, np.float64) for numbers in plain_bound(job, test_set, np.arange(359))))
    totals = bound.terms.sum(axis=0) + bound.prior
    assert likelihood.images == 359
    assert likelihood.dimensions == 64
    assert likelihood.bits_per_dim == pytest.approx(totals.mean(), rel=1e-5)
    assert likelihood.standard_error == pytest.approx(totals.std(ddof=1) / np.sqrt(359), rel=1e-4)
    assert likelihood.distortion_bits == pytest.approx(bound.terms[0].mean(), rel=1e-5)
    assert likelihood.rate_bits + likelihood.distortion_bits == pytest.approx(likelihood.bits_per_dim, rel=1e-9)
    assert likelihood.rmse == pytest.approx(127.5 * np.sqrt(bound.x0_mse[0].mean()), rel=1e-5)
    assert likelihood.l_simple == pytest.approx(bound.eps_mse.mean(), rel=1e-5)

    terms = table(out / "terms.csv")
    assert terms["t"].tolist() == list(range(T))
    np.testing.assert_allclose(terms["bits"], bound.terms.mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(terms["bits_standard_error"], bound.terms.std(axis=1, ddof=1) / np.sqrt(359), rtol=1e-3)
    np.testing.assert_allclose(terms["x0_rmse"], 127.5 * np.sqrt(bound.x0_mse.mean(axis=1)), rtol=1e-5)
    np.testing.assert_allclose(terms["log_variance"], build_schedule(job.config).fixed_large_log_variance, rtol=1e-6)
    curve = table(out / "rate_distortion.csv")
    assert curve["rate_bits"][-1] + terms["bits"][0] == pytest.approx(likelihood.bits_per_dim, rel=1e-6)
    assert (np.diff(curve["rate_bits"]) >= 0).all()
    assert curve["reverse_time"].tolist() == list(range(1, T + 1))
    np.testing.assert_allclose(curve["rmse"], terms["x0_rmse"][::-1])

    written = json.loads((out / "likelihood.json").read_text())
    assert written.pop("job") == json.loads((out / "job.json").read_text())
    assert Likelihood(**written) == likelihood
    for name in ("terms.png", "rate_distortion.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 300


def test_batch_size_and_devices_change_no_number(job, test_set):
    indices = np.array([3, 70, 71, 200, 358])
    expected = plain_bound(job, test_set, indices)
    key = jax.random.fold_in(jax.random.key(job.seed), 0)
    assert jax.local_device_count() == 8
    for batch_size, devices, size in ((5, jax.devices()[:1], 5), (5, jax.devices()[:3], 6)):
        bound_of = BatchBound(job.config, batch_size=batch_size, devices=devices)
        assert bound_of.batch_size == size
        bound = bound_of(bound_of.place(job.params), key, test_set, indices)
        for ours, theirs in zip(bound, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_sums_of_batches_are_those_of_one(job, test_set):
    bound = jax.tree.map(np.asarray, plain_bound(job, test_set, np.arange(7)))
    cut = lambda first, stop: sums_of(Bound(*(numbers[..., first:stop] for numbers in bound)), EVERY_TIME)
    together, per_time = conclude([cut(0, 7)], dimensions=64)
    parts, per_time_of_parts = conclude([cut(0, 3), cut(3, 4), cut(4, 7)], dimensions=64)
    for name, value in dataclasses.asdict(together).items():
        assert value == pytest.approx(getattr(parts, name), rel=1e-10)
    np.testing.assert_allclose(per_time.means, per_time_of_parts.means, rtol=1e-10)
    np.testing.assert_allclose(per_time.errors, per_time_of_parts.errors, rtol=1e-6)
    alone, per_time_alone = conclude([cut(2, 3)], dimensions=64)
    assert alone.standard_error is None
    assert np.isnan(per_time_alone.errors).all()


def stop_after(monkeypatch, batches):
    """Lets so many batches be kept, then interrupts."""
    save, left = bits_per_dim._Batches.save, [batches]

    def save_or_stop(self, first, sums):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        save(self, first, sums)

    monkeypatch.setattr(bits_per_dim._Batches, "save", save_or_stop)


@pytest.mark.parametrize("batch_size", [64, 200])
def test_a_job_that_was_stopped_goes_on(job, whole, tmp_path, monkeypatch, capsys, batch_size):
    likelihood, whole_out = whole
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run_job(job, out, WHOLE, batch_size=64)
    assert "128 of 359 images are done: the same command goes on" in capsys.readouterr().err
    assert not (out / "likelihood.json").exists()
    # A batch that was being written when the power failed.
    torn = out / "batches" / "00000064-00000128.npz"
    torn.write_bytes(torn.read_bytes()[:700])
    assert_same(run_job(job, out, WHOLE, batch_size=batch_size), likelihood)
    if batch_size == 64:
        for name in FILES:
            assert (out / name).read_bytes() == (whole_out / name).read_bytes()
    else:
        np.testing.assert_allclose(table(out / "terms.csv")["bits"], table(whole_out / "terms.csv")["bits"], rtol=1e-5)


def test_a_finished_job_is_not_done_again(job, whole, monkeypatch):
    likelihood, out = whole
    before = [(out / name).read_bytes() for name in FILES]
    with monkeypatch.context() as patch:
        patch.setattr(BatchBound, "__call__", None)
        assert run_job(job, out, WHOLE, batch_size=64) == likelihood
        # Bits do not depend on how the run would be sampled.
        assert (
            run_job(job._replace(choice=SamplerConfig(sampler="ddim", steps=5)), out, WHOLE, batch_size=64)
            == likelihood
        )
    assert [(out / name).read_bytes() for name in FILES] == before


def test_a_part_of_the_set_is_taken_evenly_with_the_noise_of_the_whole(job, test_set, tmp_path):
    likelihood = run_job(job, tmp_path / "out", WHOLE._replace(number=10), batch_size=64)
    chosen = np.arange(10) * 359 // 10
    bound = plain_bound(job, test_set, chosen)
    assert likelihood.images == 10
    assert likelihood.bits_per_dim == pytest.approx(float((bound.terms.sum(axis=0) + bound.prior).mean()), rel=1e-5)


def test_optimal_variances_come_from_training_images_that_are_not_counted(job, tmp_path, monkeypatch):
    train = load_source(job.config.data)
    estimated = np.arange(512) * 1438 // 512
    bound = plain_bound(job, train, estimated, use=1)
    expected = np.asarray(optimal_log_variances(build_schedule(job.config), bound.mean_mse.mean(axis=1)))
    counted = np.setdiff1d(np.arange(1438), estimated)
    for split, images in (("test", 359), ("train", len(counted))):
        request = WHOLE._replace(split=split, sigma="optimal", number=40)
        _, chosen = bits_per_dim._choose(job.config, request._replace(number=0))
        assert len(chosen.indices) == images
        if split == "train":
            assert chosen.indices.tolist() == counted.tolist()
        if split == "train":
            # Stopped while the variances are estimated.
            with monkeypatch.context() as patch:
                stop_after(patch, 3)
                with pytest.raises(KeyboardInterrupt):
                    run_job(job, tmp_path / split, request, batch_size=64)
            assert len(list((tmp_path / split / "estimation").iterdir())) == 3
        optimal = run_job(job, tmp_path / split, request, batch_size=64)
        np.testing.assert_allclose(table(tmp_path / split / "terms.csv")["log_variance"], expected, rtol=1e-4)
        if split == "test":
            # What is best for 512 images of a kind is better for 40 others than a fixed variance, t = 0 aside.
            fixed = run_job(job, tmp_path / "fixed", request._replace(sigma="fixed_large"), batch_size=64)
            assert fixed.distortion_bits == pytest.approx(optimal.distortion_bits, rel=1e-6)
            assert optimal.rate_bits < fixed.rate_bits


def test_the_error_of_a_predicted_mean_is_that_of_an_unclipped_x0(test_set):
    config, x0 = make_config(prediction="mean"), to_float(test_set.read(np.arange(4)))
    bound_of = lambda clip_x0: bound_terms(
        image_keys(jax.random.key(0), jnp.arange(4)),
        build_schedule(config),
        lambda x_t, t: jnp.tanh(0.5 * x_t),
        x0,
        prediction="mean",
        clip_x0=clip_x0,
    )
    clipped, unclipped = bound_of(True), bound_of(False)
    # The mean is used as it is, clipped or not; the x_0 that is reported is not.
    np.testing.assert_allclose(clipped.terms, unclipped.terms, rtol=1e-5)
    coef_x0 = np.asarray(build_schedule(config).posterior_mean_coef_x0)[:, None]
    np.testing.assert_allclose(clipped.mean_mse, coef_x0**2 * unclipped.x0_mse, rtol=1e-3)
    assert (clipped.x0_mse < 0.9 * unclipped.x0_mse).any()


def test_one_program_serves_every_variance_that_is_given(job, test_set, monkeypatch):
    traces = []

    def counted(*arguments, **settings):
        traces.append(len(arguments[-1]))
        return bound_at(*arguments, **settings)

    monkeypatch.setattr(bits_per_dim, "bound_at", counted)
    bound_of, schedule = BatchBound(job.config, batch_size=8), build_schedule(job.config)
    params = bound_of.place(job.params)
    for seed, log_variances in ((0, schedule.log_betas), (1, schedule.fixed_large_log_variance)):
        for indices in (np.arange(8), np.arange(3)):
            bound_of(params, jax.random.key(seed), test_set, indices, log_variances=log_variances)
    assert traces == [T]


def test_some_times_estimate_what_all_of_them_say(job, test_set, whole, tmp_path):
    likelihood, _ = whole
    estimate = run_job(job, tmp_path / "out", WHOLE._replace(times=4), batch_size=64)
    bound = jax.tree.map(lambda numbers: np.asarray(numbers, np.float64), plain_bound(job, test_set, np.arange(359)))
    # The images are the same: what differs is the draw of times, one of each range for each image.
    variance = 0.0
    for first, stop in itertools.pairwise(strata(T, 4)):
        variance += (stop - first) ** 2 * bound.terms[first:stop].var(axis=0).mean() / 359
    assert 0 < abs(estimate.bits_per_dim - likelihood.bits_per_dim) < 4 * np.sqrt(variance)
    assert estimate.standard_error > likelihood.standard_error
    assert estimate.distortion_bits == pytest.approx(likelihood.distortion_bits, rel=1e-6)  # t = 0 is always looked at
    assert estimate.prior_bits == pytest.approx(likelihood.prior_bits, rel=1e-6)
    assert estimate.rate_bits + estimate.distortion_bits == pytest.approx(estimate.bits_per_dim, rel=1e-9)
    assert estimate.l_simple == pytest.approx(likelihood.l_simple, rel=0.1)


def test_learned_variances_are_counted(test_set, tmp_path):
    job = make_job(make_config(variance="learned_range"))
    likelihood = run_job(job, tmp_path / "out", WHOLE._replace(number=16), batch_size=64)
    assert np.isfinite(likelihood.bits_per_dim)
    assert "log_variance" not in table(tmp_path / "out" / "terms.csv")
    bound = plain_bound(job, test_set, np.arange(16) * 359 // 16)
    assert likelihood.bits_per_dim == pytest.approx(float((bound.terms.sum(axis=0) + bound.prior).mean()), rel=1e-4)


def test_a_conditional_network_is_told_each_image_s_class(test_set):
    config = make_config()
    job = make_job(dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=10)))
    bound_of, key, indices = BatchBound(job.config, batch_size=8), jax.random.key(0), np.arange(8)
    params = bound_of.place(job.params)
    told = bound_of(params, key, test_set, indices)
    alone = [bound_of(params, key, test_set, indices[i : i + 1]) for i in (0, 5)]
    np.testing.assert_allclose(np.concatenate([one.terms for one in alone], axis=1), told.terms[:, [0, 5]], rtol=1e-4)
    wrong = dataclasses.replace(test_set, read_labels=lambda indices: (test_set.labels[indices] + 1) % 10)
    assert abs(bound_of(params, key, wrong, indices).eps_mse - told.eps_mse).min() > 0
    with pytest.raises(UserError, match="has no labels"):
        bits_per_dim.check_labels(job.config, dataclasses.replace(test_set, read_labels=None))


@pytest.mark.parametrize(
    ("request_", "batch_size", "message"),
    [
        (WHOLE._replace(split="tset"), 8, "has no split 'tset'"),
        (WHOLE._replace(times=11), 8, "--times must be in 2 to 10, .* or 0 for all: 11"),
        (WHOLE._replace(times=1), 8, "--times must be in 2 to 10"),
        (WHOLE._replace(number=360), 8, "--num must be in 0 (all) to 359.*: 360"),
        (WHOLE._replace(number=-1), 8, "--num must be in 0"),
        (WHOLE, 0, "--batch-size must be at least 1, not 0"),
        (WHOLE._replace(split="all", sigma="optimal"), 8, "use --split train or --split test"),
    ],
)
def test_slips_are_one_line_and_make_no_folder(job, tmp_path, request_, batch_size, message):
    with pytest.raises(UserError, match=message.replace("(all)", r"\(all\)")):
        run_job(job, tmp_path / "out", request_, batch_size=batch_size)
    assert not (tmp_path / "out").exists()


def test_the_folder_of_another_job_is_refused(job, whole, tmp_path):
    _, out = whole
    for other, request, what in (
        (job._replace(seed=4), WHOLE, "seed is 3 there and 4 here"),
        (job, WHOLE._replace(sigma="fixed_small"), "sigma is model there and fixed_small here"),
        (job, WHOLE._replace(number=5), "images is 359 there and 5 here"),
        (job, WHOLE._replace(cdf="erf"), "cdf is tanh there and erf here"),
        (make_job(job.config, seed=1), WHOLE, "weights is"),
    ):
        with pytest.raises(UserError, match=what):
            run_job(other, out, request, batch_size=64)
    (tmp_path / "mine.txt").write_text("not yours")
    with pytest.raises(UserError, match="holds no likelihood job"):
        run_job(job, tmp_path, WHOLE, batch_size=64)


def test_folders_of_different_jobs_have_different_names(job):
    requests = [
        Request(split, number, sigma, cdf, times)
        for split in ("test", "train[:90%]")
        for number in (0, 5)
        for sigma in ("model", "optimal")
        for cdf in ("tanh", "erf")
        for times in (0, 3)
    ]
    names = {default_folder(Path("run"), each, request) for each in (job, job._replace(seed=9)) for request in requests}
    assert len(names) == 2 * len(requests)
    assert default_folder(Path("run"), job, WHOLE) == Path("run/likelihood/checkpoint_7_test_model_seed_3")


# The script


@pytest.fixture(scope="module")
def run(job, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    folder.mkdir()
    save_config(job.config, folder / "config.json")
    with Checkpoints(folder, keep=1, warn=print) as checkpoints:
        # Of the averaged weights alone bits are counted.
        nothing = jax.tree.map(jnp.zeros_like, job.params)
        checkpoints.save(7, {"params": nothing, "ema": job.params, "optimizer": (jnp.zeros(3),)}, notes={})
    return folder


def test_the_script_counts_bits_and_says_where(run, whole, run_script):
    likelihood, _ = whole
    status, printed, _ = run_script("evaluate.py", "likelihood", run, "--seed", 3)
    assert status == 0
    out = run / "likelihood" / "checkpoint_7_test_model_seed_3"
    assert printed.startswith(f"{likelihood.bits_per_dim:.4f} +- {likelihood.standard_error:.4f} bits/dim over 359")
    assert str(out) in printed
    assert_same(
        Likelihood(**{k: v for k, v in json.loads((out / "likelihood.json").read_text()).items() if k != "job"}),
        likelihood,
    )


def test_the_script_draws_and_judges(run, run_script):
    status, printed, _ = run_script("evaluate.py", "quality", run, "--num", 40, "--seed", 3)
    assert status == 0
    assert "FD-own" in printed
    (file,) = run.glob("samples/*/quality.json")
    quality = json.loads(file.read_text())
    assert quality["images"] == sum(quality["counts"].values()) == 40
    # Of random weights nothing good is drawn.
    assert quality["ratio"] > 5
    few = ["--sampler", "ddim", "--steps", 2, "--num", 16]
    status, printed, _ = run_script("evaluate.py", "quality", run, "--seed", 3, *few)
    assert status == 0
    assert "checkpoint_7_seed_3_sampler_ddim_steps_2" in printed
    samples = file.with_name("samples.npz")
    status, _, error = run_script("evaluate.py", "quality", samples, *few)
    assert status == 2
    assert error.endswith("drawn already: a sampler goes with the folder of a run\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["likelihod", "x"], "there is no command 'likelihod': did you mean likelihood?"),
        (["likelihood"], "RUN is missing: see --help"),
        (["likelihood", "nowhere"], "there is no folder nowhere: give the folder of a run, such as runs/digits"),
        (
            ["likelihood", "x", "--sigma", "best"],
            "--sigma needs one of model, fixed_small, fixed_large, optimal, not 'best'",
        ),
        (["quality", "nowhere.npz", "--config", "digits"], "there is no file nowhere.npz"),
    ],
)
def test_slips_on_the_command_line_are_one_line(run_script, words, line):
    status, _, error = run_script("evaluate.py", *words)
    assert (status, error) == (2, f"evaluate.py: error: {line}\n")


def test_the_help_names_the_commands(run_script):
    status, printed, _ = run_script("evaluate.py")
    assert status == 0
    assert "likelihood" in printed
    assert "quality" in printed
    status, printed, _ = run_script("evaluate.py", "likelihood", "--help")
    assert status == 0
    assert "17" in printed  # the levels of the digits
