"""What a network is: of a Linen module, of an NNX model, of plain functions."""

import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from ddpm_jax.networks import from_linen, from_nnx, parameter_shapes, predict_with
from ddpm_jax.unet import UNet

X_T, TIMES, LABELS = jnp.linspace(-1, 1, 32).reshape(2, 4, 4, 1), jnp.array([0, 7]), jnp.array([1, 0])


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x_t, t):
        return nn.Dense(1)(x_t)


class Labeled(nn.Module):
    """Makes its embedding only where there are labels."""

    num_classes: int = 2

    @nn.compact
    def __call__(self, x_t, t, labels=None):
        told = 0.0 if labels is None else nn.Embed(self.num_classes + 1, 1)(labels)[:, None, None]
        return nn.Dense(1)(x_t) + told


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x_t, t):
        return nn.BatchNorm(use_running_average=False)(x_t)


class Model(nnx.Module):
    """Layers in a list, whose names are numbers in NNX."""

    def __init__(self, rngs, extra=None):
        self.layers = nnx.List([nnx.Linear(1, 3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs)])
        self.table = nnx.Embed(3, 1, rngs=rngs)
        self.extra = None if extra is None else extra(rngs)

    def __call__(self, x_t, t, labels):
        h = self.layers[1](nnx.relu(self.layers[0](x_t)))
        return h if labels is None else h + self.table(labels)[:, None, None]


def test_of_linen_it_is_the_module_itself():
    unet = UNet(width=8, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4, out_channels=1)
    network = from_linen(unet, (4, 4, 1))
    params = network.init(jax.random.key(3))
    expected = unet.init(jax.random.key(3), jnp.zeros((1, 4, 4, 1)), jnp.zeros((1,), jnp.int32))["params"]
    chex.assert_trees_all_equal(params, expected)
    np.testing.assert_array_equal(network.apply(params, X_T, TIMES), unet.apply({"params": params}, X_T, TIMES))
    keys = jax.random.split(jax.random.key(0), 2)
    dropped = unet.apply({"params": params}, X_T, TIMES, dropout_keys=keys)
    np.testing.assert_array_equal(network.apply(params, X_T, TIMES, dropout_keys=keys), dropped)


def test_first_parameters_follow_from_the_key():
    init = from_linen(Plain(), (4, 4, 3)).init
    first, again, other = (init(jax.random.key(seed))["Dense_0"] for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    assert not np.array_equal(first["kernel"], other["kernel"])


def test_a_module_gets_the_keywords_that_it_takes():
    plain, labeled = from_linen(Plain(), (4, 4, 1)), from_linen(Labeled(), (4, 4, 1))
    assert (plain.num_classes, labeled.num_classes) == (0, 2)
    plain.apply(plain.init(jax.random.key(0)), X_T, TIMES, None, dropout_keys=jax.random.split(jax.random.key(0), 2))
    params = labeled.init(jax.random.key(0))
    assert "Embed_0" in params
    with_labels, without = labeled.apply(params, X_T, TIMES, LABELS), labeled.apply(params, X_T, TIMES)
    expected = params["Embed_0"]["embedding"][LABELS][:, None, None]
    np.testing.assert_allclose(with_labels - without, np.broadcast_to(expected, X_T.shape), atol=1e-6)
    with pytest.raises(ValueError, match="unconditional network"):
        plain.apply({}, X_T, TIMES, LABELS)
    with pytest.raises(ValueError, match="10 classes for a network whose __call__ takes no `labels`"):
        from_linen(Plain(), (4, 4, 1), num_classes=10)


def test_a_module_with_state_is_refused():
    with pytest.raises(ValueError, match=re.escape("keeps state beside its parameters (batch_stats)")):
        parameter_shapes(from_linen(Normalized(), (4, 4, 1)))


def test_of_nnx_the_parameters_are_a_plain_dict_of_named_arrays():
    network = from_nnx(Model, num_classes=2)
    params = network.init(jax.random.key(5))
    flat = traverse_util.flatten_dict(params, sep=".")
    assert set(flat) == {"layers.0.kernel", "layers.0.bias", "layers.1.kernel", "layers.1.bias", "table.embedding"}
    assert all(isinstance(leaf, jax.Array) for leaf in flat.values())
    model = Model(nnx.Rngs(jax.random.key(5)))
    output = jax.jit(network.apply)(params, X_T, TIMES, LABELS)
    np.testing.assert_allclose(output, model(X_T, TIMES, LABELS), rtol=1e-6)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    assert not np.allclose(network.apply(doubled, X_T, TIMES), network.apply(params, X_T, TIMES))
    gradient = jax.grad(lambda params: network.apply(params, X_T, TIMES, LABELS).sum())(params)
    chex.assert_trees_all_equal_shapes(gradient, params)


def test_nnx_models_with_other_variables_are_refused():
    for extra in (lambda rngs: nnx.BatchNorm(1, rngs=rngs), lambda rngs: nnx.Dropout(0.1, rngs=rngs)):
        with pytest.raises(ValueError, match=r"variables that are not nnx.Param \((BatchStat|RngCount, RngKey)\)"):
            from_nnx(lambda rngs, extra=extra: Model(rngs, extra))


def test_guidance_combines_with_and_without_labels():
    network = from_linen(Labeled(), (4, 4, 1))
    params = network.init(jax.random.key(0))
    with_labels = predict_with(network, params, LABELS)(X_T, TIMES)
    without = network.apply(params, X_T, TIMES, jnp.full_like(LABELS, 2))
    guided = predict_with(network, params, LABELS, guidance_scale=3.0)(X_T, TIMES)
    np.testing.assert_allclose(guided, 3 * with_labels - 2 * without, atol=1e-5)
    np.testing.assert_array_equal(predict_with(network, params, None)(X_T, TIMES), network.apply(params, X_T, TIMES))
