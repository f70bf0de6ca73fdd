"""Compiles a program for devices that are not there, and reports what it needs and costs."""

import contextlib
import dataclasses
import re
import time
import typing
from collections.abc import Callable, Iterator

import jax

from ddpm_jax.aot.collectives import Collective, describe_collectives, find_collectives, in_figures
from ddpm_jax.aot.program import Program, faults
from ddpm_jax.system import progress
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.topologies import Topology, find_topology

# The one measured point: the paper trained CIFAR-10 at 21 steps/s on a TPU v3-8 (Ho et al. 2020, app. B). For the same
# step XLA estimates 19.5 ms, and the network's operations are 0.19 of the peak.
OF_XLA_ESTIMATE, OF_PEAK = 0.41, 0.19
"""Shares at which a program is assumed to run: of XLA's own estimate, and, where there is none, of the peak."""

# Of the network's operations, those that XLA must have counted for its count to be of the whole unit.
_COUNTED = 0.7


class Memory(typing.NamedTuple):
    """Bytes on one device."""

    arguments: int
    temporaries: int
    outputs: int
    aliased: int
    """Of the outputs, those in the memory of donated arguments."""
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.outputs - self.aliased + self.code


@dataclasses.dataclass(frozen=True)
class Report:
    """What a program needs and costs; figures are of one device and one `unit`, and None where they are not known."""

    name: str
    topology: str
    chip: str
    devices: int
    precision: str
    unit: str
    fits: bool
    needed: int | None
    """Bytes of memory."""
    memory: Memory | None
    """None if it does not fit."""
    available: int
    """Bytes of memory."""
    share: str
    network_flops: float | None
    """Floating-point operations of the network, counted from its layers."""
    flops: float | None
    """As XLA counts them."""
    bytes_accessed: float | None
    """As XLA counts them."""
    optimal_seconds: float | None
    """XLA's estimate."""
    compute_seconds: float | None
    """The operations at the chip's peak."""
    memory_seconds: float | None
    """The bytes at the chip's bandwidth."""
    collectives: tuple[Collective, ...]
    estimated_seconds: float | None
    """Assumed: XLA's estimate by `OF_XLA_ESTIMATE`, or the operations at `OF_PEAK` of the peak."""
    utilization: str
    """Which of the two, in words."""
    images_per_second: float | None
    """Over all devices, from `estimated_seconds`."""
    compile_seconds: float
    faults: tuple[str, ...]
    """What is wrong with the program."""


def compile_for(name: str, lower: Callable[[Topology], Program]) -> None:
    """Compiles a program for accelerators that are not there, and prints the report: what `--aot` does.

    Args:
      name: see `find_topology`; call this before anything is computed.
      lower: makes the program for a topology.

    Raises:
      UserError: the topology or its plug-in is not known, or the program cannot be compiled for it, does not fit or is
        wrong on it (after the report is printed).
    """
    topology = find_topology(name)
    try:
        with _without_cache():
            program = lower(topology)
    except NotImplementedError as error:
        raise UserError(f"something in the program does not run on {topology.name}: {error}") from error
    except jax.errors.JaxRuntimeError as error:  # the start of a chain is compiled to lower its steps
        wrong = f"does not compile for {topology.name}: {error}"
        if sizes := _sizes(error):
            wrong = (
                f"needs {_size(sizes[0])} of the {_size(sizes[1])} of a device of {topology.name}: use a smaller "
                "--batch-size"
            )
        raise UserError(f"the start of the program {wrong}") from error
    found = report(program, topology)
    progress.report(describe(found))
    check(found, program)


