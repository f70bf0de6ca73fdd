"""Ctrl-C in a script: it ends the script once, wherever it comes. Imports no other package, so that it can come first.

Python raises KeyboardInterrupt wherever the main thread is. In a callback of the garbage collector (JAX has one) or in
a finalizer, the exception is printed and dropped, and the script continues as if nothing had happened.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

# Long enough for the callback that dropped the interrupt to return; if not, it is dropped and sent once more.
_SECONDS_UNTIL_SENT_AGAIN = 0.01


def end_at_once() -> None:
    """Lets Ctrl-C end the process without a traceback while a script still imports what it needs."""
    if _can_be_set():
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Lets Ctrl-C end the process, likewise, within the block: what is raised in an import comes out as another error.

    Nothing changes where `end_at_once` changes nothing.
    """
    if not _can_be_set():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Raises KeyboardInterrupt on Ctrl-C within the block, and again where Python drops it.

    Nothing changes outside the main thread, or where the signal is ignored, as in the background of a shell script.
    """
    if not _can_be_set():
        yield
        return
    report = sys.unraisablehook

    def again(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            report(unraisable)
            return
        main = threading.main_thread().ident
        timer = threading.Timer(_SECONDS_UNTIL_SENT_AGAIN, lambda: signal.pthread_kill(main or 0, signal.SIGINT))
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = report


def _can_be_set() -> bool:
    is_main = threading.current_thread() is threading.main_thread()
    return is_main and signal.getsignal(signal.SIGINT) in (signal.SIG_DFL, signal.default_int_handler)
