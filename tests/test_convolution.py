"""The convolution: JAX's own numbers, in a form that XLA runs fast on CPUs in loops too."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from ddpm_jax.convolution import conv_general_dilated, convolve, convolve_doubled

CANONICAL = {"b01f_01io->b01f"}


def plain(x, kernel, *, strides, padding):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def energy(convolution, **options):
    """A loss whose gradients depend on the convolution's output, and exactly so for small integers."""
    return lambda x, kernel: jnp.square(convolution(x, kernel, **options)).sum()


def draw(*shapes, seed=0):
    """Arrays of small integers: their sums of products are exact in float32, in any order."""
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.integers(-3, 4, shape), jnp.float32) for shape in shapes]


SAME = dict(strides=(1, 1), padding="SAME")
HALVING = dict(strides=(2, 2), padding=((1, 1), (1, 1)))
GROWING = dict(strides=(1, 1), padding=((2, 1), (2, 2)))


def plain_doubled(x, kernel):
    return plain(x.repeat(2, 1).repeat(2, 2), kernel, **SAME)


pads = st.tuples(st.integers(0, 2), st.integers(0, 2))


@settings(max_examples=12)
@given(
    image=st.tuples(*[st.integers(1, 7)] * 2),
    taps=st.tuples(*[st.integers(1, 3)] * 2),
    strides=st.tuples(*[st.integers(1, 3)] * 2),
    padding=st.sampled_from(["SAME", "VALID"]) | st.tuples(pads, pads),
    channels=st.sampled_from([(3, 4), (4, 1)]),
)
def test_gradients_are_those_of_jax_at_any_shape(image, taps, strides, padding, channels):
    image = tuple(max(size, tap) for size, tap in zip(image, taps, strict=True))
    x, kernel = draw((2, *image, channels[0]), (*taps, *channels))
    options = dict(strides=strides, padding=padding)
    actual, expected = (
        jax.jit(jax.value_and_grad(energy(each, **options), (0, 1)))(x, kernel) for each in (convolve, plain)
    )
    chex.assert_trees_all_equal(actual, expected)


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [(convolve, plain, SAME), (convolve, plain, HALVING), (convolve_doubled, plain_doubled, {})],
    ids=["same", "halving", "doubled"],
)
@pytest.mark.parametrize(
    "derive",
    [
        lambda f: lambda x, kernel: jax.jvp(f, (x, kernel), (kernel.sum() * x, x.sum() * kernel)),
        lambda f: jax.grad(lambda x, kernel: jax.grad(f, 1)(x, kernel).sum(), (0, 1)),
        lambda f: jax.vmap(jax.grad(lambda x, kernel: f(x[None], kernel), 1), (0, None)),
        lambda f: jax.grad(jax.checkpoint(f), (0, 1)),
    ],
    ids=["forward mode", "twice", "image by image", "recomputed"],
)
def test_every_derivative_is_that_of_jax(derive, ours, theirs, options):
    x, kernel = draw((2, 6, 5, 2), (3, 3, 2, 1))
    actual, expected = (jax.jit(derive(energy(each, **options)))(x, kernel) for each in (ours, theirs))
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("options", [SAME, HALVING, GROWING], ids=["same", "halving", "growing"])
def test_loops_contain_only_the_layout_that_is_fast(options):
    x, *kernels = draw((2, 6, 6, 3), (3, 3, 3, 3), (3, 3, 3, 1))

    def layouts(convolution):
        loss = energy(convolution, **options)
        slope = jax.grad(lambda x, kernels: sum(loss(x, kernel) for kernel in kernels), (0, 1))
        step = lambda carry, _: (jax.tree.map(jnp.add, carry, slope(*carry)), None)
        program = jax.jit(lambda *carry: jax.lax.scan(step, carry, length=3)[0]).lower(x, kernels).compile().as_text()
        assert "while(" in program
        assert "conditional(" not in program
        return set(re.findall(r"dim_labels=([^,\s]*)", program))

    assert layouts(convolve) == CANONICAL
    assert layouts(plain) > CANONICAL  # JAX's own are what this is for


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("options", [SAME, HALVING], ids=["same", "halving"])
def test_accelerators_run_what_jax_derives(options, platform):
    x, kernel = draw((2, 6, 6, 3), (3, 3, 3, 3))

    def convolutions(convolution):
        slope = jax.jit(jax.grad(energy(convolution, **options), (0, 1)))
        program = slope.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        return sorted(re.findall(r"convolution\(.*?\) (dim_numbers.*)", program))

    assert len(convolutions(plain)) == 3
    assert convolutions(convolve) == convolutions(plain)


@pytest.mark.parametrize("image", [(1, 1), (3, 2), (4, 5)])
def test_repeated_pixels_are_convolved_without_being_repeated(image):
    x, kernel = draw((2, *image, 2), (3, 3, 2, 3))
    derive = lambda f: jax.jit(jax.value_and_grad(f, (0, 1)))(x, kernel)
    chex.assert_trees_all_equal(derive(energy(convolve_doubled)), derive(energy(plain_doubled)))


@pytest.mark.parametrize("library", [linen, nnx])
def test_flax_passes_what_is_computed_and_the_rest_is_refused(library):
    x = draw((1, 8, 8, 4))[0]

    def layer(**options):
        options |= dict(kernel_size=(3, 3), conv_general_dilated=conv_general_dilated)
        if library is nnx:
            return nnx.Conv(4, 4, rngs=nnx.Rngs(0), **options)(x)
        return linen.Conv(4, **options).init_with_output(jax.random.key(0), x)[0]

    assert layer(strides=2).shape == (1, 4, 4, 4)
    for wrong in (dict(kernel_dilation=2), dict(input_dilation=2), dict(feature_group_count=4)):
        with pytest.raises(ValueError, match="no dilation, groups or precision, not .*=.*: leave it out"):
            layer(**wrong)


def test_mesh_of_explicit_axes_and_shard_map():
    x, kernel = draw((8, 4, 4, 2), (3, 3, 2, 3))
    expected = jax.grad(energy(plain, **SAME), (0, 1))(x, kernel)
    slope = lambda x, kernel: jax.grad(energy(convolve, **SAME), (0, 1))(x, kernel)
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))):
        placed = jax.device_put(x, PartitionSpec("data"))
        chex.assert_trees_all_equal(jax.device_get(jax.jit(slope)(placed, kernel)), jax.device_get(expected))

    @functools.partial(
        jax.shard_map,
        mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(PartitionSpec("data"), PartitionSpec()),
        out_specs=(PartitionSpec("data"), PartitionSpec()),
    )
    def mapped(x, kernel):
        return slope(x, kernel)  # the kernel is replicated: its gradients are summed over the devices

    chex.assert_trees_all_equal(jax.device_get(jax.jit(mapped)(x, kernel)), jax.device_get(expected))
