"""A network from another program's checkpoint, in a folder that stands for a run's."""

import dataclasses
import hashlib

import numpy as np
import pytest

from ddpm_jax.interop.pretrained import Pretrained
from ddpm_jax.run.imported import is_imported, load_imported, save_imported
from ddpm_jax.run.weights import save_weights
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import read_json


@pytest.fixture
def found(runs):
    config = runs.make_config()
    data = dataclasses.replace(config.data, source="folder")
    return Pretrained(dataclasses.replace(config, data=data), runs.random_params(config), 70, averaged=True)


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "theirs.pt"
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


def test_nothing_is_overwritten_unasked(found, file, tmp_path):
    save_imported(tmp_path, found, file=file, flags=None)
    with pytest.raises(UserError, match="already contains an imported network: use --overwrite"):
        save_imported(tmp_path, found, file=file, flags=None)
    save_imported(tmp_path, found._replace(step=80), file=file, flags=None, overwrite=True)
    assert load_imported(tmp_path).step == 80
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="contains a run"):
        save_imported(tmp_path, found, file=file, flags=None, overwrite=True)


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
        with pytest.raises(UserError, match="damaged, its configuration cannot be read"):
            load_imported(tmp_path)
