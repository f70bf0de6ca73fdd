"""docs/api.md: the page of the public API is what its generator writes."""

import runpy
from pathlib import Path

import ddpm_jax

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_is_current():
    text = runpy.run_path(str(DOCS / "make_api.py"))["page"]()
    assert [name for name in ddpm_jax.__all__ if f"\n### {name}\n" not in text] == [], (
        "add its module to docs/make_api.py"
    )
    assert (DOCS / "api.md").read_text() == text, "docs/api.md is out of date: run python docs/make_api.py"
