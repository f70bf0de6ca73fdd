"""A network from another program's checkpoint, in a folder that stands for a run's."""

import dataclasses
import hashlib

import jax
import numpy as np
import pytest

from ddpm_jax.config import DataConfig, ModelConfig
from ddpm_jax.interop.pretrained import Pretrained
from ddpm_jax.run.imported import is_imported, load_imported, save_imported
from ddpm_jax.run.pretrained import load_pretrained_config
from ddpm_jax.run.trained import load_run
from ddpm_jax.run.weights import save_weights
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import read_json


@pytest.fixture
def found(runs):
    config = runs.make_config()
    data = dataclasses.replace(config.data, source="folder")
    return Pretrained(dataclasses.replace(config, data=data), runs.random_params(config), 70, averaged=True)


@pytest.fixture
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("theirs") / "theirs.pt"
    file.write_bytes(b"weights")
    return file


def test_a_folder_has_the_network_and_its_origin(found, file, tmp_path):
    folder = tmp_path / "runs" / "theirs"
    save_imported(folder, found, file=file, flags="--lr 1")
    assert is_imported(folder)
    read = load_imported(folder)
    assert (read.config, read.step, read.averaged) == (found.config, 70, True)
    np.testing.assert_array_equal(read.params["conv_in"]["kernel"], found.params["conv_in"]["kernel"])
    assert read_json(folder / "imported.json") == {
        "file": "theirs.pt",
        "sha256": hashlib.sha256(b"weights").hexdigest(),
        "flags": "--lr 1",
        "step": 70,
        "averaged": True,
    }


def test_its_configuration_is_read_without_the_weights(found, file, tmp_path):
    save_imported(tmp_path, found, file=file, flags=None)
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert load_pretrained_config(tmp_path) == found.config
    with pytest.raises(UserError, match="is damaged: the checksum"):
        load_imported(tmp_path)


def test_nothing_is_overwritten_unasked(found, file, tmp_path):
    save_imported(tmp_path, found, file=file, flags=None)
    with pytest.raises(UserError, match="already contains an imported network: use --overwrite"):
        save_imported(tmp_path, found, file=file, flags=None)
    save_imported(tmp_path, found._replace(step=80), file=file, flags=None, overwrite=True)
    assert load_imported(tmp_path).step == 80
    with pytest.raises(UserError, match="would be overwritten by its own import"):
        save_imported(tmp_path, found, file=tmp_path / "weights.safetensors", flags=None, overwrite=True)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="contains a run"):
        save_imported(tmp_path, found, file=file, flags=None, overwrite=True)


def test_only_an_imported_network_is_overwritten(found, tmp_path):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"theirs")
    with pytest.raises(UserError, match="is not empty and contains no imported network: use another --out"):
        save_imported(tmp_path, found, file=file, flags=None, overwrite=True)
    assert file.read_bytes() == b"theirs"


def test_a_folder_has_no_say_in_how_a_run_trains(found, file, tmp_path):
    save_imported(tmp_path, found, file=file, flags=None)
    config = dataclasses.replace(
        found.config,
        data=dataclasses.replace(found.config.data, workers=10**6),
        eval=dataclasses.replace(found.config.eval, features="evil.py:run"),
        train=dataclasses.replace(found.config.train, init_from="/etc", label_dropout=0.3),
    )
    save_weights(tmp_path / "weights.safetensors", found.params, config=config, step=1)
    read = load_imported(tmp_path).config
    train = dataclasses.replace(found.config.train, label_dropout=0.3)
    assert read == dataclasses.replace(found.config, train=train)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [("model", "network", "evil.py:run"), ("data", "source", "evil.py:run"), ("data", "path", "/etc")],
)
def test_a_folder_cannot_name_code_to_run(section, field, value, found, file, tmp_path):
    changed = dataclasses.replace(getattr(found.config, section), **{field: value})
    save_imported(tmp_path, found, file=file, flags=None)
    config = dataclasses.replace(found.config, **{section: changed})
    save_weights(tmp_path / "weights.safetensors", found.params, config=config, step=1)
    with pytest.raises(UserError, match="which no imported network does"):
        load_imported(tmp_path)


def test_damage_is_one_line(found, file, tmp_path):
    save_imported(tmp_path, found, file=file, flags=None)
    for content in ("", "[1]", "{}"):
        (tmp_path / "imported.json").write_text(content)
        with pytest.raises(UserError, match="damaged, its record cannot be read"):
            load_imported(tmp_path)


def test_the_paper_s_network_goes_out_and_comes_back(runs, run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(
        runs.make_config(),
        data=DataConfig(height=32, width=32, channels=1),
        model=ModelConfig(width=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=()),
    )
    trained = runs.make_trained(config, step=70)
    runs.save_runs(trained, folder=tmp_path / "run")
    assert run_script("evaluate.py", "export", "run", "--format", "original", "--out", "theirs.npz")[0] == 0
    flags = f"--num_diffusion_timesteps {runs.T} --beta_start 0.05 --beta_end 0.6 --randflip 0"
    status, out, _ = run_script("evaluate.py", "import", "theirs.npz", "--flags", flags)
    assert status == 0
    assert "averages (EMA), step 70" in out
    assert run_script("evaluate.py", "import", "theirs.npz")[0] == 2
    found = load_run(tmp_path / "runs" / "theirs")
    jax.tree.map(np.testing.assert_array_equal, found.params, trained.params)
    assert (found.step, found.config.diffusion, found.config.model) == (70, config.diffusion, config.model)
    assert run_script("sample.py", "runs/theirs", "--num", "1", "--format", "npz")[0] == 0
    with np.load("runs/theirs/samples/checkpoint_70_seed_0/samples.npz") as drawn:
        assert drawn["arr_0"].shape == (1, 32, 32, 1)
