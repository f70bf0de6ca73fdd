"""The configuration: its kinds, its files, its JSON, and what it refuses."""

import dataclasses
import json
import re
import typing

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig
from ddpm_jax.run import fields
from ddpm_jax.run.build import build_schedule, build_unet
from ddpm_jax.run.experiments import load_config
from ddpm_jax.run.fields import cast, leaves, nearest, value_of
from ddpm_jax.run.record import differences, read_config, save_config
from ddpm_jax.run.validation import validate, warnings_of
from ddpm_jax.system.errors import UserError

SMALL = Config(
    model=ModelConfig(width=8, channel_mult=(1, 2), attention_resolutions=(4,), num_groups=4),
    train=TrainConfig(steps=1000, warmup_steps=10, ema_decay=0.9),
)


def with_value(config: Config, name: str, value: object) -> Config:
    """The configuration with another value of the field with a dotted name."""
    section, _, last = name.rpartition(".")
    if not section:
        return dataclasses.replace(config, **{last: value})
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{last: value})})


def the_line(error: pytest.ExceptionInfo) -> str:
    line = str(error.value)
    assert line
    assert "\n" not in line
    return line


_OF_KIND = {
    int: st.integers(-(2**40), 2**40),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    str: st.text(),
    type(None): st.none(),
}


def values_of(kind: object) -> st.SearchStrategy:
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return st.lists(values_of(typing.get_args(kind)[0]), max_size=5).map(tuple)
    return st.one_of([_OF_KIND[member] for member in fields.members(kind)])


@st.composite
def configs(draw: st.DrawFn) -> Config:
    config = Config()
    for name, leaf in leaves(Config).items():
        config = with_value(config, name, draw(values_of(leaf.kind)))
    return config


# Kinds


def test_every_field_has_a_meaning_and_a_kind_with_a_name():
    for name, leaf in leaves(Config).items():
        assert fields.describe(leaf.kind)
        cast(leaf.kind, value_of(Config(), name))


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (int, 3, 3),
        (float, 3, 3.0),
        (float, 0.5, 0.5),
        (bool, True, True),
        (int | None, None, None),
        (int | None, 4, 4),
        (tuple[int, ...], [1, 2], (1, 2)),
        (typing.Literal["a", "b"], "b", "b"),
    ],
)
def test_cast_takes_what_is_of_the_kind(kind, value, expected):
    result = cast(kind, value)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, 1.0),
        (int, True),
        (int, "1"),
        (int, None),
        (float, True),
        (float, "0.5"),
        (bool, 1),
        (str, 1),
        (str, None),
        (int | None, 1.5),
        (tuple[int, ...], [1, 2.5]),
        (tuple[int, ...], 3),
        (tuple[int, ...], "12"),
        (typing.Literal["a", "b"], "c"),
        (typing.Literal["a", "b"], ["a"]),
    ],
)
def test_cast_refuses_what_is_not(kind, value):
    with pytest.raises(TypeError, match="needs .*, not "):
        cast(kind, value)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("train.batchsize", "train.batch_size"),
        ("batch_size", "train.batch_size"),
        ("model.batch_size", "train.batch_size"),
        ("diffusion.num_step", "diffusion.num_steps"),
        ("flipp", "data.flip"),
        ("every", "checkpoints.every or eval.every or log.every"),
    ],
)
def test_the_nearest_name_is_found(written, meant):
    assert nearest(written, leaves(Config)) == f": did you mean {meant}?"


def test_nothing_is_suggested_when_nothing_is_near():
    assert nearest("qqqqqqqq", leaves(Config)) == ""


# Experiment files


def test_a_config_file_is_run(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from ddpm_jax.config import Config, TrainConfig\nconfig = Config(name='mine', train=TrainConfig(steps=7))\n"
    )
    assert (
        load_config(file) == load_config(str(file.with_suffix(""))) == Config(name="mine", train=TrainConfig(steps=7))
    )


