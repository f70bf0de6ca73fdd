"""Many hosts: how their processes find each other, agree, and end together.

Built on `jax.distributed`. Every host runs the same program; the primary one, host 0, writes and prints.
"""

import atexit
import collections
import contextlib
import functools
import importlib.util
import os
import re
import secrets
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from numpy.typing import ArrayLike

from ddpm_jax.system.errors import UserError
from ddpm_jax.system.host_options import Hosts
from ddpm_jax.system.mesh import batch_sharding, make_mesh, replicated
from ddpm_jax.system.progress import be_silent

_LONGEST_LINE = 1000
_MOST_AXES = 4
_SECONDS_TO_APPEAR = 60


def check(hosts: Hosts) -> None:
    """Checks that the options for hosts are consistent.

    Raises:
      UserError: they are not.
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
    """Returns what started this process as one of several: "slurm", "ompi", "tpu" or ""."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        return "slurm"
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE") or 1) > 1:
        return "ompi"
    wanted = "tpu" in (os.environ.get("JAX_PLATFORMS") or "tpu")
    chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return "tpu" if wanted and chips and importlib.util.find_spec("libtpu") else ""


def join(hosts: Hosts) -> bool:
    """Joins the hosts, before anything touches a device; from then on only the primary host prints.

    The process exits with status 2 if not all hosts join in time.

    Args:
      hosts: as given on the command line.

    Returns:
      whether there are hosts to join; if not, no device was touched.

    Raises:
      UserError: the options are inconsistent, or the hosts cannot be joined.
    """
    check(hosts)
    found = "" if hosts.count else launcher()
    if not hosts.coordinator and not found:
        return False
    where = hosts.coordinator or f"the coordinator that {found} names"
    number = hosts.count or "all"

    def give_up() -> None:
        _leave(f"not all of {number} hosts joined {where} within {hosts.timeout} s: start each with its own index", 2)

    watch = threading.Timer(hosts.timeout, give_up)
    watch.daemon = True
    watch.start()
    # The library ends a process too, with a page of addresses: later than we do.
    initialize = functools.partial(
        jax.distributed.initialize,
        initialization_timeout=hosts.timeout + 60,
        heartbeat_timeout_seconds=hosts.silence + 60,
    )
    try:
        if hosts.coordinator:
            # The options take precedence over a launcher.
            initialize(hosts.coordinator, hosts.count, hosts.index, cluster_detection_method="deactivate")
        elif found == "tpu":
            with contextlib.suppress(ValueError):  # a single host with TPUs
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
        _connect(hosts)
    return True


def are_joined() -> bool:
    """Returns whether this process is one of several; touches no device."""
    return jax.distributed.is_initialized()


def is_primary_host() -> bool:
    """Returns whether this host is the one that writes and prints."""
    return jax.process_index() == 0


def barrier(where: str) -> None:
    """Waits until all hosts reach the same place in the program, which they do at about the same time."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def wait_for_all(where: str) -> None:
    """Waits until all hosts reach the same place in the program, however long it takes one of them.

    By the connections of the hosts: where they have no accelerators, jax gives up a `barrier` after half an hour.
    """
    if not _meeting.is_open:
        barrier(where)
        return
    _meeting.number += 1
    if is_primary_host():
        _meeting.wait_until(lambda: _meeting.arrived[_meeting.number] == jax.process_count() - 1)
        _tell(f"{_GO_ON} {_meeting.number}")
    else:
        _tell(f"{_ARRIVED} {_meeting.number}")
        _meeting.wait_until(lambda: _meeting.released >= _meeting.number)


def first_line(line: str) -> str:
    """Returns the same line on all hosts: that of the first host that has one.

    Args:
      line: this host's line, or "".

    Returns:
      the line; "" if no host has one.
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


def of_primary_host(numbers: ArrayLike) -> np.ndarray:
    """Returns the primary host's integers, in its shape, on all hosts; each host calls it with its own."""
    mine = np.asarray(numbers, np.int64)
    if jax.process_count() == 1:
        return mine
    # As words of 32 bits: JAX drops the upper half of longer ones. The other hosts do not know the shape.
    words = lambda array: np.asarray(array, np.int64).reshape(-1).view(np.int32)
    shape = np.full(_MOST_AXES, -1)
    shape[: mine.ndim] = mine.shape
    sent = lambda array: np.asarray(multihost_utils.broadcast_one_to_all(words(array))).view(np.int64)
    shape = sent(shape)
    shape = shape[shape >= 0]
    return sent(mine if is_primary_host() else np.zeros(shape)).reshape(shape) if shape.all() else np.zeros(shape, int)


