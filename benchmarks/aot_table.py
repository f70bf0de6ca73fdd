"""What the paper's models need on accelerators, from compiling for them: `python benchmarks/aot_table.py`.

No accelerator is needed, only the compilers' plug-ins (docs/accelerators.md). Each row compiles for minutes; what is
done is kept in docs/results/accelerators.json, so that the command can be stopped and run again.
"""

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import jax

from ddpm_jax.aot.collectives import describe_collectives
from ddpm_jax.aot.report import Report, report
from ddpm_jax.aot.training import training_program
from ddpm_jax.run.experiments import load_config
from ddpm_jax.system.topologies import find_topology

RESULTS = Path(__file__).parents[1] / "docs" / "results"
ROWS, PAGE = RESULTS / "accelerators.json", RESULTS / "accelerators.md"

SLICES = {
    "h100:1": "1 H100",
    "h100:8": "8 H100",
    "v5e:2x4": "TPU v5e-8",
    "v6e:2x4": "TPU v6e-8",
    "v5p:2x2x1": "TPU v5p-8",
    "v3:2x2": "TPU v3-8",
}
MODELS = {
    "cifar10": "CIFAR-10, 35.7M",
    "celebahq256": "CelebA-HQ and LSUN 256x256, 113.7M",
    "lsun_bedroom256_large": "LSUN Bedroom 256x256, 255.7M",
}
TABLE = [
    (model, precision, topology, {})
    for model, precision in [
        ("cifar10", "float32"),
        ("celebahq256", "float32"),
        ("lsun_bedroom256_large", "float32"),
        ("celebahq256", "bfloat16"),
        ("lsun_bedroom256_large", "bfloat16"),
        ("cifar10", "bfloat16"),
    ]
    for topology in SLICES
]
# Where, and with what, the largest batch of the 256x256 model is looked for.
LARGEST = [
    ("celebahq256", precision, topology, settings)
    for precision, settings, topologies in [
        ("float32", {}, SLICES),
        ("bfloat16", {}, SLICES),
        ("bfloat16", {"remat": True}, ("h100:1", "v5e:2x4", "v3:2x2")),
        ("float32", {"fsdp": 8}, ("v5e:2x4", "v3:2x2")),
    ]
    for topology in topologies
]


def name_of(model: str, precision: str, topology: str, settings: dict[str, Any]) -> str:
    return " ".join([model, precision, topology, *(f"{name}={value}" for name, value in settings.items())])


def compile_row(model: str, precision: str, topology: str, settings: dict[str, Any]) -> dict[str, Any]:
    config = load_config(model)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision=precision, **settings))
    where = find_topology(topology)
    found: Report = report(training_program(config, where), where)
    row = dataclasses.asdict(found)
    row["collectives"] = describe_collectives(found.collectives)
    row["memory"] = found.memory and found.memory._asdict()
    row["batch_size"] = config.train.batch_size
    return {"jax": jax.__version__, **row}


