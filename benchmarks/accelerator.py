"""What one GPU does with this library, and with PyTorch on the same network: right first, then fast.

    python benchmarks/accelerator.py [--minutes 8]        # on a machine with a GPU; no network, no data
    python benchmarks/accelerator.py --quick              # every line once, tiny, on a CPU too

Needs the core alone (jax, flax, optax, chex, numpy) and, for the second column, PyTorch. Every part runs in processes
of its own, with a share of the minutes: what does not fit is skipped, and named in the table. Results are written as
they come, one line of JSON each, to accelerator.jsonl, which must not exist; at the end as accelerator.md. The status
is 1 if a check of `correct` or `resume` is wrong, failed or was skipped.

- correct: parameter counts, the bound in closed form, the U-Net on this device against the CPU (and against PyTorch)
  with weights drawn at random, every sampler against the Gaussian that it must end in.
- resume: six training steps in one process, three and three in two, with deterministic operations: the same bits.
- train: the CIFAR-10 step and the 256 x 256 step: images/s, model FLOP utilization (of the bfloat16 peak, in every
  precision), memory, seconds to compile. bfloat16, TF32, float32; batch 128, 512, 1024.
- sample: 64, 256 and 1024 CIFAR-10 images, 1000 steps of Algorithm 2 (some are timed, and scaled) and 50 of DDIM.
- launch: a small network's 1000-step scan, whose kernels are shorter than their launch, with and without command
  buffers, and step by step from the host.

PyTorch: `torch_unet.py`, which a test compares with ours; bfloat16 autocast, channels last, `torch.compile`, and fused
Adam.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
QUICK = "--quick" in sys.argv
PRECISIONS = ("bfloat16", "TF32", "float32")
# The most important first: what comes last is left out when the time is over.
TRAINING = [
    ("cifar10", "bfloat16", 128),
    ("cifar10", "bfloat16", 512),
    ("cifar10", "TF32", 128),
    ("cifar10", "bfloat16", 1024),
    ("256x256", "bfloat16", 8),
    ("cifar10", "float32", 128),
    ("256x256", "TF32", 8),
    ("cifar10", "TF32", 512),
    ("256x256", "float32", 8),
    ("cifar10", "TF32", 1024),
    ("cifar10", "float32", 512),
    ("cifar10", "float32", 1024),
]
SAMPLING = [("ddim", 64), ("ancestral", 64), ("ddim", 256), ("ancestral", 256), ("ddim", 1024), ("ancestral", 1024)]
if QUICK:
    TRAINING, SAMPLING = [each for each in TRAINING if each[2] == 128], SAMPLING[:2]
STEPS = {"ancestral": 1000, "ddim": 50}
TIMED = 50
LAUNCHES = {
    "as it comes": "",
    "no command buffers": "--xla_gpu_enable_command_buffer=",
    "loops in command buffers": "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL",
}


class Part(typing.NamedTuple):
    """A process."""

    name: str
    share: float
    """Of the time, relative to the shares of the others."""
    flags: str = ""
    """Of XLA."""
    argument: str = ""


def parts() -> list[Part]:
    """Returns the parts in their order."""
    exact = "--xla_gpu_deterministic_ops=true"
    return [
        Part("correct", 55),
        *(Part("resume", 25, exact, which) for which in ("0:6", "3:6")),
        Part("train", 150),
        Part("train-torch", 80),
        Part("sample", 60),
        Part("sample-torch", 40),
        *(Part("launch", 15, flags, name) for name, flags in LAUNCHES.items()),
    ]


class Cases:
    """Runs the cases of a part one after the other, as long as time is left for another like the longest so far."""

    def __init__(self, seconds: float):
        self._end, self._longest = time.monotonic() + seconds, 0.0

    def run(self, name: str, case: Callable[[], dict[str, Any]]) -> None:
        """Runs a case and writes what it returns; what it raises is written too, and the next one runs."""
        now = time.monotonic()
        if now + self._longest > self._end:
            write(part=sys.argv[2], case=name, skipped="no time left")
            return
        try:
            write(part=sys.argv[2], case=name, **case())
        except Exception as error:  # out of memory, an operation that does not compile
            write(part=sys.argv[2], case=name, failed=f"{type(error).__name__}: {error}".splitlines()[0][:300])
        self._longest = max(self._longest, time.monotonic() - now)


def write(**found: Any) -> None:
    """Appends a result to the file of them all."""
    line = json.dumps(found)
    with open(os.environ["ACCELERATOR_RESULTS"], "a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def seconds_of(call: Callable[[], Any], *, at_least: float) -> float:
    """Returns the seconds per call after a first one, of as many calls as take `at_least` seconds in all, in thirds."""
    began = time.perf_counter()
    call()
    once = max(time.perf_counter() - began, 1e-6)
    number = max(1, round((0 if QUICK else at_least) / once / 3))
    thirds = []
    for _ in range(1 if QUICK else 3):
        began = time.perf_counter()
        for _ in range(number):
            call()
        thirds.append((time.perf_counter() - began) / number)
    return statistics.median(thirds)


def chain_numbers(call: Callable[[], Any], sampler: str, number: int, timed: int) -> dict[str, Any]:
    """Returns the numbers of a sampler's whole chain for some images, from a call that takes `timed` of its steps."""
    took = seconds_of(call, at_least=1) * STEPS[sampler] / timed
    return {"seconds": took, "images_per_second": number / took, "timed_steps": timed}


