"""Many hosts: how their processes find each other, agree, and end together.

`jax.distributed` does the work. Every host runs the same program; the first one, host 0, writes and prints.
"""

import atexit
import collections
import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from ddpm_jax.system.errors import UserError
from ddpm_jax.system.mesh import batch_sharding, make_mesh, replicated
from ddpm_jax.system.progress import be_silent

# Where a host says why it ends, and how often the others look.
_LAST_WORDS = "ddpm_jax/last_words"
_SIGNS_OF_LIFE = "ddpm_jax/alive"
_LONGEST_LINE = 1000
_LISTENING_MS = 1000
_SECONDS_TO_BE_READ = 2.0


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Which of many hosts this is; on TPU pods, under srun and under mpirun it is found out, with nothing given."""

    coordinator: str = ""
    """HOST:PORT of host 0, the same on every host; any free port."""
    count: int = 0
    """How many hosts; 1: this one alone, also where more are found."""
    index: int | None = None
    """Which of them this one is, 0 to count - 1."""
    timeout: int = 300
    """Seconds to wait for all hosts to come together."""
    silence: int = 60
    """Seconds without a sign of life after which a host counts as gone, and the others end."""


def check(hosts: Hosts) -> None:
    """Checks that what is given of the hosts goes together.

    Raises:
      UserError: it does not.
    """
    if hosts.timeout < 1:
        raise UserError(f"--hosts.timeout must be at least 1 second, not {hosts.timeout}")
    if hosts.silence < 5:
        raise UserError(f"--hosts.silence must be at least 5 seconds, not {hosts.silence}")
    if hosts.count < 0:
        raise UserError(f"--hosts.count must be at least 1, not {hosts.count}")
    if hosts.count in (0, 1) and not hosts.coordinator and hosts.index is None:
        return
    if not hosts.coordinator or hosts.count < 2 or hosts.index is None:
        raise UserError(
            "many hosts need --hosts.coordinator HOST:PORT, --hosts.count N (2 or more) and --hosts.index I together: "
            f"given are coordinator {hosts.coordinator or 'none'}, count {hosts.count or 'none'}, index "
            f"{'none' if hosts.index is None else hosts.index}"
        )
    if not 0 <= hosts.index < hosts.count:
        raise UserError(f"--hosts.index must be in 0 to {hosts.count - 1}, not {hosts.index}")
    name, _, port = hosts.coordinator.rpartition(":")
    if not name or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--hosts.coordinator must be HOST:PORT, such as 10.0.0.1:8476, not {hosts.coordinator}")


def launcher() -> str:
    """Says what started this process as one of several: slurm, ompi, tpu, or nothing."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        return "slurm"
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE") or 1) > 1:
        return "ompi"
    wanted = "tpu" in (os.environ.get("JAX_PLATFORMS") or "tpu")
    chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return "tpu" if wanted and chips and importlib.util.find_spec("libtpu") else ""


def join(hosts: Hosts) -> None:
    """Joins the hosts; to be called before anything touches a device. After it, hosts but the first say nothing.

    Args:
      hosts: as given on the command line.

    Raises:
      UserError: what is given does not go together, or the hosts cannot be joined.
      SystemExit: with status 2, not all hosts came within the time.
    """
    check(hosts)
    found = "" if hosts.count else launcher()
    if not hosts.coordinator and not found:
        return
    where = hosts.coordinator or f"the coordinator that {found} names"
    number = hosts.count or "all"

    def give_up() -> None:
        _leave(f"not all of {number} hosts came to {where} within {hosts.timeout} s: start each with its own index", 2)

    watch = threading.Timer(hosts.timeout, give_up)
    watch.daemon = True
    watch.start()
    # Later than we do the library ends a process as well, with a page of addresses.
    initialize = functools.partial(
        jax.distributed.initialize,
        initialization_timeout=hosts.timeout + 60,
        heartbeat_timeout_seconds=hosts.silence + 60,
    )
    try:
        if hosts.coordinator:
            # What is given counts, not what a launcher says.
            initialize(hosts.coordinator, hosts.count, hosts.index, cluster_detection_method="deactivate")
        elif found == "tpu":
            with contextlib.suppress(ValueError):  # a single host with TPUs, of no cluster
                initialize()
        else:
            initialize(cluster_detection_method=found)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot join the hosts at {where}: {' '.join(str(error).split())[:200]}") from error
    finally:
        watch.cancel()
    if jax.process_count() > 1:
        if not is_primary_host():
            be_silent()
        listener = threading.Thread(target=_listen, args=(hosts.silence,), daemon=True)
        listener.start()

        @atexit.register
        def stop_listening() -> None:
            _ended.set()
            listener.join()  # a thread that is still in the library when the interpreter goes would crash it


def are_joined() -> bool:
    """Says whether this process is one of several; touches no device."""
    return _client() is not None


