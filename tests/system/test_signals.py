"""Signals that ask for an end are collected; only a second request of a user ends the process at once."""

import os
import signal
import subprocess
import sys

from ddpm_jax.system.signals import stop_signals


def test_what_a_terminal_and_a_scheduler_send_is_collected_and_never_insists(capsys):
    before = signal.getsignal(signal.SIGHUP)
    with stop_signals("stopping") as received:
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
    assert received == [signal.SIGHUP, signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM]
    assert capsys.readouterr().err == "stopping\n"
    assert signal.getsignal(signal.SIGHUP) is before


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals("stopping") as received:
            os.kill(os.getpid(), signal.SIGHUP)
        assert received == []
    finally:
        signal.signal(signal.SIGHUP, before)


PROGRAM = """
import os, signal, sys
from ddpm_jax.system.progress import say
from ddpm_jax.system.signals import stop_signals
ours, terminal = os.openpty()
for stream in (sys.stdout, sys.stderr):
    os.dup2(terminal, stream.fileno())
with stop_signals("stopping") as received:
    os.close(ours)  # the terminal is gone: every write to it fails
    os.kill(os.getpid(), signal.SIGHUP)
    say("a line that nobody sees")
sys.exit(received != [signal.SIGHUP])
"""


def test_a_terminal_that_is_gone_does_not_end_the_work():
    assert subprocess.run([sys.executable, "-c", PROGRAM]).returncode == 0
