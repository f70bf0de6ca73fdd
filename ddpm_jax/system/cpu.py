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
# Of a device in training: between the 2048 of CIFAR-10's network and the 12544 of fashion_mnist_cpu.
_LEAST_PIXELS = 5000


def is_alone() -> bool:
    """Returns whether JAX computes on the CPU: it is asked to, or there is no accelerator, or no package for one."""
    if asked := jax.config.values["jax_platforms"]:
        return bool(asked.split(",")[0] == "cpu")
    if not _has_plugin():
        return True
    return sys.platform == "linux" and not any(any(Path("/dev").glob(name)) for name in _ACCELERATORS)


def _has_plugin() -> bool:
    packages = [*map(importlib.util.find_spec, ("jax_plugins", "libtpu"))]
    return any(packages) or bool(importlib.metadata.entry_points(group="jax_plugins"))


def set_flags(work: Work) -> None:
    """Adds to `XLA_FLAGS` what makes the CPU faster, as measured with this version of jaxlib.

    They are part of what the rounding of numbers depends on: see `environment.rounding`. Where a plug-in
    is installed but no accelerator, JAX is also asked for the CPU.

    Args:
      work: of this process.
    """
    if not is_alone():
        return
    if not jax.config.values["jax_platforms"] and _has_plugin():
        jax.config.update("jax_platforms", "cpu")  # it would look for the accelerator, and print a traceback
    given = _given()
    if given is None:
        return
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


def _given() -> list[str] | None:
    """Returns the user's flags; None if they are in a file, whose name must be all of `XLA_FLAGS`."""
    given = os.environ.get("XLA_FLAGS", "").split()
    return None if given and not given[0].startswith("-") else given


def _name(flag: str) -> str:
    return flag.partition("=")[0]


def set_devices(number: int) -> None:
    """Shares out the CPU's cores over so many devices, unless the user has chosen."""
    given = _given()
    chosen = given is None or _DEVICES in map(_name, given) or jax.config.values["jax_num_cpu_devices"] > 0
    if is_alone() and not chosen:
        jax.config.update("jax_num_cpu_devices", number)


def devices_for_sampling(cores: int) -> int:
    """Returns on how many devices of one CPU sampling is fastest: one per core, at most 8.

    With two cores that gains 9 %. They do not depend on the images, so that a job that grows has the same ones.

    Args:
      cores: of the CPU, >= 1.

    >>> [devices_for_sampling(cores) for cores in (1, 2, 64)]
    [1, 2, 8]
    """
    return min(cores, _MOST_DEVICES)


def devices_for_training(cores: int, *, images: int, pixels: int) -> int:
    """Returns on how many devices of one CPU a step of the U-Net is fastest.

    Each updates all the parameters, and they add up their gradients, while the work that they share grows with the
    pixels; both grow with the square of the network's width. Milliseconds with two cores:

    ```
                                          pixels   one device   two
    digits, 32 images of 8 x 8              2048         27.8   34.0
    CIFAR-10's network, 4 of 32 x 32        4096        890   1090
    fashion_mnist_cpu, 32 of 28 x 28       25088        237    215
    width 32, 64 of 28 x 28, gradient      50176        779    704
    ```

    Args:
      cores: of the CPU, >= 1.
      images: at once, over all devices, >= 1.
      pixels: of an image.

    Returns:
      the most devices, one per core and at most 8, that share the images evenly, if each has at least 5000 pixels, and
      one otherwise.

    >>> [devices_for_training(2, images=images, pixels=pixels) for images, pixels in ((32, 64), (4, 1024))]
    [1, 1]
    >>> [devices_for_training(2, images=images, pixels=784) for images in (32, 64, 33)]
    [2, 2, 1]
    """
    most = max(number for number in range(1, min(cores, _MOST_DEVICES) + 1) if images % number == 0)
    return most if images * pixels >= _LEAST_PIXELS * most else 1
