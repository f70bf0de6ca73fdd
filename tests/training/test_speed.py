"""What share of a device's peak a run uses, by hand."""

import jax
import pytest

from ddpm_jax.training.speed import peak_memory_gib, peak_tflops, training_flops, utilization
from ddpm_jax.training.summary import blocks_of
from ddpm_jax.unet import UNet


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


def test_of_cifar10_it_is_the_papers_cost():
    """12.2 GFLOPs forward for one image of the 35.7M network (6.1 GMACs)."""
    unet = UNet(width=128, channel_mult=(1, 2, 2, 2), num_res_blocks=2, attention_resolutions=(16,), out_channels=3)
    flops = training_flops(unet, (32, 32, 3))
    assert flops == 6 * sum(block.macs for block in blocks_of(unet, (32, 32, 3)))
    assert flops / 3 == pytest.approx(12.2e9, rel=0.03)


def test_utilization_is_work_done_by_work_possible():
    assert utilization(1000.0, 36e9, devices=2, tflops=100.0) == pytest.approx(0.18)
    assert utilization(1000.0, 36e9, devices=2, tflops=None) is None


def test_memory_of_this_process_is_between_a_module_and_a_machine():
    assert 0.05 < peak_memory_gib(jax.devices()[0]) < 1024
