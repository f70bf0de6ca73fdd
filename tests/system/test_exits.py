"""How a script ends: at most one line, and the status of its kind."""

import subprocess
import sys
import typing

import pytest

from ddpm_jax.system.errors import Stopped, UserError
from ddpm_jax.system.exits import run_script


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
            raises(Stopped(15, "stopped at step 7: run it again")),
            143,
            "train.py: stopped at step 7: run it again\n",
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
    assert capsys.readouterr() == ("", said)


def test_a_file_without_permission_is_named(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["somewhere/sample.py"])
    with pytest.raises(SystemExit) as ending:
        run_script(raises(PermissionError(13, "Permission denied", "runs/digits/config.json")))
    assert ending.value.code == 2
    assert capsys.readouterr().err == "sample.py: error: no permission for runs/digits/config.json\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 // 0)


def test_exit_at_once_does_not_wait_for_threads(tmp_path):
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


def test_a_closed_pipe_ends_it_silently(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "from ddpm_jax.system.exits import run_script\n"
        "def main():\n"
        "    for _ in range(100_000):\n"
        "        print(7)\n"
        "run_script(main)\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "7\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141
