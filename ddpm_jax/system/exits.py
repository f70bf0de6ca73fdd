"""How a script ends: one clear line and a status for every kind of failure."""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ddpm_jax.system.errors import Stopped, UserError
from ddpm_jax.system.hosts import LOST, are_joined, end_all, is_loss_of_a_host


def exit_at_once(status: int) -> NoReturn:
    """Ends the process like `sys.exit`, but without waiting for threads.

    For a script that trains: threads of Orbax can keep the interpreter from exiting after a failed save.
    """
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def run_script(main: Callable[[], int | None], *, give_up: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
    """Runs a script's `main` and ends the process.

    ========================  ======================================================  ================
    `main`                    output                                                  status
    ========================  ======================================================  ================
    returns a status or None  nothing                                                 it, or 0
    raises `UserError`        one line on stderr: `NAME: error: LINE`                 2
    has no permission         one line on stderr that names the file                  2
    raises `Stopped`          one line on stderr                                      128 + the signal
    is interrupted by Ctrl-C  one line on stderr                                      130
    writes to a closed pipe   nothing (as in `train.py --help | head`)                141
    raises another exception  its traceback: a bug in this program                    1
    ========================  ======================================================  ================

    Args:
      main: the whole script; it reads `sys.argv` itself.
      give_up: ends the process after a user error (status 2): `sys.exit` or `exit_at_once`.

    Raises:
      SystemExit: always, unless `give_up` ends the process.
    """
    program = Path(sys.argv[0]).name
    status: Any
    line = ""
    try:
        try:
            status = main() or 0
        except SystemExit as ending:
            status = ending.code
        sys.stdout.flush()
    except UserError as error:
        line = LOST if are_joined() and is_loss_of_a_host(error) else _one_line(error)
        print(f"{program}: error: {line}", file=sys.stderr)
        status = 2
    except PermissionError as error:
        print(f"{program}: error: no permission for {error.filename}", file=sys.stderr)
        status = 2
    except Stopped as stop:
        print(f"{program}: {_one_line(stop)}", file=sys.stderr)
        status = 128 + stop.signal_number
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit, and would report the error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except Exception as error:
        if not are_joined():
            raise
        if is_loss_of_a_host(error):
            line, status = LOST, 2
            print(f"{program}: error: {line}", file=sys.stderr)
        else:
            traceback.print_exc()
            line, status = f"{type(error).__name__}: {_one_line(error)}", 1
    if status in (1, 2) and are_joined():
        end_all(line, status)
    if status == 2:
        give_up(status)
    sys.exit(status)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).splitlines())
