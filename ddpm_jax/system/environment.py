"""The settings of JAX, XLA and the hardware's libraries that change numbers: fixed by the scripts, or recorded."""

import functools
import importlib.metadata
import os
import platform
import re
from pathlib import Path
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

# Variables that no program can set for itself once jax is imported, or that jax does not read: this one changes numbers
# by far more than rounding,
_VARIABLES = ("NVIDIA_TF32_OVERRIDE",)
# and these choose among programs that agree to rounding.
_ROUNDING_VARIABLES = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "LIBTPU_INIT_ARGS")

LISTS = ("cpu_features", "XLA_FLAGS", "LIBTPU_INIT_ARGS")
"""Entries of `rounding` that are lists of words."""

# The extensions of x86 and ARM that XLA and its libraries choose their code by.
_FEATURES = re.compile(r"s?sse|avx|fma|amx|f16c|bmi|asimd|sve|sme(?!p)|bf16|i8mm")

# Packages by backend.
_PACKAGES = {"tpu": "|libtpu.*", "gpu": r"|jax[-_].*(plugin|pjrt).*|nvidia-(cudnn|cublas|cuda-nvcc)\b.*"}

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
    """Returns what numbers depend on beside a configuration by more than rounding: options of JAX and of libraries.

    They are empty unless something was set: a variable by the user, options of JAX by a caller of the library.

    Returns:
      the values by the name of the environment variable.
    """
    found = {name.upper(): str(value) for name, value in _differences().items() if name not in _INDEPENDENT}
    return found | {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}


def names_of_settings() -> set[str]:
    """Returns the names of all that `settings` may return."""
    return {*_VARIABLES, *(name.upper() for name in _OPTIONS)}


def rounding() -> dict[str, str]:
    """Returns what the rounding of numbers depends on in this process, beside the number of devices.

    Returns:
      the backend ("cpu", "gpu" or "tpu"), the versions of JAX, jaxlib and the backend's plugins, the flags of XLA that
      change numbers and, where they compute, the number of cores that XLA uses, the CPU's model and the instruction
      set; or the version of the accelerator's runtime.
    """
    backend = jax.default_backend()
    found = {"backend": backend, **_versions(backend)}
    if backend == "cpu":
        found |= machine()
    else:
        found["runtime"] = " ".join(jax.devices()[0].client.platform_version.split())
    flags = {flag.partition("=")[0]: flag for flag in os.environ.get("XLA_FLAGS", "").split()}  # the last one counts
    numeric = " ".join(flag for name, flag in sorted(flags.items()) if not name.startswith(_NEUTRAL_FLAGS))
    variables = {"XLA_FLAGS": numeric, **{name: os.environ.get(name, "") for name in _ROUNDING_VARIABLES}}
    return found | {name: value for name, value in variables.items() if value}


@functools.cache
def _versions(backend: str) -> dict[str, str]:
    """Returns the versions of JAX, jaxlib, and of the packages of a backend and what they compute with."""
    matched = re.compile("jax|jaxlib" + _PACKAGES.get(backend, ""))
    found: dict[str, str] = {}
    for each in importlib.metadata.distributions():
        if each.name and matched.fullmatch(each.name):  # what a broken installation left has no name
            found.setdefault(each.name, each.version)  # of two versions the first is imported
    return dict(sorted(found.items()))


def machine() -> dict[str, str]:
    """Returns what programs are compiled for on a CPU: the cores that XLA uses, the model and the instruction set."""
    return {"cores": str(cores()), **_cpu()}


def cores() -> int:
    """Returns the number of threads among which XLA divides its work on the CPU."""
    for name in ("PJRT_NPROC", "NPROC"):
        if (asked := os.environ.get(name, "")).isdecimal() and int(asked):
            return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _cpu() -> dict[str, str]:
    """Returns the model of the CPU and its vector instructions; of a system that does not list them, what it says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    about = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    model = about.get("model name") or " ".join([about.get("CPU part", ""), platform.processor(), platform.machine()])
    features = about.get("flags") or about.get("Features") or ""
    return {"cpu": model.strip(), "cpu_features": " ".join(sorted(filter(_FEATURES.match, features.split())))}


def devices() -> str:
    """Returns the devices of all hosts in words, such as "1 CPU device" or "8 NVIDIA A100 devices on 2 hosts"."""
    number, hosts, kind = jax.device_count(), jax.process_count(), jax.devices()[0].device_kind
    words = f"{number} {kind.upper() if kind == 'cpu' else kind} device{'s' if number > 1 else ''}"
    return f"{words} on {hosts} hosts" if hosts > 1 else words


def _differences() -> dict[str, Any]:
    """Returns the options of this version of JAX that have another value than here."""
    current = {name: getattr(jax.config, name) for name in _OPTIONS if hasattr(jax.config, name)}
    return {name: value for name, value in current.items() if value != _OPTIONS[name]}
