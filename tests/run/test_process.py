"""On how many devices of a CPU a script computes."""

import dataclasses

import pytest

from ddpm_jax.run import process
from ddpm_jax.run.experiments import load_config
from ddpm_jax.system.host_options import Hosts


@pytest.mark.parametrize(
    ("config", "images", "changes", "number"),
    [
        (None, 0, {}, 2),
        ("digits", 32, {}, 1),
        ("cifar10", 4, {}, 1),
        ("fashion_mnist_cpu", 32, {}, 2),
        ("fashion_mnist_cpu", 64, {}, 2),
        ("fashion_mnist_cpu", 32, {"grad_accum_steps": 4}, 1),
        ("fashion_mnist_cpu", 32, {"devices": 1}, 1),
        ("fashion_mnist_cpu", 32, {"network": "my_net.py:make"}, 1),
    ],
)
def test_training_takes_the_devices_that_were_faster_with_two_cores(config, images, changes, number, monkeypatch):
    monkeypatch.setattr(process.environment, "cores", lambda: 2)
    chosen = []
    monkeypatch.setattr(process, "set_devices", chosen.append)
    if config is not None:
        config = load_config(config)
        model = dataclasses.replace(config.model, network=changes.pop("network", ""))
        train = dataclasses.replace(config.train, batch_size=images, **changes)
        config = dataclasses.replace(config, model=model, train=train)
    process.choose_devices(Hosts(count=1), config)
    assert chosen == [number]
