"""The record of a run: written whole, read back as it was, and held against another configuration."""

import dataclasses
import re
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_jax.config import Config
from ddpm_jax.run import code
from ddpm_jax.run.fields import leaves, members, value_of
from ddpm_jax.run.record import (
    LearningRate,
    check_environment,
    check_same_run,
    differences,
    rates_from,
    rates_so_far,
    read_config,
    read_to_resume,
    save_config,
)
from ddpm_jax.run.validation import validate
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import read_json, write_json

_OF_TYPE = {
    int: st.integers(-(2**40), 2**40),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    str: st.text(),
    type(None): st.none(),
}


def values_of(kind):
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return st.lists(values_of(typing.get_args(kind)[0]), max_size=5).map(tuple)
    return st.one_of([_OF_TYPE[member] for member in members(kind)])


def refused(path, match):
    with pytest.raises(UserError, match=match) as error:
        read_config(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@given(data=st.data())
def test_a_configuration_is_read_back_if_a_command_line_may_give_it(tmp_path_factory, with_value, data):
    name, leaf = data.draw(st.sampled_from([*leaves(Config).items()]))
    config = with_value(Config(), name, data.draw(values_of(leaf.kind)))
    path = tmp_path_factory.mktemp("record") / "config.json"
    save_config(config, path)
    try:
        validate(config)
    except UserError as error:
        refused(path, re.escape(str(error)))
    else:
        assert read_config(path) == config
    assert [file.name for file in path.parent.iterdir()] == ["config.json"]


def test_the_file_is_indented_and_readable_by_all(small, tmp_path):
    save_config(small, tmp_path / "config.json")
    text = (tmp_path / "config.json").read_text()
    assert text.startswith('{\n  "format": 3,\n  "environment": {\n')
    assert '\n  "train": {\n    "steps": 1000,\n' in text
    assert (tmp_path / "config.json").stat().st_mode & 0o444 == 0o444


def test_a_run_older_than_a_field_takes_its_default(small, tmp_path):
    saved = {"format": 3, **dataclasses.asdict(small)}
    del saved["train"]["precision"], saved["checkpoints"]
    write_json(tmp_path / "config.json", saved)
    assert read_config(tmp_path / "config.json") == small


def test_another_format_is_refused(tmp_path):
    write_json(tmp_path / "config.json", {"format": 4, "new": 1})
    refused(tmp_path / "config.json", "has format 4, and .* reads format 3: train the run again, or use the ver")
    (tmp_path / "config.json").write_text('{"format": 2}')
    refused(tmp_path / "config.json", r"or is of an older version of ddpm_jax \(it has no checksum\): put the file")


def test_no_flipped_bit_of_a_record_is_read(small, tmp_path):
    path = tmp_path / "config.json"
    save_config(small, path)
    content = path.read_bytes()
    for bit in range(5, 8 * len(content), 37):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        refused(path, "is damaged, was changed by hand")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"train": {"batchsize": 64}}, r"unknown key train\.batchsize: did you mean train\.batch_size\?"),
        ({"trian": {}}, "unknown key trian"),
        ({"train": {"steps": True}}, r"train\.steps needs an integer, not True"),
        ({"model": {"channel_mult": [1, "x"]}}, r"model\.channel_mult needs an integer, not 'x'"),
        ({"diffusion": {"schedule": "lin"}}, r"diffusion\.schedule needs one of linear, "),
        ({"train": 3}, "train must be an object in braces, not 3"),
        ({"code": []}, r"code must be an object in braces, not \[\]"),
        ({"learning_rates": [{"step": 0}]}, "learning_rates: "),
        ({"learning_rates": [{"step": "0", "learning_rate": 1.0, "warmup_steps": 0}]}, "needs an integer, not '0'"),
        ({"learning_rates": 3}, "learning_rates: "),
        ({"diffusion": {"num_steps": 0}}, r"diffusion\.num_steps=0 must be at least 1"),
        ({"diffusion": {"num_steps": 10**12}}, r"diffusion\.num_steps=1000000000000 must be .*below 1048576"),
        ({"diffusion": {"beta_end": float("nan")}}, r"diffusion\.beta_end=nan must be above 0"),
        ({"train": {"learning_rate": float("inf")}}, r"train\.learning_rate=inf must be above 0"),
        ({"model": {"width": 10**30}}, r"model\.width=1000000000000000000000000000000 must be at least 4"),
        ({"model": {"width": 1e30}}, r"model\.width needs an integer, not 1e\+30"),
        ({"model": {"num_heads": 0}}, r"model\.num_heads=0 must be at least 1"),
        ({"model": {"channel_mult": []}}, r"model\.channel_mult is empty"),
        ({"data": {"height": 7}}, "image height 7 is not divisible"),
        ({"data": {"path": "a\0b"}}, r"data\.path='a\\x00b' must not contain"),
    ],
)
def test_a_wrong_key_or_value_is_one_line_with_a_right_checksum_too(tmp_path, change, line):
    write_json(tmp_path / "config.json", {"format": 3, **change})
    refused(tmp_path / "config.json", line)


