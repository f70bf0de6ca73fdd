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


# Interrupts itself when the script begins to import NumPy.
IMPORTING = """
import builtins, os, runpy, signal, sys
real = builtins.__import__
def watched(name, *rest):
    if name == "numpy":
        os.kill(os.getpid(), signal.SIGINT)
    return real(name, *rest)
builtins.__import__ = watched
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py"])
def test_an_interrupt_while_a_script_imports_ends_it_without_a_traceback(script):
    program = IMPORTING.format(script=str(SCRIPTS / script))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
