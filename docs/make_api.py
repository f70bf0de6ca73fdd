"""Writes docs/api.md, the page of the public API, from signatures and docstrings: `python docs/make_api.py`."""

import ast
import inspect
import re
import textwrap
from pathlib import Path

import ddpm_jax

PAGE = Path(__file__).with_name("api.md")

SECTIONS = {
    "Schedules": "schedules",
    "The forward process": "forward",
    "The reverse process": "reverse",
    "Losses": "losses time_sampling",
    "Samplers": "samplers.chain samplers.ancestral samplers.ddim samplers.dpm_solver samplers.unipc samplers.by_name",
    "Likelihood": "likelihood",
    "Networks": "networks unet convolution guidance",
    "Random keys and pixels": "keys pixels",
    "Runs": "config run.experiments data.source training.loop run.trained system.errors",
}
"""The sections of the page, each with its modules."""

HEAD = """\
# The public API

<!-- Written by `python docs/make_api.py` from signatures and docstrings: edit those. -->

These names come with `import ddpm_jax`, each imported on first use. They are stable within a minor version, and the
[changelog](../CHANGELOG.md) lists what changed; anything else in the package may change. `pip install .` is enough for
all but the last section, of which only `Config`, `load_config` and `UserError` work without `pip install ".[run]"`.

Images are float32 in [-1, 1], `(B, H, W, C)`; timesteps are 0-based int32, `(B,)`. A network reaches the mathematics as
a function `predict(x_t, t)`. Arguments, shapes, errors and sources are in the docstrings: `help(ddpm_jax.q_sample)`.
[examples/minimal.py](../examples/minimal.py) puts the names together.
"""


def signature(node: ast.FunctionDef | ast.ClassDef) -> str:
    """Returns a function's arguments and result, or a class's fields, with their simple defaults."""
    if isinstance(node, ast.FunctionDef):
        for argument in filter(None, (*node.args.args, *node.args.kwonlyargs, node.args.kwarg)):
            argument.annotation = None
        return f"{node.name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns) if node.returns else None}"
    fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
    simple = lambda value: isinstance(value, ast.Constant | ast.Tuple)
    given = [f"={ast.unparse(field.value)}" if field.value and simple(field.value) else "" for field in fields]
    return f"{node.name}({', '.join(map(str.__add__, (ast.unparse(field.target) for field in fields), given))})"


def entry(module: str, name: str) -> str:
    """Returns the part of the page about one name."""
    file = f"ddpm_jax/{module.replace('.', '/')}.py"
    tree = ast.parse((PAGE.parents[1] / file).read_text(encoding="utf-8"))
    [node] = [each for each in tree.body if getattr(each, "name", None) == name]
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    code = textwrap.fill(signature(node), 110, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    summary = inspect.cleandoc(ast.get_docstring(node) or "").split("\n\n")[0]
    summary = re.sub(r":math:`([^`]+)`", r"$`\1`$", summary)
    return f"### {name}\n\n```text\n{code}\n```\n\n{summary} In [`{file.rpartition('/')[2]}`](../{file}).\n"


def page() -> str:
    """Returns the text of the page."""
    parts = [HEAD]
    for title, modules in SECTIONS.items():
        parts.append(f"## {title}\n")
        parts += [entry(module, name) for module in modules.split() for name in ddpm_jax._MODULES.get(module, ())]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
