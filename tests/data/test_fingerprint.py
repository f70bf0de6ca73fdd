import dataclasses
import shutil

import numpy as np
import pytest

from ddpm_jax.data import fingerprint as module
from ddpm_jax.data.fingerprint import check_same_set, fingerprint, read_class_names
from ddpm_jax.data.sources import load_source
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import read_json, write_json


@pytest.fixture
def folder(sets, tmp_path):
    for i in range(6):
        sets.save(tmp_path / "set" / "ab"[i % 2] / f"{i}.png", sets.noise(4, 4, 1, i))
    return tmp_path / "set"


def loaded(sets, folder, **others):
    return load_source(sets.config("folder", folder, (4, 4), **others))


def test_the_same_images_elsewhere_are_the_same_set(sets, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    here, streamed = (fingerprint(loaded(sets, folder, memory_gib=gib)) for gib in (1.0, 0.0))
    assert here == fingerprint(loaded(sets, tmp_path / "copy"))
    assert streamed == fingerprint(loaded(sets, tmp_path / "copy", memory_gib=0.0))
    assert here.keys() ^ streamed.keys() == {"crc32_all", "crc32_files"}
    assert all(here[name] == streamed[name] for name in here.keys() & streamed.keys())
    assert here["images"] == 6
    assert here["shape"] == [4, 4, 1]
    assert here["class_names"] == ["a", "b"]
    check_same_set(tmp_path / "data.json", loaded(sets, folder))
    check_same_set(tmp_path / "data.json", loaded(sets, tmp_path / "copy"))
    assert read_class_names(tmp_path) == ("a", "b")
    assert read_class_names(tmp_path / "set") == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda sets, folder: sets.save(folder / "a" / "7.png", sets.noise(4, 4, 1)), "images 6 there, 7 here"),
        (lambda sets, folder: sets.save(folder / "a" / "0.png", sets.noise(4, 4, 1, 9)), "other pixels or labels"),
        (lambda sets, folder: (folder / "b").rename(folder / "c"), "class_names ['a', 'b'] there, ['a', 'c'] here"),
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


def sets_but_for_one_pixel(sets, tmp_path, kind, which):
    """Makes two sets of 200 images that differ in one pixel of one image; gives where they lie."""
    pixels = np.stack([sets.noise(4, 4, 1, i) for i in range(200)])
    places = []
    for name in ("before", "after"):
        where = tmp_path / name
        where.mkdir()
        if kind == "folder":
            for i, image in enumerate(pixels):
                sets.save(where / "ab"[i % 2] / f"{i:03}.png", image)
        else:
            np.save(where / "set.npy", pixels)
        places.append(where if kind == "folder" else where / "set.npy")
        pixels[which, 2, 1] ^= 1
    return places


@pytest.mark.parametrize(("kind", "gib"), [("npy", 1.0), ("folder", 1.0), ("folder", 0.0)])
@pytest.mark.parametrize("which", [5, 198])  # neither is one of the 64
def test_one_pixel_of_any_image_is_noticed(sets, tmp_path, kind, gib, which):
    before, after = (
        load_source(sets.config(kind, path, (4, 4), memory_gib=gib))
        for path in sets_but_for_one_pixel(sets, tmp_path, kind, which)
    )
    assert fingerprint(before)["crc32"] == fingerprint(after)["crc32"]
    check_same_set(tmp_path / "data.json", before)
    check_same_set(tmp_path / "data.json", before)
    with pytest.raises(UserError, match="other bytes in the files" if gib == 0 else r"\(other pixels or labels\)"):
        check_same_set(tmp_path / "data.json", after)


def test_a_mapped_array_too_large_to_be_read_through_is_known_by_some_of_its_images(sets, tmp_path, monkeypatch):
    np.save(tmp_path / "set.npy", np.stack([sets.noise(4, 4, 1, i) for i in range(200)]))
    source = load_source(sets.config("npy", tmp_path / "set.npy", (4, 4)))
    whole = fingerprint(source)
    monkeypatch.setattr(module, "_MAPPED_GIB", 0)
    assert fingerprint(source) == {name: value for name, value in whole.items() if name != "crc32_all"}


def test_a_note_of_less_is_held_to_what_it_has_and_then_has_more(sets, folder, tmp_path):
    file = tmp_path / "data.json"
    held, streamed = (loaded(sets, folder, memory_gib=gib) for gib in (1.0, 0.0))
    old = {name: value for name, value in fingerprint(held).items() if name != "crc32_all"}
    write_json(file, old)
    check_same_set(file, held, write=False)
    assert read_json(file) == old
    check_same_set(file, held)
    assert read_json(file) == fingerprint(held)
    check_same_set(file, streamed)
    assert read_json(file) == fingerprint(held) | fingerprint(streamed)
    check_same_set(file, held)


def test_of_many_hosts_one_writes(sets, folder, tmp_path):
    check_same_set(tmp_path / "data.json", loaded(sets, folder), write=False)
    assert not (tmp_path / "data.json").exists()


def test_a_damaged_note_is_no_leave_to_go_on(sets, folder, tmp_path):
    file = tmp_path / "data.json"
    for content in ("junk", "[1]", ""):
        file.write_text(content)
        with pytest.raises(
            UserError,
            match=r"data.json, the record of the run's images, is damaged \(it has no checksum\): restore it, ",
        ):
            check_same_set(file, loaded(sets, folder))
        assert file.read_text() == content
