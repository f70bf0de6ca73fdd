"""Speed beside the peers': every system in turn, on the same shapes, types and threads, in one run.

    pip install -r requirements-peers.txt denoising-diffusion-pytorch
    python benchmarks/compare.py                          # all rows: an hour on two CPU cores; resumes
    python benchmarks/compare.py --rows "digits/*"        # some rows
    python benchmarks/compare.py --quick                  # every line once, in a minute; measures nothing

A row is a model and a task. Each system that takes part is a process of its own, which compiles and warms up alone and
then waits; the processes take turns of about a second, round after round, so that a change in the machine's speed meets
all of them. A row reports the least and the median over the rounds; systems are compared by the least, which is what
remains where other programs or other guests of a virtual machine take their share. In the same rounds another process
measures what the machine can do: the rate of float32 matrix products and of reading and writing memory, each with
PyTorch and JAX, the better of the two.

Systems:
- ours, as the scripts run it: with the flags of XLA, the number of devices and the huge pages that they choose.
- diffusers: `UNet2DModel` with the same structure and number of parameters, its schedulers, its `EMAModel` (foreach)
  and PyTorch's fused Adam, eager; and the same with `torch.compile`.
- lucidrains' denoising-diffusion-pytorch, at the same width, levels, image size and batch. Its network differs: two
  blocks per level both ways, attention at every level (linear where the model has none), RMS norms, a 7 x 7 first
  convolution; so it is compared per floating-point operation.
- the network of Flax's example digits_diffusion_model, written anew with NNX, for the digits alone: layer norms, max
  pooling, four levels and a bridge; with 8 features it is the nearest in parameters. It is trained by flow matching
  with AdamW and no EMA, and drawn from by an ODE solver, so there is no sampling row.

Tasks:
- forward: the network on a batch.
- train: one step: noise, forward, backward, clipping, Adam, EMA.
- ancestral, ddim: 64 images, 1000 steps of Algorithm 2 and 50 steps of DDIM. Of long chains some steps are timed, in
  the real loop, and scaled; the row says how many.
- start, start-cold: the whole command that writes one image, drawn by 50 steps of DDIM, to disk, from the launch of the
  process to its end; with what earlier starts have cached, and without.

The weights are random and those of different systems differ; no time depends on them.
"""

import argparse
import contextlib
import dataclasses
import datetime
import fnmatch
import importlib.metadata
import json
import math
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "speed"
IMAGES = 64


class Model(typing.NamedTuple):
    """A network and the batch that it trains on."""

    config: str
    """The experiment in configs/ that it is from."""
    batch_size: int
    changes: dict[str, Any] = {}
    """Fields of the model that differ from those of the experiment."""
    chain_steps: int = 1000
    """Most steps of a chain that are timed."""


MODELS = {
    "digits": Model("digits", 32, chain_steps=50),
    "fashion": Model("fashion_mnist_cpu", 32, chain_steps=10),
    # 1.6M parameters at 28 x 28, with attention at 14 x 14 and 7 x 7.
    "width32": Model("fashion_mnist_cpu", 64, {"num_res_blocks": 2, "attention_resolutions": (14, 7)}, chain_steps=5),
    "cifar10": Model("cifar10", 4, {"dropout": 0.0}, chain_steps=2),
}
TASKS = ("forward", "train", "ancestral", "ddim", "start", "start-cold")
PROCESSES = ("start", "start-cold")
SYSTEMS = ("ours", "diffusers", "diffusers compiled", "lucidrains", "flax example")
MACHINE = "machine"
STEPS = {"ancestral": 1000, "ddim": 50}
COUNTED = {"flops", "bytes"}
"""Of what is timed, where they are known; per second, of the machine."""


class Row(typing.NamedTuple):
    """What one process is to do."""

    model: str
    task: str
    quick: bool

    @property
    def timed_steps(self) -> int:
        """Steps of the chain that are timed."""
        return 2 if self.quick else min(STEPS[self.task], MODELS[self.model].chain_steps)

    @property
    def batch_size(self) -> int:
        """Images at a time."""
        size = IMAGES if self.task in STEPS else MODELS[self.model].batch_size
        return min(size, 4) if self.quick else size