def test_a_bare_name_is_one_of_configs_from_any_folder(tmp_path, monkeypatch):
    by_path = load_config("configs/cifar10.py")
    monkeypatch.chdir(tmp_path)
    assert load_config("cifar10") == load_config("configs/cifar10.py") == by_path
    assert by_path.name == "cifar10"


def test_configs_of_the_current_folder_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "cifar10.py").write_text(
        "from ddpm_jax.config import Config\nconfig = Config(name='own')\n"
    )
    assert load_config("cifar10").name == "own"


@pytest.mark.parametrize("written", ["cifra10", "configs/cifar_10.py", "cifar"])
def test_a_missing_file_names_the_nearest(written):
    with pytest.raises(UserError, match=r"did you mean configs/cifar10\.py\?") as error:
        load_config(written)
    assert written in the_line(error)


def test_a_missing_file_with_nothing_near_lists_what_there_is():
    with pytest.raises(UserError, match="choose one of .*digits.*, or give a file") as error:
        load_config("qqqqqqqqqqqqqq")
    the_line(error)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("x = 1\n", r"sets no configuration: it must contain `config = Config\(...\)`"),
        ("config = {'steps': 1}\n", "sets no configuration"),
        ("config = Config(\n", r"mine\.py, line 2: "),
        ("\nconfig = 1 / 0\n", r"mine\.py, line 3: ZeroDivisionError: division by zero"),
        ("import nowhere_to_be_found\n", r"line 2: ModuleNotFoundError: No module named"),
        (
            "config = Config(train=TrainConfig(batchsize=64))\n",
            r"line 2: TrainConfig has no batchsize: did you mean batch_size\?",
        ),
        ("config = Config(trian=TrainConfig())\n", r"line 2: Config has no trian: did you mean train\?"),
        ("config = Config(train=TrainConfig(steps='many'))\n", "train.steps needs an integer, not 'many'"),
        ("config = Config(train=TrainConfig(seed=None))\n", "train.seed needs an integer, not None"),
        ("config = Config(train=5)\n", "train must be a TrainConfig, not 5"),
        (
            "config = Config(diffusion=DiffusionConfig(schedule='lin'))\n",
            "diffusion.schedule needs one of linear, .*'lin'",
        ),
        ("raise ValueError('two\\nlines')\n", "ValueError: two lines"),
    ],
)
def test_a_faulty_config_file_is_one_line(tmp_path, text, line):
    file = tmp_path / "mine.py"
    file.write_text("from ddpm_jax.config import Config, DiffusionConfig, TrainConfig\n" + text)
    with pytest.raises(UserError, match=line) as error:
        load_config(file)
    assert str(file) in the_line(error)


# JSON


@given(config=configs())
def test_json_brings_back_every_configuration(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("json") / "config.json"
    save_config(config, path)
    assert read_config(path) == config
    assert [file.name for file in path.parent.iterdir()] == ["config.json"]


def test_the_file_is_indented_and_readable_by_all(tmp_path):
    save_config(SMALL, tmp_path / "config.json")
    assert '\n  "train": {\n    "steps": 1000,\n' in (tmp_path / "config.json").read_text()
    assert (tmp_path / "config.json").stat().st_mode & 0o444 == 0o444


def test_a_run_older_than_a_field_takes_its_default(tmp_path):
    loaded = dataclasses.asdict(SMALL)
    del loaded["train"]["precision"], loaded["checkpoints"]
    (tmp_path / "config.json").write_text(json.dumps(loaded))
    assert read_config(tmp_path / "config.json") == SMALL


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"train": {"batchsize": 64}}, r"unknown key train\.batchsize: did you mean train\.batch_size\?"),
        ({"trian": {}}, "unknown key trian"),
        ({"train": {"steps": "many"}}, r"train\.steps needs an integer, not 'many'"),
        ({"train": {"steps": 1.5}}, r"train\.steps needs an integer, not 1\.5"),
        ({"train": {"steps": True}}, r"train\.steps needs an integer, not True"),
        ({"model": {"channel_mult": [1, "x"]}}, r"model\.channel_mult needs an integer, not 'x'"),
        ({"model": {"channel_mult": 3}}, r"model\.channel_mult needs integers, not 3"),
        ({"data": {"channels": "three"}}, r"data\.channels needs an integer or None, not 'three'"),
        ({"diffusion": {"schedule": "lin"}}, r"diffusion\.schedule needs one of linear, "),
        ({"train": 3}, "train must be an object in braces, not 3"),
        ([], "the configuration must be an object in braces"),
    ],
)
def test_a_faulty_key_or_value_is_one_line(tmp_path, change, line):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(change))
    with pytest.raises(UserError, match=line) as error:
        read_config(path)
    assert str(path) in the_line(error)


