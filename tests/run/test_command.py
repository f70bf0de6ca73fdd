"""The command line: every field by its name, every slip one line, every ending its status."""

import dataclasses
import os
import re
import subprocess
import sys
import textwrap
import typing

import hypothesis
import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from ddpm_jax.config import Config, DataConfig
from ddpm_jax.run.command import parse_options, parse_run
from ddpm_jax.run.experiments import load_config
from ddpm_jax.run.fields import cast, describe, leaves, members, value_of
from ddpm_jax.system.errors import Stopped, UserError
from ddpm_jax.system.exits import run_script


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Trains a model."""

    workdir: str = ""
    """The run's folder."""
    summary: bool = False
    """Print the table of the network, and stop."""


@dataclasses.dataclass(frozen=True)
class JobOptions:
    """Draws samples."""

    run: tyro.conf.Positional[str]
    """The run's folder."""
    num: int = 64
    """How many."""
    step: int | None = None
    """Which checkpoint."""
    format: typing.Literal["grid", "png"] = "grid"
    """What is written."""
    scales: tuple[float, ...] = (1.0,)
    """Some numbers."""


def parsed(*arguments: str) -> Config:
    return parse_run(RunOptions, arguments)[1]


def refused(read: typing.Callable, *arguments: str) -> str:
    with pytest.raises(UserError) as error:
        read(*arguments)
    line = str(error.value)
    assert line
    assert "\n" not in line
    return line


# Every field

DIGITS = load_config("digits")


def another(name: str) -> tuple[list[str], object]:
    """Words for the command line that change a field, and the value that they mean."""
    kind, value = leaves(Config)[name].kind, value_of(DIGITS, name)
    if typing.get_origin(kind) is typing.Literal:
        choice = next(choice for choice in typing.get_args(kind) if choice != value)
        return [choice], choice
    if typing.get_origin(kind) is tuple:
        return ["3", "5", "7"], (3, 5, 7)
    return {int: (["1234"], 1234), float: (["2.5e-3"], 2.5e-3), str: (["some-thing"], "some-thing")}[members(kind)[0]]


VALUED = [name for name, leaf in leaves(Config).items() if leaf.kind is not bool]
FLAGS = [name for name, leaf in leaves(Config).items() if leaf.kind is bool]


@pytest.mark.parametrize("name", VALUED)
def test_every_field_is_set_in_every_spelling_and_alone(name):
    words, value = another(name)
    with_minus, with_underscore = "--" + name.replace("_", "-"), "--" + name
    for line in ([with_minus, *words], [with_underscore, *words], [f"{with_minus}={words[0]}", *words[1:]]):
        config = parsed(*line)
        read = value_of(config, name)
        assert read == value
        assert type(read) is type(value)
        others = [other for other in leaves(Config) if other != name]
        assert [value_of(config, other) for other in others] == [value_of(DIGITS, other) for other in others]


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_is_set_and_unset(name):
    section, _, last = name.rpartition(".")
    for on, spellings in {
        True: [f"--{name}", f"--{name.replace('_', '-')}"],
        False: [f"--{section}.no_{last}", f"--{section}.no-{last.replace('_', '-')}"],
    }.items():
        for spelling in spellings:
            assert value_of(parsed(spelling), name) is on
    line = refused(parsed, f"--{name}=true")
    assert line == refused(parsed, f"--{name}", "true") == refused(parsed, f"--{name}", "False")
    assert "takes no value: write --" in line


@pytest.mark.parametrize("name", [name for name in VALUED if members(leaves(Config)[name].kind) != (str,)])
def test_every_field_refuses_a_value_of_another_kind(name):
    option = "--" + name.replace("_", "-")
    for line in ([option, "x_y"], [f"{option}=x_y"]):
        assert refused(parsed, *line) == f"{option} needs {describe(leaves(Config)[name].kind)}, not 'x_y'"


