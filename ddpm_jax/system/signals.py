"""Stop signals, collected so that work can end in order."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from ddpm_jax.system.hosts import are_joined, end_all
from ddpm_jax.system.progress import say

_STOPS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stop_signals(notice: str) -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that a loop can stop between two steps; a second one ends the process at once.

    Outside the main thread, where Python allows no signal handlers, nothing is collected.

    Args:
      notice: shown when the first signal arrives.

    Yields:
      the numbers of the signals received so far.
    """
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        del frame
        if received:
            if are_joined():
                end_all("stopped by a second signal without saving", 128 + number)
            os._exit(128 + number)
        received.append(number)
        say(notice)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, note) for number in _STOPS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