@given(cut=st.integers(0, 10_000))
def test_a_truncated_file_is_one_line(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "config.json"
    save_config(SMALL, path)
    whole = path.read_text().rstrip()
    path.write_text(whole[: cut % len(whole)])
    with pytest.raises(UserError, match="is damaged, it is no whole JSON file") as error:
        read_config(path)
    the_line(error)


def test_bytes_that_are_no_text_are_one_line(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(UserError, match="is damaged") as error:
        read_config(tmp_path / "config.json")
    the_line(error)


def test_a_missing_file_and_a_file_for_a_folder_are_one_line(tmp_path):
    (tmp_path / "none").touch()
    with pytest.raises(UserError, match="cannot read .*No such file"):
        read_config(tmp_path / "config.json")
    with pytest.raises(UserError, match="cannot write .*(File exists|Not a directory)"):
        save_config(SMALL, tmp_path / "none" / "config.json")


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    save_config(SMALL, path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="cannot write .*: No space left on device"):
        save_config(Config(), path)
    assert read_config(path) == SMALL
    assert list(tmp_path.iterdir()) == [path]


# Differences


@pytest.mark.parametrize("name", leaves(Config))
def test_a_field_that_differs_is_named_unless_it_is_free(name):
    config = with_value(SMALL, "data.path", "images")
    value = value_of(config, name)
    other = not value if isinstance(value, bool) else (*value, 1) if isinstance(value, tuple) else (value or 7) * 2
    lines = differences(config, with_value(config, name, other))
    assert lines == ([] if leaves(Config)[name].free else [f"{name}: {value!r} there, {other!r} here"])


def test_what_shapes_no_number_of_a_step_is_free():
    assert {name for name, leaf in leaves(Config).items() if leaf.free} == {
        "name",
        "eval.every",
        "eval.num",
        "data.path",
        "data.memory_gib",
        "data.device_gib",
        "data.workers",
        "train.steps",
        "train.parallel",
        "train.fsdp",
        "train.grad_accum_steps",
        "train.remat",
        "checkpoints.every",
        "checkpoints.keep",
        "checkpoints.keep_every",
        "checkpoints.keep_best",
        "checkpoints.minutes",
        "log.every",
        "log.samples_every",
        "log.num_samples",
        "log.sample_steps",
        "log.tensorboard",
        "log.wandb",
        "log.peak_tflops",
    }


# Validation


def test_a_good_configuration_passes():
    validate(SMALL)
    validate(Config())


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("name", "", "must be the name of a folder"),
        ("name", "a/b", "must be the name of a folder"),
        ("name", "..", "must be the name of a folder"),
        ("data.height", 0, "must be at least 1"),
        ("data.height", 9, "image height 9 is not divisible by 2"),
        ("data.width", -8, "must be at least 1"),
        ("data.width", 7, "image width 7 is not divisible by 2"),
        ("data.channels", 0, "must be at least 1"),
        ("data.memory_gib", -1.0, "must be at least 0"),
        ("data.memory_gib", float("nan"), "must be at least 0"),
        ("data.device_gib", -1.0, "must be at least 0"),
        ("data.workers", -1, "must be at least 0"),
        ("diffusion.num_steps", 0, "must be at least 1"),
        ("diffusion.num_steps", -5, "must be at least 1"),
        ("diffusion.beta_start", 0.0, r"must be in \(0, 1\)"),
        ("diffusion.beta_start", -1e-4, r"must be in \(0, 1\)"),
        ("diffusion.beta_end", 1.0, r"must be in \(0, 1\)"),
        ("diffusion.beta_end", float("nan"), r"must be in \(0, 1\)"),
        ("diffusion.schedule", "jsd", "eps cannot tell x_0 at the last step of the jsd schedule"),
        ("diffusion.variance", "learned", "is not trained by L_simple"),
        ("diffusion.variance", "learned_range", "is not trained by L_simple"),
        ("loss.kind", "hybrid", "has nothing to train"),
        ("loss.vlb_weight", 0.0, "must be above 0"),
        ("loss.min_snr_gamma", float("nan"), "must be above 0"),
        ("train.label_dropout", 1.0, r"must be in \[0, 1\)"),
        ("model.num_classes", -1, "must be at least 0"),
        ("model.width", 0, "must be at least 4"),
        ("model.width", 10, "10 channels .* are not divisible by 4 groups"),
        ("model.channel_mult", (), "give one number for each level"),
        ("model.channel_mult", (1, 0), "must be integers of at least 1"),
        ("model.num_res_blocks", 0, "must be at least 1"),
        ("model.attention_resolutions", (-4,), "must be integers of at least 1"),
        ("model.num_heads", 0, "must be at least 1"),
        ("model.num_heads", 3, "8 channels .* are not divisible by 3 heads"),
        ("model.num_groups", 0, "must be at least 1"),
        ("model.num_groups", 3, "8 channels .* are not divisible by 3 groups"),
        ("model.dropout", -0.1, r"must be in \[0, 1\)"),
        ("model.dropout", 1.0, r"must be in \[0, 1\)"),
        ("train.steps", 0, "must be at least 1"),
        ("train.batch_size", 0, "must be at least 1"),
        ("train.learning_rate", 0.0, "must be above 0"),
        ("train.learning_rate", float("inf"), "must be above 0"),
        ("train.warmup_steps", -1, "must be at least 0"),
        ("train.grad_clip", -1.0, "must be at least 0"),
        ("train.grad_clip", float("nan"), "must be at least 0"),
        ("train.ema_decay", 1.0, r"must be in \[0, 1\)"),
        ("train.seed", -1, "must be at least 0"),
        ("train.fsdp", 0, "must be at least 1"),
        ("train.grad_accum_steps", 0, "must be at least 1"),
        ("train.seed", 2**32, r"must be below 2\^32"),
        ("checkpoints.every", 0, "must be at least 1"),
        ("checkpoints.keep", 0, "must be at least 1"),
        ("checkpoints.keep_every", -1, "must be at least 0"),
        ("checkpoints.keep_best", -1, "must be at least 0"),
        ("checkpoints.minutes", -1.0, "must be at least 0"),
        ("checkpoints.minutes", float("nan"), "must be at least 0"),
        ("log.every", 0, "must be at least 1"),
        ("log.samples_every", -1, "must be at least 0"),
        ("log.num_samples", 0, "must be at least 1"),
        ("log.sample_steps", 1001, "is more than diffusion.num_steps=1000"),
        ("log.peak_tflops", -1.0, "must be at least 0"),
        ("train.steps", "many", "needs an integer, not 'many'"),
    ],
)
def test_what_cannot_be_trained_is_one_line(name, value, line):
    with pytest.raises(UserError, match=line) as error:
        validate(with_value(SMALL, name, value))
    # The line names the value, and the field or, where several must go together, the quantity.
    value = value[0] if isinstance(value, tuple) and len(value) == 1 else value
    assert str(value) in the_line(error) or value == ()


