"""The figures of a run."""

import dataclasses
import os
import re

import jax
import numpy as np
import pytest
from PIL import Image

from ddpm_jax.config import DataConfig
from ddpm_jax.data.sources import load_held_out, load_source
from ddpm_jax.evaluation.bits_per_dim import Request, run_job
from ddpm_jax.evaluation.figures import draw_figures, finished_curve, real_images
from ddpm_jax.system.errors import UserError
from ddpm_jax.training.plots import plot_loss


def job_of(runs, folder, **fields):
    return runs.make_job(num_classes=10, folder=folder, **fields)


@pytest.fixture(scope="module")
def job(runs, tmp_path_factory):
    """A job of a run with a loss curve, and without a likelihood job."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    plot_loss(folder / "loss.png", [1, 2, 3], [0.5, 0.4, 0.3])
    return job_of(runs, folder)


@pytest.fixture(scope="module")
def drawn(job):
    draw_figures(job, job.trained.folder / "figures", num=2, batch_size=16)
    return job.trained.folder


COLUMNS = {
    "samples": (2, 2),
    "progressive_x0": (2, 11),
    "progressive_x_t": (2, 11),
    "shared_latents": (4, 3),
    "slerp_of_noise": (2, 11),
    "reconstruction": (2, 9),
    "interpolation": (2, 13),
    "interpolation_over_t": (9, 13),
    "slerp": (2, 13),
    "inpainting": (4, 6),
    "nearest_neighbors": (2, 9),
}


def cells(path, rows, columns):
    """Takes a grid of 8x8 images apart: (rows, columns, 8, 8)."""
    picture, height, width = np.asarray(Image.open(path)), 9 * rows + 1, 9 * columns + 1
    factor = 1024 // max(height, width)
    assert (picture.shape[0] > factor * height) == (path.name != "samples.png")  # texts above
    pixels = picture[-factor * height :, -factor * width :][::factor, ::factor][1:, 1:]
    return pixels.reshape(rows, 9, columns, 9)[:, :8, :, :8].swapaxes(1, 2)


def test_all_figures_are_drawn_and_described(runs, drawn):
    folder = drawn / "figures"
    files = {*(f"{name}.png" for name in COLUMNS), "reverse.gif", "loss.png", "rate_distortion.png"}
    assert {file.name for file in folder.iterdir()} == {*files, "figures.md", "job.json", ".lock"}
    with pytest.raises(UserError, match=r"other results of figures \(num is 2 there and 3 here\).*--overwrite$"):
        draw_figures(runs.make_job(num_classes=10, folder=drawn), folder, num=3)
    text = (folder / "figures.md").read_text()
    assert re.findall(r"^## (.*)$", text, re.M) == re.findall(r"\]\((.*)\)", text)
    assert set(re.findall(r"^## (.*)$", text, re.M)) == files
    assert "Checkpoint 7" in text
    assert f"evaluate.py figures {drawn} --num 2 --seed 0 --step 7`" in text
    assert (folder / "loss.png").read_bytes() == (drawn / "loss.png").read_bytes()
    for name, (rows, columns) in COLUMNS.items():
        assert cells(folder / f"{name}.png", rows, columns).std() > 10
    with Image.open(folder / "reverse.gif") as gif:
        assert gif.n_frames == runs.T + 1


def test_the_figures_are_consistent(drawn, job):
    folder = drawn / "figures"
    shown = {name: cells(folder / f"{name}.png", *size) for name, size in COLUMNS.items()}
    held_out = load_held_out(job.trained.config.data)
    a = real_images(job, held_out, 4).images[:2, ..., 0]
    # The real images are the first of their rows, and progressive generation ends in the samples.
    for name in ("reconstruction", "interpolation", "slerp"):
        np.testing.assert_array_equal(shown[name][:, 0], a)
    np.testing.assert_array_equal(shown["progressive_x0"][:, -1], shown["samples"][0])
    np.testing.assert_array_equal(shown["progressive_x_t"][:, -1], shown["samples"][0])
    # At t = 0 pixels are mixed.
    over_t = shown["interpolation_over_t"]
    np.testing.assert_array_equal(over_t[0, [1, 11]], over_t[0, [0, 12]])
    assert abs(over_t[1:, 1].astype(int) - over_t[0, 0]).max() > 20
    # Known pixels are those of the image.
    known = np.ones((8, 8), bool)
    known[:, 4:] = False
    np.testing.assert_array_equal(shown["inpainting"][0, 2:, known], np.repeat(a[0][known][:, None], 4, axis=1))
    assert (shown["inpainting"][0, 1][~known] == 128).all()
    assert abs(shown["inpainting"][0, 2].astype(int) - shown["inpainting"][0, 3])[~known].max() > 5


def test_the_captions_name_the_images_and_what_is_left_out(drawn):
    text = (drawn / "figures" / "figures.md").read_text()
    assert "Real images are from digits, test, nearest neighbors from digits, train." in text
    assert "of 64, evenly over all 359, images of digits, test, at all T timesteps; in total" in text
    assert "(Figs. 1, 3, 4, 11, 13, 16-19)" in text
    left_out = text[text.index("Left out of the paper's figures:") :]
    assert re.findall(r"^- (Fig. \d+)", left_out, re.M) == ["Fig. 2", "Fig. 10"]


def test_nearest_neighbors_are_those_of_the_samples_in_the_training_set(drawn, job):
    shown = cells(drawn / "figures" / "nearest_neighbors.png", *COLUMNS["nearest_neighbors"]).astype(int)
    samples = cells(drawn / "figures" / "samples.png", *COLUMNS["samples"]).reshape(4, 8, 8)
    own = load_source(job.trained.config.data).images[..., 0].astype(int)
    for row, sample in zip(shown, samples.astype(int), strict=False):
        np.testing.assert_array_equal(row[0], sample)
        distances = ((own - sample) ** 2).sum(axis=(1, 2))
        np.testing.assert_array_equal(((row[1:] - sample) ** 2).sum(axis=(1, 2)), np.sort(distances)[:8])


def test_the_curve_is_that_of_the_bound(job, drawn, tmp_path):
    text = (drawn / "figures" / "figures.md").read_text()
    bits, error = map(float, re.search(r"in total ([\d.]+) \+- ([\d.]+) bits/dim", text).groups())
    likelihood = run_job(job.trained, tmp_path / "job", Request("test", 64, "model", "tanh"), batch_size=64)
    # The images are the same, the noise is another.
    assert bits == pytest.approx(likelihood.bits_per_dim, abs=4 * error)
    assert bits == pytest.approx(likelihood.bits_per_dim, rel=0.05)


def test_real_images_are_of_the_test_split_and_chosen_by_the_seed(job):
    held_out = load_source(dataclasses.replace(job.trained.config.data, split="test"))
    known = {(image.tobytes(), int(label)) for image, label in zip(held_out.images, held_out.labels, strict=True)}
    first, again, other = (real_images(job._replace(seed=seed), held_out, 20) for seed in (0, 0, 1))
    assert {(image.tobytes(), label) for image, label in zip(first.images, first.labels, strict=True)} <= known
    np.testing.assert_array_equal(first.images, again.images)
    assert (first.images != other.images).any()


def test_without_the_data_figures_of_noise_and_the_newest_finished_curve_are_drawn(runs, tmp_path, capsys):
    trained = job_of(runs, tmp_path).trained

    def finish(name, number, of, age):
        folder = tmp_path / "likelihood" / name
        run_job(of, folder, Request("test", number, "model", "tanh"), batch_size=8)
        os.utime(folder / "likelihood.json", (age, age))

    assert finished_curve(trained) is None
    finish("old", 2, trained, 1)
    finish("new", 3, trained, 2)
    finish("other", 4, trained._replace(params=jax.tree.map(lambda leaf: leaf + 1, trained.params)), 3)
    (tmp_path / "likelihood" / "damaged").mkdir()
    (tmp_path / "likelihood" / "damaged" / "likelihood.json").write_text("{")
    assert finished_curve(trained) == tmp_path / "likelihood" / "new"

    gone = DataConfig(source="folder", path=str(tmp_path / "gone"))
    text = draw_figures(job_of(runs, tmp_path, data=gone), tmp_path / "out", num=1).read_text()
    assert "does not exist" in capsys.readouterr().err
    assert "## samples.png" in text
    assert re.search(r"^- Figures of real .*\(Figs. 12 and 15\): the run's data cannot be read: data.path", text, re.M)
    assert "Real images are" not in text
    caption = "of 3 images of the test split, at 12 of the T timesteps each, variances 'model', from likelihood/new"
    assert caption in text
    curve = "rate_distortion.png"
    assert (tmp_path / "out" / curve).read_bytes() == (tmp_path / "likelihood" / "new" / curve).read_bytes()


@pytest.mark.parametrize(
    ("wrong", "message"), [(dict(num=0), "--num must be 1 to 32, not 0"), (dict(batch_size=0), "--batch-size must be")]
)
def test_invalid_numbers_are_one_line(job, tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        draw_figures(job, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_the_script_refuses_invalid_numbers(runs, job, tmp_path, run_script):
    run = runs.save_runs(job.trained, folder=tmp_path / "run")
    status, _, error = run_script("evaluate.py", "figures", run, "--num", 40)
    assert status == 2
    assert error.strip().splitlines()[-1].startswith("evaluate.py: error: --num must be 1 to 32, not 40")
