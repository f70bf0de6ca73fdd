"""The lines of metrics: appended, cut off by a crash, rewound."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_jax.training.metrics import StepNumbers, append_line, read_lines, rewind, summarise

numbers = st.floats(allow_nan=False, allow_infinity=False)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("metrics") / "metrics.jsonl"


def fill(file, losses):
    file.unlink(missing_ok=True)
    lines = [{"step": 10 * number, "loss": loss} for number, loss in enumerate(losses, 1)]
    for line in lines:
        append_line(file, line)
    return lines


def test_no_file_has_no_lines(tmp_path):
    assert read_lines(tmp_path / "none") == []


@given(losses=st.lists(numbers, max_size=5))
def test_what_is_appended_is_read_to_the_last_digit(file, losses):
    assert fill(file, losses) == (read_lines(file) if losses else [])


@given(losses=st.lists(numbers, min_size=1, max_size=5), data=st.data())
def test_a_line_cut_off_is_left_out_and_the_next_is_whole(file, losses, data):
    lines = fill(file, losses)
    whole = file.read_bytes()
    last = len(json.dumps(lines[-1])) + 1
    cut = data.draw(st.integers(2, last))  # more than the line's end is lost
    file.write_bytes(whole[: len(whole) - cut])
    assert read_lines(file) == lines[:-1]
    rewind(file, lines[-1]["step"])
    append_line(file, lines[-1])
    assert file.read_bytes() == whole


@given(losses=st.lists(numbers, max_size=6), step=st.integers(0, 70))
def test_rewound_is_as_if_never_gone_further(file, losses, step):
    lines = fill(file, losses)
    rewind(file, step)
    kept = [line for line in lines if line["step"] <= step]
    assert read_lines(file) == kept
    fill_again = file.read_bytes()
    fill(file, losses[: len(kept)])
    assert (file.read_bytes() if kept else b"") == fill_again


def test_rewinding_nothing_makes_an_empty_file(tmp_path):
    rewind(tmp_path / "metrics.jsonl", 5)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_is_the_mean_of_its_steps():
    first = StepNumbers(1.0, 3.0, 10.0, [2.0, 0.0, 4.0, 0.0], [1.0, 0.0, 2.0, 0.0])
    second = StepNumbers(2.0, 5.0, 11.0, [1.0, 3.0, 0.0, 0.0], [2.0, 1.0, 0.0, 0.0])
    assert summarise([first, second]) == {
        "loss": 1.5,
        "loss_quartiles": [1.0, 3.0, 2.0, None],  # means over images, not over steps
        "grad_norm": 4.0,
        "param_norm": 11.0,
    }


@pytest.mark.parametrize("field", ["loss", "grad_norm", "param_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_seen(field, value):
    good = StepNumbers(1.0, 1.0, 1.0, [1.0] * 4, [1.0] * 4)
    assert good.is_finite()
    assert not good._replace(**{field: value}).is_finite()
