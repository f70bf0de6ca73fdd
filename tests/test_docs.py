"""The documents: what they link to is there, and what they tell the reader to type can be typed."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAP = ROOT / "docs" / "paper_to_code.md"
API_PAGE = ROOT / "docs" / "api.md"

LINK = re.compile(r"\[([^\[\]]*)\]\(([^()\s]+)\)")
FENCE = re.compile(r"^```.*?$(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
COMMAND = re.compile(r"(?:\S*/)?python[\d.]*\s+(train|sample|evaluate)\.py\b(.*)")


def links(document):
    """Links outside of blocks of code: (text, target)."""
    return LINK.findall(FENCE.sub("", document.read_text()))


@functools.cache
def anchors(document):
    """The names by which GitHub's pages address a document's headings."""
    prose = FENCE.sub("", document.read_text())
    headings = re.findall(r"^#+ +(.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@functools.cache
def public_names(module):
    """The names that a module defines (not those that it imports), and the members of its classes, with a dot."""

    def defined(body):
        for node in body:
            match node:
                case ast.FunctionDef() | ast.ClassDef():
                    yield node.name, node
                case ast.AnnAssign(target=ast.Name(id=name)):
                    yield name, node
                case ast.Assign(targets=targets):
                    yield from ((target.id, node) for target in targets if isinstance(target, ast.Name))

    names = {}
    for name, node in defined(ast.parse(module.read_text()).body):
        names[name] = node
        if isinstance(node, ast.ClassDef):
            names |= {f"{name}.{member}": each for member, each in defined(node.body)}
    return {name: node for name, node in names.items() if not any(part.startswith("_") for part in name.split("."))}


def named_functions(text):
    """Links of the form [`module.name`](../ddpm_jax/module.py): (module's name, name, target)."""
    for words, target in LINK.findall(text):
        if target.endswith(".py") and "ddpm_jax/" in target and not words.endswith(".py`"):
            module, _, name = words.strip("`").partition(".")
            yield module, name, target


def rows(heading):
    """The rows of the tables in one section of the map, as lists of cells."""
    section = re.split(rf"^#+ {re.escape(heading)}$", MAP.read_text(), maxsplit=1, flags=re.MULTILINE)[1]
    section = re.split(r"^## ", section, maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def numbers(cell):
    """The numbers in a cell that names equations or algorithms: "eqs. 10 to 12" has three, "eq. 5, $L_0$" one."""
    listed = re.match(r"(?:eqs?\.|Algorithms?) (\d+(?:(?: to |, )\d+)*)", cell)
    found = set()
    for part in listed.group(1).split(", ") if listed else ():
        first, _, last = part.partition(" to ")
        found |= set(range(int(first), int(last or first) + 1))
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_lead_somewhere(document):
    wrong = []
    for text, target in links(document):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(f"[{text}]({target})")
    assert not wrong, f"{document.name} links to what is not there: {', '.join(wrong)}"


# docs/api.md is generated, and links in another form.
@pytest.mark.parametrize("document", sorted({*DOCUMENTS} - {API_PAGE}), ids=lambda document: document.name)
def test_functions_are_in_the_modules_that_they_are_linked_to(document):
    wrong = []
    for module, name, target in named_functions(document.read_text()):
        file = (document.parent / target.partition("#")[0]).resolve()
        if not file.is_file() or file.stem != module or name not in public_names(file):
            wrong.append(f"{module}.{name} in {target}")
    assert not wrong, f"{document.name} names what is not there: {', '.join(wrong)}"


def test_the_map_names_functions_in_one_form_alone():
    # A cell that names code without a link to it would be held by no test.
    linked = re.sub(r"\[`[\w.]+`\]\(\.\./ddpm_jax/[\w/]+\.py\)", "", MAP.read_text())
    modules = {file.stem for file in (ROOT / "ddpm_jax").rglob("*.py")}
    bare = [
        span for span in SPAN.findall(linked) if span.partition(".")[0] in modules and re.fullmatch(r"\w+\.\w+", span)
    ]
    assert [span for span in bare if not span.endswith(".py")] == []
    assert len(list(named_functions(MAP.read_text()))) > 100


@pytest.mark.parametrize(
    ("heading", "kind", "wanted"),
    [
        ("Denoising Diffusion Probabilistic Models", "eq", set(range(1, 17))),
        ("Denoising Diffusion Probabilistic Models", "Algorithm", {1, 2, 3, 4}),
        ("Improved DDPM", "eq", set(range(1, 20))),
        ("DDIM", "eq", set(range(1, 17))),
        ("Classifier-free guidance", "eq", set(range(1, 7))),
        ("Classifier-free guidance", "Algorithm", {1, 2}),
    ],
)
def test_every_equation_and_algorithm_has_its_row(heading, kind, wanted):
    found = [numbers(row[0]) for row in rows(heading) if row[0].startswith(kind)]
    assert set().union(*found) == wanted


def test_rows_have_as_many_cells_as_their_table():
    # A bar inside a formula would cut its cell in two.
    blocks = re.findall(r"(?:^\|.*\n)+", MAP.read_text(), re.MULTILINE)
    assert len(blocks) > 10
    for block in blocks:
        header, _, *body = block.splitlines()
        assert [line for line in body if line.count("|") != header.count("|")] == []


def test_docstrings_that_cite_an_equation_are_in_the_map():
    papers = ("Ho et al. 2020", "Nichol & Dhariwal 2021", "Song et al. 2021", "Ho & Salimans 2022")
    cites = re.compile(rf"(?:{'|'.join(map(re.escape, papers))})[^;]*?\b(?:eqs?\.|Algorithms?)\s\d")
    named = {((MAP.parent / target).resolve(), name) for _, name, target in named_functions(MAP.read_text())}
    cited, missing = 0, []
    for file in sorted((ROOT / "ddpm_jax").rglob("*.py")):
        for name, node in public_names(file).items():
            if isinstance(node, ast.FunctionDef) and "." not in name and cites.search(ast.get_docstring(node) or ""):
                cited += 1
                missing += [f"{file.stem}.{name}"] if (file, name) not in named else []
    assert cited > 20
    assert not missing, f"not in docs/paper_to_code.md: {', '.join(missing)}"


def test_wrong_links_would_be_found(tmp_path):
    (tmp_path / "there.py").write_text("def function(): ...\nclass Class:\n    field: int\n    _own: int\n")
    assert set(public_names(tmp_path / "there.py")) == {"function", "Class", "Class.field"}
    assert list(named_functions("[`there.no_function`](../ddpm_jax/there.py)")) == [
        ("there", "no_function", "../ddpm_jax/there.py")
    ]
    (tmp_path / "page.md").write_text(
        "# A heading: `x`, and more\n[a](there.py) [b](gone.py)\n```\n[c](code.py)\n```\n"
    )
    assert links(tmp_path / "page.md") == [("a", "there.py"), ("b", "gone.py")]
    assert anchors(tmp_path / "page.md") == {"a-heading-x-and-more"}
