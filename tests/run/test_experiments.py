"""Experiment files: those in configs/ have the numbers of the paper, and a faulty one is one line."""

import ast
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ddpm_jax.config import Config, TrainConfig
from ddpm_jax.run.build import build_schedule, build_unet
from ddpm_jax.run.experiments import load_config
from ddpm_jax.run.fields import value_of
from ddpm_jax.run.validation import validate, warnings_of
from ddpm_jax.system.errors import UserError

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))

PARAMETERS = {
    "celebahq256": 113_673_219,
    "cifar10": 35_746_307,
    "image_folder": 78_700_803,
    "lsun_bedroom256": 113_673_219,
    "lsun_bedroom256_large": 255_677_955,
    "lsun_cat256": 113_673_219,
    "lsun_church256": 113_673_219,
}

# Ho et al. 2020, app. B: steps, learning rate, batch, dropout, mirrored; the variance is that of its code.
PAPER = {
    "cifar10": (800_000, 2e-4, 128, 0.1, True, "fixed_large", 32),
    "celebahq256": (500_000, 2e-5, 64, 0.0, True, "fixed_small", 256),
    "lsun_bedroom256": (2_400_000, 2e-5, 64, 0.0, False, "fixed_small", 256),
    "lsun_bedroom256_large": (1_150_000, 2e-5, 64, 0.0, False, "fixed_small", 256),
    "lsun_church256": (1_200_000, 2e-5, 64, 0.0, True, "fixed_small", 256),
    "lsun_cat256": (1_800_000, 2e-5, 64, 0.0, True, "fixed_small", 256),
}


def num_parameters(config: Config) -> int:
    data = config.data
    image = jnp.zeros((1, data.height, data.width, data.channels))
    shapes = jax.eval_shape(build_unet(config).init, jax.random.key(0), image, jnp.zeros((1,), jnp.int32))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_all_experiments_are_there():
    assert {file.stem for file in FILES} == {*PARAMETERS, "digits", "emoji32", "fashion_mnist", "fashion_mnist_cpu"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_is_data_names_its_command_and_can_be_trained(file):
    config = load_config(file)
    validate(config)
    assert config.name == file.stem
    assert warnings_of(config) == []
    tree = ast.parse(file.read_text())
    assert f"python train.py configs/{file.stem}.py" in ast.get_docstring(tree)
    kinds = [type(statement) for statement in tree.body]
    assert kinds == [ast.Expr, ast.ImportFrom, ast.Assign]


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_number_of_parameters(name):
    config = load_config(name)
    color = dataclasses.replace(config, data=dataclasses.replace(config.data, channels=3))
    assert num_parameters(color) == PARAMETERS[name]


@pytest.mark.parametrize("name", PAPER)
def test_the_numbers_of_the_paper(name):
    config = load_config(name)
    fields = (
        "train.steps",
        "train.learning_rate",
        "train.batch_size",
        "model.dropout",
        "data.flip",
        "diffusion.variance",
        "data.height",
    )
    assert tuple(value_of(config, field) for field in fields) == PAPER[name]
    assert (config.data.width, config.data.channels) == (config.data.height, 3)
    assert (config.train.ema_decay, config.train.warmup_steps, config.train.grad_clip) == (0.9999, 5000, 1.0)
    assert (config.model.num_res_blocks, config.model.attention_resolutions, config.model.num_groups) == (2, (16,), 32)
    assert (config.diffusion.prediction, config.diffusion.clip_x0) == ("eps", True)
    schedule = build_schedule(config)
    assert schedule.num_steps == 1000
    assert float(schedule.alphas_bar[-1]) == pytest.approx(4.0358298e-05, rel=1e-6)


# Other files


def refused(path, match):
    with pytest.raises(UserError, match=match) as error:
        load_config(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_file_is_run(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from ddpm_jax.config import Config, TrainConfig\nconfig = Config(name='mine', train=TrainConfig(steps=7))\n"
    )
    for path in (file, str(file.with_suffix(""))):
        assert load_config(path) == Config(name="mine", train=TrainConfig(steps=7))


def test_a_bare_name_is_one_of_configs_from_any_folder(tmp_path, monkeypatch):
    by_path = load_config("configs/cifar10.py")
    monkeypatch.chdir(tmp_path)
    assert load_config("cifar10") == load_config("configs/cifar10.py") == by_path
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "cifar10.py").write_text(
        "from ddpm_jax.config import Config\nconfig = Config(name='own')\n"
    )
    assert load_config("cifar10").name == "own"


def test_a_missing_file_names_the_nearest_or_all():
    refused("cifra10", r"did you mean configs/cifar10\.py\?")
    refused("configs/cifar_10.py", r"did you mean configs/cifar10\.py\?")
    refused("qqqqqqqqqqqqqq", "choose one of .*digits.*, or give a file")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("x = 1\n", r"does not set a configuration: it must contain `config = Config\(...\)`"),
        ("config = {'steps': 1}\n", "does not set a configuration"),
        ("config = Config(\n", r"mine\.py, line 2: "),
        ("\nconfig = 1 / 0\n", r"mine\.py, line 3: ZeroDivisionError: division by zero"),
        (
            "config = Config(train=TrainConfig(batchsize=64))\n",
            r"line 2: TrainConfig has no batchsize: did you mean batch_size\?",
        ),
        ("config = Config(trian=TrainConfig())\n", r"line 2: Config has no trian: did you mean train\?"),
        ("config = Config(train=TrainConfig(steps='many'))\n", "train.steps needs an integer, not 'many'"),
        ("config = Config(train=5)\n", "train must be a TrainConfig, not 5"),
        ("raise ValueError('two\\nlines')\n", "ValueError: two lines"),
    ],
)
def test_a_faulty_config_file_is_one_line(tmp_path, text, line):
    file = tmp_path / "mine.py"
    file.write_text("from ddpm_jax.config import Config, TrainConfig\n" + text)
    refused(file, line)
