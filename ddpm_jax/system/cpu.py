"""How XLA computes where there is only a CPU: with which flags, and with how many devices.

XLA reads both when its backend starts, so a script chooses them once, before. What the user has set wins, each flag by
its name, and where an accelerator may be found nothing is chosen.
"""

import importlib.metadata
import importlib.util
import os
import sys
import typing
from pathlib import Path

import jax

from ddpm_jax.system import environment

Work = typing.Literal["training", "sampling"]
"""Sampling computes no gradients."""

_EIGEN = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"

# By the beginning of jaxlib's version: XLA aborts the process at a flag that it does not know, so a version that was
# not measured gets none. Two cores with AVX-512; of the network of fashion_mnist_cpu in float32:
#
# jaxlib    work                           YNNPACK (default)   Eigen   oneDNN
# 0.10.2    training step, 64 images       2150 ms             1260
#           cifar10's, 4 images            1080                890
#           forward, 64 images             500                 400
# 0.12.0    training step, 32 images       242                 226
#           forward, 64 images             86                  96      75
#
# oneDNN (--xla_cpu_experimental_onednn_custom_call) is not used: programs with it cannot be kept on disk ("bad_alloc"),
# so that every start compiles, and in bfloat16 its gradients of kernels are silently wrong at some shapes.
_FLAGS: dict[str, dict[Work, tuple[str, ...]]] = {
    "0.10.2": {"training": (_EIGEN,), "sampling": (_EIGEN,)},
    "0.12.0": {"training": (_EIGEN,), "sampling": ()},
}

_DEVICES = "--xla_force_host_platform_device_count"
# Of NVIDIA, Google, AMD and Intel, and of Windows below Linux.
_ACCELERATORS = ("nvidia[0-9]*", "accel[0-9]*", "vfio/[0-9]*", "kfd", "dri/renderD*", "dxg")
# More were not measured.
_MOST_DEVICES = 8


def is_alone() -> bool:
    """Returns whether JAX computes on the CPU: it is asked to, or there is no accelerator, or no package for one."""
    if asked := jax.config.values["jax_platforms"]:
        return bool(asked.split(",")[0] == "cpu")
    packages = [*map(importlib.util.find_spec, ("jax_plugins", "libtpu"))]
    if not any(packages) and not importlib.metadata.entry_points(group="jax_plugins"):
        return True
    return sys.platform == "linux" and not any(any(Path("/dev").glob(name)) for name in _ACCELERATORS)


def set_flags(work: Work) -> None:
    """Adds to `XLA_FLAGS` what makes the CPU faster, as measured with this version of jaxlib.

    They are part of what the rounding of numbers depends on: see `environment.rounding`.

    Args:
      work: of this process.
    """
    if not is_alone():
        return
    given = os.environ.get("XLA_FLAGS", "").split()
    names = {_name(flag) for flag in given}
    added = [flag for flag in flags_for(work, importlib.metadata.version("jaxlib")) if _name(flag) not in names]
    if added:
        os.environ["XLA_FLAGS"] = " ".join([*added, *given])


def flags_for(work: Work, version: str) -> tuple[str, ...]:
    """Returns the flags for a version of jaxlib; none for one that was not measured.

    >>> flags_for("training", "99.0")
    ()
    """
    return next((flags[work] for known, flags in _FLAGS.items() if f"{version}.".startswith(f"{known}.")), ())


def _name(flag: str) -> str:
    return flag.partition("=")[0]


def set_devices(work: Work, images: int, *, asked: int = 0) -> None:
    """Shares out the CPU's cores over as many devices as `number_of_devices` finds, unless the user has chosen.

    Args:
      work: of this process.
      images: at once, over all devices.
      asked: number of devices; 0: chosen here.
    """
    chosen = _DEVICES in os.environ.get("XLA_FLAGS", "") or jax.config.values["jax_num_cpu_devices"] > 0
    if is_alone() and not chosen:
        number = asked or number_of_devices(work, images, cores=environment.cores())
        jax.config.update("jax_num_cpu_devices", number)


def number_of_devices(work: Work, images: int, *, cores: int) -> int:
    """Returns on how many devices of one CPU the work is fastest.

    Args:
      work: of the process.
      images: at once, over all devices, >= 1.
      cores: of the CPU, >= 1.

    Returns:
      one for training: two update all parameters twice and add up gradients, which costs the digits 22 % and CIFAR-10's
      network at batch 4 as much, and leaves fashion_mnist_cpu 10 %. One per core for sampling, at most 8, which gains
      9 % with two cores; none without an image.

    >>> [number_of_devices("sampling", 64, cores=cores) for cores in (1, 2, 64)], number_of_devices(
    ...     "training", 64, cores=2
    ... )
    ([1, 2, 8], 1)
    """
    return 1 if work == "training" else max(1, min(cores, images, _MOST_DEVICES))
