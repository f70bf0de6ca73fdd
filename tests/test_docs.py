"""The documents: what they link to is there, and what they tell the reader to type can be typed."""

import ast
import functools
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest

from ddpm_jax.generation.sampler_config import SamplerConfig
from ddpm_jax.run import command
from ddpm_jax.run.experiments import load_config
from ddpm_jax.run.record import save_config
from ddpm_jax.run.validation import validate
from ddpm_jax.samplers.by_name import make_sampler
from ddpm_jax.schedules import make_betas
from ddpm_jax.system.errors import UserError

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


def commands(document):
    """The calls of the scripts that a document shows, in blocks of code or in a line: (script, words)."""
    text = document.read_text()
    shown = "\n".join(FENCE.findall(text)).replace("\\\n", " ").splitlines() + SPAN.findall(FENCE.sub("", text))
    for line in shown:
        for part in re.split(r"&&|;", line.split(" #")[0]):
            found = COMMAND.search(part)
            # A line with brackets shows a form, not a command.
            if found and "[" not in part:
                yield found.group(1), tuple(shlex.split(found.group(2)))


def option_spans(document):
    """The options that a document names in a line, `--x 4` or `sample.py --x 4`: (front, words).

    The front holds the script and what stands before the first option; it is empty for options alone.
    """
    for span in SPAN.findall(FENCE.sub("", document.read_text())):
        found = re.fullmatch(r"((?:train|sample|evaluate)\.py [^-]*|)(--\w.*)", span)
        if found:
            yield tuple(found.group(1).split()), tuple(shlex.split(found.group(2)))


# What stands before the options in a whole command of each kind; RUN is the folder.
WHOLE = [
    ("train.py",),
    ("sample.py", "RUN"),
    *(("sample.py", mode, "RUN") for mode in ("progressive", "share", "reconstruct", "interpolate", "inpaint")),
    *(("evaluate.py", name, "RUN") for name in ("likelihood", "quality", "figures", "verify", "export")),
]
# Of other programs: `tfds build`.
NOT_OURS = {"--data_dir"}

COMMANDS = sorted({(document.name, *each) for document in DOCUMENTS for each in commands(document)})


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


class Read(Exception):
    """Ends a script as soon as its command line is read."""


@pytest.fixture
def read_command(monkeypatch, tmp_path, default_precision):
    """Runs a script as far as its command line; what it reads there is checked, and nothing is done."""
    monkeypatch.chdir(tmp_path)
    save_config(load_config("digits"), tmp_path / "runs" / "digits" / "config.json")  # the run of the documents

    def ending(parse):
        def parse_and_end(*arguments, **keywords):
            raise Read(parse(*arguments, **keywords))

        return parse_and_end

    def read(name, words):
        spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)  # where tyro looks the annotations up
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        with monkeypatch.context() as patch:
            patch.setattr(command, "parse_options", ending(command.parse_options))
            patch.setattr(command, "parse_run", ending(command.parse_run))
            spec.loader.exec_module(module)
            with pytest.raises(Read) as end:
                module.main()
        if name == "train":
            validate(end.value.args[0].config)
        asked = end.value.args[0]
        if isinstance(asked, SamplerConfig):
            betas, predict = make_betas("linear", 1000), lambda x_t, t: x_t
            make_sampler(asked.sampler, betas, predict, num_steps=asked.steps, spacing=asked.spacing, eta=asked.eta)

    return read


def test_documents_show_commands():
    scripts = [script for _, script, _ in COMMANDS]
    assert {script: scripts.count(script) > 1 for script in ("train", "sample", "evaluate")} == dict.fromkeys(
        ("train", "sample", "evaluate"), True
    )
    assert {name for name, _, _ in COMMANDS} >= {"README.md", "paper_to_code.md"}


@pytest.mark.parametrize(
    ("document", "script", "words"), COMMANDS, ids=lambda part: " ".join(part) if isinstance(part, tuple) else part
)
def test_commands_can_be_typed(read_command, document, script, words):
    read_command(script, words)


OPTIONS = sorted({(document.name, *each) for document in DOCUMENTS for each in option_spans(document)})


def read_options(read_command, front, words):
    """Reads options as those of some whole command with that front; without their value it is enough that they are."""
    wholes = [whole for whole in WHOLE if tuple(word for word in whole if word != "RUN") == front or not front]
    assert wholes, f"there is no command {' '.join(front)}"
    lines = []
    for script, *between in wholes:
        try:
            return read_command(script.removesuffix(".py"), [*between, *words])
        except (UserError, ValueError) as error:
            if len(words) == 1 and "but no value follows it" in str(error):
                return None
            lines.append(str(error))
    raise UserError("; ".join(dict.fromkeys(lines)))


@pytest.mark.parametrize(
    ("document", "front", "words"),
    [each for each in OPTIONS if each[2][0] not in {*NOT_OURS, "--help"}],
    ids=lambda part: " ".join(part) if isinstance(part, tuple) else part,
)
def test_options_can_be_typed(read_command, document, front, words):
    read_options(read_command, front, words)


@pytest.mark.parametrize(
    ("front", "words", "line"),
    [
        ((), ["--train.remat", "true"], "a flag takes no value"),
        ((), ["--train.stps"], "did you mean --train.steps"),
        ((), ["--train.parallel", "pmaps"], "needs one of"),
        (("sample.py",), ["--train.steps", "5"], "unknown option --train.steps"),
        (("evaluate.py", "likelihood"), ["--clip", "off"], "unknown option --clip"),
    ],
)
def test_wrong_options_would_be_found(read_command, front, words, line):
    with pytest.raises(UserError, match=line):
        read_options(read_command, front, words)


@pytest.mark.parametrize(
    ("script", "words", "line"),
    [
        ("train", ["configs/cifar10.py", "--train.batchsize", "64"], "did you mean --train.batch-size"),
        ("train", ["configs/cifar100.py"], "no config file"),
        ("sample", ["runs/digits", "--sampler", "dim"], "needs one of"),
        ("sample", ["runs/digits", "--steps", "5", "--spacing", "quadratc"], "unknown spacing"),
        ("train", ["--diffusion.variance", "learned_range"], "not trained by L_simple"),
        ("evaluate", ["likelihood", "runs/digits", "--sgma", "optimal"], "--sigma"),
    ],
)
def test_wrong_commands_would_be_found(read_command, script, words, line):
    with pytest.raises((UserError, ValueError), match=line):
        read_command(script, words)


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