def test_what_is_not_a_record_is_one_line(small, tmp_path):
    path = tmp_path / "config.json"
    refused(path, "cannot read .*No such file")
    save_config(small, path)
    whole = path.read_text().rstrip()
    for cut in (0, 1, 100, len(whole) - 1):
        path.write_text(whole[:cut])
        refused(path, "is damaged, was changed by hand, ")
    for content in (b"\xff\xfe\x00{", b"[]", b"[" * 100_000):
        path.write_bytes(content)
        refused(path, "is damaged, was changed by hand, ")


def test_a_failed_write_leaves_what_was_there(small, tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    save_config(small, path)
    with pytest.raises(UserError, match="cannot write .*(File exists|Not a directory)"):
        save_config(small, path / "config.json")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="cannot write .*: No space left on device"):
        save_config(Config(), path)
    assert read_config(path) == small
    assert list(tmp_path.iterdir()) == [path]


def test_a_field_that_differs_is_named_unless_it_is_free(small, with_value):
    saved = with_value(small, "data.path", "images")
    for name, leaf in leaves(Config).items():
        value = value_of(saved, name)
        other = not value if isinstance(value, bool) else (*value, 1) if isinstance(value, tuple) else (value or 7) * 2
        lines = differences(saved, with_value(saved, name, other))
        assert lines == ([] if leaf.free else [f"{name}: {value!r} saved, {other!r} requested"])


def test_what_does_not_change_the_numbers_of_a_step_is_free():
    free = {name for name, leaf in leaves(Config).items() if leaf.free}
    always = {name for name in leaves(Config) if name.startswith(("checkpoints.", "eval.", "log."))}
    always.remove("checkpoints.best_by")  # the losses that it compares are saved with the checkpoints
    assert always <= free
    assert free - always == {
        "name",
        "data.path",
        "data.max_megapixels",
        "data.memory_gib",
        "data.device_gib",
        "data.workers",
        "train.steps",
        "train.learning_rate",  # where it changed is recorded
        "train.warmup_steps",
        "train.parallel",
        "train.devices",
        "train.fsdp",
        "train.grad_accum_steps",
        "train.steps_per_call",
        "train.remat",
    }


def test_a_run_is_resumed_with_its_configuration_alone(small, with_value, tmp_path):
    path = tmp_path / "config.json"
    check_same_run(path, small)
    save_config(small, path)
    check_same_run(path, with_value(small, "train.steps", 2000))
    with pytest.raises(
        UserError, match=r"contains a run with a different .*\(train\.seed: 0 saved, 5 requested\): use"
    ):
        check_same_run(path, with_value(small, "train.seed", 5))


def test_a_run_is_resumed_under_the_settings_of_its_record(small, tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    save_config(small, path)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX")  # that is rounding
    check_environment(path)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    with pytest.raises(UserError, match=r"a different NVIDIA_TF32_OVERRIDE \(not set saved, 0 now\), which changes"):
        check_environment(path)


def test_a_learning_rate_that_changes_is_recorded_with_its_step(small, with_value, tmp_path):
    path, other = tmp_path / "config.json", with_value(small, "train.learning_rate", 1e-5)
    first = LearningRate(0, small.train.learning_rate, small.train.warmup_steps)
    assert rates_so_far(path, small) == ()
    save_config(small, path)
    assert rates_so_far(path, small) == ()
    assert rates_so_far(path, other) == (first,)
    rates = rates_from((first,), other, 70)
    assert rates == (first, LearningRate(70, 1e-5, small.train.warmup_steps))
    save_config(other, path, rates)
    assert read_config(path) == other
    assert rates_so_far(path, other) == rates_so_far(path, small) == rates
    for step in (50, 70, 90):  # 50: the newest checkpoints were damaged
        assert rates_from(rates, other, step) == rates
    assert rates_from(rates, small, 60) == rates_from(rates, small, 70) == ()
    assert rates_from(rates, small, 90) == (*rates, first._replace(step=90))
    record = read_json(path)
    record["learning_rates"][1]["stap"] = record["learning_rates"][1].pop("step")
    write_json(path, record)
    refused(path, "learning_rates: .*stap")


def test_a_run_whose_own_file_was_moved_is_resumed_with_its_copy(small, with_value, tmp_path):
    file, moved, run = tmp_path / "net.py", tmp_path / "moved.py", tmp_path / "run"
    file.write_text("def make(config): ...")
    config = with_value(small, "model.network", f"{file}:make")
    save_config(config, run / "config.json")
    code.keep_copies(config, run)
    assert read_to_resume(run) == config
    file.rename(moved)
    resumed = read_to_resume(run)
    assert resumed.model.network == f"{run / 'code' / 'network.py'}:make"
    check_same_run(run / "config.json", resumed)
    check_same_run(run / "config.json", with_value(small, "model.network", f"{moved}:make"))
    with pytest.raises(UserError, match=r"different configuration \(model\.network: "):
        check_same_run(run / "config.json", with_value(small, "model.network", f"{moved}:other"))
    moved.write_text("def make(config): pass")
    with pytest.raises(UserError, match="has changed since"):
        check_same_run(run / "config.json", with_value(small, "model.network", f"{moved}:make"))