@pytest.mark.parametrize("name", [name for name in VALUED if typing.get_origin(leaves(Config)[name].kind) is not tuple])
def test_every_field_refuses_to_go_without_a_value(name):
    option = "--" + name.replace("_", "-")
    for line in ([option], [option, "--data.flip"]):
        assert (
            refused(parsed, *line) == f"{option} needs {describe(leaves(Config)[name].kind)}, but no value follows it"
        )


@pytest.mark.parametrize("name", leaves(Config))
def test_every_field_misspelt_is_named_right(name):
    section, _, last = name.rpartition(".")
    misspelt = f"--{section}{'.' if section else ''}{last[:-1]}{last[-1] * 3}"
    line = refused(parsed, misspelt, "1")
    assert line.startswith(f"unknown option {misspelt}: did you mean --")
    assert f"--{name.replace('_', '-')}" in line


# The line as a whole


def test_no_words_mean_the_digits():
    options, config = parse_run(RunOptions, [])
    assert (options, config) == (RunOptions(), DIGITS)


@pytest.mark.parametrize(
    "arguments",
    [
        ["cifar10", "--summary", "--train.steps", "5"],
        ["--summary", "cifar10", "--train.steps", "5"],
        ["--train.steps", "5", "cifar10", "--summary"],
        ["--train.steps=5", "--summary", "configs/cifar10.py"],
    ],
)
def test_the_config_file_may_stand_anywhere(arguments):
    options, config = parse_run(RunOptions, arguments)
    assert options == RunOptions(summary=True)
    cifar10 = load_config("cifar10")
    assert config == dataclasses.replace(cifar10, train=dataclasses.replace(cifar10.train, steps=5))


def test_the_last_of_two_words_wins():
    assert parsed("--train.steps", "5", "--train.steps=6", "--data.flip", "--data.no-flip").train.steps == 6
    assert parsed("--data.flip", "--data.no-flip").data.flip is False


@pytest.mark.parametrize(
    ("arguments", "data"),
    [
        (["--data.channels", "None"], DataConfig(channels=None)),
        (["--data.path="], DataConfig(path="")),
        (["--data.path", "a folder/with = and spaces"], DataConfig(path="a folder/with = and spaces")),
        (["--data.path=--odd"], DataConfig(path="--odd")),
        (["--data.height=-3"], DataConfig(height=-3)),
        (["--data.height", "-3"], DataConfig(height=-3)),
    ],
)
def test_odd_values_are_taken_as_they_are(arguments, data):
    assert parsed(*arguments).data == data


def test_a_list_may_be_empty_or_in_one_word():
    assert parsed("--model.attention-resolutions").model.attention_resolutions == ()
    assert parsed("--model.attention-resolutions", "--data.flip").model.attention_resolutions == ()
    assert parsed("--model.channel-mult=1 2 4").model.channel_mult == (1, 2, 4)
    assert parsed("--model.channel-mult", "1", "-2").model.channel_mult == (1, -2)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--train.batchsize", "64"], "unknown option --train.batchsize: did you mean --train.batch-size?"),
        (["--batch-size=64"], "unknown option --batch-size: did you mean --train.batch-size?"),
        (["--work-dir", "x"], "unknown option --work-dir: did you mean --workdir?"),
        (["--config-file", "x"], "unknown option --config-file: see --help"),
        (["-s", "64"], "unknown option -s: see --help"),
        (["--"], "unknown option --: see --help"),
        (["--data.no-height"], "unknown option --data.no-height: did you mean --data.height?"),
        (["--train.steps", "many"], "--train.steps needs an integer, not 'many'"),
        (["--train.steps", "1e5"], "--train.steps needs an integer, not '1e5'"),
        (["--data.channels", "three"], "--data.channels needs an integer or None, not 'three'"),
        (["--model.channel-mult", "1", "2.5"], "--model.channel-mult needs integers, not '2.5'"),
        (["digits", "cifar10"], "needless argument 'cifar10': see --help"),
        (["cifra10"], "there is no config file cifra10: did you mean configs/cifar10.py?"),
    ],
)
def test_a_slip_is_one_line(arguments, line):
    assert refused(parsed, *arguments) == line


