"""Bits/dim of a set of images: against the bound of the whole set at once, interrupted, and by the script."""

import csv
import dataclasses
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ddpm_jax.config import DataConfig
from ddpm_jax.data.fingerprint import check_same_set
from ddpm_jax.data.sources import load_source
from ddpm_jax.evaluation.bits_per_dim import (
    Images,
    Likelihood,
    Request,
    bound_program,
    compute_bounds,
    conclude,
    default_folder,
    describe_images,
    run_job,
    sums_of,
)
from ddpm_jax.generation.store import Parts
from ddpm_jax.keys import image_keys
from ddpm_jax.likelihood import Bound, bound_terms, optimal_log_variances, strata
from ddpm_jax.pixels import to_float
from ddpm_jax.run.build import build_schedule
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import read_json

T = 10
WHOLE = Request("test", 0, "model", "tanh", seed=3)
EVERY_TIMESTEP = strata(T, T)
FILES = ("likelihood.json", "terms.csv", "rate_distortion.csv")


def config_of(runs, **fields):
    return runs.make_config(**{"num_steps": T, "beta_start": 0.01, **fields})


@pytest.fixture(scope="module")
def trained(runs):
    return runs.make_trained(config_of(runs))


@pytest.fixture(scope="module")
def test_set(trained):
    return load_source(dataclasses.replace(trained.config.data, split="test"))


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """The job over all 359 test images, never stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return run_job(trained, out, WHOLE, batch_size=64), out


def key_of(use=0):
    return jax.random.fold_in(jax.random.key(WHOLE.seed), use)


def plain_bound(trained, source, indices, use=0, **settings):
    """The bound of all images at once on one device, with nothing of the job but its key."""
    config = trained.config
    compute = jax.jit(
        lambda x0: bound_terms(
            image_keys(key_of(use), jnp.asarray(indices)),
            build_schedule(config),
            lambda x_t, t: trained.network.apply(trained.params, x_t, t),
            x0,
            prediction=config.diffusion.prediction,
            variance=config.diffusion.variance,
            **settings,
        )
    )
    return compute(to_float(source.read(indices)))


def bound_of(trained, source, indices, *, batch_size=8, seed_key=None, log_variances=None, devices=None):
    """The bound of at most one batch of images by the job's program."""
    program = bound_program(trained.config, trained.network, batch_size=batch_size, devices=devices)
    ((_, bound),) = compute_bounds(
        program,
        trained.params,
        key_of() if seed_key is None else seed_key,
        Images(source, np.asarray(indices)),
        [(0, len(indices))],
        log_variances=log_variances,
        description="bits/dim",
    )
    return bound


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


