"""The table of a network, held against the counts of the paper's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.run.build import build_unet, image_shape
from ddpm_jax.run.experiments import load_config
from ddpm_jax.training.summary import blocks_of, summary
from ddpm_jax.unet import UNet


@pytest.fixture(scope="module")
def cifar10():
    config = load_config("cifar10")
    return build_unet(config), image_shape(config)


@pytest.fixture(scope="module")
def blocks(cifar10):
    return blocks_of(*cifar10)


def parameters(blocks, prefix):
    return sum(block.parameters for block in blocks if block.name.startswith(prefix))


@pytest.mark.parametrize(
    ("prefix", "count"),
    [
        ("", 35_746_307),
        ("temb", 328_704),
        ("conv_in", 3_584),
        ("down_0_block", 722_688),
        ("down_0_downsample", 147_584),
        ("down_1_block", 2_362_880),
        ("down_1_attn", 527_360),
        ("down_2_block", 2_625_024),
        ("down_3", 2_625_024),
        ("mid", 2_888_704),
        ("up_3_block", 6_102_528),
        ("up_1_block", 5_774_592),
        ("up_1_attn", 791_040),
        ("up_1_upsample", 590_080),
        ("up_0", 1_789_952),
    ],
)
def test_parameters_are_the_papers(blocks, prefix, count):
    assert parameters(blocks, prefix) == count


def test_cost_is_the_papers(blocks):
    np.testing.assert_allclose(sum(block.macs for block in blocks), 6.22e9, rtol=2e-3)


def test_blocks_are_in_the_order_of_the_image(blocks):
    names = [block.name for block in blocks]
    order = ["temb_dense0", "conv_in", "down_0_block_0", "down_3_block_1", "mid_attn_1", "up_3_block_0", "conv_out"]
    assert [name for name in names if name in order] == order
    shapes = {block.name: block.shape for block in blocks}
    assert shapes["temb_dense1"] == (512,)
    assert shapes["down_0_downsample"] == (16, 16, 128)
    assert shapes["mid_block_1"] == (4, 4, 256)
    assert shapes["conv_out"] == (32, 32, 3)


def test_cost_of_one_convolution_and_of_attention_by_hand():
    unet = UNet(width=8, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(6,), num_groups=4, out_channels=3)
    blocks = {block.name: block for block in blocks_of(unet, (6, 4, 3))}
    pixels = 6 * 4
    assert blocks["conv_in"].macs == pixels * 9 * 3 * 8
    assert blocks["conv_in"].parameters == 9 * 3 * 8 + 8
    assert blocks["temb_dense0"].macs == 8 * 32
    assert blocks["mid_attn_1"].macs == 4 * pixels * 8 * 8 + 2 * pixels**2 * 8
    assert blocks["mid_block_1"].macs == 2 * pixels * 9 * 8 * 8 + 32 * 8


def test_counts_every_parameter():
    unet = UNet(width=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(), num_groups=4, out_channels=1)
    shapes = jax.eval_shape(unet.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros((1,), jnp.int32))
    blocks = blocks_of(unet, (8, 8, 1))
    assert sum(block.parameters for block in blocks) == sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_table_has_a_row_a_block_and_the_sums(cifar10, blocks):
    table = summary(*cifar10).splitlines()
    assert table[0].split() == ["block", "output", "parameters", "MFLOPs"]
    assert len(table) == len(blocks) + 4
    assert len({len(line) for line in table}) == 1
    assert table[2].split()[0] == blocks[0].name
    assert "35,746,307" in table[-1]
    assert "32 x 32 x 3 in" in table[-1]
    flops = float(table[-1].split()[-1].replace(",", ""))
    np.testing.assert_allclose(flops, 2 * 6220, rtol=2e-3)
