"""The published numbers of accelerators: speed, bandwidth and memory."""

import typing


class Accelerator(typing.NamedTuple):
    """One chip or card, by its maker's data sheet."""

    tflops: float
    """Dense bfloat16 products (float16 where there is no bfloat16), 10^12 operations per second."""
    tflops_float32: float
    """Float32 products at JAX's default precision, likewise: bfloat16 passes on TPUs, TF32 on GPUs that have it."""
    gigabytes_per_second: float
    """Bandwidth of the memory."""
    gib: float
    """Memory."""
    cores: int = 1
    """Devices that JAX sees of one chip."""


# Keys are prefixes of `jax.Device.device_kind`; the longest match counts. Sources: NVIDIA's data sheets of each card,
# Google's pages of each TPU version (cloud.google.com/tpu/docs).
_ACCELERATORS = {
    "NVIDIA B200": Accelerator(2250, 1125, 8000, 180),
    "NVIDIA H200": Accelerator(989, 494.5, 4800, 141e9 / 2**30),
    "NVIDIA H100": Accelerator(989, 494.5, 3350, 80),
    "NVIDIA H100 PCIe": Accelerator(756, 378, 2000, 80),
    "NVIDIA A100": Accelerator(312, 156, 2039, 80),
    "NVIDIA A100-SXM4-40GB": Accelerator(312, 156, 1555, 40),
    "NVIDIA A100-PCIE-40GB": Accelerator(312, 156, 1555, 40),
    "NVIDIA L4": Accelerator(121, 60, 300, 24),
    "Tesla V100": Accelerator(125, 15.7, 900, 16),
    "Tesla T4": Accelerator(65, 8.1, 320, 16),
    "TPU v6 lite": Accelerator(918, 918, 1640, 32),
    "TPU v5 lite": Accelerator(197, 197, 819, 16),
    "TPU v5e": Accelerator(197, 197, 819, 16),
    "TPU v5": Accelerator(459, 459, 2765, 95),
    "TPU v4": Accelerator(275, 275, 1228, 32),
    "TPU v3": Accelerator(123, 123, 900, 32, cores=2),
    "TPU v2": Accelerator(45, 45, 700, 16, cores=2),
}


def find_accelerator(device_kind: str) -> Accelerator | None:
    """Returns the numbers of an accelerator.

    Args:
      device_kind: as `jax.Device.device_kind` names it.

    Returns:
      its numbers; None if it is not in the table (CPUs are not).

    >>> find_accelerator("NVIDIA H100 80GB HBM3").tflops, find_accelerator("TPU v5 lite").gib, find_accelerator("cpu")
    (989, 16, None)
    """
    found = [name for name in _ACCELERATORS if device_kind == name or device_kind.startswith((f"{name} ", f"{name}-"))]
    return _ACCELERATORS[max(found, key=len)] if found else None
