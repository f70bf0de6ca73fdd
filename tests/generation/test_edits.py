"""The commands of sample.py beside samples."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.config import DataConfig
from ddpm_jax.data.decode import open_picture, to_array
from ddpm_jax.data.sources import load_held_out
from ddpm_jax.generation import edits
from ddpm_jax.generation.editor import Editor, read_mask
from ddpm_jax.generation.edits import (
    draw_progressive,
    hide,
    inpaint_picture,
    interpolate_pictures,
    lay_out,
    reconstruct_picture,
    share_latents,
)
from ddpm_jax.generation.sampler_config import SamplerConfig
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import claimed, dump_checked, read_json


def load(path):
    return np.asarray(Image.open(path))


def grid_of(path, rows, columns, size=8):
    """The pixels of a picture's grid, without the texts above and beside it."""
    height, width = rows * (size + 1) + 1, columns * (size + 1) + 1
    factor = 1024 // max(height, width)
    picture = load(path)
    assert picture.shape[0] > factor * height  # a title
    return picture[-factor * height :, -factor * width :][::factor, ::factor]


@pytest.fixture(scope="module")
def job(runs):
    return runs.make_job(num_classes=10)


def test_the_chain_over_time_ends_in_the_samples_and_begins_in_noise(job, tmp_path):
    assert draw_progressive(job, tmp_path, num=3, columns=4) == tmp_path / "x0.png"
    editor = Editor(job, batch_size=8)
    images, _ = editor.sample(3, editor.job_labels(3), watched=1)
    shown = {name: grid_of(tmp_path / f"{name}.png", 3, 5) for name in ("x0", "x_t")}
    for picture in shown.values():
        for row, image in enumerate(images):
            last = picture[1 + 9 * row : 9 * (row + 1), 1 + 9 * 4 : 9 * 5]
            assert abs(last.astype(int) - image[..., 0]).max() <= 1
    # At the first time x_t is noise; what is predicted of it is not.
    first = {name: picture[1:9, 1:9].astype(int) for name, picture in shown.items()}
    assert abs(first["x_t"] - first["x0"]).max() > 50


def test_images_that_share_a_late_x_t_are_more_alike(job, tmp_path):
    few = job._replace(sampler=SamplerConfig(steps=6, labels=(3,)))
    share_latents(few, tmp_path / "all", t=(), draws=6, label=3)
    rows = (
        grid_of(tmp_path / "all" / "share.png", 4, 7)[1:, 1:]
        .reshape(4, 9, 7, 9)[:, :8, :, :8]
        .swapaxes(1, 2)
        .astype(float)
    )
    spread = rows[:, 1:].std(axis=1).mean(axis=(1, 2))
    assert (np.diff(spread) < 0).all()
    # At t = 0 nothing is left to be drawn: the latent is the image.
    share_latents(few, tmp_path / "one", t=[0], draws=2)
    row = grid_of(tmp_path / "one" / "share.png", 1, 3)
    latent, *images = row[1:9, 1:].reshape(8, 3, 9)[..., :8].swapaxes(0, 1)
    for image in images:
        np.testing.assert_array_equal(image, latent)


def test_guidance_changes_the_images(job, tmp_path):
    # `closed_form` shifts eps by 0.3 sin(label): guidance multiplies the shift between the label and no label.
    pictures = []
    for scale in (1.0, 5.0):
        sampler = SamplerConfig(steps=2, guidance_scale=scale)
        share_latents(job._replace(sampler=sampler), tmp_path / f"{scale}", t=[5], draws=1, label=3)
        pictures.append(load(tmp_path / f"{scale}" / "share.png").astype(int))
    assert abs(pictures[0] - pictures[1]).max() > 20


def test_a_number_is_an_image_of_the_test_part(job, tmp_path):
    reconstruct_picture(job, "17", tmp_path, t=0, draws=1)
    held_out = load_held_out(job.trained.config.data).read(np.array([17]))
    np.testing.assert_array_equal(load(tmp_path / "00.png"), held_out[0, ..., 0])


