"""A folder that one process writes at a time; files that could hang or fill the memory."""

import errno
import fcntl
import os
import socket
import subprocess
import sys

import pytest

from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import claimed, open_file, read_json


def test_a_folder_belongs_to_one_process_until_that_is_killed(tmp_path):
    folder = tmp_path / "new" / "run"
    program = "import sys, time, pathlib; from ddpm_jax.system.files import claimed\n"
    program += "with claimed(pathlib.Path(sys.argv[1])): print('claimed', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match=f"^another process is writing to {folder}: "), claimed(folder):
            pass
        other.kill()
    with claimed(folder):
        assert [path.name for path in folder.iterdir()] == [".lock"]
    with claimed(folder), pytest.raises(UserError, match="another process"), claimed(folder):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EIO])
def test_a_disk_without_locks_is_named_for_what_it_is(tmp_path, monkeypatch, number):
    def refuse(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError) as error, claimed(tmp_path):
        pass
    line = str(error.value)
    assert line.startswith(f"cannot lock {tmp_path}/.lock, ")
    assert os.strerror(number) in line
    assert "another process" not in line


def test_what_the_holder_raises_is_not_taken_for_the_lock(tmp_path):
    with pytest.raises(BlockingIOError), claimed(tmp_path):
        raise BlockingIOError(errno.EAGAIN, "a pipe is full")
    with claimed(tmp_path):  # it was released
        pass


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(tmp_path / "socket"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("fifo", "socket", "/dev/zero", ".", "loop", "missing"):
        with pytest.raises(OSError, match=r"regular file|symbolic links|No such file"):
            open_file(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"[" * 10**6, "nested too deeply"), (b"\xff", "utf-8"), (b"1" * 5000, "digits"), (b" " * 2**24 + b"1", "16 MiB")],
)
def test_json_of_others_is_a_value_or_a_value_error(tmp_path, content, said):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_json(tmp_path / "a.json")