# ---- ours ----


def unet_of(
    model: str, precision: str = "float32", *, dropout: float | None = None
) -> tuple[Any, tuple[int, int, int]]:
    """Returns a network and the shape of its images."""
    import jax.numpy as jnp

    from ddpm_jax.unet import UNet

    dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    if model == "small":
        return UNet(32, (1, 2), 1, (4,), num_groups=8, dropout=0.0, out_channels=1, dtype=dtype), (8, 8, 1)
    if QUICK:
        return UNet(8, (1, 2), 1, (4,), num_groups=4, dropout=dropout or 0.0, dtype=dtype), (8, 8, 3)
    if model == "medium":
        return UNet(64, (1, 2), 1, (16,), dropout=0.1, dtype=dtype), (32, 32, 3)
    if model == "256x256":
        return UNet(128, (1, 1, 2, 2, 4, 4), 2, (16,), dropout=0.0, dtype=dtype), (256, 256, 3)
    return UNet(128, (1, 2, 2, 2), 2, (16,), dropout=0.1 if dropout is None else dropout, dtype=dtype), (32, 32, 3)


def precision_of(name: str) -> Any:
    """Returns the context in which float32 products are computed so."""
    import jax

    return jax.default_matmul_precision({"float32": "highest", "TF32": "tensorfloat32"}.get(name, "default"))


def params_of(unet: Any, shape: tuple[int, int, int], *, draw: bool = False) -> Any:
    """Returns first parameters; or all drawn anew, so that none is zero."""
    import jax
    import jax.numpy as jnp

    init = jax.jit(lambda key: unet.init(key, jnp.zeros((1, *shape)), jnp.zeros(1, jnp.int32))["params"])
    params = init(jax.random.key(0))
    if not draw:
        return params
    random = np.random.default_rng(0)

    def leaf_of(path: Any, leaf: Any) -> Any:
        if path[-1].key == "kernel":
            return jnp.asarray(random.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1])), jnp.float32)
        return jnp.asarray((path[-1].key == "scale") + 0.2 * random.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf_of, params)


