"""Options of a sampler: the columns of a grid, and classes by number or name."""

import dataclasses

import pytest

from ddpm_jax.config import Config, ModelConfig
from ddpm_jax.generation.sampler_config import SamplerConfig, default_columns, number_of_class
from ddpm_jax.system.errors import UserError

CONFIG = Config(model=ModelConfig(num_classes=3))


def test_each_column_is_of_one_class():
    with_classes = lambda number: dataclasses.replace(
        CONFIG, model=dataclasses.replace(CONFIG.model, num_classes=number)
    )
    every = SamplerConfig()
    assert [default_columns(with_classes(10), every, number) for number in (80, 10, 9)] == [10, 10, 3]
    assert default_columns(with_classes(10), SamplerConfig(labels=(3, 5, 5)), 64) == 9
    assert default_columns(with_classes(2), every, 64) == 8
    assert default_columns(with_classes(1000), every, 2000) == 45
    assert default_columns(Config(), every, 64) == 8


def test_a_class_is_named_by_its_number_or_its_name():
    names = ["1", "10", "2", "smileys"]
    find = lambda given, names=names, classes=4: number_of_class(given, names, classes, option="--label")
    assert [find(given) for given in ("smileys", "3", 3, "10", "2", 1)] == [3, 3, 3, 1, 2, 1]
    assert [find(given) for given in ("name:1", "number:1")] == [0, 1]
    assert find("2", names=[]) == 2
    for given, line in (
        ("1", r"--label 1 may be class 0 \(1\) and class 1 \(10\): write name:1 or number:1$"),
        ("smilys", r"--label smilys: the run's classes are 0 \(1\), .*, 3 \(smileys\): did you mean smileys\?$"),
        ("-1", r"--label -1: the run's classes are 0 \(1\), 1 \(10\), 2, 3 \(smileys\)$"),
        (4, "--label 4: the run's classes are"),
    ):
        with pytest.raises(UserError, match=line):
            find(given)
    many = [f"class of the name {number}" for number in range(100)]
    with pytest.raises(UserError, match="the run's classes are 0 to 99; --label help lists their names$"):
        find("horse", many, 100)
    with pytest.raises(UserError, match="--label needs a class-conditional run"):
        find("1", [], 0)
