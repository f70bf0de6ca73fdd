"""A folder that one process writes at a time."""

import errno
import fcntl
import os

import pytest

from ddpm_jax.system import files
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import claimed


def test_a_folder_is_of_one_process_until_that_ends(tmp_path):
    folder = tmp_path / "new" / "run"
    with claimed(folder), pytest.raises(UserError, match=f"^another process is writing to {folder}: "), claimed(folder):
        pass
    with claimed(folder):
        assert [path.name for path in folder.iterdir()] == [".lock"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
def test_a_disk_without_locks_is_named_for_what_it_is(tmp_path, monkeypatch, number):
    def refuse(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with pytest.raises(UserError) as error, claimed(tmp_path):
        pass
    line = str(error.value)
    assert line.startswith(f"cannot lock {tmp_path}/.lock, ")
    assert os.strerror(number) in line
    assert "another process" not in line


def test_what_the_holder_raises_is_not_taken_for_the_lock(tmp_path):
    with pytest.raises(BlockingIOError), claimed(tmp_path):
        raise BlockingIOError(errno.EAGAIN, "a pipe is full")
    with (tmp_path / ".lock").open("w") as lock:  # and it was given back
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
