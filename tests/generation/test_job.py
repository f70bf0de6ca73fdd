"""The sampling job: which images it draws, how it resumes, what it refuses, and the script."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from ddpm_jax.config import DataConfig
from ddpm_jax.generation.chains import make_chain
from ddpm_jax.generation.job import SamplingJob, default_folder, describe_job, load_job, run_job
from ddpm_jax.generation.sampler_config import SamplerConfig
from ddpm_jax.generation.store import StoredImages
from ddpm_jax.pixels import to_uint8
from ddpm_jax.run.record import save_config
from ddpm_jax.samplers.chain import sample
from ddpm_jax.system import pictures
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import write_json

T, SHAPE = 10, (4, 6, 1)
SCRIPT = Path(__file__).parents[2] / "sample.py"


def config_of(runs, channels=1):
    return runs.make_config(data=DataConfig(height=4, width=6, channels=channels), num_steps=T)


@pytest.fixture(scope="module")
def job(runs):
    return SamplingJob(runs.make_trained(config_of(runs)), seed=3)


def change(job, **fields):
    """The job with other fields of its run."""
    return job._replace(trained=job.trained._replace(**fields))


@pytest.fixture(scope="module")
def expected(job):
    """The first 40 images, drawn in one batch by `sample` on one device."""
    make = make_chain(job.trained.config, job.trained.network, SamplerConfig())
    draw = jax.jit(lambda params: sample(jax.random.key(job.seed), make(params, None), (40, *SHAPE)))
    images = np.asarray(to_uint8(draw(job.trained.params)))
    assert images.std() > 20
    return images


def assert_same(images, expected):
    """Within one level: the order of sums may differ between batch sizes."""
    assert images.shape == expected.shape
    assert abs(images.astype(int) - expected.astype(int)).max() <= 1


def npz(out):
    with np.load(out / "samples.npz") as file:
        return file["arr_0"]


@pytest.fixture
def drawn(monkeypatch):
    """Notes the ranges that are drawn."""
    ranges, save = [], StoredImages.save

    def note(self, first, images):
        save(self, first, images)
        ranges.append((first, first + len(images)))

    monkeypatch.setattr(StoredImages, "save", note)
    return ranges


def interrupt_after(monkeypatch, batches, error):
    """Lets so many batches be kept, then ends the job."""
    save = StoredImages.save
    left = [batches]

    def save_or_end(self, first, images):
        if not left[0]:
            raise error
        left[0] -= 1
        save(self, first, images)

    monkeypatch.setattr(StoredImages, "save", save_or_end)


@pytest.mark.parametrize("batch_size", [1, 16, 64])
def test_an_image_is_the_same_in_any_batch(job, expected, tmp_path, batch_size):
    assert jax.local_device_count() == 8
    run_job(job, tmp_path / "out", number=19, batch_size=batch_size, format="npz")
    assert_same(npz(tmp_path / "out"), expected[:19])


def test_a_stopped_job_resumes_with_what_is_missing(job, expected, tmp_path, monkeypatch, capsys, drawn):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run_job(job, out, number=40, batch_size=8, format="npz")
    assert "24 of 40 images are done; run the same command to resume" in capsys.readouterr().err
    assert drawn == [(0, 8), (8, 16), (16, 24)]
    (out / "parts" / "00000008-00000016.npz").unlink()
    drawn.clear()

    run_job(job, out, number=40, batch_size=16, format="npz")
    assert drawn == [(8, 16), (24, 40)]
    assert_same(npz(out), expected)
    assert sorted(path.name for path in out.iterdir()) == [".lock", "computed_on.json", "job.json", "samples.npz"]


def test_a_job_that_is_resumed_elsewhere_says_so(job, tmp_path, monkeypatch, capsys):
    request = dict(batch_size=8, format="npz")
    run_job(job, tmp_path, number=8, exact=True, **request)
    monkeypatch.setenv("NPROC", "77")
    run_job(job, tmp_path, number=8, exact=True, **request)  # nothing is computed
    with pytest.raises(UserError, match=r"--exact: .*: cores \d+ before, 77 now: what is computed from here on agrees"):
        run_job(job, tmp_path, number=16, exact=True, **request)
    assert "warning" not in capsys.readouterr().err
    run_job(job, tmp_path, number=16, **request)
    assert "before, 77 now: what is computed from here on agrees with the rest to rounding" in capsys.readouterr().err
    run_job(job, tmp_path, number=24, exact=True, **request)


def test_a_stopped_job_is_byte_identical_to_one_that_was_not(job, tmp_path, monkeypatch):
    request = dict(number=40, batch_size=16, format="npz")
    run_job(job, tmp_path / "whole", **request)
    for batches in (1, 2):
        with monkeypatch.context() as patch:
            interrupt_after(patch, batches, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                run_job(job, tmp_path / f"{batches}", **request)
        run_job(job, tmp_path / f"{batches}", **request)
        assert (tmp_path / f"{batches}/samples.npz").read_bytes() == (tmp_path / "whole/samples.npz").read_bytes()


def test_a_full_disk_is_one_line_and_loses_no_finished_batch(job, expected, tmp_path, monkeypatch):
    out, write, left = tmp_path / "out", np.lib.format.write_array, [2]

    def full(file, array, **options):
        if not left[0]:
            file.write(b"half a fi")
            raise OSError(28, "No space left on device")
        left[0] -= 1
        write(file, array, **options)

    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "write_array", full)
        with pytest.raises(UserError, match=r"^cannot write .*00000016-00000024.npz: No space left on device$"):
            run_job(job, out, number=40, batch_size=8, format="npz")
    assert StoredImages(out, SHAPE, asked=describe_job(job)).done() == [(0, 0), (0, 8), (8, 16)]
    run_job(job, out, number=40, batch_size=8, format="npz")
    assert_same(npz(out), expected)


def test_a_finished_job_is_shown_otherwise_and_made_longer_without_drawing_anew(job, expected, tmp_path, capsys, drawn):
    out = tmp_path / "out"
    assert run_job(job, out, number=10, batch_size=16, format="grid", columns=5) == out / "grid.png"
    first = npz(out)
    drawn.clear()

    assert run_job(job, out, number=10, batch_size=16, format="png") == out / "images"
    assert "all 10 images already exist" in capsys.readouterr().err
    files = sorted((out / "images").iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(10)]
    for file, image in zip(files, first, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), image[..., 0])
    assert drawn == []

    assert run_job(job, out, number=14, batch_size=16, format="npz") == out / "samples.npz"
    assert drawn == [(10, 14)]
    np.testing.assert_array_equal(npz(out)[:10], first)
    assert_same(npz(out), expected[:14])

    run_job(job, out, number=3, batch_size=16, format="npz")
    assert "contains all 14 images of this job, more than the 3 requested" in capsys.readouterr().err
    assert len(npz(out)) == 14


def test_the_grid_is_the_images_row_by_row(job, expected, tmp_path):
    path = run_job(job, tmp_path / "out", number=7, batch_size=16, format="grid", columns=3)
    shown = pictures.enlarge(pictures.grid(npz(tmp_path / "out"), columns=3))
    np.testing.assert_array_equal(np.asarray(Image.open(path)), shown[..., 0])
    assert max(shown.shape) > 500


def test_the_gif_shows_the_reverse_process_from_noise_to_the_images(job, expected, tmp_path, capsys, drawn):
    out = tmp_path / "out"
    path = run_job(job, out, number=20, batch_size=16, format="gif", columns=5)
    assert path == out / "reverse.gif"
    with Image.open(path) as gif:
        frames = []
        for index in range(gif.n_frames):
            gif.seek(index)
            frames.append((gif.info["duration"], np.asarray(gif.convert("L"))))
    assert [duration for duration, _ in frames] == [60] * T + [2000]
    np.testing.assert_array_equal(frames[-1][1], pictures.enlarge(pictures.grid(npz(out), columns=5), side=512)[..., 0])
    assert_same(npz(out), expected[:20])
    # Noise is cut to black or white at |x| > 1: P = 0.317 for N(0, 1); 4 sd of 480 pixels are 0.085.
    factor = frames[0][1].shape[0] // 21
    noise = pictures.enlarge(pictures.grid(np.zeros((20, *SHAPE), np.uint8), columns=5), side=512)[..., 0] == 0
    pixels = frames[0][1][noise].reshape(-1, 1)
    assert factor > 1
    assert abs(np.isin(pixels, (0, 255)).mean() - 0.317) < 0.085
    assert sorted(file.name for file in out.iterdir()) == [
        *(".lock", "computed_on.json", "job.json", "reverse.gif", "reverse.json", "samples.npz"),
    ]

    drawn.clear()
    before = path.read_bytes()
    run_job(job, out, number=20, batch_size=16, format="gif", columns=5)
    assert "already exists" in capsys.readouterr().err
    assert drawn == []
    run_job(job, out, number=20, batch_size=16, format="gif", columns=4)
    assert path.read_bytes() != before


@pytest.mark.parametrize(
    ("other", "line"),
    [
        (lambda job, runs: job._replace(seed=4), r"\(seed is 3 there and 4 here\)"),
        (lambda job, runs: change(job, step=8), r"\(checkpoint is 7 there and 8 here\)"),
        (
            lambda job, runs: change(job, params=runs.random_params(job.trained.config, seed=1)),
            r"\(weights is \w{8} there and \w{8} here\)",
        ),
        (
            lambda job, runs: change(job, config=runs.make_config(data=job.trained.config.data, clip_x0=False)),
            r"\(diffusion.num_steps is 10 there and 12 here; diffusion.clip_x0 is True there and False here\)",
        ),
        (
            lambda job, runs: job._replace(sampler=SamplerConfig("ddim")),
            r"\(sampler is ancestral there and ddim here\)",
        ),
    ],
    ids=["seed", "checkpoint", "weights", "diffusion", "sampler"],
)
def test_the_folder_of_another_job_is_refused(runs, job, tmp_path, other, line):
    out = tmp_path / "out"
    run_job(job, out, number=2, batch_size=16, format="npz")
    before = (out / "samples.npz").read_bytes()
    with pytest.raises(UserError, match=f"^{out} holds another job {line}: give another --out, or remove it$"):
        run_job(other(job, runs), out, number=2, batch_size=16, format="npz")
    assert (out / "samples.npz").read_bytes() == before


def test_a_folder_of_something_else_is_refused(job, tmp_path):
    (tmp_path / "holiday.png").write_text("")
    for out in (tmp_path, tmp_path / "holiday.png"):
        with pytest.raises(UserError, match="is not empty and contains no sampling job: use another --out$"):
            run_job(job, out, number=2, batch_size=16, format="npz")


@pytest.mark.parametrize(
    ("request_", "line"),
    [
        (dict(number=0), "--num must be at least 1, not 0"),
        (dict(batch_size=-1), "--batch-size must be at least 1, not -1"),
        (dict(columns=0), "--columns must be at least 1, not 0"),
        (
            dict(number=10**8, format="grid"),
            "--format grid: 100000000 images of 4x6 are too many for one picture: .* --format png or npz",
        ),
        (dict(number=10**8, format="gif"), "--format gif: .* use --num 228571 or less"),
    ],
)
def test_bad_requests_are_one_line_before_anything_is_made(job, tmp_path, request_, line):
    with pytest.raises(UserError, match=line):
        run_job(job, tmp_path / "out", **{"number": 2, "batch_size": 8, "format": "grid", **request_})
    assert not (tmp_path / "out").exists()


def test_images_of_two_channels_are_saved_but_not_shown(runs, tmp_path):
    job = runs.make_job(config_of(runs, channels=2))
    for format in ("grid", "png", "gif"):
        with pytest.raises(UserError, match=f"^--format {format}: images of 2 channels .*--format npz"):
            run_job(job, tmp_path / "out", number=2, batch_size=8, format=format)
    run_job(job, tmp_path / "out", number=2, batch_size=8, format="npz")
    assert npz(tmp_path / "out").shape == (2, 4, 6, 2)


@pytest.fixture(scope="module")
def run(runs, job, tmp_path_factory):
    """The folder of a run that has saved twice."""
    older = runs.make_trained(job.trained.config, seed=5, step=5)
    return runs.save_runs(older, job.trained, folder=tmp_path_factory.mktemp("runs") / "tiny")


def test_the_script_draws_from_the_newest_average_and_says_where(run, job, expected, tmp_path, run_script):
    status, said, _ = run_script("sample.py", run, "--num", 9, "--batch-size", 16, "--seed", 3)
    out = run / "samples" / "checkpoint_7_seed_3"
    assert (status, said) == (0, f"9 images of checkpoint 7: {out / 'grid.png'}\n")
    assert_same(npz(out), expected[:9])
    assert json.loads((out / "job.json").read_text())["checkpoint"] == 7

    # Of an older checkpoint, elsewhere.
    words = ("--num=3", "--seed=3", "--step=5", "--out", tmp_path / "o", "--format=npz")
    status, said, _ = run_script("sample.py", run, *words)
    assert (status, said) == (0, f"3 images of checkpoint 5: {tmp_path / 'o' / 'samples.npz'}\n")
    assert abs(npz(tmp_path / "o").astype(int) - expected[:3]).max() > 10


def test_the_script_writes_the_file_that_out_names(run, expected, tmp_path, run_script):
    words = (run, "--num", 5, "--batch-size", 16, "--seed", 3, "--step", 7, "--out")
    for name in ("grid.png", "reverse.gif", "five.npz"):
        status, said, error = run_script("sample.py", *words, tmp_path / name)
        assert (status, said) == (0, f"5 images of checkpoint 7: {tmp_path / name}\n"), error
    assert {file.name for file in tmp_path.iterdir()} == {"grid.png", "reverse.gif", "five.npz"}
    with np.load(tmp_path / "five.npz") as file:
        assert_same(file["arr_0"], expected[:5])
    shown = pictures.enlarge(pictures.grid(np.load(tmp_path / "five.npz")["arr_0"]))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "grid.png")), shown[..., 0])
    for given, line in (
        (["grid.png"], "this file exists: choose another name, or replace it with --overwrite"),
        (["grid.jpg"], "this command writes files of .png, .gif, .npz, or a folder: choose another name"),
        (["new.png", "--format", "npz"], "--format npz is not written as this file: name a folder"),
    ):
        status, _, error = run_script("sample.py", *words, tmp_path / given[0], *given[1:])
        assert (status, line in error) == (2, True)
    assert run_script("sample.py", *words, tmp_path / "grid.png", "--overwrite")[0] == 0


def test_the_script_takes_classes_by_name(runs, tmp_path, run_script):
    config = runs.make_config(data=DataConfig(height=4, width=6), num_steps=2, num_classes=3)
    run = runs.save_runs(runs.make_trained(config), folder=tmp_path / "run")
    write_json(run / "data.json", {"class_names": ["cats", "dogs", "smileys"]})
    words = (run, "--num", 4, "--batch-size", 8)
    assert run_script("sample.py", run, "--labels", "help")[:2] == (0, "0  cats\n1  dogs\n2  smileys\n")
    assert run_script("sample.py", "share", run, "--label", "help")[:2] == (0, "0  cats\n1  dogs\n2  smileys\n")
    for given in (["smileys", "cats"], [2, 0]):  # one job
        status, said, error = run_script("sample.py", *words, "--labels", *given)
        assert (status, "checkpoint_7_seed_0_labels_2-0" in said) == (0, True), error
        assert "classes in turn: 2 (smileys), 0 (cats)\n" in error
    assert "all 4 images already exist" in error
    with np.load(run / "samples/checkpoint_7_seed_0_labels_2-0/samples.npz") as file:
        assert file["arr_1"].tolist() == [2, 0, 2, 0]
    status, _, error = run_script("sample.py", *words, "--labels", "smilies")
    assert status == 2
    assert "--labels smilies: the run's classes are 0 (cats), 1 (dogs), 2 (smileys): did you mean smileys?" in error


def test_the_default_folder_of_many_labels_has_a_short_name(job):
    of = lambda *labels: default_folder(job._replace(sampler=SamplerConfig(labels=labels))).name
    assert len(of(*range(200))) <= 120
    assert of(*range(200)) != of(*range(199))
    assert of(3, 5) == "checkpoint_7_seed_3_labels_3-5"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nowhere"], "there is no folder nowhere: give the folder of a run, such as runs/digits"),
        (["{empty}"], "is neither a run nor a model .*: looked for config.json of a run"),
        (["{unsaved}"], "no checkpoints in .*has not saved yet"),
        (["{run}", "--step", "6"], "has no checkpoint of step 6: there are 5, 7"),
        (["{run}", "--seed", "-1"], r"--seed must be in \[0, 2\^32\), not -1"),
        (["{run}", "--num", "0"], "--num must be at least 1, not 0"),
        (["{run}", "--num", "many"], "--num needs an integer, not 'many'"),
        (["{run}", "--format", "gird"], "--format needs .*grid.*, not 'gird'"),
        (["{run}", "--nums", "3"], "unknown option --nums: did you mean --num"),
        ([], "missing RUN"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_the_script_refuses_in_one_line_with_status_2(run, job, tmp_path, run_script, words, line):
    (tmp_path / "empty").mkdir()
    (tmp_path / "unsaved").mkdir()
    save_config(job.trained.config, tmp_path / "unsaved" / "config.json")
    places = {"run": run, "empty": tmp_path / "empty", "unsaved": tmp_path / "unsaved"}
    status, out, err = run_script("sample.py", *(word.format(**places) for word in words))
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("sample.py: error: ")
    assert re.search(line, err)


def test_weights_of_another_network_are_refused_in_one_line(run, job, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    config = job.trained.config
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, width=16))
    save_config(wider, other / "config.json")
    with pytest.raises(UserError, match=r"checkpoint 7 and .* do not fit: \['.*\] is \(.*\) float32 in the weights"):
        load_job(other, seed=0)


def test_the_script_runs_alone():
    done = subprocess.run([sys.executable, SCRIPT, "nowhere"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (
        done.stderr == "sample.py: error: there is no folder nowhere: give the folder of a run, such as runs/digits\n"
    )


def test_the_largest_seed_works(run):
    assert load_job(run, seed=2**32 - 1).seed == 2**32 - 1
    jax.random.key(2**32 - 1)
    with pytest.raises(UserError, match="4294967296"):
        load_job(run, seed=2**32)