def training_of(unet: Any, shape: tuple[int, int, int], *, learning_rate: float = 2e-4) -> tuple[Any, Any]:
    """Returns the first state and the step of Algorithm 1: noise, gradient, clipping, Adam, EMA, a key per image."""
    import jax
    import jax.numpy as jnp
    import optax

    import ddpm_jax as ddpm
    from ddpm_jax import keys as per_image

    schedule = ddpm.make_schedule("linear", 1000)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))
    params = params_of(unet, shape)
    state = (jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))

    def step(state: Any, images: Any) -> tuple[Any, Any]:
        number, params, ema, moments = state
        keys = per_image.image_keys(jax.random.fold_in(jax.random.key(1), number), jnp.arange(len(images)))
        times, noise, dropped = per_image.split(keys, 3)
        t = jax.vmap(lambda key: jax.random.randint(key, (), 0, 1000))(times)

        def loss(params: Any) -> Any:
            predict = lambda x_t, t: unet.apply({"params": params}, x_t, t, dropout_keys=dropped)
            losses, _ = ddpm.l_simple(noise, schedule, predict, ddpm.to_float(images), t)
            return losses.mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        params = optax.apply_updates(params, updates)
        ema = jax.tree.map(lambda old, new: 0.9999 * old + 0.0001 * new, ema, params)
        return (number + 1, params, ema, moments), value

    return state, step


def pixels(number: int, shape: tuple[int, int, int]) -> Any:
    """Returns random images."""
    return np.random.default_rng(1).integers(0, 256, (number, *shape), np.uint8)


