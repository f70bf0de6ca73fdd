"""The table of a network, checked against the paper's parameter counts."""

import jax
import jax.numpy as jnp
import pytest

from ddpm_jax.networks import Network, parameter_shapes
from ddpm_jax.run.build import build_network, image_shape
from ddpm_jax.run.experiments import load_config
from ddpm_jax.training.summary import summary


@pytest.fixture(scope="module")
def config():
    return load_config("cifar10")


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
def test_parameters_are_the_papers(config, prefix, count):
    params = parameter_shapes(build_network(config))
    blocks = [block for name, block in params.items() if name.startswith(prefix)]
    assert sum(leaf.size for leaf in jax.tree.leaves(blocks)) == count


def test_table_of_a_module_names_its_blocks_and_the_sum(config):
    table = summary(build_network(config), image_shape(config))
    names = ["temb_dense0", "conv_in", "down_0_block_0", "down_3_block_1", "mid_attn_1", "up_3_block_0", "conv_out"]
    places = [table.index(f" {name} ") for name in names]
    assert places == sorted(places)  # in the order of the calls
    assert "35,746,307 parameters; forward pass of one image: 11,6" in table.splitlines()[-1]


def test_table_of_plain_functions_names_its_arrays():
    network = Network(lambda key: {"a": {"w": jnp.ones((3, 2))}, "b": jnp.ones(5)}, lambda params, x_t, t: x_t)
    lines = [line.split() for line in summary(network, (4, 4, 1)).splitlines() if line]
    assert lines[:2] == [["a.w", "(3,", "2)", "6"], ["b", "(5,)", "5"]]
    assert lines[2][:2] == ["11", "parameters;"]
