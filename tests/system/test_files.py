"""Files with checksums, a folder that one process writes at a time, and files that could hang or fill memory."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import zlib

import chex
import numpy as np
import pytest

from ddpm_jax.system.errors import Damage, UserError
from ddpm_jax.system.files import (
    claimed,
    dump_checked,
    load_checked,
    open_file,
    parse_json,
    read_arrays,
    read_json,
    read_or_set_aside,
    write_arrays,
    write_json,
)


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
    [(b"[" * 10**6, "nested too deeply"), (b"\xff", "utf-8"), (b"1" * 5000, "digits")],
)
def test_json_of_others_is_a_value_or_a_value_error(content, said):
    with pytest.raises(ValueError, match=said):
        parse_json(content)


def _flipped(content, bits):
    for bit in bits:
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


@pytest.mark.parametrize("indent", [None, 2])
def test_no_flipped_bit_of_json_is_read(indent):
    value = {"step": 10, "loss": 0.25, "list": [1.5, None, "é"], "nested": {"crc32": "00000000", "checksum": 7}}
    content = dump_checked(value, indent=indent)
    assert load_checked(content) == value
    assert json.loads(content).pop("checksum") == content.rpartition(b'"')[0][-8:].decode()
    for changed in _flipped(content, range(8 * len(content))):
        with pytest.raises(Damage):
            load_checked(changed)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1}', "it has no checksum"),
        ('{"a": 1, "a": 2, "checksum": "00000000"}', "a key occurs twice"),
        ('{"a": ' + "[" * 100_000 + '"checksum": "00000000"', "nested too deeply"),
        ('[{"checksum": "00000000"}]', "not an object in braces"),
        ('{"a": 1' + "0" * 5000 + ', "checksum": "00000000"}', "is not JSON"),
    ],
)
def test_json_that_we_do_not_write_is_refused_with_a_right_checksum_too(text, reason):
    head, zeros, tail = text.rpartition('"00000000"')
    crc = f'"{zlib.crc32(text.encode()):08x}"' if zeros else ""
    with pytest.raises(Damage, match=reason):
        load_checked(f"{head}{crc}{tail}".encode())


def test_arrays_are_read_back_or_refused_after_any_damage(tmp_path):
    file = tmp_path / "part.npz"
    arrays = {"images": np.arange(24, dtype=np.uint8).reshape(2, 3, 4), "sums": np.linspace(0, 1, 5)}
    write_arrays(file, arrays, {"images": (4, 6), "job": "a"})
    content = file.read_bytes()
    chex.assert_trees_all_equal(read_arrays(file, {"images": [4, 6], "job": "a"}), arrays)
    with np.load(file) as opened:  # as any other program does
        chex.assert_trees_all_equal(dict(opened), arrays)
    for about in ({"images": [0, 2]}, {"job": "b"}, {"else": 0}):
        with pytest.raises(Damage, match="it is of "):
            read_arrays(file, about)
    spoiled = [*_flipped(content, range(3, 8 * len(content), 7)), content[:-1], content[: len(content) // 2], b""]
    for changed in (*spoiled, content + b"0"):
        file.write_bytes(changed)
        with pytest.raises(Damage):
            read_arrays(file, {})


def test_a_damaged_file_is_set_aside_under_a_new_name(tmp_path, capsys):
    file = tmp_path / "data.json"
    for name in ("data.json.damaged", "data.json.damaged1"):
        write_json(file, {"a": 1})
        assert read_or_set_aside(file, read_json) == {"a": 1}
        file.write_text(file.read_text().replace("1", "2", 1))
        assert read_or_set_aside(file, read_json) is None
        assert f"{file} is damaged (its checksum differs): renamed to {name} and recreated" in capsys.readouterr().err
        assert (tmp_path / name).exists()
        assert not file.exists()
