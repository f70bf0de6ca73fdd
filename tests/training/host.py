"""One host of two: trains three steps and writes down what its network was given, for test_parallel.py.

python host.py HOST:PORT INDEX OUT.npz
"""

import runpy
import sys
from pathlib import Path

import jax
import numpy as np
import optax

from ddpm_jax.system.hosts import Hosts, join
from ddpm_jax.training.parallel import make_layout


def main(coordinator: str, index: str, out: str) -> None:
    join(Hosts(coordinator=coordinator, count=2, index=int(index)))
    helpers = runpy.run_path(str(Path(__file__).with_name("helpers.py")), run_name="helpers")
    layout, probe, optimizer = make_layout("jit", batch_size=16), helpers["Probe"](), optax.sgd(0.1)
    step = layout.lift(lambda **device: helpers["step_of"](probe.network, optimizer, **device))
    state = layout.init(lambda key: helpers["state_of"](key, probe.network, optimizer), jax.random.key(5))
    for number in range(3):
        state, _ = step(jax.random.key(11), state, layout.place_batch(helpers["images_of"](number)[layout.rows]))
    jax.block_until_ready(state)
    jax.effects_barrier()
    np.savez(out, *(np.stack(column) for column in zip(*probe.rows, strict=True)))


if __name__ == "__main__":
    main(*sys.argv[1:])