WORDS = st.sampled_from(
    [
        "digits",
        "cifar10",
        "-3",
        "1",
        "2.5",
        "None",
        "nan",
        "x",
        "true",
        "cosine",
        "a",
        "--",
        "-",
        "--=",
        "-t",
        "--.steps",
    ]
    + [
        "--data.flip",
        "--data.no_flip",
        "--data.flip=",
        "--summary",
        "--no-summary",
        "--workdir",
        "--workdir=",
        "--name",
    ]
    + ["--train.steps", "--train.steps=7", "--train.steps=x", "--train.learning-rate=1e-3", "--train.learning-rate"]
    + [
        "--model.channel-mult",
        "--model.channel-mult=",
        "--data.channels",
        "--train",
        "--train.",
        "--no-name",
        "--config",
    ]
    + ["--options.workdir", "--config.name", "--diffusion.schedule", "--tyro-print-completion"]
) | st.text(max_size=6)


@hypothesis.settings(max_examples=100)
@given(arguments=st.lists(WORDS, max_size=5))
def test_any_line_is_read_or_refused_in_one_line(arguments):
    try:
        options, config = parse_run(RunOptions, arguments)
    except UserError:
        return
    for name, leaf in leaves(Config).items():
        cast(leaf.kind, value_of(config, name))
    for name, leaf in leaves(RunOptions).items():
        cast(leaf.kind, value_of(options, name))


# A script's own options


def test_options_by_place_and_by_name():
    options = parse_options(JobOptions, ["--num", "3", "runs/digits", "--format=png", "--scales", "1", "-2.5"])
    assert options == JobOptions("runs/digits", num=3, format="png", scales=(1.0, -2.5))
    assert parse_options(JobOptions, ["r", "--step", "7"]) == JobOptions("r", step=7)
    assert parse_options(JobOptions, ["r", "--step", "None"]) == JobOptions("r")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "RUN is missing: see --help"),
        (["--num", "3"], "RUN is missing: see --help"),
        (["a", "b"], "needless argument 'b': see --help"),
        (["a", "--run", "b"], "unknown option --run: see --help"),
        (["a", "--nun", "3"], "unknown option --nun: did you mean --num?"),
        (["a", "--num", "3.5"], "--num needs an integer, not '3.5'"),
        (["a", "--format", "jpg"], "--format needs one of grid, png, not 'jpg'"),
        (["a", "--scales", "x"], "--scales needs numbers, not 'x'"),
    ],
)
def test_a_slip_in_options_is_one_line(arguments, line):
    assert refused(lambda *words: parse_options(JobOptions, words), *arguments) == line


# Help


def help_of(capsys, monkeypatch, read: typing.Callable, *arguments: str) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ending:
        read(*arguments)
    assert ending.value.code == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)


def in_one_line(text: str) -> str:
    return " ".join(re.sub("[│─╭╮╰╯]", " ", text).split())


def test_help_lists_every_field_with_its_meaning_in_80_columns(capsys, monkeypatch):
    text = help_of(capsys, monkeypatch, parsed, "--help")
    assert max(map(len, text.splitlines())) <= 80
    text = re.sub(r", --\S*no-\S+", "", in_one_line(text))
    for name in (*leaves(Config), *leaves(RunOptions)):
        # Under each option stands its meaning, and what it is if it is not given.
        entry = text.partition(f" --{name.replace('_', '-')}")[2].partition(" --")[0]
        assert "(default: " in entry, name
        assert len(entry.split()) > 4, name


