"""Accelerators that are not there: what their compilers need to know of them, as devices to compile for."""

import fnmatch
import importlib.metadata
import math
import os
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from ddpm_jax.system.accelerators import find_accelerator
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.gpu_targets import GPU_TARGETS, target_config

# The slices that can be had, chips along each axis.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
SLICES = {
    "v2": ("2x2", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v3": ("2x2", "4x4", "4x8", "8x8", "8x16", "16x16", "16x32", "32x32"),
    "v4": _CUBES,
    "v5e": _FLAT,
    "v5p": _CUBES,
    "v6e": _FLAT,
}
"""The known slices of each TPU version."""

_GPUS_PER_HOST = 8
# By default JAX reserves this much of a GPU's memory at its start.
_GPU_SHARE = 0.75
_SHARE_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


class Topology(typing.NamedTuple):
    """Devices to compile for."""

    name: str
    """As it was asked for, such as "v5e:2x4" or "h100:8"."""
    devices: tuple[jax.Device, ...]
    """The devices of all hosts: they can be compiled for, and hold nothing."""
    per_host: int
    """Number of devices of one host."""
    chip: str
    """What the devices are of, in words."""
    memory: int
    """Bytes of memory of one device that a program can use."""
    share: str
    """Why that is less than all of its memory; "" if it is not."""
    tflops: Mapping[str, float]
    """Peak of one device, 10^12 operations per second, by the products: "bfloat16", and "float32" by
    `train.matmul_precision`: "float32", "float32, high" and "float32, highest"."""
    gigabytes_per_second: float
    """Bandwidth of one device's memory."""
    platform: typing.Literal["tpu", "gpu"]
    compiler_options: dict[str, Any]
    """What the compiler is told of a device that is not there."""

    @property
    def one_host(self) -> tuple[jax.Device, ...]:
        """The devices of one host."""
        host = self.devices[0].process_index
        return tuple(device for device in self.devices if device.process_index == host)[: self.per_host]


def find_topology(name: str) -> Topology:
    """Returns the devices of a slice of TPUs or of some GPUs, from their compiler's plug-in; none needs to be there.

    JAX itself stays on the CPU: call it before anything is computed.

    Args:
      name: a TPU version and the chips along each axis, such as v5e:2x4 or v5p:2x2x1; or a card and how many of them,
        such as h100:8.

    Raises:
      UserError: the name is unknown, or the plug-in is missing or of another version than JAX needs.
    """
    version, _, size = name.partition(":")
    if version in SLICES and size in SLICES[version]:
        return _slice(name, version, size)
    if version in GPU_TARGETS and re.fullmatch(r"[1-9]\d{0,3}", size or "1"):
        return _gpus(name, version, int(size or 1))
    if version in SLICES:
        raise UserError(f"--aot {name}: the slices of {version} are {', '.join(SLICES[version])}")
    if version in GPU_TARGETS:
        raise UserError(f"--aot {name}: give the number of devices, such as {version}:8")
    known = [f"{each}:{shapes[1]}" for each, shapes in SLICES.items()] + [f"{each}:8" for each in GPU_TARGETS]
    raise UserError(f"--aot {name!r} is unknown: give a TPU slice or a number of GPUs, such as {', '.join(known)}")


def _slice(name: str, version: str, size: str) -> Topology:
    _check_plugin(f"--aot {name}", "tpu", ["libtpu"])
    shape = [int(each) for each in size.split("x")]
    chips = math.prod(shape)
    # A host has four chips; of v5e and v6e slices of up to eight chips are on one.
    one_host = chips < 4 or (len(shape) == 2 and version in ("v5e", "v6e") and chips <= 8)
    bounds = (*shape, 1, 1)[:3] if one_host else (2, 2, 1)
    _stay_on_cpu()
    _quiet_libtpu()
    devices = _devices(name, platform="tpu", topology_name=name, chips_per_host_bounds=bounds)
    chip = find_accelerator(devices[0].device_kind)
    assert chip is not None, devices[0].device_kind
    cores = len(devices) // chips
    return Topology(
        name=name,
        devices=devices,
        per_host=sum(device.process_index == devices[0].process_index for device in devices),
        chip=devices[0].device_kind + (f", {cores} devices a chip" if cores > 1 else ""),
        memory=int(chip.gib * 2**30 / cores),
        share="",
        # Of three passes in bfloat16, and of six.
        tflops=_tflops(
            chip.tflops / cores, chip.tflops_float32 / cores, chip.tflops / cores / 3, chip.tflops / cores / 6
        ),
        gigabytes_per_second=chip.gigabytes_per_second / cores,
        platform="tpu",
        compiler_options={},
    )


def _gpus(name: str, version: str, number: int) -> Topology:
    plugin = _check_plugin(f"--aot {name}", "cuda13-local", ["jax-cuda13-plugin", "jax-cuda12-plugin"])
    hosts, left = divmod(number, _GPUS_PER_HOST)
    if number > _GPUS_PER_HOST and left:
        raise UserError(
            f"--aot {name}: more than {_GPUS_PER_HOST} GPUs are hosts of {_GPUS_PER_HOST}: use "
            f"{version}:{hosts * _GPUS_PER_HOST} or {version}:{(hosts + 1) * _GPUS_PER_HOST}"
        )
    target, per_host = GPU_TARGETS[version], min(number, _GPUS_PER_HOST)
    card = find_accelerator(target.name)
    assert card is not None, target.name
    share, which = _gpu_share()
    _stay_on_cpu()
    config = target_config(target, cuda=int(re.findall(r"\d+", plugin)[0]))
    layout = f"1x{number // per_host}x{per_host}"
    return Topology(
        name=name,
        devices=_devices(name, platform="cuda", topology=layout, target_config=config),
        per_host=per_host,
        chip=target.name,
        memory=int(share * target.memory),
        share=f"{share:.0%} of its {target.memory / 2**30:.1f} GiB, {which}",
        # TF32; and the multiplications and additions of the float32 units.
        tflops=_tflops(card.tflops, card.tflops_float32, card.tflops_float32, target.tflops_without_tensor_cores),
        gigabytes_per_second=card.gigabytes_per_second,
        platform="gpu",
        # Kernels are timed on the device to choose among them; there is none.
        compiler_options={"xla_gpu_autotune_level": 0},
    )


def _tflops(bfloat16: float, float32: float, high: float, highest: float) -> dict[str, float]:
    return {"bfloat16": bfloat16, "float32": float32, "float32, high": high, "float32, highest": highest}


def _gpu_share() -> tuple[float, str]:
    """Returns the share of a GPU's memory that JAX reserves, and why, in words."""
    for variable in _SHARE_VARIABLES:
        if value := os.environ.get(variable):
            try:
                share = float(value)
            except ValueError:
                share = 0.0
            if not 0 < share <= 1:
                raise UserError(
                    f"{variable}={value} must be a number in (0, 1]: the share of a GPU's memory to reserve"
                )
            return share, f"by {variable}"
    return _GPU_SHARE, f"which JAX reserves unless {_SHARE_VARIABLES[0]} says otherwise"


def _devices(name: str, **wanted: Any) -> tuple[jax.Device, ...]:
    try:
        found: Sequence[Any] = topologies.get_topology_desc(**wanted).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--aot {name}: the compiler's plug-in does not start: {error}") from error
    return tuple(found)


def _check_plugin(what: str, extra: str, packages: list[str]) -> str:
    """Returns the first package that is installed, in the version that the installed JAX needs."""
    jax_version = importlib.metadata.version("jax")
    install = f'pip install "jax[{extra}]=={jax_version}"'
    for package in packages:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        needed = _needed(package)
        if needed and not fnmatch.fnmatch(version, needed):
            raise UserError(f"{what} needs {package} {needed} for jax {jax_version}, not {version}: {install}")
        return package
    raise UserError(f"{what} needs the compiler's plug-in {packages[0]}: {install}")


def _needed(package: str) -> str:
    """Returns the version of a package that the installed JAX asks for, such as "0.0.42.*"; "" if any."""
    for requirement in importlib.metadata.requires("jax") or ():
        found = re.match(rf"{re.escape(package)}(?:\[[\w,-]*\])?\s*([^;]*)", requirement)
        exact = re.search(r"[<=]=\s*([\w.*]+)", found[1]) if found else None
        if exact:
            return exact[1]
    return ""


def _stay_on_cpu() -> None:
    # With a plug-in and no device, JAX would search for the device first, and fail.
    jax.config.update("jax_platforms", "cpu")


def _quiet_libtpu() -> None:
    """Answers what libtpu would ask the cloud's metadata server for, and lets several processes compile at once."""
    # Only one process can have a TPU, so that each locks a file of the machine: there is no TPU here.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
