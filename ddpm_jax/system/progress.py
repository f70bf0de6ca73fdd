"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
import types
import typing
from collections.abc import Callable

from tqdm import tqdm

from ddpm_jax.system.errors import printable


class Progress:
    """Counts towards a total and shows the count, the speed and the time left.

    The first update counts for neither speed nor time left, because it may have had to wait for a compilation.

    On a terminal it is a bar. Elsewhere (a log file, a pipe) it is a line now and then, and one at the end, however the
    work ends. Use it in a `with` block.

    >>> with Progress(3, unit="image", file=sys.stdout) as progress:
    ...     for loss in (0.3, 0.2, 0.1):
    ...         progress.update(1, loss=loss)
    image: 3/3 images, 100%, elapsed 00:00, ETA 00:00, ... images/s, loss 0.1
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        unit: str = "step",
        description: str = "",
        file: typing.TextIO | None = None,
        seconds_between_lines: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Starts to count.

        Args:
          total: the number of units in all.
          initial: the number done before; they do not count as speed.
          unit: what is counted, in the singular.
          description: what is being done; the unit if empty.
          file: where to write; stderr if None.
          seconds_between_lines: the least time between two lines where there is no terminal.
          clock: returns the time in seconds, for those lines.
        """
        self._file = sys.stderr if file is None else file
        self._total, self._initial, self._done = total, initial, initial
        self._unit, self._description = unit, description or unit
        self._seconds_between_lines, self._clock = seconds_between_lines, clock
        self._numbers: dict[str, str] = {}
        self._start = self._line_time = self._speed_time = clock()
        self._line_done = self._speed_done = initial
        self._closed = False
        self._bar = None
        if self._file.isatty() and not _silent:
            self._bar = tqdm(
                total=total,
                initial=initial,
                unit=f" {unit}",
                desc=description or None,
                file=self._file,
                dynamic_ncols=True,
            )

    def update(self, n: int = 1, **numbers: typing.SupportsFloat) -> None:
        """Counts `n` more units.

        Args:
          n: the number of units.
          numbers: what else to show, such as the loss; each is shown until its next value.
        """
        is_first = self._done == self._initial
        self._done += n
        self._numbers |= {name: f"{float(number):.4g}" for name, number in numbers.items()}
        if self._bar is not None:
            self._bar.set_postfix(self._numbers, refresh=False)
            if is_first:
                self._bar.n = self._bar.last_print_n = self._bar.initial = self._done
                self._bar.last_print_t = time.time()
                self._bar.refresh()
            else:
                self._bar.update(n)
            return
        if is_first:
            self._speed_time, self._speed_done = self._clock(), self._done
        if self._clock() - self._line_time >= self._seconds_between_lines:
            self._write_line()

    def close(self) -> None:
        """Shows the last state; may be called more than once."""
        if self._closed:
            return
        self._closed = True
        if self._bar is not None:
            self._bar.initial = self._initial
            self._bar.close()
        elif self._done != self._line_done:
            self._write_line()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: types.TracebackType | None
    ) -> None:
        self.close()

    def _write_line(self) -> None:
        if _silent:
            return
        now = self._clock()
        # The recent speed: the overall one would include the compilation for long. The last line has the overall one.
        since, at = (self._initial, self._start) if self._closed else (self._speed_done, self._speed_time)
        speed = (self._done - since) / (now - at) if now > at else 0.0
        left = tqdm.format_interval((self._total - self._done) / speed) if speed > 0 else "?"
        shown = f"{speed:.3g}" if speed > 0 else "?"
        share = f", {100 * self._done / self._total:.0f}%" if self._total else ""
        line = (
            f"{self._description}: {self._done}/{self._total} {self._unit}s{share}, "
            f"elapsed {tqdm.format_interval(now - self._start)}, ETA {left}, {shown} {self._unit}s/s"
        )
        self._line_time, self._line_done = self._speed_time, self._speed_done = now, self._done
        print(
            ", ".join([line, *(f"{name} {number}" for name, number in self._numbers.items())]),
            file=self._file,
            flush=True,
        )


_silent = False


def be_silent() -> None:
    """Silences `say`, `report` and `Progress` in this process: of many hosts only the primary one prints."""
    global _silent
    _silent = True


def say(line: str) -> None:
    """Prints a line to stderr, above the progress bar if there is one; names in it are escaped as by `printable`."""
    if not _silent:
        tqdm.write(_escaped(line), file=sys.stderr)


def report(line: object) -> None:
    """Prints a result to stdout, likewise."""
    if not _silent:
        print(_escaped(line), flush=True)


def _escaped(text: object) -> str:
    return "\n".join(map(printable, str(text).split("\n")))