@pytest.mark.parametrize(
    "arguments",
    [
        ["cifar10", "--help"],
        ["--help", "cifar10"],
        ["--train.steps", "5", "cifar10", "-h"],
    ],
)
def test_help_shows_the_values_of_the_file_given(capsys, monkeypatch, arguments):
    text = in_one_line(help_of(capsys, monkeypatch, parsed, *arguments))
    assert "(default: cifar10)" in text
    assert "(default: 32)" in text


def test_help_is_given_in_spite_of_a_slip(capsys, monkeypatch):
    assert "--train.batch-size" in help_of(capsys, monkeypatch, parsed, "--train.batchsize", "3", "--help")
    options = help_of(capsys, monkeypatch, lambda *words: parse_options(JobOptions, words), "--nun", "--help")
    assert re.search(r"usage: .*RUN", options)
    assert "Which checkpoint. (default: None)" in options


# Endings


def raises(error: BaseException) -> typing.Callable:
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "status", "said"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (raises(UserError("no such thing")), 2, "train.py: error: no such thing\n"),
        (raises(UserError("two\nlines")), 2, "train.py: error: two lines\n"),
        (raises(KeyboardInterrupt()), 130, "train.py: interrupted\n"),
        (
            raises(Stopped(15, "stopped at step 7: start again to go on")),
            143,
            "train.py: stopped at step 7: start again",
        ),
        (raises(SystemExit(0)), 0, ""),
        (raises(SystemExit(4)), 4, ""),
    ],
)
def test_every_ending_has_its_status_and_at_most_one_line(capsys, monkeypatch, main, status, said):
    monkeypatch.setattr(sys, "argv", ["somewhere/train.py"])
    with pytest.raises(SystemExit) as ending:
        run_script(main)
    assert ending.value.code == status
    error = capsys.readouterr().err
    assert error.startswith(said)
    assert error.count("\n") == bool(said)


def test_a_file_that_may_not_be_read_is_named(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["somewhere/sample.py"])
    with pytest.raises(SystemExit) as ending:
        run_script(raises(PermissionError(13, "Permission denied", "runs/digits/config.json")))
    assert ending.value.code == 2
    assert capsys.readouterr().err == "sample.py: error: no permission for runs/digits/config.json\n"


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 // 0)


def test_an_error_of_a_script_that_trains_waits_for_no_thread(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import threading\n"
        "from ddpm_jax.system.exits import exit_at_once, run_script\n"
        "from ddpm_jax.system.errors import UserError\n"
        "def main():\n"
        "    threading.Thread(target=threading.Event().wait).start()\n"
        "    raise UserError('cannot save')\n"
        "run_script(main, give_up=exit_at_once)\n"
    )
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (2, "train.py: error: cannot save\n")


SCRIPT = """
import dataclasses, sys
from ddpm_jax.run.command import parse_run
from ddpm_jax.run.validation import validate
from ddpm_jax.system.exits import run_script

@dataclasses.dataclass(frozen=True)
class Options:
    workdir: str = ""

def main():
    options, config = parse_run(Options)
    validate(config)
    for _ in range(100_000):
        print(config.train.steps)

run_script(main)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(textwrap.dedent(SCRIPT))
    return [sys.executable, str(path)]


def test_a_process_ends_with_one_line_and_status_2(script):
    for arguments, line in {
        "--train.batchsize 64": "train.py: error: unknown option --train.batchsize: did you mean --train.batch-size?\n",
        "--diffusion.num-steps 0": "train.py: error: diffusion.num_steps=0 must be at least 1\n",
    }.items():
        ended = subprocess.run([*script, *arguments.split()], capture_output=True, text=True)
        assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", line)


def test_a_reader_that_goes_away_is_met_with_silence(script):
    process = subprocess.Popen([*script, "--train.steps=7"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "7\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


def test_help_on_a_terminal_without_unicode(script):
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    ended = subprocess.run([*script, "--help"], capture_output=True, text=True, env=environment)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "--train.batch-size INT" in ended.stdout
