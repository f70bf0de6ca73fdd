"""A convolution of images whose gradients are as fast in a loop as outside, on CPUs too."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType

_LAYOUT = ("NHWC", "HWIO", "NHWC")

Pairs = tuple[tuple[int, int], tuple[int, int]]


def convolve(
    x: Array, kernel: Array, *, strides: Sequence[int] = (1, 1), padding: str | Sequence[Sequence[int]]
) -> Array:
    r"""Computes the convolution of images with a kernel, as `jax.lax.conv_general_dilated` does.

    .. math:: y_{b,h,w,o} = \sum_{i,j,c} x_{b,\, s h + i,\, s w + j,\, c} \, k_{i,j,c,o}

    with x padded by zeros. On CPUs, XLA runs a convolution fast only in this layout, and converts others to it only
    outside loops. In a loop, the gradients that JAX derives, which have other layouts, take 60 times as long. So on
    CPUs both gradients are written as convolutions in this layout, with the same sums; accelerators run what JAX
    derives. Forward-mode differentiation works everywhere, but is slow in loops on CPUs.

    Args:
      x: images, (B, H, W, C).
      kernel: (h, w, C, O), of the type of `x`.
      strides: vertical and horizontal, static.
      padding: "SAME", "VALID", or the rows of zeros above and below and the columns left and right, static.

    Returns:
      (B, H', W', O).
    """
    strides = (strides[0], strides[1])
    if isinstance(padding, str):
        (above, below), (left, right) = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    else:
        (above, below), (left, right) = padding
    return _on_any_mesh(functools.partial(_convolve, strides, ((above, below), (left, right))), x, kernel)


def conv_general_dilated(
    lhs: Array, rhs: Array, window_strides: Sequence[int], padding: str | Sequence[Sequence[int]], **options: Any
) -> Array:
    """Computes a convolution of images as `jax.lax.conv_general_dilated` does, with gradients fast in loops on CPUs.

    It is for the argument of the same name that `nn.Conv` has in Flax Linen and NNX:
    `nn.Conv(..., conv_general_dilated=conv_general_dilated)`.

    Args:
      lhs: images, (B, H, W, C).
      rhs: the kernel, (h, w, C, O).
      window_strides: vertical and horizontal, static.
      padding: as of `convolve`, static.
      **options: what else Flax passes, each at its default.

    Returns:
      (B, H', W', O).

    Raises:
      ValueError: the images are not two-dimensional, or there are a dilation, groups or another option.
    """
    # Flax's layout is that of `convolve`.
    others = {name: value for name, value in options.items() if name != "dimension_numbers"}
    others = {name: value for name, value in others.items() if value not in (None, 1, (1, 1))}
    if lhs.ndim != 4 or others:
        found = ", ".join(f"{name}={value}" for name, value in others.items()) or f"images of shape {lhs.shape}"
        raise ValueError(
            f"conv_general_dilated of ddpm_jax takes images (B, H, W, C) and no dilation, groups or precision, not "
            f"{found}: leave it out for this layer"
        )
    return convolve(lhs, rhs, strides=window_strides, padding=padding)


def convolve_doubled(x: Array, kernel: Array) -> Array:
    r"""Computes the convolution of images whose every pixel is repeated twice in both directions.

    The result is that of `convolve(double(x), kernel, padding="SAME")`, to rounding. CPUs do not make the repeated
    images: of the three rows under the kernel two are equal, and of the columns likewise, so that each of the four
    pixels which come from one is a convolution with a kernel of 2 x 2, sums of the entries of the given one, rounded to
    their type. Accelerators do.

    Args:
      x: images, (B, H, W, C).
      kernel: (3, 3, C, O), of the type of `x`.

    Returns:
      (B, 2 H, 2 W, O).
    """
    repeated = lambda x, kernel: convolve(double(x), kernel, padding="SAME")
    by_platform = lambda x, kernel: jax.lax.platform_dependent(x, kernel, cpu=_by_parity, default=repeated)
    return _on_any_mesh(by_platform, x, kernel)


def double(x: Array) -> Array:
    """Repeats every pixel of images (B, H, W, C) twice in both directions."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    # One pair of axes at a time: a mesh with explicit axes refuses both at once.
    return x.reshape(batch, 2 * height, width, 2, channels).reshape(batch, 2 * height, 2 * width, channels)


def _by_parity(x: Array, kernel: Array) -> Array:
    batch, height, width, _ = x.shape
    for axis in (0, 1):
        # Under an even row of the result lie the rows i - 1, i, i of x, under an odd one i, i, i + 1.
        first, second, third = jnp.split(kernel, 3, axis)
        even, odd = jnp.concatenate([first, second + third], axis), jnp.concatenate([first + second, third], axis)
        kernel = jnp.concatenate([even, odd], -1)  # channels: the parity of the columns, that of the rows, O
    y = convolve(x, kernel, padding=((1, 1), (1, 1)))
    y = y.reshape(batch, height + 1, width + 1, 2, 2, -1)
    # Windows of the odd rows begin one row later.
    y = jnp.stack([y[:, :, :-1, 0], y[:, :, 1:, 1]], 3)
    y = jnp.stack([y[:, :-1, :, :, 0], y[:, 1:, :, :, 1]], 2)
    return y.reshape(batch, 2 * height, 2 * width, -1)


