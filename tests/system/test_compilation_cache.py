"""Compiled programs on disk: the same bits from the cache as compiled, also if several wrote it, or it is damaged."""

import os
import pwd
import resource
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from ddpm_jax.system import compilation_cache

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
import jax, jax.numpy as jnp
from ddpm_jax.system import compilation_cache
compilation_cache.use_compilation_cache()
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
network = jax.jit(lambda x: jnp.tanh(x @ x.T).sum(axis=0) / jnp.linspace(1.0, 3.0, len(x)))
result = network(jax.random.normal(jax.random.key(0), (64, 48)))
print(jax.device_get(result).tobytes().hex())
print(len(hits), file=sys.stderr)
"""


def start(folder, *, before=None, **variables):
    clean = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=clean | {"DDPM_JAX_CACHE": str(folder)} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=before,
    )


def run(folder, **options):
    """The bits of the result, the number of programs found in the cache, and what else was written to stderr."""
    process = start(folder, **options)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    *lines, hits = err.splitlines()
    return out, int(hits), lines


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A folder in which two processes have kept their programs at once, and the bits."""
    folder = tmp_path_factory.mktemp("cache")
    processes = [start(folder) for _ in range(2)]
    ends = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    assert ends[0][0] == ends[1][0]
    return folder, ends[0][0]


def entries(folder):
    return sorted(folder.glob("compiled/*/*-cache"))


def test_a_program_from_the_cache_computes_the_same_bits(filled):
    folder, bits = filled
    found, hits, lines = run(folder)
    assert (found, lines) == (bits, [])
    assert hits == len(entries(folder)) > 1
    assert next((folder / "compiled").iterdir()).stat().st_mode & 0o077 == 0


def test_damaged_and_unfinished_programs_are_compiled_again(filled):
    folder, bits = filled
    whole = entries(folder)
    for position, file in enumerate(whole):
        content = bytearray(file.read_bytes())
        if position % 2:  # a flipped bit
            content[len(content) * position // len(whole)] ^= 4
        else:  # cut off
            del content[len(content) // 2 :]
        file.write_bytes(content)
    killed = whole[0]
    killed.with_name(killed.name.removesuffix("-cache") + "-atime").unlink()
    found, hits, lines = run(folder)
    assert (found, hits) == (bits, 0)
    assert len(lines) == len(whole) - 1
    assert all("is damaged: compiling it again" in line for line in lines)
    assert run(folder) == (bits, len(whole), [])


def test_a_disk_that_fails_costs_one_line_and_no_program(filled):
    folder, bits = filled
    whole = entries(folder)
    # Reading an entry also writes when it was used.
    found, _, lines = run(folder, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)))
    assert found == bits
    assert len(lines) == 1
    assert lines[0].startswith("compiled programs are not kept from here on: ")
    assert entries(folder) == whole


def test_the_number_of_cores_is_part_of_what_programs_are_kept_by(filled):
    """XLA divides sums among cores as it compiles, and JAX's key leaves them out."""
    folder, bits = filled
    found, hits, _ = run(folder, PJRT_NPROC="1")
    assert hits == 0
    assert run(folder, PJRT_NPROC="1")[0] == found
    assert len(list((folder / "compiled").iterdir())) == 2


def test_a_folder_that_cannot_be_written_costs_one_line(tmp_path):
    (tmp_path / "file").touch()
    _, hits, lines = run(tmp_path / "file")
    assert hits == 0
    assert len(lines) == 1
    assert lines[0].startswith(f"compiled programs are not kept for the next start: {tmp_path}/file/compiled/")
    assert lines[0].endswith(": Not a directory")


@pytest.mark.parametrize("kind", ["writable", "link", "no home"])
def test_a_folder_that_is_not_the_users_own_is_not_used(kind, own_process, monkeypatch, tmp_path, capsys):
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "HOME", "DDPM_JAX_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    if kind != "no home":
        monkeypatch.setenv("DDPM_JAX_CACHE", str(tmp_path))
    if kind == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        (tmp_path / "compiled").symlink_to("elsewhere")
    else:
        (tmp_path / "compiled").mkdir()
        (tmp_path / "compiled").chmod(0o770)
    before = jax.config.jax_compilation_cache_dir
    compilation_cache.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("compiled programs are not kept for the next start: ")


@pytest.mark.parametrize("chosen", ["own", ""])
def test_the_folder_of_the_user_wins_and_an_empty_name_turns_it_off(chosen, own_process, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", chosen)
    monkeypatch.setenv("DDPM_JAX_CACHE", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    compilation_cache.use_compilation_cache()
    assert not list(tmp_path.iterdir())
    assert (jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache) == (before, bool(chosen))
