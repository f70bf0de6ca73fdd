import io
import re

import pytest

from ddpm_jax.system.errors import UserError
from ddpm_jax.system.progress import Progress, say


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    return Clock()


def run(clock, *, total=100, initial=0, seconds_a_step=1.0, **settings):
    file = io.StringIO()
    with Progress(total, initial=initial, file=file, clock=clock, **settings) as progress:
        for step in range(initial, total):
            clock.now += seconds_a_step
            progress.update(1, loss=1 / (step + 1))
    return file.getvalue().splitlines()


def test_a_line_every_ten_seconds_and_one_at_the_end(clock):
    lines = run(clock, total=25, description="digits")
    assert [int(re.match(r"digits: (\d+)/25 steps", line)[1]) for line in lines] == [10, 20, 25]
    assert lines[0] == "digits: 10/25 steps, 40%, elapsed 00:10, ETA 00:15, 1 steps/s, loss 0.1"
    assert lines[-1] == "digits: 25/25 steps, 100%, elapsed 00:25, ETA 00:00, 1 steps/s, loss 0.04"


def test_slow_steps_give_no_more_than_a_line_each(clock):
    assert len(run(clock, total=5, seconds_a_step=60.0)) == 5


def test_what_was_done_before_is_not_counted_as_speed(clock):
    lines = run(clock, total=1000, initial=980, seconds_a_step=2.0)
    assert lines[0].startswith("step: 985/1000 steps, 98%, elapsed 00:10, ETA 00:30, 0.5 steps/s")


def test_speed_is_that_of_late_and_in_the_end_that_of_the_whole(clock):
    file = io.StringIO()
    with Progress(31, file=file, clock=clock) as progress:
        for seconds in [100.0] + 30 * [0.5]:  # the first step compiles
            clock.now += seconds
            progress.update()
    first, second, last = file.getvalue().splitlines()
    assert first == "step: 1/31 steps, 3%, elapsed 01:40, ETA ?, ? steps/s"
    assert "2 steps/s" in second
    assert f"{31 / 115:.3g} steps/s" in last


def test_the_first_unit_of_a_bar_is_not_its_speed():
    file = Terminal()
    with Progress(1000, file=file) as progress:
        progress.update(1)
        assert re.search(r"1/1000 \[\d\d:\d\d<\?, \? step/s\]", file.getvalue())


def test_the_last_line_is_written_when_the_work_is_broken_off(clock):
    file = io.StringIO()

    def work():
        with Progress(10, file=file, clock=clock, unit="image") as progress:
            progress.update(3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert file.getvalue().startswith("image: 3/10 images, 30%")
    assert file.getvalue().count("\n") == 1


def test_work_that_was_done_before_says_nothing(clock):
    assert run(clock, total=7, initial=7) == []
    assert run(clock, total=0) == []


def test_numbers_stay_until_given_anew(clock):
    file = io.StringIO()
    with Progress(2, file=file, clock=clock) as progress:
        progress.update(1, loss=0.5, rate=2)
        progress.update(1, loss=0.25)
    assert file.getvalue().endswith("loss 0.25, rate 2\n")


def test_a_terminal_gets_a_bar_with_speed_time_left_and_numbers():
    file = Terminal()
    with Progress(4, unit="image", description="sampling", file=file) as progress:
        for _ in range(4):
            progress.update(1, loss=0.125)
    last = file.getvalue().split("\r")[-1]
    assert re.search(r"sampling: 100%\|[█#]+\| 4/4 \[\d\d:\d\d<\d\d:\d\d, .* image/s, loss=0.125\]", last)


def test_closing_twice_writes_once(clock):
    file = io.StringIO()
    progress = Progress(1, file=file, clock=clock)
    progress.update()
    progress.close()
    progress.close()
    assert file.getvalue().count("\n") == 1


def test_say_goes_to_stderr(capsys):
    say("a line")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "a line\n")


def test_what_a_terminal_would_obey_is_escaped(capsys):
    say("cat\x1b]0;title\x07\u202e:\n loaded")
    assert capsys.readouterr().err == "cat\\x1b]0;title\\x07\\u202e:\n loaded\n"
    assert str(UserError("no \x1b[31mred\x9b\nfile")) == "no \\x1b[31mred\\x9b file"
