"""What share of a device's peak a run uses, by hand."""

import jax
import jax.numpy as jnp
import pytest

from ddpm_jax.networks import Network
from ddpm_jax.run.build import build_network
from ddpm_jax.run.experiments import load_config
from ddpm_jax.training.speed import forward_flops, peak_memory_gib, peak_tflops, utilization


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L40S", None),  # not an L4
        ("TPU v5 lite", 197),
        ("TPU v5p", None),  # it calls itself TPU v5
        ("TPU v5", 459),
        ("TPU v4", 275),
        ("cpu", None),
    ],
)
def test_a_device_is_known_by_its_whole_name(kind, tflops):
    assert peak_tflops(kind) == tflops


def test_cost_of_cifar10_is_the_papers():
    """12.2 GFLOPs (6.1 GMACs) for a forward pass of the 35.7M network; XLA leaves out products with padding."""
    assert forward_flops(build_network(load_config("cifar10")), (32, 32, 3)) == pytest.approx(12.2e9, rel=0.05)


def test_cost_of_one_product_by_hand():
    network = Network(lambda key: {"w": jnp.zeros((16, 16))}, lambda params, x_t, t: x_t @ params["w"])
    assert forward_flops(network, (4, 6, 16)) == 2 * 4 * 6 * 16 * 16


def test_cost_of_a_network_for_the_cpu_alone():
    def apply(params, x_t, t):
        jax.debug.print("{}", x_t.mean())
        return x_t @ params["w"]

    assert forward_flops(Network(lambda key: {"w": jnp.zeros((16, 16))}, apply), (4, 6, 16)) >= 2 * 4 * 6 * 16 * 16


def test_cost_that_cannot_be_counted_is_none():
    assert forward_flops(Network(lambda key: {}, lambda params, x_t, t: 1 / 0), (4, 6, 16)) is None


def test_utilization_is_work_done_by_work_possible():
    assert utilization(1000.0, 12e9, devices=2, tflops=100.0) == pytest.approx(0.18)
    assert utilization(1000.0, 12e9, devices=2, tflops=None) is None
    assert utilization(1000.0, None, devices=2, tflops=100.0) is None


def test_memory_of_this_process_is_between_a_module_and_a_machine():
    assert 0.05 < peak_memory_gib(jax.devices()[0]) < 1024
