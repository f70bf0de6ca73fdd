"""A script starts itself anew with huge pages, once; what the user has set wins."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_jax.system import huge_pages

SCRIPT = """
import json, os, sys
started = os.environ.get("STARTED", "")
os.environ["STARTED"] = started + "."
from ddpm_jax.system.huge_pages import use_huge_pages
use_huge_pages()
import resource
import jax, jax.numpy as jnp
sin = jax.jit(jnp.sin)
x = jnp.ones(2**24)  # 64 MiB
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
after = [(jax.block_until_ready(sin(x)), faults())[1] for _ in range(17)]
pages = (after[-1] - after[0]) * resource.getpagesize() / (16 * x.nbytes)
print(json.dumps([started, sys.argv[1:], sys.flags.optimize, os.getpid(), os.environ.get("GLIBC_TUNABLES"), pages]))
"""


NOTEBOOK = """
import runpy, sys
sys.argv = sys.argv[1:-1]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(tmp_path, *, before=(), after=(), own=None):
    """What a script says of itself, with other words in its command, and with the user's tunables."""
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    clean = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment = {
        **clean,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.getcwd(),
        **({"GLIBC_TUNABLES": own} if own else {}),
    }
    process = subprocess.Popen(
        [sys.executable, "-O", *before, file, "a b", "", *after], env=environment, stdout=subprocess.PIPE, text=True
    )
    (line,) = process.communicate()[0].splitlines()
    started, arguments, optimize, number, tunables, pages = json.loads(line)
    assert (arguments, optimize, number) == (["a b", ""], 1, process.pid)
    return len(started), tunables, pages


@pytest.mark.skipif(not huge_pages._can_ask(), reason="this system gives huge pages to all programs, or to none")
def test_a_script_starts_anew_once_and_its_memory_comes_in_huge_pages(tmp_path):
    starts, tunables, pages = run(tmp_path)
    assert (starts, tunables) == (1, "glibc.malloc.hugetlb=1")
    assert pages < 0.05


def test_it_does_not_where_another_program_runs_the_script(tmp_path):
    assert run(tmp_path, before=("-c", NOTEBOOK), after=("cell",))[:2] == (0, None)


def test_it_does_not_where_the_user_has_set_malloc(tmp_path):
    assert run(tmp_path, own="glibc.malloc.perturb=0")[:2] == (0, "glibc.malloc.perturb=0")


@pytest.mark.parametrize("mode", ["[always] madvise never", "always madvise [never]", None])
def test_it_does_not_where_it_would_change_nothing(mode, tmp_path, monkeypatch):
    file = tmp_path / "enabled"
    if mode:
        file.write_text(mode)
    monkeypatch.setattr(huge_pages, "_MODE", file)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "enabled.py")])
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, *sys.argv])
    Path(sys.argv[0]).touch()
    monkeypatch.setattr(os, "execv", lambda *words: pytest.fail("started anew"))
    huge_pages.use_huge_pages()
