"""The numbers of graphics cards from which XLA compiles for one that is not there."""

import typing


class GpuTarget(typing.NamedTuple):
    """A card as XLA's compiler sees it. What cards of one architecture share is by its compute capability."""

    name: str
    """As `jax.Device.device_kind` names it."""
    capability: tuple[int, int]
    """Compute capability."""
    multiprocessors: int
    lanes: int
    """Float32 units per multiprocessor."""
    gigahertz: float
    """Boost clock."""
    bandwidth: float
    """Of the memory, bytes per second."""
    memory: int
    """Bytes that a program can use, with error correction on."""
    l2: int
    """Bytes of the second-level cache."""
    shared_memory: int
    """Bytes of shared memory of a multiprocessor; a block can have 1 KiB less."""

    @property
    def tflops_without_tensor_cores(self) -> float:
        """Float32 products without TF32, 10^12 operations per second: each unit multiplies and adds in a cycle."""
        return 2 * self.multiprocessors * self.lanes * self.gigahertz / 1e3


# Multiprocessors, lanes, clocks, caches and bandwidths are those of NVIDIA's architecture papers (A100: "NVIDIA A100
# Tensor Core GPU Architecture"; H100 and H200: "NVIDIA H100 Tensor Core GPU Architecture"; B200: the Blackwell data
# sheet), limits of a block those of the CUDA C++ programming guide, table "Technical Specifications per Compute
# Capability"; the memory is what the driver reports.
GPU_TARGETS = {
    "a100": GpuTarget("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 2.039e12, 84_974_239_744, 40 << 20, 164 << 10),
    "h100": GpuTarget("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 3.352e12, 84_929_347_584, 50 << 20, 228 << 10),
    "h200": GpuTarget("NVIDIA H200", (9, 0), 132, 128, 1.98, 4.8e12, 150_754_820_096, 50 << 20, 228 << 10),
    "b200": GpuTarget("NVIDIA B200", (10, 0), 148, 128, 1.965, 8e12, 191_501_959_168, 126 << 20, 228 << 10),
}

_FORMAT = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {target.shared_memory}
  shared_memory_per_block_optin: {optin}
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: {target.multiprocessors}
  fpus_per_core: {target.lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {target.bandwidth:.0f}
  l2_cache_size: {target.l2}
  clock_rate_ghz: {target.gigahertz}
  device_memory_size: {target.memory}
  cuda_compute_capability {{ major: {target.capability[0]} minor: {target.capability[1]} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: {cuda} }}
device_description_str: "{target.name}"
"""


def target_config(target: GpuTarget, *, cuda: int) -> str:
    """Returns a card's `target_config`, as `jax.experimental.topologies` takes it.

    Args:
      target: the card.
      cuda: major version of CUDA that the plug-in is for.
    """
    return _FORMAT.format(target=target, optin=target.shared_memory - 1024, cuda=cuda)
