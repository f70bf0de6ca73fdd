"""How fast a run trains, and what share of the devices' peak speed that is."""

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.networks import Network, parameter_shapes
from ddpm_jax.system.accelerators import find_accelerator


def peak_tflops(device_kind: str) -> float | None:
    """Returns the peak speed of a device in bfloat16 products, by its data sheet.

    Args:
      device_kind: as `jax.Device.device_kind` names it. A device of a TPU v2 or v3 is a core, half a chip.

    Returns:
      10^12 operations per second; None if it is not known (CPUs are not).

    >>> peak_tflops("NVIDIA H100 80GB HBM3"), peak_tflops("TPU v5 lite"), peak_tflops("cpu")
    (989.0, 197.0, None)
    """
    found = find_accelerator(device_kind)
    return None if found is None else found.tflops / found.cores


def forward_flops(network: Network, image_shape: Sequence[int]) -> float | None:
    """Returns the floating-point operations of one forward pass of one image.

    XLA counts them, on shapes alone and without compiling: every product and sum, and no convolution's padding.

    Args:
      network: the network.
      image_shape: (H, W, C).

    Returns:
      the operations; None where XLA cannot count them.
    """
    example = jnp.zeros((1, *image_shape)), jnp.zeros((1,), jnp.int32)
    forward = jax.jit(network.apply)
    # As on a GPU where there is only a CPU, for which some convolutions are written with fewer operations; a network
    # that prints or calls back, say, can be lowered for the CPU alone.
    for platforms in [("cuda",), None] if jax.default_backend() == "cpu" else [None]:
        with contextlib.suppress(Exception):  # to count is no reason to end
            lowered = forward.trace(parameter_shapes(network), *example).lower(lowering_platforms=platforms)
            flops = (lowered.cost_analysis() or {}).get("flops", -1)  # -1 is XLA's for unknown
            return None if flops < 0 else flops
    return None


def utilization(
    images_per_second: float, forward_flops: float | None, *, devices: int, tflops: float | None
) -> float | None:
    r"""Returns the model FLOP utilization of training, whose step counts as three forward passes.

    .. math:: \mathrm{MFU} = \frac{\text{images/s} \cdot 3 \cdot \text{forward FLOPs}}{\text{devices} \cdot \text{peak}}

    What rematerialization computes twice counts once: these are the model's operations, not the program's.

    Args:
      images_per_second: over all devices.
      forward_flops: floating-point operations of a forward pass of one image; None if unknown.
      devices: number of devices.
      tflops: peak of one device, 10^12 operations per second; None if unknown.

    Returns:
      a share in [0, 1], or None if unknown.

    Chowdhery et al. 2022 (PaLM), app. B.
    """
    if tflops is None or forward_flops is None:
        return None
    return images_per_second * 3 * forward_flops / (devices * tflops * 1e12)


def peak_memory_gib(device: jax.Device) -> float | None:
    """Returns the peak memory of the device, or of this process if the device is its CPU; None for a CPU on Windows."""
    statistics: dict[str, Any] = device.memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return round(statistics["peak_bytes_in_use"] / 2**30, 3)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 2**10  # Linux counts in KiB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)


class SpeedMeter:
    """Measures the speed of a run's training steps; used in a `with` block it pauses for what is not training."""

    def __init__(
        self,
        *,
        first: int,
        batch_size: int,
        flops: float | None,
        tflops: float | None,
        seconds_waited: Callable[[], float],
    ):
        """Starts to measure.

        Args:
          first: steps done before.
          batch_size: images per step, over all devices.
          flops: of the forward pass of one image; None if they are not known.
          tflops: peak of one device; None if it is not known.
          seconds_waited: returns the total seconds spent waiting for data.
        """
        self._step, self._batch_size, self._flops, self._tflops = first, batch_size, flops, tflops
        self._seconds_waited, self._waited = seconds_waited, 0.0
        self._seconds, self._since = 0.0, time.perf_counter()

    def __enter__(self) -> None:
        self._seconds += time.perf_counter() - self._since

    def __exit__(self, *exception: object) -> None:
        self._since = time.perf_counter()

    def measure(self, step: int) -> dict[str, float | None]:
        """Returns the speed since the last call; to be called during a pause.

        Args:
          step: steps done.
        """
        seconds, waited, steps = self._seconds, self._seconds_waited() - self._waited, step - self._step
        self._step, self._waited, self._seconds = step, self._waited + waited, 0.0
        rate = steps * self._batch_size / seconds
        share = utilization(rate, self._flops, devices=jax.device_count(), tflops=self._tflops)
        return {
            "seconds": round(seconds, 3),
            "images_per_second": round(rate, 2),
            "waited_for_data": round(waited / seconds, 4),
            "model_flops_utilization": None if share is None else round(share, 4),
            "peak_memory_gib": peak_memory_gib(jax.local_devices()[0]),
        }