def check_same(described: str) -> None:
    """Checks that a description of what is to be done is the same on all hosts.

    Raises:
      UserError: on the primary host, which ends the others, if it is not.
    """
    if jax.process_count() == 1:
        return
    crcs = multihost_utils.process_allgather(np.uint32(zlib.crc32(described.encode())))
    different = [str(host) for host, crc in enumerate(crcs) if crc != crcs[0]]
    if different and not is_primary_host():
        wait_for_all("the primary host ends this one")  # one line is printed, not two
    if different:
        raise UserError(
            f"host {', '.join(different)} was started with other options than host 0, or reads other files: start "
            "every host with the same command"
        )


def check_shared_folder(folder: Path) -> None:
    """Checks that all hosts see one and the same folder: a file that the primary host puts there for a moment.

    Raises:
      UserError: a host does not see it within a minute.
    """
    if jax.process_count() == 1:
        return
    file = folder / f".shared_{first_line(secrets.token_hex(8) if is_primary_host() else '')}"
    try:
        if is_primary_host():
            file.touch()
        barrier("the shared file is there")
        if not appears(file.exists):
            raise UserError(
                f"{folder} of host 0 is not visible from host {jax.process_index()}: it must be on a disk that all "
                "share"
            )
        barrier("the shared file is seen")
    finally:
        if is_primary_host():
            file.unlink(missing_ok=True)


def appears(seen: Callable[[], bool]) -> bool:
    """Waits up to a minute for what another host has written: a network file system may show it that much later."""
    until = time.monotonic() + _SECONDS_TO_APPEAR
    while not (found := seen()) and time.monotonic() < until:
        time.sleep(1)
    return found


class Agreement:
    """The maximum over hosts of small numbers that each gives at every step, known to all `lag` steps later.

    Because of the lag nothing waits for it.
    """

    def __init__(self, numbers: int, *, lag: int):
        """Compiles the program.

        Args:
          numbers: how many numbers there are.
          lag: the number of steps until they are known; on a single host there is no lag.
        """
        self._lag, self._nothing = lag, (0,) * numbers
        self._pending: collections.deque[jax.Array] = collections.deque()
        self._alone = jax.process_count() == 1
        if not self._alone:
            mesh = make_mesh()
            self._shape, self._places = (mesh.size, numbers), batch_sharding(mesh)
            self._largest = jax.jit(lambda said: jnp.max(said, axis=0), out_shardings=replicated(mesh))

    def __call__(self, said: Sequence[int]) -> tuple[int, ...]:
        """Takes numbers >= 0; returns the maximum over hosts of each, as of `lag` calls ago."""
        if self._alone:
            return tuple(said)
        mine = np.broadcast_to(np.asarray(said, np.int32), self._shape)
        self._pending.append(self._largest(jax.make_array_from_callback(mine.shape, self._places, mine.__getitem__)))
        if len(self._pending) <= self._lag:
            return self._nothing
        return tuple(np.asarray(self._pending.popleft()).tolist())


