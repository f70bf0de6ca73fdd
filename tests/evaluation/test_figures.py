"""The figures of a run, and what it makes of a user's own pictures."""

import dataclasses
import re
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ddpm_jax import chains, pictures
from ddpm_jax.chains import Choice, network
from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, build_unet, image_shape, save_config
from ddpm_jax.data.decode import read_picture
from ddpm_jax.data.sources import load_source
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import edits, figures
from ddpm_jax.evaluation.edits import Editor, read_mask
from ddpm_jax.evaluation.figures import draw_figures, real_images
from ddpm_jax.evaluation.own_images import inpaint_picture, interpolate_pictures, reconstruct_picture
from ddpm_jax.sampling import Job, batch_chain, run_job
from ddpm_jax.training.checkpoints import Checkpoints
from ddpm_jax.training.state import TrainState, init_params

T = 12
SCRIPT = Path(__file__).parents[2] / "evaluate.py"


def make_job(*, num_classes=0, data=None, seed=0, choice=None):
    config = Config(
        data=DataConfig() if data is None else data,
        diffusion=DiffusionConfig(num_steps=T, beta_start=0.05, beta_end=0.6),
        model=ModelConfig(
            width=8, multipliers=(1,), blocks=1, attention_resolutions=(), groups=4, num_classes=num_classes
        ),
    )
    shapes = jax.eval_shape(lambda key: init_params(key, build_unet(config), image_shape(config)), jax.random.key(0))
    leaves, structure = jax.tree.flatten(shapes)
    random = np.random.default_rng(0)
    # As initialised the network says almost 0.
    params = structure.unflatten([jnp.asarray(0.2 * random.normal(size=leaf.shape), jnp.float32) for leaf in leaves])
    return Job(config, params, 7, seed, Choice() if choice is None else choice)


def closed_form(unet, params, labels, **choice):
    """A network that compiles at once, for what does not depend on which network it is."""
    told = 0.0 if labels is None else 0.3 * jnp.sin(labels.astype(jnp.float32))[:, None, None, None]
    return lambda x_t, t: 0.6 * x_t + 0.2 * jnp.roll(x_t, 1, axis=1) + told


@pytest.fixture(autouse=True, scope="module")
def _closed_form():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chains, "network", closed_form)
        patch.setattr(edits, "network", closed_form)
        batch_chain.cache_clear()
        yield
    batch_chain.cache_clear()


@pytest.fixture(scope="module")
def job():
    return make_job(num_classes=10)


@pytest.fixture(scope="module")
def editor(job):
    return Editor(job, batch_size=16)


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


def test_all_figures_are_drawn_and_said_what_they_are(drawn):
    folder = drawn / "figures"
    files = {*(f"{name}.png" for name in COLUMNS), "reverse.gif", "loss.png"}
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
        assert gif.n_frames == T + 1


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


def test_samples_are_those_of_the_sampling_job(job, editor, tmp_path):
    images, frames = editor.sample(5, editor.labels([0, 1, 2, 3, 4]), watched=3)
    run_job(job, tmp_path / "job", number=5, batch_size=8, format="npz")
    with np.load(tmp_path / "job" / "samples.npz") as file:
        assert abs(images.astype(int) - file["arr_0"].astype(int)).max() <= 1
    assert frames.shape == (T + 1, 3, 8, 8, 1)
    np.testing.assert_array_equal(frames[-1], images[:3])


def test_no_image_depends_on_the_batch(job, editor, real):
    key, depth = jax.random.key(5), np.array([12, 3, 0, 7, 7, 1])
    labels = editor.labels(real.labels)
    few = Editor(job, batch_size=8).reconstruct(key, real.images, labels, depth, draws=3)
    many = editor.reconstruct(key, real.images, labels, depth, draws=3)
    assert few.shape == (6, 3, 8, 8, 1)
    assert abs(few.astype(int) - many.astype(int)).max() <= 1
    np.testing.assert_array_equal(many[2], real.images[2][None].repeat(3, axis=0))
    assert abs(many[0, 0].astype(int) - many[0, 1]).max() > 20


def test_labels_are_told(editor, real):
    key, depth = jax.random.key(5), np.full(6, 6)
    told, other, none = (
        editor.reconstruct(key, real.images, editor.labels(labels), depth)
        for labels in (real.labels, [(label + 1) % 10 for label in real.labels], [None] * 6)
    )
    assert min(abs(told.astype(int) - each).max() for each in (other, none)) > 5


def test_real_images_are_of_the_test_part_and_chosen_by_the_seed(job):
    held_out = load_source(dataclasses.replace(job.config.data, split="test"))
    known = {(image.tobytes(), int(label)) for image, label in zip(held_out.images, held_out.labels, strict=True)}
    first, again, other = (real_images(job._replace(seed=seed), 20) for seed in (0, 0, 1))
    assert {(image.tobytes(), label) for image, label in zip(first.images, first.labels, strict=True)} <= known
    np.testing.assert_array_equal(first.images, again.images)
    assert (first.images != other.images).any()