def tried_batches(rows: dict[str, Any], name: str) -> dict[int, dict[str, Any]]:
    """The rows of a search, by images on a device."""
    found = [row for key, row in rows.items() if key == name or key.startswith(f"{name} batch_size=")]
    return {row["batch_size"] // row["devices"]: row for row in sorted(found, key=lambda row: row["batch_size"])}


def bracket(tried: dict[int, dict[str, Any]]) -> tuple[int, float]:
    """The largest batch of a device that was seen to fit, and the smallest that was seen not to."""
    fits = [number for number, row in tried.items() if row["fits"]]
    return max(fits, default=0), min((number for number in tried if number not in fits), default=math.inf)


def next_batch(rows: dict[str, Any], name: str, topology: str) -> int | None:
    """The next batch of a device to compile in search of the largest that fits; None when it is found.

    Memory is nearly linear in the batch: the next is where the line through the two nearest meets the limit.
    """
    tried = tried_batches(rows, name)
    if not tried:
        return 8
    low, high = bracket(tried)
    if high - low == 1:
        return None
    limit = min(row["available"] for row in rows.values() if row["topology"] == topology)
    near = sorted(((abs(row["needed"] - limit), number, row["needed"]) for number, row in tried.items()))[:2]
    if len(near) == 1:
        memory = tried[near[0][1]]["memory"]
        # Of one batch only: what does not grow with it is the state, and a gradient of a fourth of its size.
        near.append((0.0, 0, 1.25 * memory["arguments"] if memory else 0))
    (_, a, at_a), (_, b, at_b) = near
    guess = a + math.floor((limit - at_a) * (a - b) / (at_a - at_b))
    if high == math.inf:
        return max(guess, low + max(1, low // 8))
    # Near the limit the compiler recomputes by itself, and the line bends.
    return guess if low < guess < high else int(low + high) // 2


def next_row(rows: dict[str, Any]) -> tuple[str, str, str, dict[str, Any]] | None:
    for row in TABLE:
        if name_of(*row) not in rows:
            return row
    for model, precision, topology, settings in LARGEST:
        number = next_batch(rows, name_of(model, precision, topology, settings), topology)
        if number is not None:
            batch_size = number * len(find_topology(topology).devices)
            return model, precision, topology, {**settings, "batch_size": batch_size}
    return None


def write_page(rows: dict[str, Any]) -> None:
    gib = lambda number: f"{number / 2**30:.2f}"
    ms = lambda seconds: "-" if seconds is None else f"{1e3 * seconds:.1f}"
    giga = lambda number: "-" if number is None else f"{number / 1e9:,.1f}"
    lines = []
    for model, title in MODELS.items():
        done = [(row, rows[name_of(*row)]) for row in TABLE if row[0] == model and name_of(*row) in rows]
        if not done:
            continue
        lines += [
            f"## {title} parameters, batch {done[0][1]['batch_size']}",
            "",
            "| | precision | GiB of a device | fits | GFLOP, network / XLA | GB accessed | collectives "
            "| XLA's estimate, ms | peak / bandwidth, ms | images/s, assumed | compiled in, s |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for (_, precision, topology, _), row in done:
            cells = [
                SLICES[topology],
                precision,
                f"{gib(row['needed'])} of {gib(row['available'])}",
                "yes" if row["fits"] else "**no**",
                f"{giga(row['network_flops'])} / {giga(row['flops'])}",
                giga(row["bytes_accessed"]),
                row["collectives"] if row["memory"] else "-",
                ms(row["optimal_seconds"]),
                f"{ms(row['compute_seconds'])} / {ms(row['memory_seconds'])}",
                f"{row['images_per_second']:,.0f}" if row["fits"] else "-",
                f"{row['compile_seconds']:.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    found = []
    for model, precision, topology, settings in LARGEST:
        tried = tried_batches(rows, name_of(model, precision, topology, settings))
        low, high = bracket(tried)
        if not tried or high - low != 1:
            continue
        devices = next(iter(tried.values()))["devices"]
        cells = [
            SLICES[topology],
            precision,
            ", ".join(f"{name} {value}" for name, value in settings.items()) or "-",
            f"{low}",
            f"{low * devices}",
            f"{gib(tried[low]['needed'])} of {gib(tried[low]['available'])}" if low else "-",
            gib(tried[int(high)]["needed"]),
        ]
        found.append(f"| {' | '.join(cells)} |")
    if found:
        lines += [
            "## The largest batch of the 256x256 model (113.7M parameters) that fits",
            "",
            "| | precision | settings | images on a device | batch | GiB at this batch | GiB at the next |",
            "|---|---|---|---|---|---|---|",
            *found,
            "",
        ]
    searching = len(LARGEST) - len(found)
    missing = [row for row in TABLE if name_of(*row) not in rows]
    if missing or searching:
        lines.append(
            f"Not compiled yet: {len(missing)} of the {len(TABLE)} rows of the models, and {searching} of the "
            f"{len(LARGEST)} searches for the largest batch of the 256x256 model. Run the "
            "command again to compile them."
        )
    text = PAGE.read_text() if PAGE.exists() else "<!-- rows -->\n"
    PAGE.write_text(text.partition("<!-- rows -->")[0] + "\n".join(["<!-- rows -->", "", *lines, ""]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no row after so many minutes")
    rows = json.loads(ROWS.read_text()) if ROWS.exists() else {}
    stop = time.monotonic() + 60 * parser.parse_args().minutes
    while time.monotonic() < stop:
        row = next_row(rows)
        if row is None:
            print("all rows are done")
            break
        rows[name_of(*row)] = compile_row(*row)
        print(name_of(*row), rows[name_of(*row)], flush=True)
        ROWS.write_text(json.dumps(rows, indent=1) + "\n")
        write_page(rows)
    write_page(rows)


if __name__ == "__main__":
    main()
