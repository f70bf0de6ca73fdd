"""The lines of metrics: appended, cut off by a crash, rewound."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import dump_checked
from ddpm_jax.training.metrics import StepNumbers, append_line, read_lines, rewind, summarize
from ddpm_jax.training.plots import plot_run

numbers = st.floats(allow_nan=False, allow_infinity=False)


def must_not_warn(line):
    raise AssertionError(line)


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
    last = len(dump_checked(lines[-1])) + 1
    cut = data.draw(st.integers(2, last))  # more than the line's end is lost
    file.write_bytes(whole[: len(whole) - cut])
    assert read_lines(file) == lines[:-1]
    rewind(file, lines[-1]["step"], warn=must_not_warn)
    append_line(file, lines[-1])
    assert file.read_bytes() == whole


@given(losses=st.lists(numbers, max_size=6), step=st.integers(0, 70))
def test_rewound_is_as_if_never_gone_further(file, losses, step):
    lines = fill(file, losses)
    rewind(file, step, warn=must_not_warn)
    kept = [line for line in lines if line["step"] <= step]
    assert read_lines(file) == kept
    fill_again = file.read_bytes()
    fill(file, losses[: len(kept)])
    assert (file.read_bytes() if kept else b"") == fill_again


@pytest.mark.parametrize(("ends", "kept"), [(False, 1), (True, 3)])
def test_final_lines_go_where_the_run_goes_on(tmp_path, ends, kept):
    file = tmp_path / "metrics.jsonl"
    lines = [{"step": 10}, {"step": 15, "loss": 1.0, "final": True}, {"step": 15, "eval_loss": 1.0, "final": True}]
    for line in lines:
        append_line(file, line)
    rewind(file, 15, ends=ends, warn=must_not_warn)
    assert read_lines(file) == lines[:kept]


def test_rewinding_nothing_makes_an_empty_file(tmp_path):
    rewind(tmp_path / "metrics.jsonl", 5, warn=must_not_warn)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"step": 20, "lo',
        b"\xff\xfe\x80\x00",
        b"",
        b'{"step": 20, "loss": 0.5}',
        dump_checked({"step": 20, "loss": 0.5}).replace(b"0.5", b"0.4"),
        dump_checked({"stfp": 20}),
    ],
)
def test_a_damaged_line_goes_alone_and_is_said(tmp_path, damaged):
    file, said = tmp_path / "metrics.jsonl", []
    good = [dump_checked({"step": step, "loss": 1.5}) for step in (10, 30, 40)]
    whole = b"\n".join([good[0], damaged, *good[1:], dump_checked({"step": 50, "loss": 0.1})]) + b"\n"
    file.write_bytes(whole + b'{"step": 60, "lo')
    assert [line["step"] for line in read_lines(file)] == [10, 30, 40, 50]
    rewind(file, 40, warn=said.append)
    assert file.read_bytes() == b"\n".join(good) + b"\n"
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == whole + b'{"step": 60, "lo'
    assert said == [f"{file}: line 2 was damaged and dropped; the file as it was is kept as metrics.jsonl.damaged"]
    rewind(file, 40, warn=must_not_warn)  # it is whole now

    file.write_bytes(damaged + b"\n" + whole)  # again, and the first copy stays
    rewind(file, 40, warn=said.append)
    assert "lines 1, 3 were damaged" in said[-1]
    assert (tmp_path / "metrics.jsonl.damaged1").read_bytes() == damaged + b"\n" + whole
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() != (tmp_path / "metrics.jsonl.damaged1").read_bytes()
    assert file.read_bytes() == b"\n".join(good) + b"\n"


def test_no_flipped_bit_stops_a_run_or_becomes_another_number(tmp_path):
    run, said = tmp_path / "run", []
    file, window = run / "metrics.jsonl", [StepNumbers(1.5, 1.0, 1.0, [1.0] * 4, [1.0, 0.0, 2.0, 1.0])]
    run.mkdir()
    for step in (10, 20, 30):
        append_line(file, {"step": step, **summarize(window)})
    lines, content = read_lines(file), file.read_bytes()
    first = content.index(b"\n") + 1
    for bit in range(8 * first, 8 * (2 * first)):  # of the second line and its end
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        found = read_lines(file)
        assert found in ([lines[0], lines[2]], [lines[0]])  # where lines became one, it is damaged
        if bit % 997 == 0:
            plot_run(run)
            rewind(file, 30, warn=said.append)
            assert read_lines(file) == found
            assert "damaged and dropped" in said[-1]
    file.write_bytes(content[:-1] + b"\x0b")
    rewind(file, 30, warn=said.append)
    assert (read_lines(file), "line 3 was damaged" in said[-1]) == (lines[:2], True)


def test_a_users_own_loss_is_not_in_the_plot(tmp_path):
    append_line(tmp_path / "metrics.jsonl", {"step": 1, "loss": 2.0})
    plot_run(tmp_path)
    assert not (tmp_path / "loss.png").exists()


def test_a_file_that_may_not_be_read_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="^cannot read .*metrics.jsonl: not a regular file$"):
        read_lines(tmp_path / "metrics.jsonl")


def test_a_line_is_the_mean_of_its_steps():
    first = StepNumbers(1.0, 3.0, 10.0, [2.0, 0.0, 4.0, 0.0], [1.0, 0.0, 2.0, 0.0])
    second = StepNumbers(2.0, 5.0, 11.0, [1.0, 3.0, 0.0, 0.0], [2.0, 1.0, 0.0, 0.0])
    assert summarize([first, second]) == {
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
