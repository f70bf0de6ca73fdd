"""The import rule: which room may import which, and which package only one room may import."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ddpm_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

MATHEMATICS = {
    *("keys", "schedules", "forward", "reverse", "bound", "losses", "time_sampling", "likelihood", "pixels"),
    *("guidance", "editing", "averages", "samplers", "names"),
}
NETWORKS = MATHEMATICS | {"convolution", "unet", "networks"}
GENERAL = NETWORKS | {"system", "config", "run", "data"}

# The rooms that each room may import, beside itself.
ALLOWED = {
    "system": set(),
    **dict.fromkeys(MATHEMATICS, MATHEMATICS),
    **dict.fromkeys(("convolution", "unet", "networks"), NETWORKS),
    "interop": NETWORKS | {"config", "system"},
    "run": GENERAL | {"interop"},
    **dict.fromkeys(("config", "data"), GENERAL),
    "generation": GENERAL,
    "training": GENERAL | {"generation.batches"},
    "evaluation": GENERAL | {"generation", "training", "interop"},
    "aot": GENERAL | {"generation", "training", "evaluation"},
}

# Where a package may be imported at all.
ONLY = {
    "orbax": {"run/checkpoints.py"},
    "grain": {"data/"},
    "tensorflow_datasets": {"data/"},
    "tyro": {"run/command.py"},
}

# What the mathematics may import besides the standard library; the networks add Flax.
CORE = {"jax", "numpy", "chex", "optax"}


def imports(file):
    """The modules that a file imports anywhere in it, as dotted names: `from a import b` is `a.b`."""
    names = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path(file)} imports relatively"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def room(name):
    """The room of a dotted name: `ddpm_jax.run.build.image_shape` is of `run`."""
    return name.split(".")[1]


def path(file):
    return file.relative_to(PACKAGE).as_posix()


def own_room(file):
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def test_rooms_import_only_what_they_may():
    wrong = [
        f"{path(file)} imports {name}"
        for file in FILES
        if file != PACKAGE / "__init__.py"  # it names everything, and imports nothing before it is used
        for name in imports(file)
        if name.startswith("ddpm_jax.")
        and room(name) != own_room(file)
        and not any(f"{name}.".startswith(f"ddpm_jax.{allowed}.") for allowed in ALLOWED[own_room(file)])
    ]
    assert not wrong


def test_packages_are_imported_only_where_they_may_be():
    wrong = []
    for file in FILES:
        found = {name.split(".")[0] for name in imports(file)} - {"ddpm_jax"}
        misplaced = {package for package in ONLY if not path(file).startswith(tuple(ONLY[package]))}
        if own_room(file) in NETWORKS:
            misplaced |= found - sys.stdlib_module_names - CORE - {"flax"}
        if own_room(file) in MATHEMATICS:
            misplaced.add("flax")
        wrong += [f"{path(file)} imports {package}" for package in found & misplaced]
        private = [name for name in imports(file) if any(part.startswith("_") for part in name.split("."))]
        wrong += [f"{path(file)} imports {name}" for name in private]
    assert not wrong
