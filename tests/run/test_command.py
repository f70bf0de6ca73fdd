"""The command line: every field by its name, every mistake one line."""

import dataclasses
import io
import itertools
import re
import subprocess
import sys
import typing
from pathlib import Path

import hypothesis
import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from ddpm_jax.config import Config, DataConfig
from ddpm_jax.run.command import parse_options, parse_run, run_command
from ddpm_jax.run.experiments import load_config
from ddpm_jax.run.fields import cast, leaves, members, value_of
from ddpm_jax.run.record import save_config
from ddpm_jax.system.errors import UserError


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Trains a model."""

    workdir: str = ""
    """The run's folder."""
    summary: bool = False
    """Print the table of the network, and exit."""


@dataclasses.dataclass(frozen=True)
class JobOptions:
    """Draws samples."""

    run: tyro.conf.Positional[str]
    """The run's folder."""
    num: int = 64
    """Number of images."""
    step: int | None = None
    """Training step of the checkpoint."""
    guidance_scale: float = 1.0
    """Scale of the guidance."""
    format: typing.Literal["grid", "png"] = "grid"
    """What is written."""
    scales: tuple[float, ...] = (1.0,)
    """Some numbers."""
    labels: str = ""
    """Some text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditOptions:
    """Edits an image."""

    run: tyro.conf.Positional[str]
    """The run's folder."""
    image: str
    """The image."""
    t: int
    """The timestep."""


def parse_config(*words):
    return parse_run(RunOptions, words)[1]


def refused(parse, *words):
    with pytest.raises(UserError) as error:
        parse(*words)
    (line,) = str(error.value).splitlines()
    return line


# Values

DIGITS = load_config("digits")


def another(name):
    """Words of the command line that change a field of the digits, and the value that they mean."""
    kind, value = members(leaves(Config)[name].kind)[0], value_of(DIGITS, name)
    if kind is bool:
        return [], not value
    if typing.get_origin(kind) is typing.Literal:
        choice = next(choice for choice in typing.get_args(kind) if choice != value)
        return [choice], choice
    if typing.get_origin(kind) is tuple:
        return ["3", "5", "7"], (3, 5, 7)
    return {int: (["1234"], 1234), float: (["2.5e-3"], 2.5e-3), str: (["some-thing"], "some-thing")}[kind]


def option(name, value, delimiter):
    section, dot, last = name.rpartition(".")
    return "--" + f"{section}{dot}{'no_' if value is False else ''}{last}".replace("_", delimiter)


def test_every_field_is_set_in_every_spelling():
    changed = {name: another(name) for name in leaves(Config)}
    separate = [[option(name, value, "-"), *words] for name, (words, value) in changed.items()]
    joined = [
        ["=".join([option(name, value, "_"), *words[:1]]), *words[1:]] for name, (words, value) in changed.items()
    ]
    for words in (separate, joined):
        config = parse_config(*itertools.chain(*words))
        for name, (_, value) in changed.items():
            assert value_of(config, name) == value
            assert type(value_of(config, name)) is type(value)


def test_fields_that_are_not_set_are_those_of_the_config_file():
    assert parse_run(RunOptions, []) == (RunOptions(), DIGITS, None)
    cifar10 = load_config("cifar10")
    for words in (
        ["cifar10", "--summary", "--train.steps=5"],
        ["--train.steps", "5", "--summary", "configs/cifar10.py"],
    ):
        options, config, _ = parse_run(RunOptions, words)
        assert options == RunOptions(summary=True)
        assert config == dataclasses.replace(cifar10, train=dataclasses.replace(cifar10.train, steps=5))


def test_flags_of_other_programs_are_a_value():
    options = parse_options(JobOptions, ["--num", "3", "--labels", "--image_size 64 --lr 1e-4", "runs/digits"])
    assert (options.run, options.num, options.labels) == ("runs/digits", 3, "--image_size 64 --lr 1e-4")


def test_the_last_value_of_an_option_counts():
    config = parse_config("--train.steps", "5", "--train.steps=6", "--data.flip", "--data.no-flip")
    assert (config.train.steps, config.data.flip) == (6, False)


@pytest.mark.parametrize(
    ("words", "data"),
    [
        (["--data.channels", "None"], DataConfig(channels=None)),
        (["--data.path", "a folder/with = and spaces"], DataConfig(path="a folder/with = and spaces")),
        (["--data.path=--odd"], DataConfig(path="--odd")),
        (["--data.height", "-3"], DataConfig(height=-3)),
    ],
)
def test_odd_values_are_kept(words, data):
    assert parse_config(*words).data == data


