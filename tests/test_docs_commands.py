"""What the documents tell to type can be typed, and does what they say.

Every command is run, in a short form, in a folder laid out like a fresh clone, and its results are checked; the few
that cannot be are parsed, and listed in `NOT_RUN` with the reason.
"""

import ast
import contextlib
import importlib.util
import io
import json
import math
import os
import pickle
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from ddpm_jax.config import DataConfig
from ddpm_jax.generation.sampler_config import SamplerConfig
from ddpm_jax.interop.diffusers import write_folder
from ddpm_jax.run import command
from ddpm_jax.run.experiments import load_config
from ddpm_jax.run.record import save_config
from ddpm_jax.run.validation import validate
from ddpm_jax.samplers.by_name import make_sampler
from ddpm_jax.schedules import make_betas
from ddpm_jax.system.errors import UserError

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
# The tutorial has a test of its own.
PAGES = [README, *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.stem != "tutorial")]
# The docstrings of these show commands too.
FILES = [
    file
    for folder in ("examples", "configs")
    for file in sorted((ROOT / folder).glob("*.py"))
    if file.stem != "tutorial"
]
DOCUMENTS = [*PAGES, *FILES]

CODE = re.compile(r"^```(.*?)$(.*?)^```$|`([^`\n]+)`", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(r"(?:\w+=\S+ )?(?:python|make|pip|apt-get|tfds) ")
COMMAND = re.compile(r"python[\d.]*\s+(train|sample|evaluate)\.py\b(.*)")


def code(document):
    """What a document shows as code, in its order: (language of a block or "", text)."""
    text = document.read_text()
    if document.suffix == ".py":
        text = ast.get_docstring(ast.parse(text))
        yield "", text
    for language, block, span in CODE.findall(text):
        yield language, block or span


def lines(document):
    """The command lines that a document shows, those with "[" excepted: they show a form."""
    for language, text in code(document):
        for line in text.replace("\\\n", " ").splitlines() if not language else ():
            for part in re.split(r"&&|;", re.split(r" #|  +\(or", line)[0]):
                if PROGRAM.match(part.strip()) and not re.search(r"\[(?!cuda|tpu|run)", part):
                    yield part.strip()


def commands(document):
    """The calls of the scripts that a document shows, in its order: (script, words)."""
    for line in lines(document):
        if found := COMMAND.search(line):
            yield found.group(1), tuple(shlex.split(found.group(2)))


def option_spans(document):
    """The options that a document names in a line, `--x 4` or `sample.py --x 4`: (front, words).

    The front holds the script and what stands before the first option; it is empty for options alone.
    """
    for span in [text for language, text in code(document) if not language]:
        found = re.fullmatch(r"((?:train|sample|evaluate)\.py [^-]*|)(--\w.*)", span)
        if found:
            yield tuple(found.group(1).split()), tuple(shlex.split(found.group(2)))


# What stands before the options in a whole command of each kind; RUN is the folder.
WHOLE = [
    ("train.py",),
    ("sample.py", "RUN"),
    *(("sample.py", mode, "RUN") for mode in ("progressive", "share", "reconstruct", "interpolate", "inpaint")),
    *(("evaluate.py", name, "RUN") for name in ("likelihood", "quality", "fid", "figures", "verify", "report")),
    *(("evaluate.py", name, "RUN") for name in ("export", "import", "ema")),
    ("evaluate.py", "ema", "RUN", "--sigma-rel", "0.1"),
]
# Of other programs: `tfds build`, XLA.
NOT_OURS = {"--data_dir", "--xla_cpu_experimental_onednn_custom_call=true"}

COMMANDS = sorted({(document.name, *each) for document in DOCUMENTS for each in commands(document)})


class Read(Exception):
    """Ends a script as soon as its command line is read."""


@pytest.fixture(scope="module")
def published_model(runs, tmp_path_factory):
    """Puts a diffusers model where the documents take the reader to have downloaded one."""
    config, model = (
        runs.make_config(data=DataConfig("folder", height=32, width=32, channels=3)),
        tmp_path_factory.mktemp("model"),
    )
    write_folder(model, runs.random_params(config), config=config, step=0)

    def put(folder):
        (folder / "models").mkdir()
        (folder / "models" / "cifar10").symlink_to(model)

    return put


@pytest.fixture
def read_command(monkeypatch, tmp_path, default_precision, published_model):
    """Runs a script as far as its command line; what it reads there is checked, and nothing is done."""
    monkeypatch.chdir(tmp_path)
    save_config(load_config("digits"), tmp_path / "runs" / "digits" / "config.json")  # the run of the documents
    published_model(tmp_path)

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


# Commands that no test runs, by how they begin, with the reason; those of our scripts are parsed all the same.
NOT_RUN = {
    "make ": "installs packages, or is the tests themselves; `test_make_does_what_the_readme_says` reads its plan",
    "pip ": "downloads",
    "apt-get ": "downloads",
    "tfds ": "downloads",
    **{
        f"python evaluate.py fid {what}": "needs Inception's weights; tests/evaluation/test_scoring.py uses others"
        for what in ("RUN", "runs/cifar10", "samples.npz", "my_samples", "cifar10")
    },
    "python train.py configs/celebahq256.py": "needs a data set of TFDS; tests/data/test_prepared.py reads one",
    "python train.py configs/lsun_": "needs a data set of TFDS",
    "python train.py configs/cifar10.py --workdir shared/run": "two machines; tests/training/test_parallel.py runs two",
    "python sample.py shared/run": "two machines; tests/test_scripts_on_hosts.py runs two",
    **{
        f"python {what}": "needs a published checkpoint; tests/run/test_imported.py imports another"
        for what in ("evaluate.py import", "sample.py runs/cifar10_uncond_50M_500K")
    },
    "python train.py --eval.fid-every": "a thousand samples; tests/evaluation/test_during_training.py scores a few",
    "python docs/make_api.py": "writes into the repository; tests/test_api_page.py compares",
    "python examples/minimal.py": "tests/test_examples.py runs it",
    "python benchmarks/": "measures for minutes",
    **{
        f"python {what}": "needs a compiler's plug-in; tests/aot/test_plugins.py compiles for it"
        for what in (
            "train.py configs/cifar10.py --aot",
            "train.py configs/celebahq256.py --train.precision bfloat16 --train.remat --aot",
            "sample.py runs/digits --aot",
            "evaluate.py likelihood runs/digits --aot",
        )
    },
    "python examples/emoji/": "needs a font, or hours; tests/test_emoji.py draws a few",
    "python tests/faults/": "minutes; tests/faults/test_faults.py and test_power_cut.py run their kinds of fault",
}
# What a run keeps of the user's own code.
COPIES = {"--model.network": "network.py", "--data.source": "source.py"}
# The short form: a network and a run of seconds. A command's own values are replaced by these.
TINY = {
    "--train.steps": "2",
    "--train.batch-size": "8",
    "--train.warmup-steps": "1",
    "--model.width": "8",
    "--model.channel-mult": "1",
    "--model.num-res-blocks": "1",
    "--model.num-groups": "4",
    "--model.num-heads": "1",
    "--eval.num": "8",
    "--log.every": "1",
    "--log.samples-every": "0",
}
FEW = {
    "sample": {"--num": "10"},
    "progressive": {"--num": "2", "--columns": "3"},
    "share": {"--draws": "2"},
    "reconstruct": {"--draws": "2"},
    "interpolate": {"--num": "3"},
    "inpaint": {"--draws": "1"},
    "likelihood": {"--num": "8", "--num-strata": "5"},
    "quality": {"--num": "8"},
    "fid": {"--num": "8", "--reference-num": "8", "--batch-size": "8"},
    "figures": {"--num": "2"},
    "ema": {"--sigma-rel": "0.1", "--num": "8", "--num-strata": "5"},
}
STEPS = {"sample", "progressive", "share", "reconstruct", "interpolate", "inpaint", "quality", "fid", "figures"}


def shorten(script, words):
    """A command in its short form: (its name, words)."""
    name = words[0] if words and words[0] in MODES else script
    changed = dict(TINY if script == "train" else FEW.get(name, {}))
    if "--summary" in words or "--check-data" in words:
        return name, words  # they train nothing
    if name in STEPS and "--steps" not in words:
        changed["--steps"] = "4"
    if "fashion_mnist" in "".join(words) and script == "train":
        changed["--data.path"] = "fashion"
    if not words:
        changed |= {"--log.samples-every": "2", "--log.num-samples": "4", "--log.sample-steps": "4"}
    if "--eval.every" in words:
        changed["--eval.every"] = "1"
    if "--ema.snapshots-every" in words:
        changed["--ema.snapshots-every"] = "1"
    if script == "train" and ("--data.height" in words or "my_images" in words):
        changed |= {"--data.height": "8", "--data.width": "8"}
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            dropping = word in changed
        if not dropping:
            kept.append(word)
    return name, [*kept, *(word for item in changed.items() for word in item)]


def option(words, name):
    """The value of an option, or None."""
    return words[words.index(name) + 1] if name in words else None


@contextlib.contextmanager
def as_a_user():
    """Jax as lenient as it comes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def clone(tmp_path, monkeypatch, published_model):
    """A folder laid out like a fresh clone, with the images that the documents take the reader to have."""
    for name in ("configs", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    # A refused start of train.py would end the tests.
    monkeypatch.setattr(os, "_exit", lambda status: sys.exit(status))
    random = np.random.default_rng(0)

    def pixels(*shape):
        return random.integers(0, 256, shape, np.uint8)

    for i in range(12):
        file = Path("my_images", ["cats", "dogs"][i % 2], f"{i}.{['png', 'jpg', 'webp'][i % 3]}")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(50 + i, 70, 3)).save(file)
    np.savez("images.npz", pixels(12, 8, 8, 3))
    Image.fromarray(np.where(np.arange(64).reshape(8, 8) < 32, 0, 255).astype(np.uint8)).save("mask.png")
    Path("fashion").mkdir()
    for part in ("train", "t10k"):
        for kind, array in ("images-idx3", pixels(12, 28, 28)), ("labels-idx1", np.arange(12, dtype=np.uint8) % 10):
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            Path("fashion", f"{part}-{kind}-ubyte").write_bytes(head + array.tobytes())
    published_model(tmp_path)
    for i in range(36):
        file = Path("data/emoji", ["train", "test"][i % 2], f"class_{i // 4}", f"{i}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(40, 40, 3)).save(file)
    with tarfile.open("data/cifar-10-python.tar.gz", "w:gz") as archive:
        batches = {
            f"{name}_batch{end}": {b"data": pixels(8, 3072), b"labels": [*range(8)]}
            for name, ends in {"data": [f"_{i}" for i in range(1, 6)], "test": [""]}.items()
            for end in ends
        }
        for name, value in {**batches, "batches.meta": {b"label_names": [b"%d" % i for i in range(10)]}}.items():
            content = pickle.dumps(value, protocol=2)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with as_a_user():
        yield


def check_train(words, out, err):
    config = re.sub(r"\W", " ", words[0]).split()[1] if words[0].startswith("configs/") else "digits"
    run = Path(words[0] if words[0].startswith("runs/") else option(words, "--workdir") or f"runs/{config}")
    if "--summary" in words:
        assert "35,746,307 parameters" in out
        return
    if "--check-data" in words:
        assert "cats 6, dogs 6" in out
        assert Image.open(run / "data.png").size > (1, 1)
        return
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", *(["eval_loss"] if "--eval.every" in words else [])):
        logged = {line["step"]: line[name] for line in metrics if name in line}
        assert [*logged] == [1, 2]
        assert all(map(math.isfinite, logged.values()))
    assert (run / "checkpoints" / "2").is_dir()
    assert (run / "loss.png").exists()
    assert (run / "init_from.json").exists() == ("--train.init-from" in words or words[0].startswith("models/"))
    own = {file for field, file in COPIES.items() if ".py:" in (option(words, field) or "")}
    assert {path.name for path in run.glob("code/*.py")} == own
    if int(option(words, "--log.samples-every")):
        assert np.asarray(Image.open(run / "samples" / "step_0000002.png")).std() > 0


def check_sample(words, out, err):
    (shown,) = [Path(word) for word in out.split() if Path(word).is_file()]
    images = np.load(shown.parent / "samples.npz")["arr_0"]
    assert (len(images), images.dtype) == (int(option(words, "--num")), np.uint8)
    assert images.std() > 0
    assert shown.suffix == {"npz": ".npz", "gif": ".gif", None: ".png"}[option(words, "--format")]
    if shown.suffix == ".gif":
        assert Image.open(shown).n_frames > 1


def check_edit(words, out, err):
    (shown,) = [Path(word) for word in out.split() if Path(word).is_file()]
    assert np.asarray(Image.open(shown)).std() > 0


def check_likelihood(words, out, err):
    assert re.search(r"\d\.\d+ bits/dim|bits/dim.*\d\.\d+", out)
    folder = next(Path(word.rstrip(":")) for word in out.split() if Path(word.rstrip(":")).is_dir())
    assert {"likelihood.json", "terms.csv", "rate_distortion.csv"} <= {path.name for path in folder.iterdir()}


def check_quality(words, out, err):
    (file,) = [Path(word) for word in out.split() if Path(word).is_file()]
    assert json.loads(file.read_text())


def check_fid(words, out, err):
    (file,) = [Path(word) for word in out.split() if Path(word).name == "scores.json"]
    assert json.loads(file.read_text())["scores"]["FD-EfficientNetLite0"] > 0


def check_figures(words, out, err):
    page = next(path for word in out.split() for path in (Path(word), Path(word) / "figures.md") if path.is_file())
    named = re.findall(r"\]\((\S+\.png)\)", page.read_text())
    assert len(named) > 3
    assert all((page.parent / name).is_file() for name in named)


def check_report(words, out, err):
    page = Path(out.strip()).read_text()
    assert "x_t" in page
    assert "predicted x_0" in page
    assert page.count('class="tiles"') == len(words) - 1


def check_ema(words, out, err):
    (picture,) = [Path(word) for word in out.split() if word.endswith(".png")]
    assert np.asarray(Image.open(picture)).std() > 0
    assert len(picture.with_suffix(".csv").read_text().splitlines()) == 3


def check_verify(words, out, err):
    assert re.match(r"config.json: ok\n", out)
    assert re.search(r"^step \d+: \d+ arrays, .* MB, ok$", out, re.MULTILINE)
    assert all(line.endswith((": ok", ", ok")) for line in out.splitlines())


def check_export(words, out, err):
    file = Path(out.strip())
    assert len(load_file(file / "unet/diffusion_pytorch_model.safetensors" if file.is_dir() else file)) > 10
    assert file.is_file() or "license: mit" in (file / "README.md").read_text()


MODES = {
    **dict.fromkeys(("progressive", "share", "reconstruct", "interpolate", "inpaint"), check_edit),
    "likelihood": check_likelihood,
    "quality": check_quality,
    "fid": check_fid,
    "figures": check_figures,
    "report": check_report,
    "ema": check_ema,
    "verify": check_verify,
    "export": check_export,
}
CHECKS = {"train": check_train, "sample": check_sample, **MODES}


def is_run(line):
    return not re.sub(r"^\w+=\S+ ", "", line).startswith(tuple(NOT_RUN))


def walk(run_script, *documents):
    """Runs the commands of documents in their order, as a reader would who types every one."""
    wrong = []
    for document in documents:
        for line in filter(is_run, lines(document)):
            script, words = COMMAND.search(line).groups()
            name, words = shorten(script, shlex.split(words))
            try:
                status, out, err = run_script(f"{script}.py", *words)
                assert (status, "Traceback" in err) == (0, False), err
                CHECKS[name](words, out, err)
            except Exception as error:
                wrong.append(f"{document.name}: {line}\n{error!r}")
    assert not wrong, "\n\n".join(wrong)


def test_every_command_is_run_or_listed_with_the_reason():
    shown = [(document.name, line) for document in DOCUMENTS for line in lines(document)]
    assert [each for each in shown if is_run(each[1]) and not COMMAND.search(each[1])] == []
    unused = [begin for begin in NOT_RUN if not any(begin in line for _, line in shown)]
    assert unused == []


def test_the_readme_does_what_it_says(run_script, clone):
    walk(run_script, README)


@pytest.mark.slow
def test_every_document_does_what_it_says(run_script, clone):
    walk(run_script, README, *(document for document in DOCUMENTS if document != README))


@pytest.mark.parametrize("target", ["demo", "test", "faults"])
def test_make_does_what_the_readme_says(target):
    words = ["make", "--dry-run", "VENV=no-such-folder", target]  # as in a fresh clone
    alone = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}  # also where make runs the tests
    plan = subprocess.run(words, cwd=ROOT, env=alone, capture_output=True, text=True, check=True).stdout
    shown = {
        "demo": r"-m venv .*pip install .*train\.py configs/digits\.py\n.*sample\.py runs/digits --num 64",
        "test": r"python -m pytest .*not slow",
        "faults": r"python tests/faults/program\.py",
    }
    assert re.search(shown[target], plan, re.DOTALL)


SNIPPETS = {page: [text for language, text in code(page) if language == "python"] for page in PAGES}


def test_there_are_snippets():
    assert {page.name: len(texts) for page, texts in SNIPPETS.items() if texts} == {"README.md": 1, "running.md": 2}


@pytest.fixture(scope="module", params=[page for page, texts in SNIPPETS.items() if texts], ids=lambda page: page.name)
def names(request, tmp_path_factory):
    """What the snippets of a page define, run one after the other."""
    names = {}
    with pytest.MonkeyPatch.context() as patch, as_a_user():
        patch.chdir(tmp_path_factory.mktemp("snippets"))
        for text in SNIPPETS[request.param]:
            exec(text, names)
        yield names


def test_snippets_draw_with_the_weights_that_they_are_given(names):
    draw, params, images = names["draw"], names["params"], names["images"]
    assert images.shape == (16, 8, 8, 1)
    assert np.isfinite(images).all()
    changed = jax.tree.map(lambda leaf: leaf + 0.1, params)
    with as_a_user():  # as in the snippet, so that it is compiled already
        assert np.abs(images - draw(changed, jax.random.key(1))).max() > 0.1


def test_snippets_that_train_write_what_they_say(names):
    if "log_norm" not in names:
        pytest.skip("this page's snippets train nothing")
    metrics = [json.loads(line) for line in Path("runs/mine/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "ema_norm" in line] == [10, 20]
