import dataclasses
import json
import shutil

import numpy as np
import pytest

from ddpm_jax.data.fingerprint import check_same_set, fingerprint
from ddpm_jax.data.sources import load_source
from ddpm_jax.errors import UserError


@pytest.fixture
def folder(sets, tmp_path):
    for i in range(6):
        sets.save(tmp_path / "set" / "ab"[i % 2] / f"{i}.png", sets.noise(4, 4, 1, i))
    return tmp_path / "set"


def loaded(sets, folder, **others):
    return load_source(sets.config("folder", folder, (4, 4), **others))


def test_the_same_images_elsewhere_are_the_same_set(sets, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    here = fingerprint(loaded(sets, folder))
    assert here == fingerprint(loaded(sets, tmp_path / "copy", memory_gib=0.0))
    assert here["images"] == 6
    assert here["shape"] == [4, 4, 1]
    assert here["classes"] == ["a", "b"]
    check_same_set(tmp_path / "data.json", loaded(sets, folder))
    check_same_set(tmp_path / "data.json", loaded(sets, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda sets, folder: sets.save(folder / "a" / "7.png", sets.noise(4, 4, 1)), "images 6 there, 7 here"),
        (lambda sets, folder: sets.save(folder / "a" / "0.png", sets.noise(4, 4, 1, 9)), "other pixels or labels"),
        (lambda sets, folder: (folder / "b").rename(folder / "c"), "classes ['a', 'b'] there, ['a', 'c'] here"),
    ],
)
def test_another_set_is_refused_in_one_line(sets, folder, tmp_path, change, said):
    check_same_set(tmp_path / "data.json", loaded(sets, folder))
    kept = (tmp_path / "data.json").read_bytes()
    change(sets, folder)
    with pytest.raises(UserError) as raised:
        check_same_set(tmp_path / "data.json", loaded(sets, folder))
    line = str(raised.value)
    assert said in line
    assert f"remove {tmp_path / 'data.json'}" in line
    assert "\n" not in line
    assert (tmp_path / "data.json").read_bytes() == kept


def test_labels_that_change_places_are_another_set(sets, folder):
    source = loaded(sets, folder)
    turned = dataclasses.replace(source, read_labels=lambda indices: 1 - source.labels[indices])
    assert fingerprint(source) != fingerprint(turned)


def test_of_many_hosts_one_writes(sets, folder, tmp_path):
    check_same_set(tmp_path / "data.json", loaded(sets, folder), write=False)
    assert not (tmp_path / "data.json").exists()


def test_a_damaged_note_is_written_anew(sets, folder, tmp_path):
    file = tmp_path / "data.json"
    file.write_text('{"images": 6, "sha')
    check_same_set(file, loaded(sets, folder))
    assert json.loads(file.read_text()) == fingerprint(loaded(sets, folder))
    assert np.uint32(json.loads(file.read_text())["crc32"]) == json.loads(file.read_text())["crc32"]
