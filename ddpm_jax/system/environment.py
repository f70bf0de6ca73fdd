"""The settings of JAX, XLA and the hardware's libraries that change numbers: fixed by the scripts, or recorded."""

import os
from typing import Any

import jax

from ddpm_jax.system.progress import say

# The options of jax 0.10.2 and 0.12 on which the numbers of a program depend, and their values here. The promotion
# options (jax_numpy_*_promotion) are not among them: they only raise.
_OPTIONS: dict[str, Any] = {
    # random numbers
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_high_dynamic_range_gumbel": False,
    "jax_accurate_erf_inv": False,
    # types and precision
    "jax_enable_x64": False,
    "jax_default_matmul_precision": None,
    "jax_allow_f16_reductions": True,
    # what is compiled, and so how sums are rounded
    "jax_disable_jit": False,
    "jax_optimization_level": "UNKNOWN",
    "jax_memory_fitting_level": "O2",
    "jax_exec_time_optimization_effort": 0.0,
    "jax_memory_fitting_effort": 0.0,
    "jax_compiler_enable_remat_pass": True,
    "jax_softmax_custom_jvp": False,
    "jax_use_direct_linearize": True,
    "jax_use_hlo_logistic_lowering": None,
    # checks for defects, which end the program
    "jax_debug_nans": False,
    "jax_debug_infs": False,
    "jax_debug_key_reuse": False,
}

# Of these a run is independent also where a caller of the library set them: its keys name their generator, its config
# names the precision of products, and the checks for defects change no number.
_INDEPENDENT = {
    "jax_default_prng_impl",
    "jax_default_matmul_precision",
    "jax_debug_nans",
    "jax_debug_infs",
    "jax_debug_key_reuse",
}

_INSTEAD = {
    "jax_default_matmul_precision": "use --train.matmul-precision",
    "jax_debug_nans": "use train.py --debug-nans",
}

# Variables that no program can set for itself once jax is imported, or that jax does not read.
_VARIABLES = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")

# Flags of XLA that change no number: where it writes, waits, and how it compiles in parallel.
_NEUTRAL_FLAGS = (
    "--xla_force_host_platform_device_count",
    "--xla_dump_",
    "--xla_cpu_collective_",
    "--xla_cpu_parallel_codegen_split_count",
    "--xla_gpu_cuda_data_dir",
    "--xla_gpu_force_compilation_parallelism",
    "--xla_gpu_kernel_cache_file",
    "--xla_gpu_per_fusion_autotune_cache_dir",
)


def fix_options() -> None:
    """Sets every option of JAX that changes numbers to the one value of all runs; names those that were set otherwise.

    A run is a function of its configuration and its seed, not of the environment of the process. Scripts call it before
    anything else; the library leaves the options alone, see `settings`.
    """
    for name, value in _differences().items():
        reason = _INSTEAD.get(name, "a run depends on its config and seed alone")
        say(f"warning: {name.upper()}={value} is ignored: {reason}")
        jax.config.update(name, _OPTIONS[name])
    # Plots go to files; the backend that a notebook names for its child processes need not exist in this environment.
    os.environ["MPLBACKEND"] = "agg"


def settings() -> dict[str, str]:
    """Returns what numbers depend on beside a configuration: flags of XLA and of libraries, and options of JAX.

    They are empty unless something was set: XLA's flags by the user, options of JAX by a caller of the library.

    Returns:
      the values by the name of the environment variable.
    """
    found = {name.upper(): str(value) for name, value in _differences().items() if name not in _INDEPENDENT}
    flags = {flag.partition("=")[0]: flag for flag in os.environ.get("XLA_FLAGS", "").split()}  # the last one counts
    numeric = " ".join(flag for name, flag in sorted(flags.items()) if not name.startswith(_NEUTRAL_FLAGS))
    if numeric:
        found["XLA_FLAGS"] = numeric
    return found | {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}


def devices() -> str:
    """Returns the devices of all hosts in words, such as "1 CPU device" or "8 NVIDIA A100 devices on 2 hosts"."""
    number, hosts, kind = jax.device_count(), jax.process_count(), jax.devices()[0].device_kind
    words = f"{number} {kind.upper() if kind == 'cpu' else kind} device{'s' if number > 1 else ''}"
    return f"{words} on {hosts} hosts" if hosts > 1 else words


def platform() -> dict[str, str]:
    """Returns what rounding depends on: the backend ("cpu", "gpu" or "tpu") and the version of JAX."""
    return {"backend": jax.default_backend(), "jax": jax.__version__}


def _differences() -> dict[str, Any]:
    """Returns the options of this version of JAX that have another value than here."""
    current = {name: getattr(jax.config, name) for name in _OPTIONS if hasattr(jax.config, name)}
    return {name: value for name, value in current.items() if value != _OPTIONS[name]}
