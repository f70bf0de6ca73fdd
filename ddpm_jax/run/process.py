"""The process of a script: what it sets before it computes. A caller of the library sets these things itself."""

from ddpm_jax.config import Config
from ddpm_jax.run.checkpoints import silence_orbax
from ddpm_jax.system import environment
from ddpm_jax.system.compilation_cache import use_compilation_cache
from ddpm_jax.system.cpu import Work, devices_for_sampling, devices_for_training, set_devices, set_flags
from ddpm_jax.system.environment import fix_options
from ddpm_jax.system.host_options import Hosts
from ddpm_jax.system.hosts import join


def prepare(work: Work) -> None:
    """Sets what a script computes with: JAX's options, XLA's flags, and where compiled programs are kept."""
    fix_options()
    silence_orbax()
    set_flags(work)
    use_compilation_cache()


def choose_devices(hosts: Hosts, trained: Config | None = None) -> None:
    """Joins the hosts, or shares out the cores of a single one; before anything touches a device.

    Args:
      hosts: as given on the command line.
      trained: configuration of the run to train; None: to sample or to evaluate.

    Raises:
      UserError: as `join`.
    """
    if not join(hosts):
        set_devices(_number_of_devices(trained, environment.cores()))


def _number_of_devices(trained: Config | None, cores: int) -> int:
    if trained is None:
        return devices_for_sampling(cores)
    if trained.train.devices or trained.model.network:  # of another network than the U-Net nothing was measured
        return trained.train.devices or 1
    images = trained.train.batch_size // trained.train.grad_accum_steps
    return devices_for_training(cores, images=images, pixels=trained.data.height * trained.data.width)