def test_what_is_small_is_laid_out_large_and_what_is_unknown_is_grey():
    images = np.zeros((2, 3, 4, 5, 1), np.uint8)
    assert lay_out(images).shape[:2] == (11 * (1024 // 19), 19 * (1024 // 19))
    known = np.zeros((4, 5), bool)
    known[0] = True
    assert hide(images[0, 0], known)[..., 0].tolist() == [[0] * 5, *[[128] * 5] * 3]


@pytest.fixture(scope="module")
def color_job(runs):
    return runs.make_job(data=DataConfig(source="folder", path="gone", height=4, width=6, channels=3))


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
    Image.fromarray(mask[:20, 20:40]).save(folder / "square.png")
    (folder / "no.png").write_text("no picture")
    return folder


def test_own_pictures_are_reconstructed_interpolated_and_filled_in(color_job, own, tmp_path):
    a, b = (to_array(open_picture(str(own / f"{name}.png")), (4, 6, 3)) for name in "ab")
    load = lambda path: np.asarray(Image.open(path))

    row = reconstruct_picture(color_job, str(own / "a.png"), tmp_path / "same", t=0, draws=2)
    assert row == tmp_path / "same" / "row.png"
    np.testing.assert_array_equal(load(tmp_path / "same" / "01.png"), a)

    files = [str(own / "a.png"), str(own / "b.png")]
    interpolate_pictures(color_job, files, tmp_path / "mixed", t=0, num=3)
    for number, expected in ((0, a), (1, (a.astype(float) + b) / 2), (2, b)):
        assert abs(load(tmp_path / "mixed" / f"{number:02d}.png") - expected).max() <= 0.5 + 1e-3
    interpolate_pictures(color_job, files, tmp_path / "slerp", t=None, num=3)
    assert len([*(tmp_path / "slerp").glob("0?.png")]) == 3

    inpaint_picture(color_job, str(own / "a.png"), str(own / "mask.png"), tmp_path / "filled", draws=2)
    filled = [load(tmp_path / "filled" / f"{number:02d}.png") for number in range(2)]
    known = read_mask(str(own / "mask.png"), (4, 6, 3), size=(40, 60))
    assert known.sum() == 24 - 6
    for image in filled:
        np.testing.assert_array_equal(image[known], a[known])
    assert (filled[0][~known] != filled[1][~known]).any()


def test_results_of_other_settings_are_replaced_on_request_alone(job, tmp_path):
    few = job._replace(sampler=SamplerConfig("ddim", steps=2, eta=1.0))
    out = tmp_path / "out"
    reconstruct_picture(few, "17", out, t=3, draws=3)
    (out / "notes.txt").write_text("mine")
    (out / "100.png").write_text("mine too")
    before = (out / "row.png").read_bytes()
    with pytest.raises(
        UserError, match=r"contains other results of reconstruct \(.*t is 3 there and 5 here.* --overwrite$"
    ):
        reconstruct_picture(few, "18", out, t=5, draws=2, label=4)
    assert (out / "row.png").read_bytes() == before
    reconstruct_picture(few, "18", out, t=5, draws=2, label=4, overwrite=True)
    assert {path.name for path in out.iterdir()} == {
        *("00.png", "01.png", "row.png", "job.json", ".lock"),
        *("notes.txt", "100.png"),
    }
    description = read_json(out / "job.json")
    assert all(len(description.pop(name)) == 8 for name in ("weights", "content"))
    assert description == {
        "command": "reconstruct",
        "checkpoint": 7,
        "seed": 0,
        "sampler": "ddim",
        "steps": 3,
        "guidance_scale": 1.0,
        "t": 5,
        "pictures": ["18"],
        "draws": 2,
        "label": 4,
    }


def test_every_command_describes_its_results(job, own, tmp_path):
    few = job._replace(sampler=SamplerConfig(steps=2))
    draw_progressive(few, tmp_path / "0", num=2, columns=2)
    share_latents(few, tmp_path / "1", t=(), draws=1)
    interpolate_pictures(few, ["1", "2"], tmp_path / "2", t=7, num=2)
    interpolate_pictures(few, ["1", "2"], tmp_path / "3", t=None, num=2, label=3)
    inpaint_picture(few, "1", str(own / "square.png"), tmp_path / "4", draws=1)
    said = [read_json(tmp_path / str(number) / "job.json") for number in range(5)]
    assert [each["command"] for each in said] == ["progressive", "share", "interpolate", "interpolate", "inpaint"]
    assert [each["steps"] for each in said] == [2, 4, 3, 2, 2]
    assert [each.get("t") for each in said] == [[12, 6], [12, 9, 6, 3], 7, None, None]
    assert [each["sampler"] for each in said] == [*["ancestral"] * 3, "ddim", "ancestral"]
    assert said[0]["labels"] == [0, 1]
    assert said[3]["label"] == 3


def test_a_folder_of_something_else_is_left_alone(job, tmp_path):
    reconstruct = lambda: reconstruct_picture(job, "17", tmp_path, t=0, draws=1)
    (tmp_path / "05.png").write_text("mine")
    with pytest.raises(UserError, match="is not empty and contains no results of reconstruct"):
        reconstruct()
    for there, content in (
        (dump_checked({"seed": 3}), "contains another job"),
        (dump_checked({"command": "share"}), "contains the results of share"),
        (b"{", "job.json is damaged"),
    ):
        (tmp_path / "job.json").write_bytes(there)
        with pytest.raises(UserError, match=content):
            reconstruct()
        assert (tmp_path / "job.json").read_bytes() == there
    (tmp_path / "job.json").unlink()
    (tmp_path / "05.png").rename(tmp_path / ".05.png")
    with (
        claimed(tmp_path),
        pytest.raises(UserError, match="another process is writing"),
    ):
        reconstruct()
    assert (tmp_path / ".05.png").read_text() == "mine"


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [(50, 33, (67, 100)), (120, 80, (40, 60)), (6, 4, (7, 100))],
    ids=["made smaller, its sides rounded", "larger", "of the run's size"],
)
def test_a_mask_is_of_the_picture_s_aspect_ratio_or_of_the_run_s_size(tmp_path, width, height, size):
    half = np.full((height, width), 255, np.uint8)
    half[:, : width // 2] = 0
    Image.fromarray(half).save(tmp_path / "mask.png")
    known = read_mask(str(tmp_path / "mask.png"), (4, 6, 3), size=size)
    assert known.tolist() == [[False] * 3 + [True] * 3] * 4


def test_a_mask_of_another_shape_is_refused_before_anything_is_drawn(color_job, job, own, tmp_path):
    for run, picture, mask in (
        (color_job, str(own / "a.png"), "square.png"),
        (job, "1", "mask.png"),  # a number of the run's data, 8x8
    ):
        with pytest.raises(
            UserError, match=r"the mask .* its image is (60x40|8x8): use the same aspect ratio, or (6x4|8x8)"
        ):
            inpaint_picture(run, picture, str(own / mask), tmp_path / "out", draws=1)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_done_with_own_pictures_is_one_line(color_job, job, own, tmp_path):
    a, out = str(own / "a.png"), tmp_path / "out"
    config = job.trained.config
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, label_dropout=0.0))
    undropped = job._replace(trained=job.trained._replace(config=config))
    guided_job, of_ddim = (
        job._replace(sampler=sampler) for sampler in (SamplerConfig(guidance_scale=2.0), SamplerConfig("ddim"))
    )
    for call, message in [
        (lambda: reconstruct_picture(color_job, a, out, t=13, draws=1), "--t 13 must be 0 to 12"),
        (lambda: reconstruct_picture(color_job, a, out, t=1, draws=0), "--draws must be 1 to 64, not 0"),
        (
            lambda: reconstruct_picture(color_job, a, out, t=1, draws=1, label=3),
            "--label needs a class-conditional run",
        ),
        (lambda: reconstruct_picture(job, a, out, t=1, draws=1, label=10), "--label 10: the run's classes are 0 to 9"),
        (lambda: reconstruct_picture(job, str(own / "c.png"), out, t=1, draws=1), "c.png .*there is no such file"),
        (lambda: reconstruct_picture(job, str(own / "no.png"), out, t=1, draws=1), "no.png .*no picture"),
        (lambda: reconstruct_picture(job, "359", out, t=1, draws=1), "no image 359: .* has 359, numbered from 0"),
        (lambda: share_latents(of_ddim, out, t=[5], draws=2), "ddim is deterministic, so all --draws 2 .*--draws 1"),
        (lambda: reconstruct_picture(of_ddim, "1", out, t=5, draws=2), "ddim is deterministic, so all --draws 2"),
        (lambda: share_latents(undropped, out, t=[5], draws=2), "drawing without --label needs a run trained with"),
        (lambda: draw_progressive(job, out, num=65, columns=3), "--num must be 1 to 64, not 65"),
        (lambda: draw_progressive(job, out, num=1, columns=0), "--columns must be 1 to 64, not 0"),
        (lambda: share_latents(job, out, t=[5, 13], draws=1), "--t 13 must be 0 to 12"),
        (lambda: share_latents(guided_job, out, t=[5], draws=1), "--guidance-scale needs --label"),
        (lambda: reconstruct_picture(guided_job, a, out, t=1, draws=1), "--guidance-scale needs --label"),
        (lambda: interpolate_pictures(guided_job, [a, a], out, t=None, num=3), "--guidance-scale needs --label"),
        (lambda: inpaint_picture(guided_job, a, a, out, draws=1), "--guidance-scale needs --label"),
        (lambda: inpaint_picture(of_ddim, a, a, out, draws=1), "--sampler ddim: RePaint needs the noise of ancestral"),
        (lambda: share_latents(job, out, t=[], draws=1, label=10), "--label 10: the run's classes are 0 to 9"),
        (lambda: interpolate_pictures(job, [a], out, t=1, num=3), "--images needs two pictures .* not 1"),
        (lambda: interpolate_pictures(job, [a, a], out, t=1, num=1), "--num must be at least 2"),
        (lambda: inpaint_picture(color_job, a, str(own / "white.png"), out, draws=1), "is all white: paint black"),
    ]:
        with pytest.raises(UserError, match=message):
            call()
    assert not out.exists()


