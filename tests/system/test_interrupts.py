"""Ctrl-C ends a script once: while it imports, and where Python would drop it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2]

# Interrupts itself in a place where Python drops the exception, and then waits to be ended.
PROGRAM = """
import gc, os, signal, time
from ddpm_jax.system.exits import run_script

def interrupt(*arguments):
    if not sent:
        sent.append(True)
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # the signal arrives in here
            pass

class Finalized:
    def __del__(self):
        interrupt()

def main():
    {interrupted}
    time.sleep(60)

sent = []
run_script(main)
"""


@pytest.mark.parametrize("interrupted", ["gc.callbacks.append(interrupt); gc.collect()", "Finalized()", "interrupt()"])
def test_an_interrupt_is_not_dropped(interrupted):
    program = PROGRAM.format(interrupted=interrupted)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (130, "-c: interrupted\n")


# Interrupts itself when the script begins to import a module.
IMPORTING = """
import builtins, os, runpy, signal, sys
real = builtins.__import__
def watched(name, *rest):
    if name == {module!r}:
        os.kill(os.getpid(), signal.SIGINT)
    return real(name, *rest)
builtins.__import__ = watched
sys.argv = {words!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("module", ["tyro", "numpy"])
@pytest.mark.parametrize("words", ["train.py", "sample.py runs/none", "evaluate.py likelihood runs/none"])
def test_an_interrupt_while_a_script_imports_ends_it_without_a_traceback(words, module):
    """Before its options are parsed, and after."""
    script, *rest = words.split()
    program = IMPORTING.format(module=module, words=[str(SCRIPTS / script), *rest])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
