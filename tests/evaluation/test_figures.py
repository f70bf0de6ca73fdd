"""The figures of a run."""

import dataclasses
import re

import numpy as np
import pytest
from PIL import Image

from ddpm_jax import pictures
from ddpm_jax.data.sources import load_source
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import figures
from ddpm_jax.evaluation.figures import draw_figures, real_images


@pytest.fixture(scope="module")
def job(drawing):
    return drawing.make_job(num_classes=10)


@pytest.fixture(scope="module")
def real(job):
    return real_images(job, 6)


@pytest.fixture(scope="module")
def drawn(job, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    pictures.plot_loss(run / "loss.png", [1, 2, 3], [0.5, 0.4, 0.3])
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
    files = {*(f"{name}.png" for name in COLUMNS), "reverse.gif", "loss.png"}
    assert {file.name for file in folder.iterdir()} == {*files, "figures.md", ".lock"}
    text = (folder / "figures.md").read_text()
    assert re.findall(r"^## (.*)$", text, re.M) == re.findall(r"\]\((.*)\)", text)
    assert set(re.findall(r"^## (.*)$", text, re.M)) == files
    assert "Checkpoint 7" in text
    assert "The real images are of digits, test." in text
    assert f"evaluate.py figures {drawn} --num 2 --seed 0 --step 7`" in text
    assert (folder / "loss.png").read_bytes() == (drawn / "loss.png").read_bytes()
    for name, (rows, columns) in COLUMNS.items():
        assert cells(folder / f"{name}.png", rows, columns).std() > 10
    with Image.open(folder / "reverse.gif") as gif:
        assert gif.n_frames == drawing.T + 1


def test_the_figures_hold_together(drawn, real, job):
    folder = drawn / "figures"
    shown = {name: cells(folder / f"{name}.png", *size) for name, size in COLUMNS.items()}
    a = real_images(job, 4).images[:2, ..., 0]
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


def test_real_images_are_of_the_test_part_and_chosen_by_the_seed(job):
    held_out = load_source(dataclasses.replace(job.config.data, split="test"))
    known = {(image.tobytes(), int(label)) for image, label in zip(held_out.images, held_out.labels, strict=True)}
    first, again, other = (real_images(job._replace(seed=seed), 20) for seed in (0, 0, 1))
    assert {(image.tobytes(), label) for image, label in zip(first.images, first.labels, strict=True)} <= known
    np.testing.assert_array_equal(first.images, again.images)
    assert (first.images != other.images).any()


def test_without_the_data_the_figures_of_noise_are_drawn_and_the_rest_is_said(job, tmp_path, monkeypatch, capsys):
    gone = dataclasses.replace(job.config.data, source="folder", path=str(tmp_path / "gone"))
    monkeypatch.setattr(figures, "_of_noise", lambda *arguments: [figures.Figure("samples.png", "of noise")])
    job = job._replace(config=dataclasses.replace(job.config, data=gone))
    text = draw_figures(job, tmp_path, tmp_path / "out").read_text()
    assert "## samples.png" in text
    assert "Left out, for the run's data cannot be read: data.path" in text
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