@pytest.mark.parametrize("prediction", ["x0", "v", "mean"])
def test_jsd_goes_with_what_can_tell_x0(prediction):
    diffusion = DiffusionConfig(schedule="jsd", prediction=prediction)
    validate(dataclasses.replace(SMALL, diffusion=diffusion))


@pytest.mark.parametrize("prediction", ["eps", "mean"])
def test_betas_that_leave_nothing_are_refused(prediction):
    diffusion = DiffusionConfig(schedule="const", beta_end=0.9, prediction=prediction)
    with pytest.raises(UserError, match="cannot tell x_0 at the last step of the const schedule"):
        validate(dataclasses.replace(SMALL, diffusion=diffusion))


def test_pmap_shares_no_state():
    with pytest.raises(UserError, match="train.parallel=pmap .* train.fsdp=4 .* use --train.parallel jit") as error:
        validate(with_value(with_value(SMALL, "train.parallel", "pmap"), "train.fsdp", 4))
    the_line(error)


# Warnings


def test_nothing_to_warn_of():
    assert warnings_of(SMALL) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"diffusion.num_steps": 100}, r"at T=100\).*--diffusion\.beta-start 0\.001 --diffusion\.beta-end 0\.2"),
        ({"diffusion.num_steps": 10}, "use --diffusion.schedule cosine"),
        ({"diffusion.beta_end": 1e-3}, "use --diffusion.schedule cosine"),
        (
            {"model.attention_resolutions": (4, 16)},
            r"attention_resolutions 16: no level has this height \(they have 8, 4\)",
        ),
        ({"train.warmup_steps": 1000}, "warmup_steps=1000 is not over after train.steps=1000"),
        ({"train.ema_decay": 0.9999}, "still 90% the untrained network"),
    ],
)
def test_what_is_seldom_meant_is_said(changes, line):
    config = SMALL
    for name, value in changes.items():
        config = with_value(config, name, value)
    validate(config)
    (said,) = warnings_of(config)
    assert "\n" not in said
    assert re.search(line, said)