def _on_any_mesh(function: Callable[[Array, Array], Array], x: Array, kernel: Array) -> Array:
    x, kernel = _varying_alike(x, kernel)
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit in sharding.mesh.axis_types:
        # JAX cannot differentiate a convolution on a mesh with explicit axes: they are automatic inside.
        function = jax.sharding.auto_axes(function, out_sharding=sharding)
    return function(x, kernel)


def _varying_alike(*arrays: Array) -> list[Array]:
    # In `shard_map`, a replicated kernel beside divided images: JAX's own operations mark it as varying by themselves,
    # so that its gradient is summed over the devices; a custom derivative does not.
    axes = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    missing = [tuple(frozenset().union(*axes) - own) for own in axes]
    return [jax.lax.pcast(array, own, to="varying") for array, own in zip(arrays, missing, strict=True)]


def _plain(x: Array, kernel: Array, **options: Any) -> Array:
    return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=_LAYOUT, **options)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _convolve(strides: tuple[int, int], padding: Pairs, x: Array, kernel: Array) -> Array:
    return _plain(x, kernel, window_strides=strides, padding=padding)


@functools.partial(_convolve.defjvp, symbolic_zeros=True)
def _tangent(strides: tuple[int, int], padding: Pairs, primals: Any, tangents: Any) -> tuple[Array, Array]:
    # Reverse mode runs the transpose of this. On CPUs this is, in turn, the transpose of the gradient that is wanted.
    (x, kernel), (dx, dkernel) = primals, tangents
    y = _convolve(strides, padding, x, kernel)
    forward = functools.partial(_plain, window_strides=strides, padding=padding)
    terms = []
    if not isinstance(dx, SymbolicZero):
        backward = lambda dy: _input_gradient(kernel, dy, strides, padding, x.shape)
        terms.append(_by_platform(lambda dx: forward(dx, kernel), backward, y, dx))
    if not isinstance(dkernel, SymbolicZero):
        backward = lambda dy: _kernel_gradient(x, dy, strides, padding, kernel.shape)
        terms.append(_by_platform(lambda dkernel: forward(x, dkernel), backward, y, dkernel))
    return y, functools.reduce(jnp.add, terms)


def _by_platform(forward: Any, backward: Any, y: Array, tangent: Array) -> Array:
    transposed = lambda tangent: jax.linear_transpose(backward, y)(tangent)[0]
    return jax.lax.platform_dependent(tangent, cpu=transposed, default=forward)


def _input_gradient(kernel: Array, dy: Array, strides: tuple[int, int], padding: Pairs, shape: Sequence[int]) -> Array:
    turned = jnp.flip(kernel, (0, 1)).transpose(0, 1, 3, 2)
    pads = _mirrored(strides, padding, shape, dy.shape, kernel.shape)
    return _plain(dy, turned, window_strides=(1, 1), padding=pads, lhs_dilation=strides)


def _kernel_gradient(x: Array, dy: Array, strides: tuple[int, int], padding: Pairs, shape: Sequence[int]) -> Array:
    # One of x and dy takes the place of the images, with its channels for images and the images for its channels; the
    # other is the kernel. The kernel must not be the larger one, or XLA exchanges them and leaves the layout. Of two
    # equal ones, that with fewer channels is faster as images, whose windows are copied, unless that costs more than
    # transposing the result.
    (height, width), (out_height, out_width), (channels, out_channels) = x.shape[1:3], dy.shape[1:3], shape[2:]
    larger = out_height * out_width - height * width
    saved = (channels - out_channels) * math.prod(dy.shape[:3]) - 4 * channels * out_channels
    if larger > 0 or (larger == 0 and saved > 0):
        images, kernel = dy.transpose(3, 1, 2, 0), x.transpose(1, 2, 0, 3)
        pads = _mirrored(strides, padding, x.shape, dy.shape, shape)
        gradient = _plain(images, kernel, window_strides=(1, 1), padding=pads, lhs_dilation=strides)
        return jnp.flip(gradient, (1, 2)).transpose(1, 2, 3, 0)
    pads = []
    for size, out, taps, stride, (before, _) in zip(
        x.shape[1:3], dy.shape[1:3], shape[:2], strides, padding, strict=True
    ):
        pads.append((before, (out - 1) * stride + taps - size - before))
    images, kernel = x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3)
    gradient = _plain(images, kernel, window_strides=(1, 1), padding=pads, rhs_dilation=strides)
    return gradient.transpose(1, 2, 0, 3)


def _mirrored(
    strides: tuple[int, int], padding: Pairs, x: Sequence[int], dy: Sequence[int], kernel: Sequence[int]
) -> list[tuple[int, int]]:
    """Returns the zeros around the spread dy in which windows of one extent are found at every offset of the other."""
    pads = []
    for size, out, taps, stride, (before, _) in zip(x[1:3], dy[1:3], kernel[:2], strides, padding, strict=True):
        spread, before = (out - 1) * stride + 1, taps - 1 - before
        pads.append((before, size + taps - 1 - spread - before))
    return pads