def test_the_script_reads_only_the_run_s_folder(runs, color_job, own, tmp_path, run_script):
    run = runs.save_runs(color_job.trained, folder=tmp_path / "run")
    pair = ["--images", own / "a.png", own / "b.png"]
    status, said, error = run_script("sample.py", "interpolate", run, *pair, "--t", 9, "--num", 2)
    assert status == 0, error
    (drawn,) = (run / "samples" / "interpolate").glob("checkpoint_7_seed_0_steps_12_pictures_a.png-b.png_num_2_*")
    assert said.strip() == str(drawn / "row.png")
    # Other settings have another folder; a file is a copy.
    file = tmp_path / "row.png"
    words = ["interpolate", run, *pair, "--t", 8, "--num", 2, "--out", file]
    assert run_script("sample.py", *words)[:2] == (0, f"{file}\n")
    drawn_beside = {*(run / "samples" / "interpolate").iterdir()} - {drawn}
    assert [(each / "row.png").read_bytes() for each in drawn_beside] == [file.read_bytes()]
    status, _, error = run_script("sample.py", *words)
    assert (status, "this file exists: choose another name, or replace it with --overwrite" in error) == (2, True)
    assert run_script("sample.py", *words, "--overwrite")[0] == 0
    status, _, error = run_script("sample.py", *words[:-1], tmp_path / "row.gif")
    assert (status, "this command writes files of .png, or a folder" in error) == (2, True)
    few = ["--sampler", "ddim", "--steps", 3, "--out"]
    status, said, error = run_script(
        "sample.py", "progressive", run, "--num", 2, "--columns", 3, *few, tmp_path / "out"
    )
    assert status == 0, error
    assert load(tmp_path / "out" / "x0.png").shape[2] == 3
    status, said, error = run_script("sample.py", "share", run, "--t", 12, 3, "--draws", 1, *few, tmp_path / "shared")
    assert status == 0, error
    assert said.strip() == str(tmp_path / "shared" / "share.png")