def correct(seconds: float, argument: str) -> None:
    """Compares with what is known."""
    import jax
    import jax.numpy as jnp

    import ddpm_jax as ddpm
    from ddpm_jax.samplers.by_name import SAMPLERS, make_sampler

    cases = Cases(seconds)
    schedule = ddpm.make_schedule("linear", 1000)

    def counts() -> dict[str, Any]:
        x, t = lambda size: jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
        large = ddpm.UNet(channel_mult=(1, 1, 2, 2, 4, 4))
        found = [
            sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(unet.init, jax.random.key(0), x(size), t)))
            for unet, size in ((ddpm.UNet(), 32), (large, 256))
        ]
        return verdict(found == [35_746_307, 113_673_219], 0.0, "35,746,307 and 113,673,219")

    def bound() -> dict[str, Any]:
        # For data N(0, I) the best prediction of x_0 is sqrt(alphas_bar) x_t, and the noise's share the rest.
        def predict(x_t: Any, t: Any) -> Any:
            return jnp.sqrt(1 - schedule.alphas_bar[t])[:, None, None, None] * x_t

        sampler = ddpm.ancestral(schedule, predict, clip_x0=False)
        drawn = jax.jit(lambda key: ddpm.sample(key, sampler, (4096, 2, 2, 1)))(jax.random.key(0))
        error = abs(float(drawn.std()) - 1)
        return verdict(error < 0.02, error, "N(0, 1) through 1000 steps, standard deviation")

    def unet(precision: str) -> tuple[Any, tuple[int, int, int]]:
        return unet_of("cifar10", precision, dropout=0.0)

    params = params_of(*unet("float32"), draw=True)
    x = np.random.default_rng(2).normal(size=(4, *unet("float32")[1])).astype(np.float32)
    t = np.array([0, 10, 500, 999], np.int32)

    def outputs(precision: str, device: Any) -> np.ndarray:
        apply = jax.jit(lambda params, x, t: unet(precision)[0].apply({"params": params}, x, t))
        with precision_of(precision):
            return np.asarray(apply(*jax.device_put((params, x, t), device)))

    @functools.cache
    def on_cpu() -> np.ndarray:
        return outputs("float32", jax.devices("cpu")[0])

    def here(precision: str, tolerance: float) -> dict[str, Any]:
        error = relative(outputs(precision, jax.devices()[0]), on_cpu())
        return verdict(error < tolerance, error, f"the U-Net in {precision} against the CPU's, of its scale")

    def against_torch() -> dict[str, Any]:
        import torch
        from torch_unet import TorchUNet

        network, shape = unet("float32")
        twin = TorchUNet(network, image_size=shape[0], channels=shape[2]).eval()
        twin.load(params)
        with torch.no_grad():
            expected = twin(torch.from_numpy(x.transpose(0, 3, 1, 2)), torch.from_numpy(t)).numpy()
        error = relative(outputs("float32", jax.devices()[0]), expected.transpose(0, 2, 3, 1))
        return verdict(error < 1e-4, error, "the U-Net against PyTorch's on the CPU, of its scale")

    def ends_in_the_data(name: str) -> dict[str, Any]:
        mean, std, number = np.linspace(-0.5, 0.5, 4), np.linspace(0.1, 1.0, 4), 4096
        alphas_bar = np.asarray(schedule.alphas_bar, np.float64)[:, None]
        gains = jnp.asarray(np.sqrt(1 - alphas_bar) / (alphas_bar * std**2 + 1 - alphas_bar), jnp.float32)
        means = jnp.asarray(np.sqrt(alphas_bar) * mean, jnp.float32)

        def predict(x_t: Any, t: Any) -> Any:
            return (gains[t] * (x_t.reshape(-1, 4) - means[t])).reshape(x_t.shape)

        sampler = make_sampler(
            name, schedule, predict, num_steps={"ancestral": 1000, "ddim": 500}.get(name, 100), clip_x0=False
        )
        drawn = jax.jit(lambda key: ddpm.sample(key, sampler, (number, 2, 2, 1)))(jax.random.key(0))
        drawn = np.asarray(drawn, np.float64).reshape(number, 4)
        # In units of what so many draws scatter; besides, a hundred steps are not infinitely many.
        of_mean = abs(drawn.mean(0) - mean) / (std / np.sqrt(number) + 0.002)
        of_std = abs(drawn.std(0) - std) / (std / np.sqrt(2 * number) + 0.02 * std)
        error = float(max(of_mean.max(), of_std.max()))
        return verdict(error < 4.5, error, f"{name} against its Gaussian, in standard deviations")

    cases.run("parameters", counts)
    cases.run("noise stays noise", bound)
    cases.run("U-Net, float32", lambda: here("float32", 1e-4))
    for name in SAMPLERS:
        cases.run(name, lambda name=name: ends_in_the_data(name))
    with contextlib.suppress(ImportError):
        import torch  # noqa: F401

        cases.run("U-Net, PyTorch", against_torch)
    cases.run("U-Net, TF32", lambda: here("TF32", 2e-2))
    cases.run("U-Net, bfloat16", lambda: here("bfloat16", 1e-1))


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Returns the largest difference, of the scale of what is expected."""
    return float(abs(found - expected).max() / abs(expected).max())


def verdict(right: bool, error: float, what: str) -> dict[str, Any]:
    """Returns the result of a comparison."""
    return {"right": bool(right), "error": float(f"{error:.3g}"), "what": what}


def resume(seconds: float, argument: str) -> None:
    """Trains to the last step from the first one, whose state is read if it is not 0; saves step 3 on the way."""
    import jax

    first, last = map(int, argument.split(":"))
    unet, shape = unet_of("medium", "bfloat16")
    saved = Path(os.environ["ACCELERATOR_SCRATCH"]) / "state.npz"

    def train() -> dict[str, Any]:
        state, step = training_of(unet, shape)
        leaves, tree = jax.tree.flatten(state)
        if first:
            with np.load(saved) as file:
                leaves = [jax.numpy.asarray(file[f"arr_{i}"]) for i in range(len(leaves))]
        state, compiled = tree.unflatten(leaves), jax.jit(step)
        for number in range(first, last):
            if number == 3 and not first:
                np.savez(saved, *map(np.asarray, jax.tree.leaves(state)))
            state, _ = compiled(state, pixels(16, shape))
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
        return {"checksum": hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()[:16]}

    Cases(seconds).run(f"steps {argument}", train)


def train(seconds: float, argument: str) -> None:
    """Times training steps of ours."""
    import jax

    from ddpm_jax.training.speed import peak_memory_gib, peak_tflops, utilization

    cases, device = Cases(seconds), jax.devices()[0]

    def case(model: str, precision: str, batch_size: int) -> dict[str, Any]:
        batch_size = 2 if QUICK else batch_size
        unet, shape = unet_of(model, precision)
        flops = forward_flops(unet, shape)
        with precision_of(precision):
            state, step = training_of(unet, shape)
            images = jax.device_put(pixels(batch_size, shape))
            began = time.perf_counter()
            compiled = jax.jit(step, donate_argnums=0).lower(state, images).compile()
            compiling = time.perf_counter() - began
            memory = compiled.memory_analysis()

            def call() -> None:
                nonlocal state
                for _ in range(4):  # in flight together, as in the loop
                    state, loss = compiled(state, images)
                loss.block_until_ready()

            rate = 4 * batch_size / seconds_of(call, at_least=2)
        share = utilization(rate, flops, devices=1, tflops=peak_tflops(device.device_kind))
        planned = memory.argument_size_in_bytes + memory.temp_size_in_bytes if memory else None
        return {
            "images_per_second": rate,
            "mfu": share,
            "seconds_to_compile": compiling,
            "program_gib": planned and planned / 2**30,
            "process_peak_gib": peak_memory_gib(device),
        }

    for model, precision, batch_size in TRAINING:
        name = f"{model}, {precision}, batch {batch_size}"
        cases.run(
            name, lambda model=model, precision=precision, batch_size=batch_size: case(model, precision, batch_size)
        )
        jax.clear_caches()


def forward_flops(unet: Any, shape: tuple[int, int, int]) -> float | None:
    """Returns the operations of a forward pass of one image, as XLA counts them for the CPU."""
    import jax

    from ddpm_jax import networks
    from ddpm_jax.training import speed

    with jax.default_device(jax.devices("cpu")[0]):
        return speed.forward_flops(networks.from_linen(unet, shape), shape)


def sample(seconds: float, argument: str) -> None:
    """Times chains of ours, in bfloat16."""
    import jax

    import ddpm_jax as ddpm
    from ddpm_jax.keys import image_keys
    from ddpm_jax.samplers.by_name import make_sampler
    from ddpm_jax.samplers.chain import initial_noise, run_chain

    cases = Cases(seconds)
    unet, shape = unet_of("cifar10", "bfloat16", dropout=0.0)
    params, schedule = params_of(unet, shape), ddpm.make_schedule("linear", 1000)

    def case(name: str, number: int) -> dict[str, Any]:
        number, timed = (2, 2) if QUICK else (number, TIMED)

        def draw(params: Any, key: Any) -> Any:
            predict = lambda x_t, t: unet.apply({"params": params}, x_t, t)
            sampler = make_sampler(name, schedule, predict, num_steps=STEPS[name])
            keys = image_keys(key, jax.numpy.arange(number))
            state = sampler.init(initial_noise(keys, shape))
            return run_chain(keys, sampler, state, 0, num_steps=timed).x

        began = time.perf_counter()
        compiled = jax.jit(draw).lower(params, jax.random.key(0)).compile()
        compiling = time.perf_counter() - began
        call = lambda: compiled(params, jax.random.key(0)).block_until_ready()
        return chain_numbers(call, name, number, timed) | {"seconds_to_compile": compiling}

    for name, number in SAMPLING:
        cases.run(f"{name}, {number} images", lambda name=name, number=number: case(name, number))
        jax.clear_caches()


def launch(seconds: float, argument: str) -> None:
    """Times the steps of a small network's chain: as one scan, and one by one."""
    import re

    import jax
    import jax.numpy as jnp

    import ddpm_jax as ddpm
    from ddpm_jax.keys import image_keys
    from ddpm_jax.samplers.chain import initial_noise, run_chain

    number, length = (2, 10) if QUICK else (64, 1000)
    unet, shape = unet_of("small")
    params, keys = params_of(unet, shape), image_keys(jax.random.key(0), jnp.arange(number))
    schedule = ddpm.make_schedule("linear", 1000)

    def chain(params: Any, state: Any, first: Any, *, num_steps: int) -> Any:
        sampler = ddpm.ancestral(schedule, lambda x_t, t: unet.apply({"params": params}, x_t, t))
        return run_chain(keys, sampler, state, first, num_steps=num_steps)

    def case() -> dict[str, Any]:
        state = ddpm.ancestral(schedule, lambda x_t, t: x_t).init(initial_noise(keys, shape))
        compiled = {}
        for steps in (1, length):
            lowered = jax.jit(chain, static_argnames="num_steps").lower(params, state, 0, num_steps=steps)
            compiled[steps] = lowered.compile()
        text = compiled[1].as_text()
        # Each of them is at least one kernel: what a step launches.
        kernels = len(re.findall(r" (?:fusion|custom-call|convolution|dot|copy|sort)\(", text))

        def one_by_one() -> None:
            now = state
            for first in range(length // 10):
                now = compiled[1](params, now, first)
            now.x.block_until_ready()

        scanned = seconds_of(lambda: compiled[length](params, state, 0).x.block_until_ready(), at_least=1)
        alone = seconds_of(one_by_one, at_least=1)
        return {
            "microseconds_per_step": 1e6 * scanned / length,
            "one_by_one": 1e6 * alone / (length // 10),
            "kernels_per_step": kernels,
            "flags": os.environ.get("XLA_FLAGS", ""),
        }

    Cases(seconds).run(argument, case)


# ---- PyTorch ----


def twin_of(model: str) -> tuple[Any, tuple[int, int, int], Any, Any]:
    """Returns PyTorch's network, the shape of its images, its device, and the context of its precision."""
    import torch
    from torch_unet import TorchUNet

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unet, shape = unet_of(model)
    twin = TorchUNet(unet, image_size=shape[0], channels=shape[2]).to(device, memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = True
    return twin, shape, device, lambda: torch.autocast(device.type, torch.bfloat16)


def finish(device: Any) -> None:
    """Waits for the device."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def train_torch(seconds: float, argument: str) -> None:
    """Times training steps of PyTorch's."""
    import torch

    cases = Cases(seconds)

    def case(model: str, batch_size: int) -> dict[str, Any]:
        batch_size = 2 if QUICK else batch_size
        twin, shape, device, precision = twin_of(model)
        network = torch.compile(twin, dynamic=False)
        optimizer = torch.optim.Adam(twin.parameters(), lr=2e-4, fused=True)
        ema = [each.detach().clone() for each in twin.parameters()]
        alphas_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).float().to(device)
        size = (batch_size, shape[2], shape[0], shape[1])
        images = torch.rand(size, device=device).to(memory_format=torch.channels_last) * 2 - 1

        def step() -> None:
            noise, t = torch.randn_like(images), torch.randint(0, 1000, (batch_size,), device=device)
            signal = alphas_bar[t][:, None, None, None]
            with precision():
                output = network(signal.sqrt() * images + (1 - signal).sqrt() * noise, t)
            torch.nn.functional.mse_loss(output.float(), noise).backward()
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            torch._foreach_lerp_(ema, [each.detach() for each in twin.parameters()], 0.0001)

        began = time.perf_counter()
        step()
        finish(device)
        compiling = time.perf_counter() - began

        def call() -> None:
            for _ in range(4):
                step()
            finish(device)

        rate = 4 * batch_size / seconds_of(call, at_least=2)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        return {"images_per_second": rate, "seconds_to_compile": compiling, "process_peak_gib": peak}

    for model, precision, batch_size in TRAINING:
        if precision == "bfloat16":
            name = f"{model}, bfloat16, batch {batch_size}"
            cases.run(name, lambda model=model, batch_size=batch_size: case(model, batch_size))
            torch._dynamo.reset()


def sample_torch(seconds: float, argument: str) -> None:
    """Times chains of PyTorch's, with CUDA graphs (mode reduce-overhead)."""
    import torch

    cases = Cases(seconds)
    twin, shape, device, precision = twin_of("cifar10")
    twin.eval()
    alphas_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))

    def case(name: str, number: int) -> dict[str, Any]:
        number, timed = (2, 2) if QUICK else (number, TIMED)
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        network = torch.compile(twin, dynamic=False, mode=mode)
        times = np.linspace(999, 0, STEPS[name]).round().astype(int)
        size = (number, shape[2], shape[0], shape[1])

        @torch.inference_mode()
        def draw() -> None:
            x = torch.randn(size, device=device).to(memory_format=torch.channels_last)
            for k in range(timed):
                now, before = alphas_bar[times[k]], alphas_bar[times[k + 1]] if k + 1 < len(times) else 1.0
                with precision():
                    eps = network(x, torch.full((number,), int(times[k]), device=device)).float()
                x0 = ((x - (1 - now) ** 0.5 * eps) / now**0.5).clamp(-1, 1)
                beta = 1 - now / before
                if name == "ddim":
                    x = before**0.5 * x0 + (1 - before) ** 0.5 * (x - now**0.5 * x0) / (1 - now) ** 0.5
                else:
                    mean = before**0.5 * beta / (1 - now) * x0 + (now / before) ** 0.5 * (1 - before) / (1 - now) * x
                    x = mean + beta**0.5 * torch.randn_like(x)
            finish(device)

        began = time.perf_counter()
        draw()
        compiling = time.perf_counter() - began
        return chain_numbers(draw, name, number, timed) | {"seconds_to_compile": compiling}

    for name, number in SAMPLING:
        cases.run(f"{name}, {number} images", lambda name=name, number=number: case(name, number))


