"""pyproject.toml: the wheel has every package, and the core asks for nothing that requirements.txt does not."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_is_in_the_wheel():
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "ddpm_jax").rglob("*.py")}
    packages = {".".join(folder.parts) for folder in folders} | {"ddpm_jax.configs"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages


def test_every_other_file_is_in_the_wheel():
    for file in (ROOT / "ddpm_jax").rglob("*"):
        if file.is_file() and file.suffix not in (".py", ".pyc"):
            package = ".".join(file.parent.relative_to(ROOT).parts)
            patterns = PROJECT["tool"]["setuptools"]["package-data"].get(package, [])
            assert any(file.match(pattern) for pattern in patterns), file


def test_requirements_are_whole():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {line.split("#")[0].strip() for line in lines}
    assert set(PROJECT["project"]["dependencies"]) <= required
