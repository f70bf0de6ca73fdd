"""bfloat16: what is computed in it and what stays float32, read off the program itself, and that it trains."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from ddpm_jax.training.step import Batch

RUN_KEY = jax.random.key(2)


def types_of(jaxpr, found=None):
    """Which types of numbers go into each primitive of a program, in whatever is nested."""
    found = collections.defaultdict(set) if found is None else found
    for equation in jaxpr.eqns:
        for inner in jaxprs_in_params(equation.params):
            types_of(inner, found)
        found[equation.primitive.name] |= {
            str(value.aval.dtype) for value in equation.invars if jnp.issubdtype(value.aval.dtype, jnp.floating)
        }
    return found


@pytest.fixture(scope="module")
def program(training):
    """A step of the U-Net in bfloat16, traced and not compiled, and the shapes of its state before and after."""
    network, optimizer = training.tiny_unet().clone(dtype=jnp.bfloat16), training.paper_optimizer(warmup_steps=0)
    batch = Batch(training.images_of(0), np.arange(16, dtype=np.int32))
    state = jax.eval_shape(lambda key: training.state_of(key, network, optimizer), RUN_KEY)
    trace = jax.make_jaxpr(training.step_of(network, optimizer), return_shape=True)
    jaxpr, (after, info) = trace(RUN_KEY, state, batch)
    return types_of(jaxpr.jaxpr), state, after, info


def test_products_are_bfloat16_and_statistics_softmax_and_loss_float32(program):
    types, *_ = program
    assert types["conv_general_dilated"] == types["dot_general"] == {"bfloat16"}
    # rsqrt: of the variances of the group norms; exp, reduce_max: of the softmax; square: of variances and the loss;
    # erf_inv: of the noise; sqrt: of Adam and the norms; pow: of Adam's corrections.
    for name in ("rsqrt", "exp", "reduce_max", "square", "erf_inv", "sqrt", "pow"):
        assert types[name] == {"float32"}, name


def test_parameters_average_moments_and_what_is_reported_are_float32(program):
    _, before, after, info = program
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(lambda leaf: leaf.dtype, before)
    floats = {str(leaf.dtype) for leaf in jax.tree.leaves((after, info)) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert floats == {"float32"}


def test_it_trains_as_float32_does(training):
    """On the digits: the same course of the loss, though not the same numbers."""
    digits = pytest.importorskip("sklearn.datasets").load_digits().images
    images = np.round(digits * (255 / 16)).astype(np.uint8)[..., None]
    courses = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        network, optimizer, course = training.OneOfEach(dtype=dtype), training.lenient(optax.adam(2e-2)), []
        state = training.drawn_state(training.OneOfEach(), optimizer)
        step = jax.jit(training.step_of(network, optimizer), donate_argnums=1)
        with jax.numpy_dtype_promotion("standard"):
            for number in range(80):
                batch = Batch(images[16 * number :][:16], np.arange(16, dtype=np.int32))
                state, info = step(RUN_KEY, state, batch)
                course.append(info.loss)
        courses[dtype] = np.asarray(course)
    full, half = courses.values()
    assert (full != half).any()
    assert half[:4].mean() > 1
    assert half[-20:].mean() < 0.8
    np.testing.assert_allclose(half[-20:].mean(), full[-20:].mean(), rtol=0.05)