def is_primary_host() -> bool:
    """Says whether this host is the one that writes and prints."""
    return jax.process_index() == 0


def barrier(where: str) -> None:
    """Waits until all hosts are at the same place of the program."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def first_line(line: str) -> str:
    """Gives all hosts what the first host that says anything says.

    Args:
      line: what this host says; "" for nothing.

    Returns:
      the line of the first host with one, "" if none has.
    """
    if jax.process_count() == 1:
        return line
    said = np.zeros(_LONGEST_LINE, np.uint8)
    words = np.frombuffer(line.encode()[:_LONGEST_LINE], np.uint8)
    said[: len(words)] = words
    for each in multihost_utils.process_allgather(said):
        if each.any():
            return bytes(each).rstrip(b"\0").decode(errors="ignore")
    return ""


class Agreement:
    """Small numbers that each host says at every step, and the largest of which all learn alike a few steps later.

    It costs no waiting: what is learnt at a step was sent `lag` steps before.
    """

    def __init__(self, numbers: int, *, lag: int):
        """Makes the program.

        Args:
          numbers: how many are said.
          lag: how many steps later they are learnt; none on a single host.
        """
        self._lag, self._nothing = lag, (0,) * numbers
        self._pending: collections.deque[jax.Array] = collections.deque()
        self._alone = jax.process_count() == 1
        if not self._alone:
            mesh = make_mesh()
            self._shape, self._places = (mesh.size, numbers), batch_sharding(mesh)
            self._largest = jax.jit(lambda said: jnp.max(said, axis=0), out_shardings=replicated(mesh))

    def __call__(self, said: Sequence[int]) -> tuple[int, ...]:
        """Says numbers >= 0; gives the largest that any host said of each, `lag` calls ago."""
        if self._alone:
            return tuple(said)
        mine = np.broadcast_to(np.asarray(said, np.int32), self._shape)
        self._pending.append(self._largest(jax.make_array_from_callback(mine.shape, self._places, mine.__getitem__)))
        if len(self._pending) <= self._lag:
            return self._nothing
        return tuple(np.asarray(self._pending.popleft()).tolist())


# How hosts end


def end_all(line: str, status: int) -> NoReturn:
    """Ends this process and all others: they would wait for this one for ever.

    Args:
      line: why, for the others to say.
      status: of the process, not 0.
    """
    with contextlib.suppress(Exception):  # another host was faster
        _client().key_value_set(_LAST_WORDS, f"{status} host {jax.process_index()}: {line}")
    # The first host carries the words: it stays until they are heard.
    _leave("", status, after=_SECONDS_TO_BE_READ)


def _listen(silence: int) -> None:
    """Gives signs of life, and ends this process when another host has said its last words, or nothing for long."""
    here = jax.process_index()
    heard = {each: ("", time.monotonic()) for each in range(jax.process_count()) if each != here}
    while not _ended.is_set():
        with contextlib.suppress(Exception):  # host 0, which answers, may be gone
            _client().key_value_increment(f"{_SIGNS_OF_LIFE}/{here}", 1)
        for each, (sign, _) in heard.items():
            with contextlib.suppress(Exception):  # none was given yet
                if (new := _client().key_value_try_get(f"{_SIGNS_OF_LIFE}/{each}")) != sign:
                    heard[each] = new, time.monotonic()
        try:
            status, _, line = _client().blocking_key_value_get(_LAST_WORDS, _LISTENING_MS).partition(" ")
        except Exception:  # nothing was said yet
            gone = [each for each, (_, last) in heard.items() if time.monotonic() - last > silence]
            if gone:
                _leave(f"nothing was heard of host {gone[0]} for {silence} s: {_GO_ON}", 2)
            _ended.wait(0.1)
            continue
        if not line.startswith(f"host {here}:"):
            _leave(line, int(status), after=_SECONDS_TO_BE_READ if is_primary_host() else 0.0)
        return


def is_loss_of_a_host(error: BaseException | None) -> bool:
    """Says whether an error, or what caused it, is that another host cannot be reached any more."""
    while error is not None:
        if re.search(r"Gloo .*(closed|reset|timed out)|UNAVAILABLE|coordination service", str(error), re.IGNORECASE):
            return True
        error = error.__cause__ or error.__context__
    return False


_GO_ON = "start all hosts again, they go on from the last checkpoint"
LOST = f"another host is gone: {_GO_ON}"
"""What is said where `is_loss_of_a_host`."""

_ended = threading.Event()
_leaving = threading.Lock()


def _leave(line: str, status: int, *, after: float = 0.0) -> NoReturn:
    """Ends this process at once: what jax does at an ordinary end waits for the other hosts."""
    _leaving.acquire()  # never given back: one line is said
    if line:
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if after:
        threading.Event().wait(after)
    os._exit(status)


def _client():
    """The connection to the coordinator; None for a process alone."""
    from jax._src import distributed  # has no public name

    return distributed.global_state.client