def test_a_list_may_be_empty():
    config = parse_config("--model.attention-resolutions", "--model.channel-mult", "1", "-2")
    assert (config.model.attention_resolutions, config.model.channel_mult) == ((), (1, -2))


def test_positional_and_named_options():
    words = ["--num", "3", "runs/digits", "--format=png", "--step", "None", "--scales", "1", "-2.5"]
    assert parse_options(JobOptions, words) == JobOptions("runs/digits", num=3, format="png", scales=(1.0, -2.5))


# Mistakes


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--train.batchsize", "64"], "unknown option --train.batchsize: did you mean --train.batch-size?"),
        (["--batch-size=64"], "unknown option --batch-size: did you mean --train.batch-size?"),
        (["--work-dir", "x", "cifar10"], "unknown option --work-dir: did you mean --workdir?"),
        (["-train.steps", "5"], "unknown option -train.steps: did you mean --train.steps?"),
        (["--data.no-height"], "unknown option --data.no-height: did you mean --data.height?"),
        (["--config-file", "x"], "unknown option --config-file: see --help"),
        (["--train.lr", "1e-3"], "unknown option --train.lr: did you mean --train.learning-rate?"),
        (["--train.ema", "0.9"], "unknown option --train.ema: did you mean --train.ema-decay?"),
        (["--image-size=32"], "unknown option --image-size: did you mean --data.height and --data.width?"),
        (["--resume"], "unknown option --resume: run the same command again, or train.py RUN, to resume"),
        (["--train.steps", "many"], "--train.steps needs an integer, not 'many'"),
        (["--train.steps=1e5"], "--train.steps needs an integer, not '1e5'"),
        (["--train.steps"], "--train.steps needs an integer, but no value follows it"),
        (["--data.path", "--summary"], "--data.path needs text, but no value follows it"),
        (["--train.learning-rate", "x"], "--train.learning-rate needs a number, not 'x'"),
        (["--data.channels", "three"], "--data.channels needs an integer or None, not 'three'"),
        (["--model.channel-mult", "1", "2.5"], "--model.channel-mult needs integers, not ['1', '2.5']"),
        (["--train.parallel", "pmaps"], "--train.parallel needs one of jit, pmap, not 'pmaps'"),
        (["--data.flip", "True"], "a flag takes no value: write --data.flip or --data.no-flip, without 'True'"),
        (["digits", "--summary=true"], "a flag takes no value: write --data.flip or --data.no-flip, without 'true'"),
        (["digits", "cifar10"], "unexpected argument 'cifar10': see --help"),
        (["cifra10"], "there is no config file cifra10: did you mean configs/cifar10.py?"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, words, line):
    monkeypatch.setenv("COLUMNS", "40")
    assert refused(parse_config, *words) == line


@pytest.mark.parametrize(
    ("kind", "words", "line"),
    [
        (JobOptions, ["--num", "3"], "missing RUN: see --help"),
        (EditOptions, ["runs/digits"], "missing --image, --t: see --help"),
        (JobOptions, ["a", "b"], "unexpected argument 'b': see --help"),
        (JobOptions, ["a", "--run", "b"], "unknown option --run: see --help"),
        (JobOptions, ["--nun", "3", "a"], "unknown option --nun: did you mean --num?"),
        (JobOptions, ["--num-samples", "3", "a"], "unknown option --num-samples: did you mean --num?"),
        (JobOptions, ["a", "--cfg=3"], "unknown option --cfg: did you mean --guidance-scale?"),
    ],
)
def test_a_mistake_in_options_is_one_line(kind, words, line):
    assert refused(lambda *words: parse_options(kind, words), *words) == line