def report(program: Program, topology: Topology) -> Report:
    """Compiles a program and reports on it. Nothing is run.

    Args:
      program: lowered for the topology.
      topology: the devices.

    Raises:
      UserError: something in the program cannot be compiled for them.
    """
    start = time.perf_counter()
    needed, compiled, available = None, None, topology.memory
    try:
        with _without_cache():
            compiled = program.lowered.compile(compiler_options=topology.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        sizes = _sizes(error)
        if not sizes:
            raise UserError(f"the {program.name} does not compile for {topology.name}: {error}") from error
        needed, available = sizes
    seconds = time.perf_counter() - start
    memory = None if compiled is None else _memory(compiled)
    needed = memory.total if memory is not None else needed
    text = (compiled.as_text() if compiled is not None else None) or ""
    costs = (compiled.cost_analysis() if compiled is not None else None) or {}
    flops, accessed, optimal = (costs.get(name) for name in ("flops", "bytes accessed", "optimal_seconds"))
    optimal = optimal if optimal is not None and optimal > 0 else None
    peak = topology.tflops[program.precision] * 1e12
    # A loop counts once: what is in it is a part of the unit.
    whole = flops is not None and (program.flops is None or flops > _COUNTED * program.flops)
    if optimal is not None and whole:
        estimated, utilization = optimal / OF_XLA_ESTIMATE, f"{OF_XLA_ESTIMATE:.0%} of the speed that XLA estimates"
    else:
        estimated = None if program.flops is None else program.flops / (OF_PEAK * peak)
        utilization = f"{OF_PEAK:.0%} of the chip's peak"
    work = flops if whole else program.flops
    return Report(
        name=program.name,
        topology=topology.name,
        chip=topology.chip,
        devices=program.devices,
        precision=program.precision,
        unit=program.unit,
        fits=compiled is not None and needed is not None and needed <= available,
        needed=needed,
        memory=memory,
        available=available,
        share=topology.share,
        network_flops=program.flops,
        flops=flops,
        bytes_accessed=accessed,
        optimal_seconds=optimal,
        compute_seconds=None if work is None else work / peak,
        memory_seconds=None if accessed is None else accessed / (topology.gigabytes_per_second * 1e9),
        collectives=find_collectives(text),
        estimated_seconds=estimated,
        utilization=utilization,
        images_per_second=None if estimated is None else program.batch_size / (program.units * estimated),
        compile_seconds=seconds,
        faults=() if compiled is None else tuple(faults(program, text)),
    )


def describe(report: Report) -> str:
    """Returns a report as lines of text."""
    lines = [
        f"{report.name} on {report.devices} {report.chip} ({report.topology}), {report.precision}; "
        f"compiled in {report.compile_seconds:.1f} s, nothing was run"
    ]
    verdict = "fits" if report.fits else "does not fit"
    needed = "unknown" if report.needed is None else _size(report.needed)
    lines.append(
        f"memory of a device: {needed} of {_size(report.available)}{report.share and f' ({report.share})'}: {verdict}"
    )
    if report.memory is not None:
        named = report.memory
        lines.append(
            f"  arguments {_size(named.arguments)}, temporaries {_size(named.temporaries)}, "
            f"outputs {_size(named.outputs)} "
            f"(of which {_size(named.aliased)} in donated arguments), code {_size(named.code)}"
        )
    lines.append(
        f"one {report.unit} on a device: "
        + _known(
            ("network", report.network_flops, 1e9, "GFLOP"),
            ("counted by XLA", report.flops, 1e9, "GFLOP"),
            ("accessed", report.bytes_accessed, 1e9, "GB"),
        )
    )
    lines.append(
        "its time: "
        + _known(
            ("XLA's estimate", report.optimal_seconds, 1e-3, "ms"),
            ("operations at the peak", report.compute_seconds, 1e-3, "ms"),
            ("bytes at the bandwidth", report.memory_seconds, 1e-3, "ms"),
        )
    )
    if report.memory is not None:
        lines.append(f"collectives: {describe_collectives(report.collectives)}")
    if report.images_per_second is not None and report.estimated_seconds is not None:
        lines.append(
            f"assumed: {in_figures(1e3 * report.estimated_seconds)} ms, "
            f"{in_figures(report.images_per_second)} images/s, at {report.utilization}; "
            "the paper's 21 steps/s on a TPU v3-8 are that"
        )
    return "\n".join([*lines, *(f"wrong: {fault}" for fault in report.faults)])


def check(report: Report, program: Program) -> None:
    """Refuses a program that does not fit or has faults.

    Raises:
      UserError: it does not fit, or has a fault.
    """
    if report.faults:
        raise UserError(f"the {report.name} is wrong on {report.topology}: {'; '.join(report.faults)}")
    if not report.fits:
        needed = "more memory" if report.needed is None else _size(report.needed)
        raise UserError(
            f"the {report.name} needs {needed} of the {_size(report.available)} of a device of "
            f"{report.topology}: {program.advice}"
        )


def _known(*figures: tuple[str, float | None, float, str]) -> str:
    """Returns figures in words, each in units of its scale, and the names of those that are not known."""
    known = [f"{name} {in_figures(value / scale)} {unit}" for name, value, scale, unit in figures if value is not None]
    unknown = [name for name, value, *_ in figures if value is None]
    return ", ".join(known + [f"not known here: {', '.join(unknown)}"] * bool(unknown))


def _size(number: int) -> str:
    unit, name = (2**30, "GiB") if number >= 2**27 else (2**20, "MiB")
    return f"{number / unit:,.2f} {name}"


def _memory(compiled: jax.stages.Compiled) -> Memory:
    found: typing.Any = compiled.memory_analysis()
    names = ("argument", "temp", "output", "alias", "generated_code")
    return Memory(*(int(getattr(found, f"{name}_size_in_bytes")) for name in names))


def _sizes(error: jax.errors.JaxRuntimeError) -> list[int]:
    """Returns the bytes that a program needs and those that there are, if that is why it does not compile."""
    size = r"([\d.]+)([KMGT])"
    found = re.search(rf"Used {size} of {size} hbm|\({size}\) exceeds available HBM \({size}\)", str(error))
    numbers = [each for each in found.groups() if each] if found else []
    pairs = zip(numbers[::2], numbers[1::2], strict=True)
    return [int(float(number) * 2 ** (10 * (1 + "KMGT".index(unit)))) for number, unit in pairs]


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Compiles anew: the time is reported, and the cache is for programs that run."""
    option = "jax_enable_compilation_cache"
    before = jax.config.values[option]
    jax.config.update(option, False)
    try:
        yield
    finally:
        jax.config.update(option, before)
