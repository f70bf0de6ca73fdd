"""The fields of a configuration: types, ranges, the nearest name."""

import typing

import pytest

from ddpm_jax.config import Config, Range
from ddpm_jax.run.fields import cast, leaves, nearest, value_of, with_kinds
from ddpm_jax.system.errors import UserError


def test_every_default_is_of_its_type_and_in_its_range():
    assert with_kinds(Config()) == Config()
    for name, leaf in leaves(Config).items():
        value = value_of(Config(), name)
        if leaf.range is not None:
            assert all(each in leaf.range for each in (value if isinstance(value, tuple) else (value,)))
    assert [name for name, leaf in leaves(Config).items() if leaf.range is None and leaf.kind in (int, float)] == []


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "words"),
    [
        (Range(at_least=1), (1, 10**9), (0, -1, float("inf"), float("nan")), "at least 1"),
        (Range(above=0), (1e-300, 5.0), (0.0, -1.0, float("inf"), float("nan")), "above 0"),
        (Range(above=0, at_most=0.28), (1e-9, 0.28), (0, 0.29, float("nan")), "above 0 and at most 0.28"),
        (Range(at_least=0, below=1), (0, 0.999), (1, -0.1, float("nan")), "at least 0 and below 1"),
    ],
)
def test_a_range_is_finite_and_says_its_bounds(allowed, inside, outside, words):
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in outside)
    assert str(allowed) == words


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (float, 3, 3.0),
        (bool, True, True),
        (int | None, None, None),
        (tuple[int, ...], [1, 2], (1, 2)),
        (typing.Literal["a", "b"], "b", "b"),
    ],
)
def test_cast_accepts_what_is_of_the_type(kind, value, expected):
    result = cast(kind, value)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, 1.0),
        (int, True),
        (int, "1"),
        (float, True),
        (bool, 1),
        (str, None),
        (int | None, 1.5),
        (tuple[int, ...], [1, 2.5]),
        (tuple[int, ...], "12"),
        (typing.Literal["a", "b"], ["a"]),
    ],
)
def test_cast_refuses_what_is_not(kind, value):
    with pytest.raises(TypeError, match="needs .*, not "):
        cast(kind, value)


def test_a_value_of_another_type_is_named(with_value):
    with pytest.raises(UserError, match="train.steps needs an integer, not 'many'"):
        with_kinds(with_value(Config(), "train.steps", "many"))


@pytest.mark.parametrize(
    ("written", "hint"),
    [
        ("train.batchsize", ": did you mean train.batch_size?"),
        ("model.batch_size", ": did you mean train.batch_size?"),
        ("flipp", ": did you mean data.flip?"),
        ("every", ": did you mean checkpoints.every or eval.every or log.every?"),
        ("qqqqqqqq", ""),
    ],
)
def test_the_nearest_name_is_found(written, hint):
    assert nearest(written, leaves(Config)) == hint
