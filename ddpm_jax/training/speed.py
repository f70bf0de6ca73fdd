"""How fast a run is, and what share of what the devices can do that is."""

import resource
import sys
from typing import Any

import jax

from ddpm_jax.training.summary import blocks_of
from ddpm_jax.unet import UNet

# Dense bfloat16 products (float16 where there is no bfloat16), 10^12 operations a second, as the makers state them.
# By the beginning of what jax calls the device, the longest first; of TPU v2 and v3 a device is a core, half a chip.
_PEAK_TFLOPS = {
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100": 989,
    "NVIDIA H200": 989,
    "NVIDIA A100": 312,
    "NVIDIA L4": 121,
    "Tesla V100": 125,
    "Tesla T4": 65,
    "TPU v6 lite": 918,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5": 459,
    "TPU v4": 275,
    "TPU v3": 61.5,
    "TPU v2": 22.5,
}


def peak_tflops(device_kind: str) -> float | None:
    """Looks up what a device can do at most.

    Args:
      device_kind: as `jax.Device.device_kind` names it.

    Returns:
      10^12 operations a second; None if it is not in the table, as no CPU is.

    >>> peak_tflops("NVIDIA H100 80GB HBM3"), peak_tflops("TPU v5 lite"), peak_tflops("cpu")
    (989, 197, None)
    """
    found = [name for name in _PEAK_TFLOPS if device_kind == name or device_kind.startswith((f"{name} ", f"{name}-"))]
    return _PEAK_TFLOPS[max(found, key=len)] if found else None


def training_flops(unet: UNet, image_shape: tuple[int, int, int]) -> float:
    """Counts the operations that a training step needs for one image: three times those of a forward pass.

    What rematerialization does twice counts once: these are the model's, not the program's.
    """
    return 3 * 2 * sum(block.macs for block in blocks_of(unet, image_shape))


def utilization(images_per_second: float, flops: float, *, devices: int, tflops: float | None) -> float | None:
    r"""Gives the model FLOP utilization.

    .. math:: \mathrm{MFU} = \frac{\text{images/s} \cdot \text{FLOPs of an image}}{\text{devices} \cdot \text{peak}}

    Args:
      images_per_second: over all devices.
      flops: of one image in training.
      devices: how many.
      tflops: peak of one device; None if it is not known.

    Returns:
      a share in [0, 1], or None.

    Chowdhery et al. 2022 (PaLM), app. B.
    """
    return None if tflops is None else images_per_second * flops / (devices * tflops * 1e12)


def peak_memory_gib(device: jax.Device) -> float:
    """Says the most memory that was in use so far: of the device, or of this process where the device is its CPU."""
    statistics: dict[str, Any] = device.memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"] / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
