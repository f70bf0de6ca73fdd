"""Options of scripts that run on many hosts. Parsed before JAX is imported."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Many hosts; on TPU pods, under srun and under mpirun these are detected automatically."""

    coordinator: str = ""
    """HOST:PORT of host 0, the same on every host; any free port."""
    count: int = 0
    """Number of hosts; 1: this host alone, even where more are detected."""
    index: int | None = None
    """Index of this host, 0 to count - 1."""
    timeout: int = 300
    """Seconds to wait until all hosts have joined."""
    silence: int = 60
    """If a host is silent for this many seconds, the others exit with an error."""
