"""How a script ends: one clear line and a status for every kind of failure."""

import contextlib
import errno
import io
import os
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from ddpm_jax.system import interrupts
from ddpm_jax.system.errors import Stopped, UserError, printable


def exit_at_once(status: int) -> NoReturn:
    """Ends the process like `sys.exit`, but without waiting for threads.

    For a script that trains: threads of Orbax can keep the interpreter from exiting after a failed save.
    """
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


@contextlib.contextmanager
def advice_for_memory(what: str, advice: str) -> Iterator[None]:
    """Turns running out of memory into an error that says what to change.

    Args:
      what: does not fit, such as "a batch of 128 images".
      advice: which options make it smaller.

    Raises:
      UserError: the memory of a device or of the machine does not suffice, to compile or to run.
    """
    try:
        yield
    except UserError:  # says itself what is wrong, such as a full disk
        raise
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        raise UserError(f"out of memory{_bytes(error)}: {what} does not fit: {advice}") from error


def run_script(main: Callable[[], int | None], *, give_up: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
    """Runs a script's `main` and ends the process.

    ========================  ======================================================  ================
    `main`                    output                                                  status
    ========================  ======================================================  ================
    returns a status or None  nothing                                                 it, or 0
    raises `UserError`        one line on stderr: `NAME: error: LINE`                 2
    fails on a file           one line on stderr that names it                        2
    has too little memory     one line on stderr                                      2
    has no such device        one line on stderr                                      2
    raises `Stopped`          one line on stderr                                      128 + the signal
    is interrupted by Ctrl-C  one line on stderr                                      130
    writes to a closed pipe   nothing (as in `train.py --help | head`)                141
    raises another exception  its traceback: a bug in this program                    1
    ========================  ======================================================  ================

    Characters that the terminal cannot show are escaped; a closed stdin, stdout or stderr is as if it were /dev/null.

    Args:
      main: the whole script; it reads `sys.argv` itself.
      give_up: ends the process after a user error (status 2): `sys.exit` or `exit_at_once`.

    Raises:
      SystemExit: always, unless `give_up` ends the process.
    """
    program = Path(sys.argv[0]).name
    status: Any
    line = ""
    _prepare_streams()
    try:
        try:
            with interrupts.raised():
                status = main() or 0
        except SystemExit as ending:
            status = ending.code
        sys.stdout.flush()
    except UserError as error:
        hosts = _joined()
        line = hosts.LOST if hosts and hosts.is_loss_of_a_host(error) else _one_line(error)
        print(f"{program}: error: {line}", file=sys.stderr)
        status = 2
    except Stopped as stop:
        print(f"{program}: {_one_line(stop)}", file=sys.stderr)
        status = 128 + stop.signal_number
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        line, status = "interrupted", 130
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit, and would report the error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except Exception as error:
        hosts = _joined()
        line = hosts.LOST if hosts and hosts.is_loss_of_a_host(error) else _line_of(error)
        if not line and not hosts:
            raise
        if line:
            status = 2
            print(f"{program}: error: {line}", file=sys.stderr)
        else:
            traceback.print_exc()
            line, status = f"{type(error).__name__}: {_one_line(error)}", 1
    if (line or status in (1, 2)) and (hosts := _joined()):
        hosts.end_all(line, status)
    if status == 2:
        give_up(status)
    sys.exit(status)


def _joined() -> types.ModuleType | None:
    """Returns `system.hosts`, if this process has joined others; it needs JAX, so it is not imported for that."""
    hosts = sys.modules.get("ddpm_jax.system.hosts")
    return hosts if hosts is not None and hosts.are_joined() else None


def _prepare_streams() -> None:
    # Else the next file that is opened would take the place of a closed stream, and get what is printed.
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(opened)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _line_of(error: BaseException) -> str:
    """Returns the line for an error that the machine or the user causes; "" for a bug."""
    if _is_out_of_memory(error):
        return f"out of memory{_bytes(error)}: use a smaller batch, or close other programs"
    if _is_without_device(error):
        asked = f" for JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}" if os.environ.get("JAX_PLATFORMS") else ""
        reason = f" ({_one_line(error).partition(' (set ')[0]})" if str(error) else ""
        return f'no device{asked}{reason}: pip install "jax[cuda13]" for NVIDIA GPUs, or set JAX_PLATFORMS=cpu'
    if isinstance(error, PermissionError) and error.filename is not None:
        return f"no permission for {printable(error.filename)}"
    if isinstance(error, OSError) and error.strerror and (error.filename is not None or error.errno in _REMEDIES):
        where = "" if error.filename is None else f"{printable(error.filename):.200}: "
        remedy = _REMEDIES.get(error.errno, "") if error.filename is None or error.errno != errno.ENOENT else ""
        return f"{where}{error.strerror}{remedy and ': '}{remedy}"
    return ""


_REMEDIES: dict[int | None, str] = {
    errno.ENAMETOOLONG: "use a shorter name, with --out or --workdir",
    errno.ENOSPC: "free some space, and run the same command to resume",
    errno.EDQUOT: "free some space, and run the same command to resume",
    errno.EROFS: "use a folder on another disk",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs",
    errno.EIO: "check the disk",
    errno.ENOENT: "the current folder, or the one that TMPDIR names, may be gone",
}


def _is_out_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        told = f"{type(error).__name__}: {error}"
        if "os_error_code" in told:  # TensorStore calls a full disk an exhausted resource, too
            return False
        if isinstance(error, MemoryError) or re.search(r"RESOURCE_EXHAUSTED|OUT_OF_MEMORY|XlaRuntime.*bad_alloc", told):
            return True
        error = error.__cause__
    return False


def _bytes(error: BaseException) -> str:
    """Returns how much was asked for, as far as the error tells."""
    found = re.search(r"allocat\w+ (\d+)(?: bytes|\.)", str(error))
    return f" ({int(found[1]) / 2**30:,.1f} GiB asked for at once)" if found else ""


def _is_without_device(error: BaseException) -> bool:
    """Returns whether JAX found no device; in some of its versions that is an assertion without words."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    if "Unable to initialize backend" in str(error):
        return True
    raised_in = "" if frame is None else frame.tb_frame.f_code.co_filename
    return isinstance(error, (RuntimeError, AssertionError)) and raised_in.endswith("xla_bridge.py")


def _one_line(error: BaseException) -> str:
    return printable(" ".join(str(error).splitlines()))