class Work(typing.NamedTuple):
    """A process's part of a row."""

    call: Callable[[], Any]
    """Does the work once, and waits for its end."""
    facts: dict[str, Any]
    """What the table says of it: "parameters", "flops" of one call, .."""


def systems_of(row: "Row", asked: Sequence[str]) -> list[str]:
    """Returns those of the systems asked for that take part in a row and are installed."""
    packages = {"diffusers": "diffusers", "lucidrains": "denoising_diffusion_pytorch"}
    found = []
    for system in asked:
        package = packages.get(system.split()[0])
        if package and not _version(package):
            continue
        if system == "flax example" and (row.model != "digits" or row.task not in ("forward", "train")):
            continue
        if row.task in PROCESSES and system not in ("ours", "diffusers"):
            continue  # lucidrains' has no command; torch.compile would add its minute to every start
        found.append(system)
    return found


def config_of(model: str) -> Any:
    """Returns the configuration of a model."""
    from ddpm_jax.run.experiments import load_config

    config = load_config(MODELS[model].config)
    changed = dataclasses.replace(config.model, **MODELS[model].changes)
    # What diffusers spells otherwise or lacks is left out on both sides; none of it costs time.
    return dataclasses.replace(config, model=changed, data=dataclasses.replace(config.data, flip=False))


# ---- ours ----


def ours(row: Row) -> Work:
    """Makes our part of a row, with what the scripts choose."""
    config = config_of(row.model)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=row.batch_size))

    from ddpm_jax.run.process import choose_devices, prepare
    from ddpm_jax.system.host_options import Hosts

    work: typing.Literal["training", "sampling"] = "training" if row.task == "train" else "sampling"
    prepare(work)
    choose_devices(Hosts(), config if work == "training" else None)

    import jax
    import jax.numpy as jnp
    import numpy as np

    from ddpm_jax.generation.batches import Driver, cut
    from ddpm_jax.generation.chains import make_chain
    from ddpm_jax.generation.sampler_config import SamplerConfig
    from ddpm_jax.keys import image_keys, make_key
    from ddpm_jax.networks import parameter_shapes
    from ddpm_jax.run.build import build_network, image_shape
    from ddpm_jax.samplers.chain import initial_noise
    from ddpm_jax.system.mesh import batch_sharding
    from ddpm_jax.training.setup import make_setup
    from ddpm_jax.training.speed import forward_flops

    network, shape = build_network(config), image_shape(config)
    facts: dict[str, Any] = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(parameter_shapes(network))),
        "devices": jax.device_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "flops": (forward_flops(network, shape) or math.nan) * row.batch_size,
    }
    random = np.random.default_rng(0)
    if row.task == "train":
        parts = make_setup(config)
        step, state = parts.layout.lift(parts.make_step), parts.layout.init(parts.init, parts.keys.init)
        batch = parts.layout.place_batch(random.integers(0, 256, (row.batch_size, *shape), np.uint8), None)

        def train() -> None:
            nonlocal state
            state, _ = step(parts.keys.run, state, batch)
            jax.block_until_ready(state)

        return Work(train, {**facts, "flops": 3 * facts["flops"]})
    driver = Driver(config, batch_size=row.batch_size)
    params = driver.place(jax.jit(network.init)(make_key(0)))
    if row.task == "forward":
        batch = (
            random.normal(size=(driver.batch_size, *shape)).astype(np.float32),
            np.arange(driver.batch_size, dtype=np.int32),
        )
        x, t = jax.device_put(batch, batch_sharding(driver.mesh))
        apply = jax.jit(network.apply).lower(params, x, t).compile()
        facts["bytes"] = (apply.cost_analysis() or {}).get("bytes accessed", math.nan) * jax.device_count()
        return Work(lambda: jax.block_until_ready(apply(params, x, t)), facts)
    sampler_config = SamplerConfig() if row.task == "ancestral" else SamplerConfig(sampler="ddim", steps=STEPS["ddim"])

    def begin(shared: Any, batch: Any) -> Any:
        keys = image_keys(shared, batch)
        return keys, initial_noise(keys, shape), None

    program = driver.chain(STEPS[row.task], make_chain(config, network, sampler_config), begin)
    job = params, make_key(0), jnp.arange(driver.batch_size, dtype=jnp.int32)
    state = program.start(*job)

    def sample() -> None:
        chain = state
        for first, length in cut(row.timed_steps):
            chain = program.advance(*job, chain, first, num_steps=length)
            jax.block_until_ready(chain)

    return Work(sample, {**facts, "flops": facts["flops"] * row.timed_steps})


