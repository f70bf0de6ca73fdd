"""The page of runs: what it shows of a folder, and of one that is damaged."""

import dataclasses
import html
import json
import re
import shlex
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from ddpm_jax.config import FROM_PYTHON, Config, DataConfig
from ddpm_jax.evaluation.bits_per_dim import Request, default_folder, run_job
from ddpm_jax.evaluation.quality import Quality
from ddpm_jax.evaluation.report.commands import describe_drawn, sample_command, train_commands
from ddpm_jax.evaluation.report.contents import fields_of, read_contents
from ddpm_jax.evaluation.report.embedded import embed, read_frames
from ddpm_jax.evaluation.report.page import write_report
from ddpm_jax.evaluation.report.reverse_process import draw_reverse, read_reverse
from ddpm_jax.generation import job as sampling
from ddpm_jax.generation.sampler_config import SamplerConfig
from ddpm_jax.run.build import build_network
from ddpm_jax.run.command import parse_run
from ddpm_jax.run.record import LearningRate
from ddpm_jax.run.trained import TrainedRun
from ddpm_jax.system import pictures
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import read_json, write_json
from ddpm_jax.training.metrics import append_line

FD = "FD-EfficientNetLite0"


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """Nothing."""


class Page(HTMLParser):
    """What a page refers to, its data, and its text outside of scripts and styles."""

    def __init__(self, file):
        super().__init__()
        self.references, self.data, self.text, self.rows, self._in, self._id = [], {}, "", [], "", None
        self.feed(file.read_text())

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.references += [value for name, value in attributes if name in ("src", "href", "action", "data")]
        if tag == "tr":
            self.rows.append((given.get("class"), []))
        self._in, self._id = tag, given.get("id")

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, text):
        if self._in == "script" and self._id:
            self.data[self._id] = json.loads(text)
        elif self._in not in ("script", "style"):
            self.text += text
            if self._in in ("td", "th") and self.rows:
                self.rows[-1][1].append(text)


def log(run, *lines):
    for line in lines:
        append_line(run / "metrics.jsonl", line)
        append_line(run / "timing.jsonl", {"step": line["step"], "seconds": 2.0, "images_per_second": 64.0})


def line(step, loss, **more):
    quartiles = [4 * loss, 2 * loss, loss, None]
    return {"step": step, "loss": loss, "loss_quartiles": quartiles, "learning_rate": 1e-3, "grad_norm": 1.0, **more}


def draw_grid(run, step, level):
    images = np.full((4, 8, 8, 1), level, np.uint8)
    pictures.save_png(run / "samples" / f"step_{step:07d}.png", pictures.enlarge(pictures.grid(images)))


