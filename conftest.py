"""Settings of every test and doctest: 8 simulated CPU devices, and jax at its strictest."""

import os
import signal

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")  # the scripts would use the user's
# Read when jax starts, so set before it is imported. Compiling is most of what the tests do: without LLVM's
# optimizations it takes half the time, and the numbers are as right.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        # On a busy machine one device may wait long for another; XLA would end the process after 40 seconds.
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        os.environ.get("XLA_FLAGS", ""),  # what is given by hand comes last and counts
    ]
).strip()

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.forward import q_sample
from ddpm_jax.keys import image_keys
from ddpm_jax.samplers.ancestral import ancestral
from ddpm_jax.samplers.chain import sample
from ddpm_jax.schedules import make_schedule

# In the background or under nohup, as some runners start tests, they are ignored, in the scripts that tests start too.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")

# The same examples on every run: a failure is found again by starting the same command.
hypothesis.settings.register_profile("ddpm_jax", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("ddpm_jax")


@pytest.fixture(autouse=True)
def _names_of_doctests(doctest_namespace):
    doctest_namespace |= dict(
        jax=jax,
        jnp=jnp,
        np=np,
        make_schedule=make_schedule,
        q_sample=q_sample,
        image_keys=image_keys,
        ancestral=ancestral,
        sample=sample,
    )