def test_steps_that_a_run_cannot_skip_are_refused(runs, tmp_path, run_script):
    run = runs.save_runs(runs.make_trained(runs.make_config(variance="learned")), folder=tmp_path / "run")
    for words in (["inpaint", run, "--image", 1, "--mask", "m.png"], ["reconstruct", run, "--image", 1, "--t", 3]):
        status, _, error = run_script("sample.py", *words, "--steps", 5)
        assert status == 2
        assert error.startswith("sample.py: error: a 'learned' variance belongs to single steps: use all timesteps")
        assert error.count("\n") == 1


def test_options_reach_the_chains(runs, job, tmp_path, monkeypatch, run_script):
    run, asked = runs.save_runs(job.trained, folder=tmp_path / "run"), []
    for name in ("interpolate_pictures", "inpaint_picture", "reconstruct_picture"):
        monkeypatch.setattr(edits, name, lambda job, *given, **options: asked.append(job.sampler))
    guided = ["--guidance-scale", 3, "--label", 3]
    for words in (
        ["interpolate", run, "--images", 1, 2, "--steps", 7],
        ["interpolate", run, "--images", 1, 2, "--t", 5, "--steps", 7],
        ["interpolate", run, "--images", 1, 2, "--t", 5, "--sampler", "ddim", *guided],
        ["inpaint", run, "--image", 1, "--mask", "m.png", "--steps", 7, *guided],
        ["reconstruct", run, "--image", 1, "--t", 5, "--sampler", "ddim", *guided],
    ):
        assert run_script("sample.py", *words)[0] == 0
    assert asked == [
        SamplerConfig("ddim", 7),
        SamplerConfig("ancestral", 7),
        SamplerConfig("ddim", guidance_scale=3.0),
        SamplerConfig("ancestral", 7, guidance_scale=3.0),
        SamplerConfig("ddim", guidance_scale=3.0),
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["inpaint", "x", "--image", "a.png"], "missing --mask: see --help"),
        (["interpolat", "x"], "there is no command 'interpolat': did you mean interpolate?"),
        (["reconstruct", "x", "--image", "a.png", "--t", "far"], "--t needs an integer, not 'far'"),
        (["share", "x", "--sampler", "unipc"], "--sampler needs one of ancestral, ddim, not 'unipc'"),
        (["progressive"], "missing RUN: see --help"),
        (["x", "progressive"], "the command comes first: sample.py progressive x"),
        (["inpaint", "x", "--sampler", "ddim"], "unknown option --sampler: see --help"),
        (
            ["interpolate", "x", "--images", "1", "2", "--sampler", "ancestral"],
            "--sampler ancestral needs --t: without it pictures are taken to their noises, only by ddim",
        ),
    ],
)
def test_slips_are_one_line(run_script, words, line):
    assert run_script("sample.py", *words) == (2, "", f"sample.py: error: {line}\n")


def test_the_help_names_the_modes_and_the_options_of_samples(run_script):
    status, said, _ = run_script("sample.py", "--help")
    assert status == 0
    for word in ("progressive", "share", "reconstruct", "interpolate", "inpaint", "--num", "--sampler"):
        assert word in said