@pytest.fixture(scope="module")
def run(runs, tmp_path_factory):
    """A run with everything that a page shows, whose evaluations are of its own commands."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    job = runs.make_job(num_classes=10, folder=folder, sampler=SamplerConfig("ddim", 12))
    runs.save_runs(job.trained, folder=folder)
    log(folder, line(1, 0.5), line(2, 0.375, eval_loss=0.25, ema_norm=3.0))
    draw_grid(folder, 1, 10)
    draw_grid(folder, 2, 200)
    place = sampling.default_folder(job)
    sampling.run_job(job, place, number=16, batch_size=16, format="grid")
    quality = Quality(16, 0.75, 0.875, 0.5, {"0": 16}, 3.0, 2.0, 1.5, 16, "digits, train", "digits, test")
    write_json(place / "quality.json", dataclasses.asdict(quality))
    request = Request("test", 8, "model", "tanh", 5)
    run_job(job.trained, default_folder(job.trained, request), request, batch_size=8)
    scores = {
        "scores": {FD: 12.345, "precision": 0.5, "recall": 0.25},
        "images": {"name": "tiny", "number": 16, "checksum": "", "drawn": sampling.describe_job(job)},
        "reference": {"images": "digits, train", "number": 1438, "options": ["--reference=digits"]},
        "features": {"name": "EfficientNetLite0", "sha256": "0123456789", "resize": "224x224"},
        "settings": {"covariance": "divisor N - 1, float64"},
        "versions": {"jax": "0"},
    }
    write_json(folder / "fid" / f"{place.name}_num_16_EfficientNetLite0_train" / "scores.json", scores)
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def test_the_page_of_a_run_shows_all_of_it_and_needs_nothing_else(run, tmp_path):
    page = Page(write_report([run], tmp_path / "page.html", drawing="never"))
    assert {each.partition(",")[0].partition(";")[0] for each in page.references} == {
        "data:",
        "data:image/webp",
        *(f"#{name}" for name in ("overview", "curves", "samples", "reverse", "scores", "config", "files")),
    }
    charts = {chart["title"]: chart["curves"] for chart in page.data["charts"]}
    names = ["Loss", "Loss by timestep", "Learning rate", "Images/s", "Gradient norm", "ema_norm"]
    assert [*charts] == names
    assert [(curve["name"], curve["x"], curve["y"]) for curve in charts["Loss"]] == [
        ("loss", [1, 2], [0.5, 0.375]),
        ("eval loss", [2], [0.25]),
    ]
    assert [curve["y"] for curve in charts["Loss by timestep"]] == [[2.0, 1.5], [1.0, 0.75], [0.5, 0.375]]
    (frames,) = page.data["frames"]
    assert [frame["caption"] for frame in frames["grids"]] == ["step 1", "step 2"]
    (bits,) = (run / "likelihood").glob("*/likelihood.json")
    for text in (
        f"{read_json(bits)['bits_per_dim']:.4f}",
        "8 of split test of digits",
        "5 of the 12 per image",
        "12.345",
        "16 images; samples checkpoint 7, ddim, 12 steps, seed 0",
        f"python evaluate.py report {run} --out {tmp_path / 'page.html'} --reverse never",
        "3.000",
        "digits, train (1,438 images)",
        "checkpoint 7, ddim, 12 steps, seed 0",
        "--reverse never leaves it out",
        "metrics.jsonl",
        "checkpoints/7/",
        f"python evaluate.py fid {run} --features efficientnet-lite0 --reference=digits --num 16 --step 7",
        f"python evaluate.py quality {run} --num 16 --step 7 --sampler ddim --steps 12",
        f"python evaluate.py likelihood {run} --step 7 --num 8 --num-strata 5",
        f"python sample.py {run} --num 16 --step 7 --sampler ddim --steps 12",
    ):
        assert text in page.text
    assert ("differs", ["width", "8"]) in page.rows
    assert ("same", ["split", "train"]) in page.rows


def test_runs_side_by_side_are_told_apart_and_their_differences_marked(runs, run, tmp_path):
    config = runs.make_config(data=DataConfig("folder", str(tmp_path), height=16, width=12, channels=3))
    other = runs.save_runs(runs.make_trained(config), folder=tmp_path / "tiny")  # of the same name
    log(other, line(3, 0.125))
    page = Page(write_report([run, other], tmp_path / "page.html", drawing="never"))
    charts = {chart["title"]: chart["curves"] for chart in page.data["charts"]}
    names = [f"{each.parent.name}/tiny" for each in (run, other)]
    assert [(curve["name"], curve["color"]) for curve in charts["Learning rate"]] == [(names[0], 0), (names[1], 1)]
    assert [curve["y"] for curve in charts["Loss, 1st quarter of t"]] == [[2.0, 1.5], [0.5]]
    data = {"source": ("digits", "folder"), "path": ("-", str(tmp_path)), "height": ("8", "16"), "width": ("8", "12")}
    expected = {f"data.{name}": values for name, values in {**data, "channels": ("1", "3")}.items()}
    expected["model.num_classes"] = ("10", "0")
    assert {cells[0]: tuple(cells[1:]) for kind, cells in page.rows if kind == "differs"} == expected
    assert "No grids yet" in page.text
    assert "No loss on held-out images" not in page.text
    alone = Page(write_report([other], tmp_path / "page.html", drawing="never")).text
    for missing in ("No loss on held-out images", "No scores yet: python evaluate.py likelihood", "No samples drawn"):
        assert missing in alone
    assert "8×8×1" in page.text
    assert "16×12×3" in page.text


def test_the_reverse_process_ends_in_the_samples_of_the_job(runs, run):
    drawn = draw_reverse(runs.make_job(num_classes=10, folder=run).trained, seed=0)
    assert [frame.caption for frame in drawn.frames] == [f"t = {t}" for t in range(12, -1, -1)]
    (file,) = (run / "samples").glob("*/samples.npz")
    samples = embed(pictures.grid(np.load(file)["arr_0"]))
    assert drawn.frames[-1].pictures == (samples, samples)
    x_t, x0 = drawn.frames[6].pictures
    assert len({x_t, x0, samples}) == 3
    assert "16 images, classes in turn" in drawn.caption


def test_what_would_take_long_is_not_drawn_unasked(runs, run, tmp_path):
    config = runs.make_config(data=DataConfig("folder", str(tmp_path), height=64, width=64, channels=3))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, width=4096))
    large = TrainedRun(config, build_network(config), None, 7, tmp_path)
    with pytest.raises(UserError, match=r"about \d+ minutes on this machine \(8 images, 12 steps\).*--reverse always$"):
        draw_reverse(large, seed=0)
    assert read_reverse(run) is None
    frames = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), np.uint8)
    pictures.save_gif(tmp_path / "samples" / "job" / "reverse.gif", pictures.enlarge(frames, side=64), 0.1)
    found = read_reverse(tmp_path)
    assert [frame.caption for frame in found.frames][:2] == ["frame 1 of 26", "frame 2 of 26"]
    assert found.frames[0].pictures[0][1:] == (8, 8)


def test_damage_is_named_and_the_page_is_made(copy, capsys, tmp_path):
    lines = (copy / "metrics.jsonl").read_bytes()
    (copy / "metrics.jsonl").write_bytes(lines.replace(b"0.375", b"0.385"))
    (copy / "samples" / "step_0000001.png").write_bytes(b"\x89PNG")
    (scores,) = (copy / "fid").glob("*/scores.json")
    scores.write_text("{}")
    (bits,) = (copy / "likelihood").glob("*/likelihood.json")
    write_json(bits, {"job": []})
    page = Page(write_report([copy], tmp_path / "page.html", drawing="never"))
    shown = capsys.readouterr().err
    for notice in (
        "metrics.jsonl is damaged in line 2, left out",
        "samples/step_0000001.png is damaged (it is no picture: ",
        f"fid/{scores.parent.name}/scores.json is damaged (it has no checksum) and left out",
        f"likelihood/{bits.parent.name}/likelihood.json does not hold what ddpm_jax writes there, and is left out",
    ):
        assert notice in page.text
        assert notice in shown
    assert [frame["caption"] for frame in page.data["frames"][0]["grids"]] == ["step 2"]
    (loss,) = page.data["charts"][0]["curves"]
    assert loss["x"] == [1]


def test_names_from_files_are_text_and_not_code(copy, tmp_path):
    attack = "</script><script>alert(1)</script>"
    log(copy, line(3, 0.25, **{attack: 1.0}))
    (copy / "samples" / "job" / "<img src=x onerror=alert(1)>").mkdir(parents=True)
    (copy / "samples" / "<b>.txt").write_text("")
    file = write_report([copy], tmp_path / "page.html", drawing="never")
    page = Page(file)
    assert attack not in file.read_text()
    assert page.data["charts"][-1]["title"] == attack
    assert "samples/<b>.txt" in page.text
    assert html.escape("<b>.txt") in file.read_text()


def test_many_grids_are_thinned_and_pictures_kept_as_they_were(copy, tmp_path):
    for step in range(3, 60):
        draw_grid(copy, step, step)
    page = Page(write_report([copy], tmp_path / "page.html", drawing="never"))
    captions = [frame["caption"] for frame in page.data["frames"][0]["grids"]]
    assert (len(captions), captions[0], captions[-1]) == (40, "step 1", "step 59")
    assert "Of the 59 grids in the folder, 40 are shown." in page.text
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 7, 3), np.uint8)
    small = pictures.grid(images)
    pictures.save_png(tmp_path / "big.png", pictures.enlarge(small))
    (pixels,) = read_frames(tmp_path / "big.png", most=1)
    picture = embed(pixels)
    assert (picture.height, picture.width) == small.shape[:2]
    assert picture == embed(small)
    large = embed(np.random.default_rng(0).integers(0, 256, (1500, 3000, 3), np.uint8))
    assert (large.width, large.height) == (1024, 512)


@pytest.mark.parametrize(
    "words",
    [
        "digits",
        "digits --model.num-classes 10 --train.label-dropout 0.2 --name 'two words'",
        "cifar10 --data.no-flip --model.channel-mult 1 2 --diffusion.spacing log_snr --data.path 'my data'",
        "cifar10 --name=-x --data.path='--my data'",
    ],
)
def test_the_train_command_gives_the_configuration(words, tmp_path):
    config = parse_run(NoOptions, shlex.split(words)).config
    assert config != Config()
    (line,) = train_commands(config, tmp_path / "a run")
    command = shlex.split(line)
    assert command[:2] == ["python", "train.py"]
    assert command[-2:] == ["--workdir", str(tmp_path / "a run")]
    assert parse_run(NoOptions, command[2:-2]).config == config


def test_commands_tell_learning_rates_that_changed_and_python_apart(tmp_path):
    config = parse_run(NoOptions, ["digits", "--train.learning-rate", "1e-5", "--train.steps", "900"]).config
    first, second = train_commands(config, tmp_path, (LearningRate(0, 2e-4, 5000), LearningRate(700, 1e-5, 0)))
    configs = [parse_run(NoOptions, shlex.split(command)[2:-2]).config.train for command in (first, second)]
    found = [(train.steps, train.learning_rate, train.warmup_steps) for train in configs]
    assert found == [(700, 2e-4, 5000), (900, 1e-5, 0)]
    given = dataclasses.replace(config, model=dataclasses.replace(config.model, network=FROM_PYTHON))
    assert train_commands(given, tmp_path) == []


def test_commands_and_captions_have_every_option_of_the_sampler(tmp_path):
    chosen = SamplerConfig("ddim", 5, clip="dynamic", dynamic_quantile=0.9, eps_after_clipping="network", labels=(2,))
    job = {"checkpoint": 7, "seed": 0, **dataclasses.asdict(chosen)}
    assert sample_command(job, tmp_path, 4).endswith(
        "--clip dynamic --dynamic-quantile 0.9 --eps-after-clipping network --labels number:2"
    )
    assert "clip dynamic, dynamic quantile 0.9, eps after clipping network, labels (2,), seed 0" in describe_drawn(job)


def test_scores_of_an_average_name_its_width(copy, tmp_path):
    (file,) = (copy / "fid").glob("*/scores.json")
    found = read_json(file)
    found["images"]["drawn"] |= {"sigma_rel": 0.125}
    write_json(file, found)
    pictures.save_png(copy / "averages" / "step_0000007_l_simple.png", np.zeros((8, 8, 3), np.uint8))
    page = Page(write_report([copy], tmp_path / "page.html", drawing="never"))
    words = "--features efficientnet-lite0 --reference=digits --num 16 --step 7 --ema 0.125 --sampler ddim --steps 12"
    assert f"python evaluate.py fid {copy} {words}" in page.text
    assert "checkpoint 7, sigma_rel 0.125, ddim" in page.text
    assert "averages/step_0000007_l_simple.png" in page.text


def test_fields_that_differ_from_the_defaults_stand_out(run):
    fields = fields_of([read_contents(run, name="tiny")])
    found = {f"{section}.{name}" for section, rows in fields.items() for name, _, stands_out in rows if stands_out}
    assert found == {
        *("diffusion.num_steps", "diffusion.beta_start", "diffusion.beta_end", "model.width", "model.channel_mult"),
        *("model.num_res_blocks", "model.attention_resolutions", "model.num_groups", "model.num_classes"),
    }


def test_bad_input_is_one_line(run, run_script, tmp_path):
    (tmp_path / "empty").mkdir()
    page = tmp_path / "page.html"
    page.write_text("mine")
    for words, message in (
        ([], "missing RUN: give the folder of a run"),
        ([tmp_path / "empty"], r"empty is not the folder of a run: it has no config.json$"),
        ([tmp_path / "gone"], "there is no folder "),
        ([run, run], "is named twice: name each run once"),
        ([run, "--out", page], "page.html: this file exists: choose another name, or replace it with --overwrite"),
        ([run, "--out", tmp_path / "page.png"], "this command writes files of .html, or a folder"),
        ([run, "--reverse", "no"], "--reverse needs one of auto, always, never"),
        ([run, "--seed", -1], r"--seed must be in \[0, 2\^32\), not -1"),
    ):
        status, _, err = run_script("evaluate.py", "report", *words)
        assert status == 2, words
        assert re.search(message, err.strip()), err
        assert "Traceback" not in err
    assert page.read_text() == "mine"


def test_the_command_writes_into_the_run_or_where_it_is_told(copy, run, run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # that of a run is replaced
        status, out, err = run_script("evaluate.py", "report", copy, "--reverse", "never")
        assert (status, out.strip()) == (0, str(copy / "report.html")), err
    words = ("report", copy, run, "--reverse", "never")
    assert run_script("evaluate.py", *words)[:2] == (0, "report.html\n")
    assert run_script("evaluate.py", *words)[0] == 2
    assert run_script("evaluate.py", *words, "--overwrite")[0] == 0
    assert (tmp_path / "report.html").stat().st_size > 4_000_000