def test_the_job_computes_the_bound_of_the_whole_set(trained, test_set, whole):
    likelihood, out = whole
    bound = Bound(*(np.asarray(numbers, np.float64) for numbers in plain_bound(trained, test_set, np.arange(359))))
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
    assert terms["t"].tolist() == list(range(1, T + 1))
    np.testing.assert_allclose(terms["bits"], bound.terms.mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(terms["bits_standard_error"], bound.terms.std(axis=1, ddof=1) / np.sqrt(359), rtol=1e-3)
    np.testing.assert_allclose(terms["x0_rmse"], 127.5 * np.sqrt(bound.x0_mse.mean(axis=1)), rtol=1e-5)
    np.testing.assert_allclose(
        terms["log_variance"], build_schedule(trained.config).fixed_large_log_variance, rtol=1e-6
    )
    curve = table(out / "rate_distortion.csv")
    assert curve["rate_bits"][-1] + terms["bits"][0] == pytest.approx(likelihood.bits_per_dim, rel=1e-6)
    assert (np.diff(curve["rate_bits"]) >= 0).all()
    assert curve["reverse_time"].tolist() == list(range(1, T + 1))
    np.testing.assert_allclose(curve["rmse"], terms["x0_rmse"][::-1])

    written = read_json(out / "likelihood.json")
    assert written.pop("job") == read_json(out / "job.json")
    assert written.pop("num") == 0  # all of them
    assert Likelihood(**written) == likelihood
    for name in ("terms.png", "rate_distortion.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 300


def test_batch_size_and_devices_change_no_number(trained, test_set):
    indices = np.array([3, 70, 71, 200, 358])
    expected = plain_bound(trained, test_set, indices)
    for devices in (1, 3):
        bound = bound_of(trained, test_set, indices, batch_size=5, devices=tuple(jax.devices()[:devices]))
        for ours, theirs in zip(bound, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_sums_of_batches_are_those_of_one(trained, test_set):
    bound = jax.tree.map(np.asarray, plain_bound(trained, test_set, np.arange(7)))
    cut = lambda first, stop: sums_of(Bound(*(numbers[..., first:stop] for numbers in bound)), EVERY_TIMESTEP)
    together, per_timestep = conclude([cut(0, 7)], dimensions=64)
    parts, per_timestep_of_parts = conclude([cut(0, 3), cut(3, 4), cut(4, 7)], dimensions=64)
    for name, value in dataclasses.asdict(together).items():
        assert getattr(parts, name) == (value if value is None else pytest.approx(value, rel=1e-10))
    np.testing.assert_allclose(per_timestep.means, per_timestep_of_parts.means, rtol=1e-10)
    np.testing.assert_allclose(per_timestep.errors, per_timestep_of_parts.errors, rtol=1e-6)
    alone, per_timestep_alone = conclude([cut(2, 3)], dimensions=64)
    assert alone.standard_error is None
    assert np.isnan(per_timestep_alone.errors).all()


def stop_after(monkeypatch, batches):
    """Lets so many batches be saved, then interrupts."""
    save, left = Parts.save, [batches]

    def save_or_stop(*arguments):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        save(*arguments)

    monkeypatch.setattr(Parts, "save", save_or_stop)


@pytest.mark.parametrize("batch_size", [64, 200])
def test_a_stopped_job_resumes(trained, whole, tmp_path, monkeypatch, capsys, batch_size):
    likelihood, whole_out = whole
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run_job(trained, out, WHOLE, batch_size=64)
    assert "128 of 359 images are done; run the same command to resume" in capsys.readouterr().err
    assert not (out / "likelihood.json").exists()
    # A batch that was being written when the power failed.
    torn = out / "batches" / "00000064-00000128.npz"
    torn.write_bytes(torn.read_bytes()[:700])
    assert_same(run_job(trained, out, WHOLE, batch_size=batch_size), likelihood)
    if batch_size == 64:
        for name in FILES:
            assert (out / name).read_bytes() == (whole_out / name).read_bytes()
    else:
        np.testing.assert_allclose(table(out / "terms.csv")["bits"], table(whole_out / "terms.csv")["bits"], rtol=1e-5)


def test_a_finished_job_is_not_done_again(trained, whole):
    likelihood, out = whole
    before = [(out / name).read_bytes() for name in FILES]
    without_network = trained._replace(network=trained.network._replace(apply=None))
    assert run_job(without_network, out, WHOLE, batch_size=64) == likelihood
    assert [(out / name).read_bytes() for name in FILES] == before


def test_a_part_of_the_set_is_taken_evenly_with_the_noise_of_the_whole(trained, test_set, tmp_path):
    likelihood = run_job(trained, tmp_path / "out", WHOLE._replace(number=10), batch_size=64)
    chosen = np.arange(10) * 359 // 10
    bound = plain_bound(trained, test_set, chosen)
    assert likelihood.images == 10
    assert likelihood.bits_per_dim == pytest.approx(float((bound.terms.sum(axis=0) + bound.prior).mean()), rel=1e-5)


def test_optimal_variances_come_from_training_images_that_are_not_evaluated(trained, tmp_path, monkeypatch):
    train = load_source(trained.config.data)
    bound = plain_bound(trained, train, np.arange(512) * 1438 // 512, use=1)
    expected = np.asarray(optimal_log_variances(build_schedule(trained.config), bound.mean_mse.mean(axis=1)))
    for split, images in (("test", 359), ("train", 1438 - 512)):
        request, out = WHOLE._replace(split=split, sigma="optimal", number=40), tmp_path / split
        with pytest.raises(UserError, match=rf"--num must be in 0 \(all\) to {images}, "):
            run_job(trained, out, request._replace(number=2000), batch_size=64)
        if split == "train":
            # Stopped while the variances are estimated.
            with monkeypatch.context() as patch:
                stop_after(patch, 3)
                with pytest.raises(KeyboardInterrupt):
                    run_job(trained, out, request, batch_size=64)
            assert len(list((out / "estimation").iterdir())) == 3
        optimal = run_job(trained, out, request, batch_size=64)
        np.testing.assert_allclose(table(out / "terms.csv")["log_variance"], expected, rtol=1e-4)
        if split == "test":
            # What is best for 512 images of a kind is better for 40 others than a fixed variance, t = 0 aside.
            fixed = run_job(trained, tmp_path / "fixed", request._replace(sigma="fixed_large"), batch_size=64)
            assert fixed.distortion_bits == pytest.approx(optimal.distortion_bits, rel=1e-6)
            assert optimal.rate_bits < fixed.rate_bits


def test_one_program_serves_every_variance_that_is_given(trained, test_set):
    traces, schedule = [], build_schedule(trained.config)

    def counted(*arguments, **options):
        traces.append(1)
        return trained.network.apply(*arguments, **options)

    watched = trained._replace(network=trained.network._replace(apply=counted))
    for seed, log_variances in ((0, schedule.log_betas), (1, schedule.fixed_large_log_variance)):
        for indices in (np.arange(8), np.arange(3)):
            bound_of(watched, test_set, indices, seed_key=jax.random.key(seed), log_variances=log_variances)
    assert len(traces) == 1


def test_strata_estimate_the_whole_bound(trained, test_set, whole, tmp_path):
    likelihood, _ = whole
    estimate = run_job(trained, tmp_path / "out", WHOLE._replace(num_strata=4), batch_size=64)
    bound = jax.tree.map(
        lambda numbers: np.asarray(numbers, np.float64), plain_bound(trained, test_set, np.arange(359))
    )
    # The images are the same: what differs is the draw of timesteps, one per stratum and image.
    variance = 0.0
    for first, stop in itertools.pairwise(strata(T, 4)):
        variance += (stop - first) ** 2 * bound.terms[first:stop].var(axis=0).mean() / 359
    assert 0 < abs(estimate.bits_per_dim - likelihood.bits_per_dim) < 4 * np.sqrt(variance)
    assert estimate.standard_error > likelihood.standard_error
    assert estimate.distortion_bits == pytest.approx(
        likelihood.distortion_bits, rel=1e-6
    )  # t = 0 is a stratum of its own
    assert estimate.prior_bits == pytest.approx(likelihood.prior_bits, rel=1e-6)
    assert estimate.rate_bits + estimate.distortion_bits == pytest.approx(estimate.bits_per_dim, rel=1e-9)
    assert estimate.l_simple == pytest.approx(likelihood.l_simple, rel=0.1)


def test_learned_variances(runs, test_set, tmp_path):
    trained = runs.make_trained(config_of(runs, variance="learned_range"))
    likelihood = run_job(trained, tmp_path / "out", WHOLE._replace(number=16), batch_size=64)
    assert "log_variance" not in table(tmp_path / "out" / "terms.csv")
    bound = plain_bound(trained, test_set, np.arange(16) * 359 // 16)
    assert likelihood.bits_per_dim == pytest.approx(float((bound.terms.sum(axis=0) + bound.prior).mean()), rel=1e-4)


def test_a_conditional_network_gets_each_image_s_label(runs, test_set, tmp_path):
    trained, indices = runs.make_trained(config_of(runs, num_classes=10)), np.arange(8)
    bound = bound_of(trained, test_set, indices)
    alone = [bound_of(trained, test_set, indices[i : i + 1]) for i in (0, 5)]
    np.testing.assert_allclose(np.concatenate([one.terms for one in alone], axis=1), bound.terms[:, [0, 5]], rtol=1e-4)
    wrong = dataclasses.replace(test_set, read_labels=lambda indices: (test_set.labels[indices] + 1) % 10)
    assert abs(bound_of(trained, wrong, indices).eps_mse - bound.eps_mse).min() > 0


@pytest.mark.parametrize(
    ("request_", "batch_size", "message"),
    [
        (WHOLE._replace(split="tset"), 8, "has no split 'tset'"),
        (WHOLE._replace(num_strata=11), 8, "--num-strata must be in 3 to 10, .* or 0 for all, not 11"),
        (WHOLE._replace(num_strata=2), 8, "--num-strata must be in 3 to 10"),
        (WHOLE._replace(number=360), 8, "--num must be in 0 (all) to 359.*: 360"),
        (WHOLE._replace(number=-1), 8, "--num must be in 0"),
        (WHOLE._replace(seed=-1), 8, "--seed must be in"),
        (WHOLE, 0, "--batch-size must be at least 1, not 0"),
        (WHOLE._replace(split="all", sigma="optimal"), 8, "use --split train or --split test"),
    ],
)
def test_slips_are_one_line_and_make_no_folder(trained, tmp_path, request_, batch_size, message):
    with pytest.raises(UserError, match=message.replace("(all)", r"\(all\)")):
        run_job(trained, tmp_path / "out", request_, batch_size=batch_size)
    assert not (tmp_path / "out").exists()


def test_the_folder_of_another_job_is_refused(runs, trained, whole, tmp_path):
    _, out = whole
    for other, request, what in (
        (trained, WHOLE._replace(seed=4), "seed is 3 there and 4 here"),
        (trained, WHOLE._replace(sigma="fixed_small"), "sigma is model there and fixed_small here"),
        (trained, WHOLE._replace(number=5), "images is 359 there and 5 here"),
        (trained, WHOLE._replace(cdf="erf"), "cdf is tanh there and erf here"),
        (runs.make_trained(trained.config, seed=1), WHOLE, "weights is"),
    ):
        with pytest.raises(UserError, match=what):
            run_job(other, out, request, batch_size=64)
    (tmp_path / "mine.txt").write_text("not yours")
    with pytest.raises(UserError, match="contains no likelihood job"):
        run_job(trained, tmp_path, WHOLE, batch_size=64)


def test_folders_of_different_jobs_have_different_names(trained):
    options = (("test", "train[:90%]"), (0, 5), ("model", "optimal"), ("tanh", "erf"), (0, 3), (3, 9))
    requests = [Request(*values) for values in itertools.product(*options)]
    assert len({default_folder(trained, request) for request in requests}) == len(requests)
    assert default_folder(trained, WHOLE) == Path("runs/tiny/likelihood/checkpoint_7_test_model_seed_3")


# The script


@pytest.fixture(scope="module")
def run(runs, trained, tmp_path_factory):
    return runs.save_runs(trained, folder=tmp_path_factory.mktemp("runs") / "tiny")


def test_images_that_the_run_was_trained_on_are_counted(trained, tmp_path):
    config = dataclasses.replace(trained.config, data=dataclasses.replace(trained.config.data, split="all"))
    request = Request("test", 9, "model", "tanh", num_strata=3)
    found = run_job(trained._replace(config=config), tmp_path, request, batch_size=16)
    assert found.trained_on == read_json(tmp_path / "likelihood.json")["trained_on"] == 9
    line = "images: split test of digits (warning: the run was trained on 9 of these 9 images, in split all)"
    assert describe_images(config, "test", found) == line
    assert "(held out: " in describe_images(trained.config, "test", dataclasses.replace(found, trained_on=0))
    assert "is not known" in describe_images(trained.config, "test", dataclasses.replace(found, trained_on=None))


def test_the_script_computes_bits_and_prints_where(run, whole, run_script):
    likelihood, _ = whole
    status, printed, _ = run_script("evaluate.py", "likelihood", run, "--seed", 3)
    assert status == 0
    out = run / "likelihood" / "checkpoint_7_test_model_seed_3"
    assert printed.startswith(f"{likelihood.bits_per_dim:.4f} +- {likelihood.standard_error:.4f} bits/dim over 359")
    assert str(out) in printed
    assert_same(
        Likelihood(**{k: v for k, v in read_json(out / "likelihood.json").items() if k not in ("num", "job")}),
        likelihood,
    )


def test_images_that_moved_are_found_and_checked(runs, tmp_path, run_script):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    images = np.random.default_rng(0).integers(0, 255, (6, 8, 8, 1), np.uint8)
    for name in ("train", "test"):
        np.save(first / f"{name}.npy", images)
    config = runs.make_config(data=DataConfig(source="npy", path=str(first)))
    run = runs.save_runs(runs.make_trained(config), folder=tmp_path / "run")
    check_same_set(run / "data.json", load_source(config.data))
    words = ("evaluate.py", "likelihood", run, "--num-strata", 3)
    assert run_script(*words)[0] == 0
    first.rename(second)
    status, _, error = run_script(*words)
    assert status == 2
    assert re.search(f"error: data.path: .*{first}", error)
    status, printed, error = run_script(*words, "--data.path", second)  # the same job
    assert status == 0, error
    # They are the same images.
    assert "images: split test of npy (warning: the run was trained on 6 of these 6 images, in split train)" in printed
    np.save(second / "train.npy", images[::-1])
    status, _, error = run_script(*words, "--data.path", second)
    assert (status, "was begun on other images than" in error) == (2, True)


def test_the_script_draws_and_judges(run, run_script):
    status, printed, _ = run_script("evaluate.py", "quality", run, "--num", 40, "--seed", 3)
    assert status == 0
    assert "FD-own" in printed
    (file,) = run.glob("samples/*/quality.json")
    quality = read_json(file)
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
    assert error.endswith("already contains the images: --ema and sampler options need the folder of a run\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["likelihod", "x"], "there is no command 'likelihod': did you mean likelihood?"),
        (["likelihood"], "missing RUN: see --help"),
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
