"""Profiles the U-Net on a CPU: with parts left out, and by operation.

    python benchmarks/profile_cpu.py [digits|fashion_mnist_cpu|cifar10] [--batch-size N] [--rounds 7] [--operations]

Times the forward pass and the gradient of the loss of a configuration's network, whole and with one part replaced by
something cheap, in turn in one process; prints medians in milliseconds. With --operations, it also prints which
operations of the compiled gradient take how long, from JAX's profiler. The environment's XLA_FLAGS and
GLIBC_TUNABLES are in effect; the scripts choose theirs.
"""

import argparse
import collections
import contextlib
import glob
import re
import runpy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax import unet
from ddpm_jax.run.build import build_unet, image_shape

ROOT = Path(__file__).parents[1]


class Identity(nn.Module):
    """Takes the place of a part, whatever its fields are."""

    fields: Any = None

    def __call__(self, x: Any, *rest: Any) -> Any:
        return x


def center_tap(x: jax.Array, kernel: jax.Array, *, strides: Any, padding: Any) -> jax.Array:
    """A convolution's shapes and a ninth of its work."""
    middle = kernel[kernel.shape[0] // 2, kernel.shape[1] // 2]
    return jnp.einsum("bhwc,co->bhwo", x[:, :: strides[0], :: strides[1]], middle)


def autodiff(x: jax.Array, kernel: jax.Array, *, strides: Any, padding: Any) -> jax.Array:
    """The convolution with the gradient that JAX derives."""
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def convolutions(convolve: Callable[..., jax.Array]) -> Any:
    """Makes every convolution of the network one of these, also those after an upsampling."""
    doubled = lambda x, kernel: convolve(unet.double(x), kernel, strides=(1, 1), padding="SAME")
    return mock.patch.multiple(unet, convolve=convolve, convolve_doubled=doubled)


VARIANTS: dict[str, Callable[[], Any]] = {
    "whole": contextlib.nullcontext,
    "without group normalization": lambda: mock.patch.object(unet, "_norm", lambda block, name: Identity(name=name)),
    "without attention": lambda: mock.patch.object(unet, "AttentionBlock", lambda *fields, name: Identity(name=name)),
    "relu for swish": lambda: mock.patch.object(nn, "swish", nn.relu),
    "1 tap of 9 in convolutions": lambda: convolutions(center_tap),
    "convolutions with JAX's gradient": lambda: convolutions(autodiff),
    "convolutions of repeated pixels": lambda: convolutions(unet.convolve),
}


def programs(name: str, batch_size: int, variants: Iterable[str]) -> tuple[dict[tuple[str, str], Any], tuple[Any, ...]]:
    """Compiles the forward pass and the gradient of every variant; returns them and their arguments."""
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["config"]
    network, shape = build_unet(config), image_shape(config)
    x, eps = jax.random.normal(jax.random.key(0), (2, batch_size, *shape))
    t = jnp.arange(batch_size, dtype=jnp.int32) * 999 // batch_size
    params = jax.jit(network.init)(jax.random.key(1), x, t)["params"]
    keys = jax.random.split(jax.random.key(2), batch_size)

    def forward(params: Any, x: Any, t: Any, keys: Any, eps: Any) -> Any:
        return network.apply({"params": params}, x, t)

    def loss(params: Any, x: Any, t: Any, keys: Any, eps: Any) -> Any:
        return jnp.mean(jnp.square(network.apply({"params": params}, x, t, dropout_keys=keys) - eps))

    arguments, compiled = (params, x, t, keys, eps), {}
    for variant in variants:
        with VARIANTS[variant]():
            jax.clear_caches()
            for kind, function in (("forward", forward), ("gradient", jax.value_and_grad(loss))):
                compiled[variant, kind] = jax.jit(lambda *args, f=function: f(*args)).lower(*arguments).compile()
    return compiled, arguments


def operations(program: Any, arguments: tuple[Any, ...], rounds: int) -> Iterator[tuple[str, float, int]]:
    """Yields (kind of operation, milliseconds a call, how many) of a program, the slowest kinds first."""
    text = program.as_text()
    kinds = {}
    for line in text.splitlines():
        if found := re.match(r"\s*(?:ROOT )?%?([\w.-]+) = (\S+?)(?:\{\S*)? ([\w-]+)\(", line):
            inside = re.search(r'op_name="([^"]*)"', line)
            what = inside.group(1).split("/")[-1] if inside else ""
            kinds[found.group(1)] = f"{found.group(3)} {what} {found.group(2)}"
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(rounds):
                jax.block_until_ready(program(*arguments))
        (file,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        spent: collections.Counter[str] = collections.Counter()
        number: collections.Counter[str] = collections.Counter()
        for plane in jax.profiler.ProfileData.from_file(file).planes:
            for line in plane.lines:
                for event in line.events:
                    if event.name in kinds:
                        spent[kinds[event.name]] += event.duration_ns
                        number[kinds[event.name]] += 1
    for kind, duration in spent.most_common():
        yield kind, duration / 1e6 / rounds, number[kind] // rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="fashion_mnist_cpu")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--operations", action="store_true")
    parser.add_argument("--whole", action="store_true", help="leave no parts out")
    options = parser.parse_args()
    variants = ["whole"] if options.whole else list(VARIANTS)
    compiled, arguments = programs(options.config, options.batch_size, variants)
    seconds = collections.defaultdict(list)
    for round in range(options.rounds + 1):
        for variant, program in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            if round:  # the first one is not counted
                seconds[variant].append(time.perf_counter() - start)
    print(f"{options.config}, batch {options.batch_size}, jax {jax.__version__}, {options.rounds} rounds\n")
    print("| | forward, ms | gradient, ms |\n|---|---|---|")
    for variant in variants:
        times = [f"{1e3 * statistics.median(seconds[variant, kind]):.1f}" for kind in ("forward", "gradient")]
        print(f"| {variant} | {' | '.join(times)} |")
    if options.operations:
        for kind in ("forward", "gradient"):
            print(f"\n{kind}, by operation\n\n| | ms | number |\n|---|---|---|")
            for operation, milliseconds, number in list(operations(compiled["whole", kind], arguments, 3))[:40]:
                print(f"| {operation} | {milliseconds:.2f} | {number} |")


if __name__ == "__main__":
    main()
