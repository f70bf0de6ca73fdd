"""The mesh: who holds which part of a state, and how it comes together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ddpm_jax.system.errors import UserError
from ddpm_jax.system.mesh import Rule, batch_sharding, gather, make_mesh, replicated, shardings, widest_mesh
from ddpm_jax.unet import UNet


@pytest.mark.parametrize("fsdp", [1, 2, 4, 8])
def test_all_devices_are_in_it_once_and_sharers_are_neighbors(fsdp):
    mesh = make_mesh(fsdp=fsdp)
    assert dict(mesh.shape) == {"data": 8 // fsdp, "fsdp": fsdp}
    assert [device.id for device in mesh.devices.ravel()] == list(range(8))


def test_what_does_not_divide_the_devices_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"^train.fsdp=3 does not divide the 8 devices: use 1 or 2 or 4 or 8$"):
        make_mesh(fsdp=3)


@pytest.mark.parametrize(("devices", "asked", "got"), [(8, 4, 4), (6, 4, 3), (1, 4, 1), (5, 4, 1), (8, 1, 1)])
def test_elsewhere_the_nearest_that_fits_is_taken(devices, asked, got):
    assert widest_mesh(jax.devices()[:devices], fsdp=asked).shape["fsdp"] == got


def test_the_rules_share_out_nearly_all_of_the_papers_network():
    unet, mesh = UNet(num_classes=10), make_mesh(fsdp=4)
    arguments = (jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros(1, jnp.int32))
    params = jax.eval_shape(unet.init, *arguments)["params"]
    places = shardings(mesh, params)
    assert places["conv_in"]["kernel"].spec == PartitionSpec(None, None, None, "fsdp")
    assert places["conv_out"]["kernel"].spec == PartitionSpec(None, None, "fsdp", None)  # 3 channels come out
    assert places["class_embedding"]["embedding"].spec == PartitionSpec(None, "fsdp")
    assert places["mid_block_1"]["norm1"]["scale"].spec == PartitionSpec()
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    each = sum(
        np.prod(place.shard_shape(leaf.shape))
        for leaf, place in zip(jax.tree.leaves(params), jax.tree.leaves(places), strict=True)
    )
    assert 0.25 < each / total < 0.252


def test_the_first_rule_that_fits_counts_and_a_leaf_that_cannot_be_cut_lies_whole():
    tree = {"a": jnp.zeros((8, 6)), "b": jnp.zeros((8, 6)), "c": jnp.zeros(()), "d": jnp.zeros((3, 6))}
    rules = (Rule(r"\['a'\]", (0,)), Rule("", (-1, -2)))
    places = shardings(make_mesh(fsdp=4), tree, rules=rules)
    assert [places[name].spec for name in "abcd"] == [
        PartitionSpec("fsdp", None),
        PartitionSpec("fsdp", None),
        PartitionSpec(),
        PartitionSpec(),
    ]
    alone = shardings(make_mesh(fsdp=1), tree, rules=rules)
    assert {place.spec for place in jax.tree.leaves(alone)} == {PartitionSpec()}


def test_gathered_parameters_are_whole_and_their_gradient_is_in_parts():
    mesh = make_mesh(fsdp=4)
    params = {"layer": {"kernel": jnp.arange(24.0).reshape(3, 8)}}
    x = jnp.arange(24.0).reshape(8, 3)

    def loss(params, x):
        return jnp.sum((x @ gather(mesh, params)["layer"]["kernel"]) ** 2)

    plain = jax.grad(lambda params: jnp.sum((x @ params["layer"]["kernel"]) ** 2))(params)
    places = shardings(mesh, params)
    compiled = jax.jit(jax.grad(loss), in_shardings=(places, batch_sharding(mesh))).lower(params, x).compile()
    text = compiled.as_text()
    assert "all-gather" in text
    assert "all-to-all" not in text
    gradient = compiled(jax.device_put(params, places), jax.device_put(x, batch_sharding(mesh)))
    assert gradient["layer"]["kernel"].sharding.is_equivalent_to(places["layer"]["kernel"], 2)
    np.testing.assert_allclose(gradient["layer"]["kernel"], plain["layer"]["kernel"], rtol=1e-6)
    together = jax.jit(lambda params: gather(mesh, params))(jax.device_put(params, places))
    assert together["layer"]["kernel"].sharding.is_equivalent_to(replicated(mesh), 2)