PARTS: dict[str, Callable[[float, str], None]] = {
    "correct": correct,
    "resume": resume,
    "train": train,
    "train-torch": train_torch,
    "sample": sample,
    "sample-torch": sample_torch,
    "launch": launch,
}


# ---- the run ----


def run_part(part: Part, seconds: float, environment: Mapping[str, str]) -> None:
    """Runs a part in a process, which writes its results itself; it is ended when its time is over."""
    words = ["--part", part.name, str(seconds - 8), part.argument, *(["--quick"] if QUICK else [])]
    environment = {**environment, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {part.flags}".strip()}
    rest = {"part": part.name, "case": part.argument or "the rest"}
    with tempfile.TemporaryFile("w+") as errors:
        try:
            done = subprocess.run(
                [sys.executable, __file__, *words], stderr=errors, env=environment, timeout=max(seconds, 1)
            )
        except subprocess.TimeoutExpired:
            write(**rest, skipped="its time was over")
            return
        if done.returncode:
            errors.seek(0)
            write(**rest, failed=(errors.read().strip().splitlines() or [f"status {done.returncode}"])[-1][:300])


def about() -> dict[str, Any]:
    """Returns the device and the versions, as a process of its own sees them."""
    code = (
        "import json, jax; d = jax.devices()[0]; found = {'device': d.device_kind, 'jax': jax.__version__}\n"
        "try:\n import torch; found['torch'] = torch.__version__\nexcept ImportError: pass\nprint(json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"JAX finds no device: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--part"]:
        name, seconds, argument = sys.argv[2:5]
        PARTS[name](float(seconds), argument)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these")
    parser.add_argument("--out", type=Path, default=Path("accelerator"), help="files to write, without .jsonl and .md")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one repetition: to try the program")
    given = parser.parse_args()
    began, found, results = time.monotonic(), about(), given.out.with_suffix(".jsonl").resolve()
    chosen = [each for each in parts() if each.name in given.parts and ("torch" in found or "torch" not in each.name)]
    if results.exists():
        parser.error(f"{results} has earlier results: move it, or name other files by --out")
    results.write_text("")
    os.environ["ACCELERATOR_RESULTS"], platforms = str(results), os.environ.get("JAX_PLATFORMS")
    write(part="about", **found, minutes=given.minutes, quick=given.quick)
    with tempfile.TemporaryDirectory() as scratch:
        environment = {
            **os.environ,
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            **({"JAX_PLATFORMS": f"{platforms},cpu"} if platforms and "cpu" not in platforms else {}),
            "JAX_ENABLE_COMPILATION_CACHE": str(QUICK).lower(),  # the seconds to compile are a result
            "ACCELERATOR_SCRATCH": scratch,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH")))),
        }
        for index, part in enumerate(chosen):
            left = 60 * given.minutes - (time.monotonic() - began)
            # What earlier parts left over is shared out too.
            run_part(part, left * part.share / sum(each.share for each in chosen[index:]), environment)
    ends = [line["checksum"] for line in read(results) if "checksum" in line]
    if len(ends) == 2:
        write(
            part="resume", case="resume", **verdict(ends[0] == ends[1], 0.0, "six steps at once, or in two processes")
        )
    write(part="about", case="all", seconds=round(time.monotonic() - began, 1))
    given.out.with_suffix(".md").write_text(report(read(results)))
    checks = [line for line in read(results) if line["part"] in ("correct", "resume")]
    wrong = [line["case"] for line in checks if not line.get("right", "checksum" in line)]
    if wrong:
        sys.exit(f"not right, or not known to be: {', '.join(wrong)}")


def read(results: Path) -> list[dict[str, Any]]:
    """Reads the results so far."""
    return [json.loads(line) for line in results.read_text().splitlines()]


def report(lines: list[dict[str, Any]]) -> str:
    """Formats the results as Markdown."""
    first = lines[0]
    text = f"# {first['device']}\n\njax {first['jax']}, torch {first.get('torch', 'absent')}.\n\n"
    text += "| correct | error | what | |\n|---|---|---|---|\n"
    for line in lines:
        if "right" in line:
            word = "right" if line["right"] else "**wrong**"
            text += f"| {line['case']} | {line['error']:g} | {line['what']} | {word} |\n"
    by_torch = {(line["part"], line.get("case")): line for line in lines}

    def beside(line: dict[str, Any]) -> dict[str, Any]:
        return by_torch.get((f"{line['part']}-torch", line.get("case")), {})

    def show(line: dict[str, Any], name: str, form: str = ".3g") -> str:
        return format(line[name], form) if isinstance(line.get(name), int | float) else "-"

    titles = "ours, images/s | MFU | program, GiB | compile, s | PyTorch, images/s | compile, s | ours / PyTorch"
    for title, part, names in (
        ("training", "train", ("images_per_second", "mfu", "program_gib", "seconds_to_compile")),
        ("sampling", "sample", ("images_per_second", "seconds", "timed_steps", "seconds_to_compile")),
    ):
        head = titles if part == "train" else titles.replace("MFU | program, GiB", "seconds | steps timed")
        text += f"\n| {title} | {head} |\n|{'---|' * 8}\n"
        for line in lines:
            if line["part"] == part and "images_per_second" in line:
                theirs = beside(line)
                ratio = (
                    line["images_per_second"] / theirs["images_per_second"] if "images_per_second" in theirs else None
                )
                cells = [show(line, name) for name in names]
                cells += [show(theirs, "images_per_second"), show(theirs, "seconds_to_compile")]
                text += f"| {line['case']} | {' | '.join(cells)} | {format(ratio, '.2f') if ratio else '-'} |\n"
    text += "\n| 1000 steps of a small network | us per step, one scan | us, step by step | kernels per step |\n"
    text += "|---|---|---|---|\n"
    for line in lines:
        if line["part"] == "launch" and "one_by_one" in line:
            cells = [show(line, name) for name in ("microseconds_per_step", "one_by_one", "kernels_per_step")]
            text += f"| {line['case']} | {' | '.join(cells)} |\n"
    missing = [
        f"{line['part']} {line['case']} ({line.get('skipped') or line['failed']})"
        for line in lines
        if "skipped" in line or "failed" in line
    ]
    return text + (f"\nNot measured: {'; '.join(missing)}.\n" if missing else "")


if __name__ == "__main__":
    main()