class _Meeting:
    """Where hosts wait for each other by their connections."""

    def __init__(self) -> None:
        self.is_open = False
        self.number = self.released = 0
        self.arrived: collections.Counter[int] = collections.Counter()
        self._changed = threading.Condition()

    def wait_until(self, happened: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(happened)

    def take(self, words: str) -> bool:
        """Takes what another host says, if it is about meetings; returns whether it is."""
        word, _, number = words.partition(" ")
        with self._changed:
            if word == _ARRIVED:
                self.arrived[int(number)] += 1
            elif word == _GO_ON:
                self.released = int(number)
            self._changed.notify_all()
        return word in (_ARRIVED, _GO_ON)


_ARRIVED, _GO_ON = "arrived", "go-on"
_meeting = _Meeting()

# How hosts end: each keeps a connection to the primary host, which passes on why one of them ends.


def end_all(line: str, status: int) -> NoReturn:
    """Ends this process and those of all other hosts, which would wait for this one forever.

    Args:
      line: the reason, printed by the others.
      status: of all processes, not 0.
    """
    _tell(f"{status} host {jax.process_index()}: {line}")
    _leave("", status, after=_SECONDS_TO_BE_READ)


def _connect(hosts: Hosts) -> None:
    """Connects this host with the primary one, by TCP."""
    said = ""
    if is_primary_host():
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        server = socket.create_server(("", 0), family=family, dualstack_ipv6=dual)
        name = hosts.coordinator.rpartition(":")[0].strip("[]") or socket.gethostname()
        said = f"{name} {server.getsockname()[1]} {secrets.token_hex(8)}"
    name, port, key = first_line(said).split()
    if is_primary_host():
        _start(_accept, server, key, hosts.silence)
    else:
        try:
            link = socket.create_connection((name, int(port)), timeout=hosts.silence)
            link.sendall(f"{key} {jax.process_index()}\n".encode())
        except OSError as error:
            print(
                f"warning: host {jax.process_index()} cannot connect to {name}:{port} ({error}): the failure of a host "
                "will be noticed late",
                file=sys.stderr,
            )
        else:
            _links.append(link)
            _start(_listen, link.makefile(errors="replace"), 0, hosts.silence)
    is_connected = is_primary_host() or bool(_links)
    _meeting.is_open = bool(multihost_utils.process_allgather(np.int32(is_connected)).all())
    if is_connected:
        _start(_give_signs_of_life)
        atexit.register(_tell, _GOODBYE)


def _start(function: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=function, args=arguments, daemon=True).start()


def _accept(server: socket.socket, key: str, silence: int) -> None:
    """Accepts the connections of the other hosts."""

    def greet(link: socket.socket) -> None:
        lines = link.makefile(errors="replace")
        with contextlib.suppress(OSError):  # a stranger, such as a port scanner
            greeting, _, host = lines.readline(100).strip().partition(" ")
            if greeting == key:
                _links.append(link)
                _listen(lines, int(host), silence)

    while True:
        link, _ = server.accept()
        link.settimeout(silence)
        _start(greet, link)


def _tell(words: str) -> None:
    """Sends words to the hosts that this one is connected with."""
    for link in _links:
        with contextlib.suppress(OSError):  # it is gone
            link.sendall(f"{words}\n".encode())


def _give_signs_of_life() -> None:
    while True:
        time.sleep(1)
        _tell("")


def _listen(lines: Iterable[str], host: int, silence: int) -> None:
    """Ends this process when a host sends its last words, is gone, or is silent for too long."""
    words = f"2 {LOST}"
    try:
        for line in lines:
            if line.strip() == _GOODBYE:
                return
            if line.strip() and not _meeting.take(line.strip()):
                words = line.strip()
                break
    except TimeoutError:
        words = f"2 no sign of life from host {host} for {silence} s: {_RESUME}"
    except OSError:
        pass
    _tell(words)
    status, _, line = words.partition(" ")
    # The primary host waits until others have read its words; between two hosts the other one has ended already, and
    # every moment more is one in which the library may abort this process.
    others = is_primary_host() and len(_links) > 1
    _leave(line, int(status), after=_SECONDS_TO_BE_READ if others else 0.0)


def is_loss_of_a_host(error: BaseException | None) -> bool:
    """Returns whether an error, or its cause, is that another host is no longer reachable."""
    while error is not None:
        if re.search(r"Gloo .*(closed|reset|timed out)|UNAVAILABLE|coordination service", str(error), re.IGNORECASE):
            return True
        error = error.__cause__ or error.__context__
    return False


_RESUME = "start all hosts again; they resume from what was saved"
LOST = f"another host is gone: {_RESUME}"
"""The error message where `is_loss_of_a_host`."""

_GOODBYE = "goodbye"
_SECONDS_TO_BE_READ = 2.0
_links: list[socket.socket] = []
_leaving = threading.Lock()


def _leave(line: str, status: int, *, after: float = 0.0) -> NoReturn:
    """Ends this process at once: at an ordinary exit jax would wait for the other hosts."""
    _leaving.acquire()  # never released: one line is printed
    if line:
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if after:
        time.sleep(after)
    os._exit(status)
