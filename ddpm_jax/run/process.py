"""The process of a script: what it sets before it computes. A caller of the library sets these things itself."""

from ddpm_jax.run.checkpoints import silence_orbax
from ddpm_jax.system.compilation_cache import use_compilation_cache
from ddpm_jax.system.cpu import Work, set_devices, set_flags
from ddpm_jax.system.environment import fix_options
from ddpm_jax.system.host_options import Hosts
from ddpm_jax.system.hosts import join


def prepare(work: Work) -> None:
    """Sets what a script computes with: JAX's options, XLA's flags, and where compiled programs are kept."""
    fix_options()
    silence_orbax()
    set_flags(work)
    use_compilation_cache()


def choose_devices(hosts: Hosts, work: Work, images: int, *, asked: int = 0) -> None:
    """Joins the hosts, or shares out the cores of a single one; before anything touches a device.

    Args:
      hosts: as given on the command line.
      work: of this process.
      images: at once, over all devices.
      asked: number of devices; 0: as measured.

    Raises:
      UserError: as `join`.
    """
    if not join(hosts):
        set_devices(work, images, asked=asked)