@pytest.mark.parametrize("num_steps", [25, 50, 100, 250, 400])
def test_the_betas_that_the_warning_gives_end_it(num_steps):
    (said,) = warnings_of(with_value(SMALL, "diffusion.num_steps", num_steps))
    words = said.split()
    start, end = (float(words[words.index(f"--diffusion.beta-{which}") + 1]) for which in ("start", "end"))
    diffusion = DiffusionConfig(num_steps=num_steps, beta_start=start, beta_end=end)
    mended = dataclasses.replace(SMALL, diffusion=diffusion)
    validate(mended)
    assert warnings_of(mended) == []


# What is built


def test_the_schedule_is_the_one_configured():
    schedule = build_schedule(dataclasses.replace(SMALL, diffusion=DiffusionConfig(num_steps=5, beta_end=0.3)))
    assert schedule.num_steps == 5
    assert float(schedule.betas[0]) == pytest.approx(1e-4)
    assert float(schedule.betas[-1]) == pytest.approx(0.3)


def test_the_unet_is_the_one_configured():
    unet = build_unet(with_value(SMALL, "data.channels", 3))
    for name in (
        "width",
        "channel_mult",
        "num_res_blocks",
        "attention_resolutions",
        "num_heads",
        "dropout",
        "num_groups",
    ):
        assert getattr(unet, name) == value_of(SMALL, f"model.{name}")
    assert (unet.out_channels, unet.dtype) == (3, jnp.float32)


def test_a_learned_variance_doubles_the_output():
    assert build_unet(with_value(SMALL, "diffusion.variance", "learned_range")).out_channels == 2


def test_recomputing_is_the_networks_choice():
    assert build_unet(with_value(SMALL, "train.remat", True)).remat


def test_bfloat16_is_the_networks_type():
    assert build_unet(with_value(SMALL, "train.precision", "bfloat16")).dtype == jnp.bfloat16


def test_channels_that_are_not_known_yet_are_refused():
    with pytest.raises(ValueError, match="channels is None"):
        build_unet(Config(data=DataConfig(channels=None)))
