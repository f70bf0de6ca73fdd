"""Stop signals, collected so that work can end in order."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

from ddpm_jax.system.hosts import are_joined, end_all
from ddpm_jax.system.progress import say

# A second one of these ends the process at once; the others come of themselves, from a terminal or a scheduler.
_INSISTENT = (signal.SIGINT, signal.SIGTERM)
_OTHERS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGHUP") if hasattr(signal, name))


@contextlib.contextmanager
def stop_signals(notice: str) -> Iterator[list[int]]:
    """Collects the signals that ask for an end, so that a loop can stop between two steps.

    These are SIGINT, SIGTERM and, where they exist, SIGUSR1 (a scheduler's warning) and SIGHUP (the terminal is gone;
    not under nohup). A second SIGINT or SIGTERM ends the process at once.

    Outside the main thread, where Python allows no signal handlers, nothing is collected.

    Args:
      notice: shown when the first signal arrives.

    Yields:
      the numbers of the signals received so far.
    """
    received: list[int] = []
    terminals = _terminals()  # once a terminal is gone, it is not recognized as one

    def note(number: int, frame: object) -> None:
        del frame
        if number in _INSISTENT and any(each in _INSISTENT for each in received):
            if are_joined():
                end_all("stopped by a second signal without saving", 128 + number)
            os._exit(128 + number)
        received.append(number)
        if signal.Signals(number).name == "SIGHUP":
            _silence(terminals)
        if len(received) == 1:
            say(notice)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    stops = [*_INSISTENT, *(number for number in _OTHERS if signal.getsignal(number) != signal.SIG_IGN)]
    before = {number: signal.signal(number, note) for number in stops}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _terminals() -> list[int]:
    """Lists the file descriptors of the output that are terminals."""
    found = []
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # not a file, or closed
            if os.isatty(stream.fileno()):
                found.append(stream.fileno())
    return found


def _silence(terminals: list[int]) -> None:
    """Redirects the output to terminals that are gone, where every write would fail."""
    for terminal in terminals:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, terminal)
        os.close(null)
