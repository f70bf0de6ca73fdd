"""pyproject.toml: the wheel has every package, and the core asks for nothing that requirements.txt does not."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_is_in_the_wheel():
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "ddpm_jax").rglob("*.py")}
    packages = {".".join(folder.parts) for folder in folders} | {"ddpm_jax.configs"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages


def test_requirements_are_whole():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {line.split("#")[0].strip() for line in lines}
    assert set(PROJECT["project"]["dependencies"]) <= required
