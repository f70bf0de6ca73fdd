"""Importing a module changes nothing in the process: no log level, hook, environment variable, setting or handler."""

import subprocess
import sys
import textwrap

PROGRAM = """
    import logging, os, pkgutil, signal, sys, threading, warnings
    import absl.logging, jax, grain, matplotlib.pyplot, optax, orbax.checkpoint, sklearn.datasets, tensorflow_datasets
    import ddpm_jax

    def state():
        loggers = [logging.getLogger(), *(logging.getLogger(name) for name in ("absl", "asyncio", "jax", "orbax"))]
        return {
            "log levels": [(logger.name, logger.level) for logger in loggers],
            "log handlers": [list(logger.handlers) for logger in loggers],
            "absl's verbosity": absl.logging.get_verbosity(),
            "hooks": [sys.excepthook, sys.unraisablehook, threading.excepthook, sys.displayhook],
            "environment": dict(os.environ),
            "jax's configuration": dict(jax.config.values),
            "signal handlers": [signal.getsignal(number) for number in signal.valid_signals()],
            "warnings": list(warnings.filters),
            "matplotlib's backend": dict(matplotlib.rcParams),
            "threads": threading.active_count(),
        }

    before = state()
    modules = [module.name for module in pkgutil.walk_packages(ddpm_jax.__path__, "ddpm_jax.")]
    for name in modules:
        __import__(name)
    after = state()
    assert "ddpm_jax.run.checkpoints" in modules, modules
    for what in before:
        if before[what] != after[what]: print(what, before[what], after[what])
"""


def test_importing_every_module_changes_nothing():
    """In a process of its own, which has imported the libraries alone before: what they do is theirs."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