def test_times_and_depths_of_a_shorter_chain():
    editor = Editor(make_job(choice=Choice(steps=4, spacing="linspace")))
    assert editor.num_steps == 4
    assert [editor.paper_time(depth) for depth in range(5)] == [0, 1, 5, 8, 12]
    assert [editor.depth_of(time) for time in (0, 1, 4, 5, 9, 12)] == [0, 1, 2, 2, 3, 4]
    assert editor.labels([None, None]) is None


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


# Pictures of one's own


@pytest.fixture(scope="module")
def colour_job():
    return make_job(data=DataConfig(source="folder", path="gone", height=4, width=6, channels=3))


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(random.integers(0, 255, (40, 60, 3), np.uint8)).save(folder / f"{name}.png")
    mask = np.full((40, 60), 255, np.uint8)
    mask[:20, :30] = 0
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(np.full((4, 6), 255, np.uint8)).save(folder / "white.png")
    (folder / "no.png").write_text("no picture")
    return folder


def test_own_pictures_are_reconstructed_interpolated_and_filled_in(colour_job, own, tmp_path):
    a, b = (read_picture(str(own / f"{name}.png"), (4, 6, 3)) for name in "ab")
    load = lambda path: np.asarray(Image.open(path))

    row = reconstruct_picture(colour_job, str(own / "a.png"), tmp_path / "same", time=0, draws=2)
    assert row == tmp_path / "same" / "row.png"
    np.testing.assert_array_equal(load(tmp_path / "same" / "01.png"), a)

    files = [str(own / "a.png"), str(own / "b.png")]
    interpolate_pictures(colour_job, files, tmp_path / "mixed", time=0, num=3)
    for number, expected in ((0, a), (1, (a.astype(float) + b) / 2), (2, b)):
        assert abs(load(tmp_path / "mixed" / f"{number:02d}.png") - expected).max() <= 0.5 + 1e-3
    interpolate_pictures(colour_job, files, tmp_path / "slerp", time=None, num=3)
    assert len([*(tmp_path / "slerp").glob("0?.png")]) == 3

    inpaint_picture(colour_job, str(own / "a.png"), str(own / "mask.png"), tmp_path / "filled", draws=2)
    filled = [load(tmp_path / "filled" / f"{number:02d}.png") for number in range(2)]
    known = read_mask(str(own / "mask.png"), (4, 6, 3))
    assert known.sum() == 24 - 6
    for image in filled:
        np.testing.assert_array_equal(image[known], a[known])
    assert (filled[0][~known] != filled[1][~known]).any()


def test_what_cannot_be_done_with_own_pictures_is_one_line(colour_job, job, own, tmp_path):
    a, out = str(own / "a.png"), tmp_path / "out"
    for call, message in [
        (lambda: reconstruct_picture(colour_job, a, out, time=13, draws=1), "--t 13 must be 0 to 12"),
        (lambda: reconstruct_picture(colour_job, a, out, time=1, draws=0), "--draws must be at least 1, not 0"),
        (
            lambda: reconstruct_picture(colour_job, a, out, time=1, draws=1, label=3),
            "--label 3: .* it is unconditional",
        ),
        (lambda: reconstruct_picture(job, a, out, time=1, draws=1, label=10), "--label 10: .* classes are 0 to 9"),
        (lambda: reconstruct_picture(job, str(own / "c.png"), out, time=1, draws=1), "c.png .*there is no such file"),
        (lambda: reconstruct_picture(job, str(own / "no.png"), out, time=1, draws=1), "no.png .*no picture"),
        (lambda: interpolate_pictures(job, [a], out, time=1, num=3), "--images needs two pictures .* not 1"),
        (lambda: interpolate_pictures(job, [a, a], out, time=1, num=1), "--num must be at least 2"),
        (lambda: inpaint_picture(colour_job, a, str(own / "white.png"), out, draws=1), "white all over: paint black"),
    ]:
        with pytest.raises(UserError, match=message):
            call()
    assert not out.exists()


def test_the_command_line_reads_the_run_s_folder_alone(colour_job, own, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(chains, "network", network)
    run = tmp_path / "run"
    run.mkdir()
    save_config(colour_job.config, run / "config.json")
    with Checkpoints(run, keep=1, warn=print) as checkpoints:
        ema = colour_job.params
        checkpoints.save(7, TrainState(jnp.int32(7), jax.tree.map(jnp.zeros_like, ema), ema, (jnp.zeros(3),)), notes={})

    def evaluate(*words):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
        with pytest.raises(SystemExit) as ending:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return ending.value.code, capsys.readouterr()

    status, output = evaluate("interpolate", run, "--images", own / "a.png", own / "b.png", "--t", 9, "--num", 2)
    assert status == 0, output.err
    assert output.out.strip() == str(run / "edits" / "interpolate" / "row.png")
    status, output = evaluate("inpaint", run, "--image", own / "a.png")
    assert status == 2
    assert output.err.strip() == "evaluate.py: error: --mask is missing: see --help"
    status, output = evaluate("figures", run, "--num", 40)
    assert status == 2
    assert output.err.strip().splitlines()[-1].startswith("evaluate.py: error: --num must be 1 to 32, not 40")
