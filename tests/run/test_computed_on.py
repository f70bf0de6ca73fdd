"""A run remembers what its steps were computed on; another environment is named, or refused."""

import dataclasses

import pytest

from ddpm_jax.config import Config, TrainConfig
from ddpm_jax.run.computed_on import ComputedOn, describe, resumed
from ddpm_jax.system.errors import UserError

HERE = {"backend": "cpu", "cores": "2", "cpu_features": "avx avx2 avx512f"}
THERE = {"backend": "cpu", "cores": "1", "cpu_features": "avx avx2"}


def test_the_same_environment_says_nothing():
    past, line = resumed([], 0, HERE, exact=True)
    assert (past, line) == ([ComputedOn(0, HERE)], "")
    for step in (0, 45):
        assert resumed(past, step, HERE, exact=True) == (past, "")


def test_another_one_is_named_and_remembered_and_exact_refuses():
    first, _ = resumed([], 0, HERE)
    there, line = resumed([tuple(each) for each in first], 45, THERE)
    assert there == [ComputedOn(0, HERE), ComputedOn(45, THERE)]
    assert line.startswith("cores 2 before, 1 now; cpu_features without avx512f: the steps from 45 on agree with")
    with pytest.raises(
        UserError,
        match=r"--exact: steps 1 to 45 were computed in a different environment \(cores 2 before, 1 now; cpu_f",
    ):
        resumed(first, 45, THERE, exact=True)
    back, line = resumed(there, 60, HERE)
    assert back == [*there, ComputedOn(60, HERE)]
    assert "cores 1 before, 2 now; cpu_features with avx512f:" in line
    with pytest.raises(UserError, match="steps 46 to 60 were computed in a different environment"):
        resumed(back, 70, HERE, exact=True)
    assert resumed(there, 45, HERE)[0] == [ComputedOn(0, HERE), ComputedOn(45, HERE)]  # no step was computed there


def test_how_a_step_is_spread_and_cut_is_part_of_it():
    config = Config()
    spread = dataclasses.replace(
        config, train=TrainConfig(devices=4, fsdp=2, grad_accum_steps=2, steps_per_call=2, remat=True)
    )
    one, other = describe(config), describe(spread)
    assert {name for name in one if one[name] != other[name]} == {
        *("devices", "train.fsdp", "train.grad_accum_steps", "train.steps_per_call", "train.remat")
    }
    assert (one["devices"], other["devices"]) == ("8 cpu", "4 cpu")
