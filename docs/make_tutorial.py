"""Runs examples/tutorial.py as a notebook and writes docs/tutorial.ipynb and docs/tutorial.md with its pictures.

pip install -r requirements-docs.txt && python docs/make_tutorial.py       # a quarter of an hour on two CPU cores
"""

import shutil
from pathlib import Path

import jupytext
import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import ExecutePreprocessor

DOCS = Path(__file__).parent
SCRIPT = DOCS.parent / "examples" / "tutorial.py"


def main() -> None:
    """Writes the pages anew."""
    notebook = jupytext.read(SCRIPT)
    ExecutePreprocessor(timeout=3600, kernel_name="python3").preprocess(notebook, {"metadata": {"path": DOCS.parent}})
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for number, cell in enumerate(notebook.cells):  # the same bytes but for what the cells print
        cell["id"], cell.metadata = f"cell-{number}", {}
    nbformat.write(notebook, DOCS / "tutorial.ipynb")

    text, resources = MarkdownExporter().from_notebook_node(notebook, {"unique_key": "tutorial"})
    pictures = DOCS / "tutorial_files"
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir()
    for name, content in resources["outputs"].items():
        (pictures / name).write_bytes(content)
        text = text.replace(f"]({name})", f"](tutorial_files/{name})")
    (DOCS / "tutorial.md").write_text(text)


if __name__ == "__main__":
    main()
