"""The figures of a run."""

import dataclasses
import os
import re

import jax
import numpy as np
import pytest
from PIL import Image

from ddpm_jax.data.sources import load_held_out, load_source
from ddpm_jax.evaluation import bits_per_dim, figures, plots
from ddpm_jax.evaluation.figures import draw_figures, real_images
from ddpm_jax.system.errors import UserError
from ddpm_jax.training.plots import plot_loss


@pytest.fixture(scope="module")
def job(drawing):
    return drawing.make_job(num_classes=10)


@pytest.fixture(scope="module")
def real(job):
    return real_images(job, load_held_out(job.config.data), 6)


@pytest.fixture(scope="module")
def drawn(job, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    run.mkdir()
    plot_loss(run / "loss.png", [1, 2, 3], [0.5, 0.4, 0.3])
    draw_figures(job, run, run / "figures", num=2, batch_size=16)
    return run


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
    picture = np.asarray(Image.open(path))
    factor = picture.shape[0] // (9 * rows + 1)
    assert picture.shape == (factor * (9 * rows + 1), factor * (9 * columns + 1))
    pixels = picture[::factor, ::factor][1:, 1:]
    return pixels.reshape(rows, 9, columns, 9)[:, :8, :, :8].swapaxes(1, 2)


def test_all_figures_are_drawn_and_said_what_they_are(drawing, drawn):
    folder = drawn / "figures"
    files = {*(f"{name}.png" for name in COLUMNS), "reverse.gif", "loss.png", "rate_distortion.png"}
    assert {file.name for file in folder.iterdir()} == {*files, "figures.md", ".lock"}
    text = (folder / "figures.md").read_text()
    assert re.findall(r"^## (.*)$", text, re.M) == re.findall(r"\]\((.*)\)", text)
    assert set(re.findall(r"^## (.*)$", text, re.M)) == files
    assert "Checkpoint 7" in text
    assert f"evaluate.py figures {drawn} --num 2 --seed 0 --step 7`" in text
    assert (folder / "loss.png").read_bytes() == (drawn / "loss.png").read_bytes()
    for name, (rows, columns) in COLUMNS.items():
        assert cells(folder / f"{name}.png", rows, columns).std() > 10
    with Image.open(folder / "reverse.gif") as gif:
        assert gif.n_frames == drawing.T + 1


def test_the_figures_hold_together(drawn, real, job):
    folder = drawn / "figures"
    shown = {name: cells(folder / f"{name}.png", *size) for name, size in COLUMNS.items()}
    held_out = load_held_out(job.config.data)
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
    # Where it is known, what is filled in is the image.
    known = np.ones((8, 8), bool)
    known[:, 4:] = False
    np.testing.assert_array_equal(shown["inpainting"][0, 2:, known], np.repeat(a[0][known][:, None], 4, axis=1))
    assert (shown["inpainting"][0, 1][~known] == 128).all()
    assert abs(shown["inpainting"][0, 2].astype(int) - shown["inpainting"][0, 3])[~known].max() > 5


def test_the_captions_say_where_images_come_from_and_what_is_left_out(drawn):
    text = (drawn / "figures" / "figures.md").read_text()
    assert "Real images are of digits, test, those of the nearest neighbors of digits, train." in text
    assert "of 64, evenly over all 359, images of digits, test, at all T times; in all" in text
    assert "(Figs. 1, 3, 4, 11, 13, 16-19)" in text
    left_out = text[text.index("Left out of the paper's figures:") :]
    assert re.findall(r"^- (Fig. \d+)", left_out, re.M) == ["Fig. 2", "Fig. 10"]


def test_nearest_neighbors_are_those_of_the_samples_in_the_training_set(drawn, job):
    shown = cells(drawn / "figures" / "nearest_neighbors.png", *COLUMNS["nearest_neighbors"]).astype(int)
    samples = cells(drawn / "figures" / "samples.png", *COLUMNS["samples"]).reshape(4, 8, 8)
    own = load_source(job.config.data).images[..., 0].astype(int)
    for row, sample in zip(shown, samples.astype(int), strict=False):
        np.testing.assert_array_equal(row[0], sample)
        distances = ((own - sample) ** 2).sum(axis=(1, 2))
        np.testing.assert_array_equal(((row[1:] - sample) ** 2).sum(axis=(1, 2)), np.sort(distances)[:8])


def test_the_curve_is_that_of_the_bound(job, tmp_path, monkeypatch):
    held_out, plotted = load_held_out(job.config.data), []
    monkeypatch.setattr(plots, "plot_rate_distortion", lambda path, *curve: plotted.append(curve))
    monkeypatch.setattr(figures, "_COUNTED", held_out.num_examples)
    caption = figures._estimated_curve(job, held_out, tmp_path, batch_size=100).caption
    likelihood = bits_per_dim.run_job(
        job, tmp_path / "job", bits_per_dim.Request("test", 0, "model", "tanh"), batch_size=400
    )
    (time, rate, distortion), (other_time, other_rate, other_distortion) = plotted
    np.testing.assert_array_equal(time, other_time)
    # The noise is another.
    np.testing.assert_allclose(rate, other_rate, rtol=0.02)
    np.testing.assert_allclose(distortion, other_distortion, rtol=0.02)
    assert f"all {held_out.num_examples} images of digits, test" in caption
    assert abs(float(re.search(r"in all ([\d.]+)", caption)[1]) / likelihood.bits_per_dim - 1) < 0.02


def test_the_curve_of_the_newest_finished_job_of_the_weights_is_copied(job, tmp_path):
    def finish(name, counted, of, age):
        bits_per_dim.run_job(
            of, tmp_path / "likelihood" / name, bits_per_dim.Request("test", counted, "model", "tanh"), batch_size=8
        )
        os.utime(tmp_path / "likelihood" / name / "likelihood.json", (age, age))

    assert figures._finished_curve(job, tmp_path) is None
    finish("old", 2, job, 1)
    finish("new", 3, job, 2)
    finish("other", 4, job._replace(params=jax.tree.map(lambda leaf: leaf + 1, job.params)), 3)
    (tmp_path / "likelihood" / "damaged").mkdir()
    (tmp_path / "likelihood" / "damaged" / "likelihood.json").write_text("{")
    folder = figures._finished_curve(job, tmp_path)
    assert folder == tmp_path / "likelihood" / "new"
    figure = figures._copied_curve(folder, tmp_path / "out")
    assert (
        "3 images of the part 'test', at 12 of the T times each, variances 'model', from likelihood/new"
        in figure.caption
    )
    assert (tmp_path / "out" / figure.file).read_bytes() == (folder / "rate_distortion.png").read_bytes()


def test_of_a_large_set_the_first_images_alone_are_looked_at_and_that_is_said(job, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "_LOOKED_AT", 100)
    own = load_source(job.config.data)
    samples = own.read(np.array([3, 1000]))
    figure = figures._neighbors(samples, own, tmp_path)
    assert f"among the first 100 of the {own.num_examples} images of digits, train" in figure.caption
    shown = cells(tmp_path / figure.file, 2, 9)
    np.testing.assert_array_equal(shown[0, 0], shown[0, 1])
    assert (shown[1, 0] != shown[1, 1]).any()


def test_real_images_are_of_the_test_part_and_chosen_by_the_seed(job):
    held_out = load_source(dataclasses.replace(job.config.data, split="test"))
    known = {(image.tobytes(), int(label)) for image, label in zip(held_out.images, held_out.labels, strict=True)}
    first, again, other = (real_images(job._replace(seed=seed), held_out, 20) for seed in (0, 0, 1))
    assert {(image.tobytes(), label) for image, label in zip(first.images, first.labels, strict=True)} <= known
    np.testing.assert_array_equal(first.images, again.images)
    assert (first.images != other.images).any()


def test_without_the_data_the_figures_of_noise_are_drawn_and_the_rest_is_said(job, tmp_path, monkeypatch, capsys):
    gone = dataclasses.replace(job.config.data, source="folder", path=str(tmp_path / "gone"))
    monkeypatch.setattr(figures, "_of_noise", lambda *arguments, **options: [figures.Figure("samples.png", "of noise")])
    job = job._replace(config=dataclasses.replace(job.config, data=gone))
    text = draw_figures(job, tmp_path, tmp_path / "out").read_text()
    assert "## samples.png" in text
    assert re.search(r"^- What is .*the curve of .* \(Fig. 5\): the run's data cannot be read: data.path", text, re.M)
    assert "Real images are" not in text
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"), [(dict(num=0), "--num must be 1 to 32, not 0"), (dict(batch_size=0), "--batch-size must be")]
)
def test_what_cannot_be_drawn_is_one_line(job, tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        draw_figures(job, tmp_path, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_the_command_line_refuses_what_cannot_be_drawn(drawing, job, tmp_path, run_script):
    run = drawing.save_run(job, tmp_path / "run")
    status, _, error = run_script("evaluate.py", "figures", run, "--num", 40)
    assert status == 2
    assert error.strip().splitlines()[-1].startswith("evaluate.py: error: --num must be 1 to 32, not 40")
