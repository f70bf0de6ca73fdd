"""The tutorial: its pages have the cells of its script, and the script ends in the numbers that they show."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "tutorial.py"
NOTEBOOK, PAGE = (ROOT / "docs" / f"tutorial.{ending}" for ending in ("ipynb", "md"))


def cells():
    """The cells of the script: (is text, content)."""
    for cell in re.split(r"^# %%", SCRIPT.read_text(), flags=re.MULTILINE)[1:]:
        head, _, body = cell.partition("\n")
        is_text = head.strip() == "[markdown]"
        yield is_text, (re.sub(r"^# ?", "", body, flags=re.MULTILINE) if is_text else body).strip()


def test_the_pages_are_made_of_the_script():
    """If not: python docs/make_tutorial.py."""
    notebook = json.loads(NOTEBOOK.read_text())["cells"]
    assert [(cell["cell_type"] == "markdown", "".join(cell["source"]).strip()) for cell in notebook] == list(cells())
    page = PAGE.read_text()
    for _, content in cells():
        assert content in page
    assert all(cell["execution_count"] for cell in notebook if cell["cell_type"] == "code")
    shown = re.findall(r"\]\((tutorial_files/\S+)\)", page)
    assert sorted(shown) == sorted(str(file.relative_to(PAGE.parent)) for file in PAGE.parent.glob("tutorial_files/*"))
    assert len(shown) > 5


def test_names_of_the_package_are_public():
    import ddpm_jax

    assert set(re.findall(r"\bddpm\.(\w+)", SCRIPT.read_text())) <= set(ddpm_jax.__all__)


@pytest.mark.slow
def test_the_script_ends_in_the_numbers_of_the_page(tmp_path):
    alone = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment = alone | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    done = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    numbers = re.compile(r"([\d,]+) parameters|steps: ([\d.]+)|([\d.]+) bits/dim")
    of_script, of_page = (
        [float("".join(found).replace(",", "")) for found in numbers.findall(text)]
        for text in (done.stdout, PAGE.read_text())
    )
    assert len(of_script) == 3
    # Other machines round otherwise, which 3,000 steps enlarge.
    assert of_script == pytest.approx(of_page, rel=0.03)