# ---- PyTorch ----


def _torch() -> Any:
    import torch

    torch.set_num_threads(cores())
    torch.manual_seed(0)
    return torch


def _size(module: Any) -> int:
    return sum(each.numel() for each in module.parameters())


def diffusers(row: Row, *, compiled: bool) -> Work:
    """Makes the part of diffusers, as its own training script and pipelines do the work."""
    from ddpm_jax.interop.diffusers_config import write_scheduler, write_unet

    torch = _torch()
    from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    config = config_of(row.model)
    unet = UNet2DModel.from_config(write_unet(config))
    facts = {"parameters": _size(unet)}
    network = torch.compile(unet) if compiled else unet
    shape = (row.batch_size, config.data.channels, config.data.height, config.data.width)
    schedulers = {"ancestral": DDPMScheduler, "ddim": DDIMScheduler}
    scheduler = schedulers.get(row.task, DDPMScheduler).from_config(write_scheduler(config))
    images = torch.randn(shape)
    if row.task == "train":
        unet.train()
        optimizer = torch.optim.Adam(unet.parameters(), lr=config.train.learning_rate, fused=True)
        ema = EMAModel(unet.parameters(), decay=config.train.ema_decay, foreach=True)

        def train() -> None:
            noise = torch.randn_like(images)
            t = torch.randint(0, config.diffusion.num_steps, (row.batch_size,))
            loss = torch.nn.functional.mse_loss(network(scheduler.add_noise(images, noise, t), t).sample, noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.step(unet.parameters())

        return Work(train, facts)
    unet.eval()
    if row.task == "forward":
        times = torch.arange(row.batch_size)
        return Work(torch.inference_mode()(lambda: network(images, times).sample), facts)
    scheduler.set_timesteps(STEPS[row.task])

    @torch.inference_mode()
    def sample() -> None:
        x = images
        for t in scheduler.timesteps[: row.timed_steps]:
            x = scheduler.step(network(x, t).sample, t, x).prev_sample

    return Work(sample, facts)


def lucidrains(row: Row) -> Work:
    """Makes the part of denoising-diffusion-pytorch, as its `Trainer` and `sample` do the work."""
    torch = _torch()
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA
    from torch.utils.flop_counter import FlopCounterMode

    config = config_of(row.model)
    model, data = config.model, config.data
    unet = Unet(
        model.width,
        dim_mults=model.channel_mult,
        channels=data.channels,
        dropout=model.dropout,
        full_attn=tuple(
            data.height >> level in model.attention_resolutions for level in range(len(model.channel_mult))
        ),
        flash_attn=True,
    )
    steps = {"sampling_timesteps": row.timed_steps} if row.task == "ddim" else {}
    diffusion = GaussianDiffusion(
        unet, image_size=(data.height, data.width), objective="pred_noise", beta_schedule="linear", **steps
    )
    images, t = torch.rand(row.batch_size, data.channels, data.height, data.width), torch.arange(row.batch_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(images, t)
    times = 3 if row.task == "train" else row.timed_steps if row.task in STEPS else 1
    facts = {"parameters": _size(unet), "flops": times * counter.get_total_flops()}
    if row.task == "train":
        optimizer = torch.optim.Adam(diffusion.parameters(), lr=config.train.learning_rate, fused=True)
        ema = EMA(diffusion, beta=config.train.ema_decay, update_every=1, update_after_step=0)

        def train() -> None:
            diffusion(images).backward()
            torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.update()

        return Work(train, facts)
    diffusion.eval()
    if row.task == "forward":
        return Work(torch.inference_mode()(lambda: unet(images, t)), facts)
    if row.task == "ddim":
        return Work(lambda: diffusion.sample(row.batch_size), facts)

    def sample() -> None:
        x = images
        for t in reversed(range(STEPS["ancestral"] - row.timed_steps, STEPS["ancestral"])):
            x, _ = diffusion.p_sample(x, t)

    return Work(sample, facts)


# ---- Flax's example ----


# The example has 64: nearest to our network's parameters are 8.
_FLAX_FEATURES = 8


def flax_example(row: Row) -> Work:
    """Makes the part of the network of Flax's digits example."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from flax_example import Network, flow_matching_loss

    network, rngs = Network(_FLAX_FEATURES, rngs=nnx.Rngs(0)), nnx.Rngs(1)
    facts = {"parameters": sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))}
    images = jax.random.normal(jax.random.key(0), (row.batch_size, 8, 8, 1))
    if row.task == "forward":
        apply, t = nnx.jit(lambda network, x, t: network(x, t)), jnp.linspace(0, 1, row.batch_size)
        return Work(lambda: jax.block_until_ready(apply(network, images, t)), facts)
    clipped = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(5e-4, weight_decay=2e-5))
    optimizer = nnx.Optimizer(network, clipped, wrt=nnx.Param)

    @nnx.jit
    def step(network: Any, optimizer: Any, rngs: Any, x1: jax.Array) -> jax.Array:
        t, x0 = nnx.sigmoid(rngs.normal((row.batch_size,))), rngs.normal(x1.shape)
        value, gradient = nnx.value_and_grad(lambda network: flow_matching_loss(network, x1, t, x0))(network)
        optimizer.update(network, gradient)
        return value

    return Work(lambda: jax.block_until_ready((step(network, optimizer, rngs, images), nnx.state(network))), facts)


# ---- the machine ----


def machine(row: Row) -> Work:
    """Makes the process that measures the machine: products of matrices, and a sum of two arrays into a third."""
    import jax
    import jax.numpy as jnp

    size, length = (256, 2**16) if row.quick else (2048, 2**25)  # 128 MiB each: no cache holds them
    product, total = jax.jit(jnp.matmul), jax.jit(jnp.add)
    a, b = jnp.ones((size, size)), jnp.ones(length)
    candidates = [(lambda: product(a, a).block_until_ready(), lambda: total(b, b).block_until_ready(), 2)]
    if _version("torch"):
        torch = _torch()
        c, d, out = torch.ones(size, size), torch.ones(length), torch.empty(length)
        candidates.append((lambda: torch.mm(c, c), lambda: torch.add(d, d, out=out), 2))
    for multiply, add, _ in candidates:
        multiply(), add()

    def measure() -> dict[str, float]:
        gemm = max(2 * size**3 / _seconds(multiply, 2) for multiply, _, _ in candidates)
        memory = max(arrays * 4 * length / _seconds(add, 2) for _, add, arrays in candidates)
        return {"flops": gemm, "bytes": memory}

    return Work(measure, {})


def _seconds(call: Callable[[], Any], number: int = 1) -> float:
    """Returns the seconds per call."""
    began = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - began) / number


WORKERS: dict[str, Callable[[Row], Work]] = {
    "ours": ours,
    "diffusers": lambda row: diffusers(row, compiled=False),
    "diffusers compiled": lambda row: diffusers(row, compiled=True),
    "lucidrains": lucidrains,
    "flax example": flax_example,
    MACHINE: machine,
}


def work(system: str, row: Row, turn: float) -> None:
    """Takes a turn for each line of the standard input, until it ends; writes what is found as lines of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print

    def answer(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    began = time.perf_counter()
    part = WORKERS[system](row)
    part.call()
    part.facts["first_call"] = time.perf_counter() - began  # compiles
    seconds = _seconds(part.call)
    answer(part.facts)
    for _ in sys.stdin:
        if system == MACHINE:
            answer(part.call())
            continue
        seconds = _seconds(part.call, 1 if row.quick else max(1, round(turn / seconds)))
        answer({"seconds": seconds})
    answer({"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20})


# ---- the rows ----


class Process:
    """A process that takes turns."""

    def __init__(self, system: str, row: Row, turn: float):
        words = ["--worker", system, row.model, row.task, str(turn), *(["--quick"] if row.quick else [])]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, __file__, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.facts = self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            self._process.wait()
            self._errors.seek(0)
            sys.exit(f"a process failed:\n{self._errors.read()}")
        return json.loads(line)

    def turn(self) -> dict[str, float]:
        """Lets the process do its work once."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._answer()

    def end(self) -> dict[str, float]:
        """Ends the process, and returns its peak memory."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        found = self._answer()
        self._process.wait()
        return found


def measure(row: Row, systems: Sequence[str], *, rounds: int, seconds: float, turn: float) -> dict[str, Any]:
    """Measures a row whose systems take turns."""
    processes = {name: Process(name, row, turn) for name in [MACHINE, *systems_of(row, systems)]}
    turns = take_turns(processes, rounds=rounds, seconds=seconds)
    scale = STEPS[row.task] / row.timed_steps if row.task in STEPS else 1
    found: dict[str, Any] = {"batch_size": row.batch_size, "systems": {}}
    if row.task in STEPS:
        found["timed_steps"] = row.timed_steps
    for name, process in processes.items():
        ended, facts = process.end(), process.facts
        if name == MACHINE:
            found["machine"] = {key: statistics.median(each[key] for each in turns[name]) for key in COUNTED}
            continue
        counts = {key: scale * facts[key] for key in COUNTED & {*facts}}
        found["systems"][name] = _summary([scale * each["seconds"] for each in turns[name]]) | facts | counts | ended
    return found


def take_turns(processes: dict[str, Process], *, rounds: int, seconds: float) -> dict[str, list[dict[str, float]]]:
    """Runs the rounds, at least three if they are so many, then no other that would end after the seconds."""
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in processes}
    began = time.monotonic()
    for number in range(rounds):
        if number >= 3 and (time.monotonic() - began) * (1 + 1 / number) > seconds:
            break
        for name, process in processes.items():
            turns[name].append(process.turn())
    return turns


def _summary(times: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(times), "least": min(times), "most": max(times), "rounds": len(times)}


_PIPELINE = """
import sys
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
folder, out, steps = sys.argv[1:]
unet = UNet2DModel.from_pretrained(folder, subfolder="unet")
scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
pipeline = DDIMPipeline(unet, scheduler)
pipeline.set_progress_bar_config(disable=True)
pipeline(batch_size=1, num_inference_steps=int(steps)).images[0].save(out)
"""


def measure_start(row: Row, systems: Sequence[str], *, rounds: int, seconds: float) -> dict[str, Any]:
    """Measures the whole command from its launch to the image on disk; both systems read the same folder."""
    steps, began = 2 if row.quick else STEPS["ddim"], time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder, caches = Path(scratch) / "model", Path(scratch) / "caches"
        _write_model(row.model, folder)
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(caches)}

        def run(system: str, number: int) -> tuple[float, float]:
            out = Path(scratch) / system / str(number)
            out.parent.mkdir(exist_ok=True)
            words = {
                "ours": ["sample.py", folder, "--sampler", "ddim", "--steps", steps, "--num", 1, "--out", out],
                "diffusers": ["-c", _PIPELINE, folder, out.with_suffix(".png"), steps],
            }[system]
            if row.task == "start-cold":
                shutil.rmtree(caches, ignore_errors=True)
            launched = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, *map(str, words)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
            )
            _, status, used = os.wait4(process.pid, 0)
            if status:
                sys.exit(f"{system} failed")
            return time.perf_counter() - launched, used.ru_maxrss / 2**20

        names = systems_of(row, systems)
        for name in names if row.task == "start" else ():
            run(name, -1)  # fills the caches
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for number in range(rounds):
            if number >= 3 and (time.monotonic() - began) * (1 + 1 / number) > seconds:
                break
            for name in names:
                results[name].append(run(name, number))
    found = {}
    for name, each in results.items():
        found[name] = _summary([took for took, _ in each]) | {"peak_gib": max(memory for _, memory in each)}
    return {"batch_size": 1, "systems": found}


def _write_model(model: str, folder: Path) -> None:
    """Writes a model with random weights as a folder of diffusers, in a process of its own."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import compare; "
        "from ddpm_jax.interop.diffusers import write_folder; from ddpm_jax.keys import make_key; "
        "from ddpm_jax.run.build import build_network; config = compare.config_of(sys.argv[2]); "
        "write_folder(Path(sys.argv[3]), build_network(config).init(make_key(0)), config=config, step=0)"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT / "benchmarks"), model, str(folder)], cwd=ROOT, check=True)


# ---- the tables ----


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def about() -> dict[str, Any]:
    """Returns what the machine is and which versions are compared."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    packages = ("jax", "jaxlib", "flax", "torch", "diffusers", "denoising_diffusion_pytorch")
    return {
        "cpu": (models or [platform.processor() or platform.machine()])[0],
        "cores": cores(),
        "date": f"{datetime.date.today()}",
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def report(results: dict[str, Any]) -> str:
    """Formats all results as Markdown."""
    text = _HEAD
    for python, run in sorted(results.items()):
        versions = ", ".join(f"{name} {version}" for name, version in run["about"]["versions"].items() if version)
        machine = f"{run['about']['date']}, {run['about']['cpu']}, {run['about']['cores']} cores"
        text += f"\n## Python {python}\n\n{machine}; {versions}.\n\n"
        names = [name for name in SYSTEMS if any(name in each["systems"] for each in run["rows"].values())]
        head = [
            "model, batch",
            "task",
            *names,
            "diffusers / ours, lucidrains / ours",
            "of GEMM, of memory",
            "peak GiB: ours, diffusers",
        ]
        lines = []
        for key, row in _in_order(run["rows"]):
            model, task = key.split("/")
            cells = [_seconds_cell(row["systems"][name]) if name in row["systems"] else "" for name in names]
            # The same network first; of another one, seconds per operation are compared.
            same = [each["least"] for name, each in row["systems"].items() if name.startswith("diffusers")]
            other = row["systems"].get("lucidrains", {}) if task not in PROCESSES else {}
            own, limits = row["systems"]["ours"], row.get("machine", {})
            ratios = f"**{min(same) / own['least']:.2f}**" if same else "-"
            if "flops" in other:
                ratios += f", {other['least'] / other['flops'] / (own['least'] / own['flops']):.2f}"
            shares = [
                f"{own[key] / own['least'] / limits[key]:.0%}"
                for key in ("flops", "bytes")
                if key in limits and key in own
            ]
            memory = ", ".join(f"{row['systems'][n]['peak_gib']:.2f}" for n in names[:2] if n in row["systems"])
            few = row.get("timed_steps", math.inf) < STEPS.get(task, 0)
            steps = f" ({row['timed_steps']} steps timed)" if few else ""
            lines.append([f"{model}, {row['batch_size']}", f"{task}{steps}", *cells, ratios, ", ".join(shares), memory])
        text += _table(head, lines)
        text += "\nParameters: " + "; ".join(_parameters(run["rows"])) + ".\n"
        chosen = {
            (own["devices"], own["xla_flags"])
            for own in (row["systems"]["ours"] for row in run["rows"].values())
            if "devices" in own
        }
        shown = [f"{number} device{'s' * (number > 1)} ({flags or 'no flags'})" for number, flags in sorted(chosen)]
        text += f"\nOurs chose, by row: {'; '.join(shown)}.\n" if shown else ""
        limits = [row["machine"] for row in run["rows"].values() if "machine" in row]
        if limits:
            rates = [statistics.median(each[key] for each in limits) / 1e9 for key in ("flops", "bytes")]
            text += f"\nThe machine in these rows, medians: {rates[0]:.0f} GFLOP/s, {rates[1]:.1f} GB/s.\n"
    return text


_HEAD = """\
# Speed beside the peers'

As `python benchmarks/compare.py` measured it: seconds per forward pass, per training step, per 64 images, or from the
launch of a command to its image on disk: the least over the rounds, and in brackets the median. What the systems and
tasks are is in the docstring of [the program](../../benchmarks/compare.py), every number in [speed.json](speed.json).
"diffusers / ours" is how many times as long diffusers takes for the same network, by the least, compiled or not;
"lucidrains / ours" compares the seconds per floating-point operation, since its network is another; "of GEMM" is our
rate in floating-point operations of the network (a step counts as three forward passes), relative to that of float32
matrix products on the machine in the same minutes; "of memory", for a forward pass, is the bytes that the compiled
program reads and writes, as XLA counts them, per second, relative to the bandwidth of main memory: much of it is met by
the caches.
"""


def _in_order(rows: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for model in MODELS:
        for task in TASKS:
            if f"{model}/{task}" in rows:
                yield f"{model}/{task}", rows[f"{model}/{task}"]


def _seconds_cell(found: dict[str, float]) -> str:
    show = lambda value: f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return f"{show(found['least'])} ({show(found['median'])})"


def _parameters(rows: dict[str, Any]) -> Iterator[str]:
    sizes: dict[str, dict[str, int]] = {}
    for key, row in _in_order(rows):
        for name, each in row["systems"].items():
            if "parameters" in each:
                sizes.setdefault(key.split("/")[0], {})[name] = each["parameters"]
    for model, by_system in sizes.items():
        yield f"{model} " + ", ".join(
            f"{size:,} ({name})" for name, size in by_system.items() if "compiled" not in name
        )


def _table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines]) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        system, model, task, turn = sys.argv[2:6]
        if system == "ours":
            from ddpm_jax.system.huge_pages import use_huge_pages

            use_huge_pages()  # as the scripts do
        work(system, Row(model, task, "--quick" in sys.argv), float(turn))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [f"{model}/{task}" for model in MODELS for task in TASKS]
    parser.add_argument("--rows", nargs="+", default=["*"], help=f"patterns of {', '.join(every)}")
    parser.add_argument("--again", action="store_true", help="measure rows anew that the results have")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="of a row's rounds, of which it has three at least"
    )
    parser.add_argument("--turn", type=float, default=1.0, help="seconds of one turn, at least one call")
    parser.add_argument("--systems", nargs="+", default=SYSTEMS, choices=SYSTEMS, help="beside ours")
    parser.add_argument("--out", type=Path, default=RESULTS, help="files to write, without .json and .md")
    parser.add_argument("--quick", action="store_true", help="tiny batches, two steps, one round: to try the program")
    given = parser.parse_args()
    chosen = [key for key in every if any(fnmatch.fnmatch(key, pattern) for pattern in given.rows)]
    if not chosen:
        parser.error(f"--rows {' '.join(given.rows)}: none of {', '.join(every)}")
    file, python = given.out.with_suffix(".json"), ".".join(platform.python_version_tuple()[:2])
    results = json.loads(file.read_text()) if file.is_file() else {}
    run = results.setdefault(python, {"rows": {}})
    systems = [name for name in SYSTEMS if name in ("ours", *given.systems)]
    run["about"] = about()
    for key in chosen:
        if key in run["rows"] and not given.again:
            continue
        row = Row(*key.split("/"), given.quick)
        options = {"rounds": 1 if given.quick else given.rounds, "seconds": given.seconds}
        if row.task in PROCESSES:
            found = measure_start(row, systems, **options)
        else:
            found = measure(row, systems, **options, turn=given.turn)
        run["rows"][key] = found
        print(key, {name: round(each["median"], 4) for name, each in found["systems"].items()}, flush=True)
        file.write_text(json.dumps(results, indent=1))
        given.out.with_suffix(".md").write_text(report(results))


if __name__ == "__main__":
    main()
