"""How a script ends: at most one line, and the status of its kind."""

import errno
import os
import re
import subprocess
import sys
import typing

import jax
import pytest

from ddpm_jax.system.errors import Stopped, UserError
from ddpm_jax.system.exits import advice_for_memory, run_script


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


def no_memory_for_a_batch():
    with advice_for_memory("a batch of 8 images", "use fewer"):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3221225472 bytes.")


@pytest.mark.parametrize(
    ("main", "line"),
    [
        (
            raises(PermissionError(errno.EACCES, "Permission denied", "runs/digits/config.json")),
            "no permission for runs/digits/config.json",
        ),
        (
            raises(OSError(errno.ENAMETOOLONG, "File name too long", "a" * 300)),
            f"{'a' * 200}: File name too long: use a shorter name, with --out or --workdir",
        ),
        (
            raises(OSError(errno.ENOSPC, "No space left on device")),
            "No space left on device: free some space, and run the same command to resume",
        ),
        (
            no_memory_for_a_batch,
            "out of memory (3.0 GiB asked for at once): a batch of 8 images does not fit: use fewer",
        ),
        (raises(MemoryError()), "out of memory: use a smaller batch, or close other programs"),
        (
            raises(RuntimeError("Unable to initialize backend 'tpu': no libtpu.so (set JAX_PLATFORMS='' to ..)")),
            "no device for JAX_PLATFORMS=cpu (Unable to initialize backend 'tpu': no libtpu.so): "
            'pip install "jax[cuda13]" for NVIDIA GPUs, or set JAX_PLATFORMS=cpu',
        ),
    ],
)
def test_what_the_machine_refuses_is_one_line(capsys, monkeypatch, main, line):
    monkeypatch.setattr(sys, "argv", ["somewhere/sample.py"])
    with pytest.raises(SystemExit) as ending:
        run_script(main)
    assert ending.value.code == 2
    assert capsys.readouterr().err == f"sample.py: error: {line}\n"


@pytest.mark.parametrize(
    "bug", [ZeroDivisionError(), AssertionError(), RuntimeError("of ours"), OSError("of a library")]
)
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises(type(bug)):
        run_script(raises(bug))


def test_a_device_that_is_not_there_is_one_line(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import jax\nfrom ddpm_jax.system.exits import run_script\nrun_script(jax.devices)\n")
    ended = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cuda"}
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    # Where the plug-in is installed without a GPU, JAX prints what it misses before.
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("train.py")]
    assert re.fullmatch(r"train\.py: error: no device for JAX_PLATFORMS=cuda.*: pip install \"jax\[cuda13\]\" .*", line)


def test_characters_that_the_terminal_cannot_show_are_escaped(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "from ddpm_jax.system.errors import UserError\n"
        "from ddpm_jax.system.exits import run_script\n"
        "def main():\n"
        "    print('caf\\xe9', 'bad\\udcff')\n"
        "    raise UserError('caf\\xe9')\n"
        "run_script(main)\n"
    )
    for encoding in ("ascii:strict", "utf-8:strict"):
        strict = {**os.environ, "PYTHONIOENCODING": encoding}
        ended = subprocess.run([sys.executable, str(script)], capture_output=True, env=strict)
        shown = "caf\xe9".encode(encoding.split(":")[0], "backslashreplace")
        assert (ended.returncode, ended.stdout) == (2, shown + b" bad\\udcff\n")
        assert ended.stderr == b"train.py: error: " + shown + b"\n"


def test_nothing_is_printed_into_files_where_the_streams_are_closed(tmp_path):
    script, file = tmp_path / "train.py", tmp_path / "file"
    script.write_text(
        "import os\n"
        "from ddpm_jax.system.exits import run_script\n"
        "from ddpm_jax.system.progress import Progress, say\n"
        "def main():\n"
        f"    with open({str(file)!r}, 'w') as file, Progress(2) as progress:\n"
        "        print('to stdout')\n"
        "        say('to stderr')\n"
        "        os.write(2, b'of a library')\n"
        "        file.write('kept')\n"
        "        progress.update(2)\n"
        "run_script(main)\n"
    )
    ended = subprocess.run(["sh", "-c", f"{sys.executable} {script} <&- >&- 2>&-"])
    assert (ended.returncode, file.read_text()) == (0, "kept")


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
