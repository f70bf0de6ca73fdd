"""Huge pages for the memory of a script, without which a training step on a CPU spends a quarter of its time on pages.

XLA allocates the temporary memory of a program anew at each call. glibc takes blocks of that size from the system and
gives them back, and the system clears every page of 4 KiB again: 60,000 page faults a step of `fashion_mnist_cpu`. With
pages of 2 MiB there are 400. Milliseconds of a training step with two cores, before and after:

```
fashion_mnist_cpu, 32 images         189    139
emoji32, 32 images                   458    363
width 32, 28 x 28, 64 images         689    497
CIFAR-10's network, 4 images         553    484
```

glibc reads `GLIBC_TUNABLES` when a process starts, so the script starts itself anew, once. Its `mallopt` could keep the
memory instead, but that takes twice as much, and where programs were compiled in the same process, steps of the digits
take twice as long (docs/results/cpu.md).
"""

import os
import sys
from pathlib import Path

_TUNABLES = "GLIBC_TUNABLES"
_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> None:
    """Starts the script anew with huge pages for malloc, where the system gives them to programs that ask for them.

    It returns where it has nothing to do: in the second process, without glibc, where the system gives them to all
    programs or to none, where the user has set `GLIBC_TUNABLES`, and where the script is not what Python was started
    with, as under `%run` in a notebook. Process number, arguments and the rest of the environment stay.
    """
    started_with_it = sys.orig_argv[-len(sys.argv) :] == sys.argv and Path(sys.argv[0]).is_file()
    if started_with_it and sys.executable and _TUNABLES not in os.environ and _can_ask():
        os.environ[_TUNABLES] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _can_ask() -> bool:
    try:
        return "glibc" in (os.confstr("CS_GNU_LIBC_VERSION") or "") and "[madvise]" in _MODE.read_text()
    except (AttributeError, ValueError, OSError):  # no Linux, another C library, or a kernel without huge pages
        return False