def test_a_mistake_is_one_line_where_the_terminal_has_no_unicode(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert refused(parse_config, "--train.steps", "many") == "--train.steps needs an integer, not 'many'"
    assert refused(lambda: parse_options(EditOptions, [])) == "missing RUN, --image, --t: see --help"


FIELDS = ["--train.steps", "--train.learning-rate", "--model.channel-mult", "--data.channels", "--diffusion.schedule"]
FLAGS = ["--data.flip", "--data.no_flip", "--no-summary", "--data.no-height", "--tyro-print-completion", "-h"]
VALUES = ["digits", "-3", "2.5", "None", "nan", "x", "true", "cosine", "--", "-", "--=", "--.steps", "--train."]
WORDS = st.sampled_from([*FIELDS, *FLAGS, *VALUES, *(f"{field}={value}" for field in FIELDS for value in ("", "7"))])


@hypothesis.settings(max_examples=100)
@given(words=st.lists(WORDS | st.text(max_size=6), max_size=5))
def test_any_line_is_parsed_or_refused(words):
    try:
        options, config, _ = parse_run(RunOptions, words)
    except UserError:
        return
    except SystemExit:
        assert {"-h", "--help"} & set(words)
        return
    for name, leaf in leaves(Config).items():
        cast(leaf.kind, value_of(config, name))
    for name, leaf in leaves(RunOptions).items():
        cast(leaf.kind, value_of(options, name))


# The folder of a run


def test_the_folder_of_a_run_stands_for_its_configuration(small, tmp_path):
    save_config(small, tmp_path / "config.json")
    options, config, folder = parse_run(RunOptions, [str(tmp_path), "--train.steps", "2000", "--summary"])
    assert folder == tmp_path
    assert options == RunOptions(summary=True)
    assert config == dataclasses.replace(small, train=dataclasses.replace(small.train, steps=2000))


def test_a_folder_that_is_no_runs_is_one_line(tmp_path):
    assert refused(parse_config, str(tmp_path)).startswith(
        f"{tmp_path} is not the folder of a run: it has no config.js"
    )


# Commands


def test_commands():
    ran = []

    def draw(options: JobOptions) -> None:
        """Draws samples."""
        ran.append(("draw", options))

    def edit(options: EditOptions) -> None:
        """Edits an image."""
        ran.append(("edit", options))

    def run(*words, default=draw):
        run_command({"edit": edit}, words, default=default)

    run("runs/digits", "--num", "3")
    run("edit", "runs/digits", "--image", "a.png", "--t", "5")
    assert ran == [
        ("draw", JobOptions("runs/digits", num=3)),
        ("edit", EditOptions(run="runs/digits", image="a.png", t=5)),
    ]
    assert refused(run) == "missing RUN: see --help"
    assert refused(run, "edti", "runs/digits") == "there is no command 'edti': did you mean edit?"
    assert refused(run, "runs/digits", "edit").startswith("the command comes first: ")
    assert refused(lambda: run("runs/digits", default=None)) == "there is no command 'runs/digits': choose edit"


# Help


def help_of(capsys, parse, *words):
    with pytest.raises(SystemExit) as ending:
        parse(*words)
    assert ending.value.code in (0, None)
    return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)


def test_help_lists_every_field_with_its_meaning_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(capsys, parse_config, "cifar10", "--help")
    assert max(map(len, text.splitlines())) <= 80
    text = re.sub(r", --\S*no-\S+", "", " ".join(re.sub("[│─╭╮╰╯]", " ", text).split()))
    for name in (*leaves(Config), *leaves(RunOptions)):
        entry = text.partition(f" --{name.replace('_', '-')}")[2].partition(" --")[0]
        assert len(entry.partition("(default: ")[0].split()) > 3, name
        assert "(default: " in entry, name
    assert "Image height in pixels; images of a folder are resized and center-cropped to it. (default: 32)" in text


def test_help_is_printed_in_spite_of_a_mistake(capsys):
    assert "--train.batch-size" in help_of(capsys, parse_config, "--train.batchsize", "3", "--help")
    assert "(default: None)" in help_of(capsys, lambda *words: parse_options(JobOptions, words), "--nun", "-h")


def test_help_lists_the_commands(capsys):
    def draw(options: JobOptions) -> None:
        """Draws samples."""

    run_command({"draw": draw}, ["--help"])
    assert re.search(r"draw +Draws samples\.", capsys.readouterr().out)
    assert "RUN" in help_of(capsys, lambda *words: run_command({}, words, default=draw), "--help")


@pytest.mark.parametrize(
    "words", ["train.py --help", "sample.py --help", "evaluate.py fid --help", "sample.py runs/none --stepz 3"]
)
def test_help_and_mistakes_need_no_jax(words):
    """It takes half a second to import, and the rest as long again."""
    program = f"import runpy, sys; sys.argv = {words.split()}; runpy.run_path(sys.argv[0], run_name='__main__')"
    watched = f"import atexit, sys; atexit.register(lambda: print({{'jax', 'numpy'}} & {{*sys.modules}})); {program}"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", watched], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if "--help" in words else 2)
    assert done.stdout.splitlines()[-1] == "set()"
