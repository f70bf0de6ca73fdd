"""A gradient in parts: that of the whole batch, in less memory, with every device at its own rows."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.system.mesh import batch_sharding, make_mesh, replicated
from ddpm_jax.training.accumulation import in_parts


def gradient(params, rows):
    """Of a mean of weighted errors of a small network, worked out by autodiff."""

    def loss(params):
        losses = jnp.mean((jnp.tanh(rows["x"] @ params["kernel"]) - rows["y"]) ** 2, axis=1) * rows["weight"]
        return jnp.mean(losses), losses

    return jax.value_and_grad(loss, has_aux=True)(params)


def example(number=24, width=6):
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)
    return {"kernel": draw(width, width)}, {"x": draw(number, width), "y": draw(number, width), "weight": draw(number)}


@pytest.mark.parametrize("parts", [1, 2, 3, 8, 24])
def test_parts_make_the_whole(parts):
    params, rows = example()
    (loss, losses), slope = jax.jit(in_parts, static_argnames=("gradient", "parts"))(
        gradient, params, rows, parts=parts
    )
    (expected, each), expected_slope = gradient(params, rows)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(losses, each, rtol=1e-5)  # in the order of the rows
    chex.assert_trees_all_close(slope, expected_slope, rtol=1e-5, atol=1e-6)


def test_keys_and_missing_labels_may_be_among_the_rows():
    keys = jax.random.split(jax.random.key(0), 8)

    def noisy(params, rows):
        noise = jax.vmap(jax.random.normal)(rows["key"])
        return (jnp.mean(params * noise), noise), jnp.mean(noise)

    (_, noises), _ = in_parts(noisy, jnp.ones(()), {"key": keys, "label": None}, parts=4)
    np.testing.assert_array_equal(noises, jax.vmap(jax.random.normal)(keys))


def test_no_row_leaves_its_device():
    params, rows = example(number=32)
    mesh = make_mesh()

    def run(params, rows):
        return in_parts(gradient, params, rows, parts=4)

    places = ((replicated(mesh), batch_sharding(mesh)), replicated(mesh))
    text = jax.jit(run, in_shardings=(replicated(mesh), batch_sharding(mesh)), out_shardings=places).lower(params, rows)
    text = text.compile().as_text()
    assert "all-reduce" in text
    for moved in ("all-to-all", "all-gather", "collective-permute"):
        assert moved not in text


def test_parts_are_in_memory_one_at_a_time():
    def wide(params, rows):
        loss = lambda params: (jnp.mean(jnp.tanh(rows["x"] @ params["kernel"]) @ params["kernel"].T), rows["weight"])
        return jax.value_and_grad(loss, has_aux=True)(params)

    params = {"kernel": jax.ShapeDtypeStruct((8, 4096), jnp.float32)}
    rows = {name: jax.ShapeDtypeStruct((256, *shape), jnp.float32) for name, shape in (("x", (8,)), ("weight", ()))}

    def bytes_of(parts):
        run = lambda params, rows: in_parts(wide, params, rows, parts=parts)
        return jax.jit(run).lower(params, rows).compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(16) < bytes_of(1) / 4
