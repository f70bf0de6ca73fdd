import struct

import numpy as np
import pytest

from ddpm_jax.config import DataConfig
from ddpm_jax.data import sources
from ddpm_jax.system.errors import UserError


def test_the_channels_are_filled_in(sets):
    assert sources.resolve(sets.config("digits")) == sets.config("digits", channels=1)
    assert sources.resolve(sets.config("folder", "nowhere", channels=3)).channels == 3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("digit", "did you mean digits?"),
        ("Folder", "did you mean folder?"),
        ("tfds", "did you mean tfds:NAME?"),
        ("tfds:", "did you mean tfds:NAME?"),
        ("folder:flowers", "did you mean folder?"),
        ("imagenet", "(digits, folder, npz, npy, idx, cifar10, tfds:NAME, or your own my_data.py:function)"),
    ],
)
def test_an_unknown_source_is_refused(sets, name, said):
    message = sets.refused(sets.config(name))
    assert said in message
    assert repr(name) in message


def save_part(sets, kind, folder, part, pixels):
    """Saves one part of a set as `kind` has it; gives the file, to be damaged."""
    if kind == "folder":
        return [sets.save(folder / part / f"{i}.png", image) for i, image in enumerate(pixels)][0]
    file = folder / {"npy": f"{part}.npy", "idx": f"{'t10k' if part == 'test' else part}-images-idx3-ubyte"}[kind]
    if kind == "npy":
        np.save(file, pixels)
    else:
        file.write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">3I", *pixels.shape) + pixels.tobytes())
    return file


@pytest.mark.parametrize("kind", ["folder", "npy", "idx"])
def test_what_is_held_out_is_the_training_part_only_where_there_is_no_other(sets, tmp_path, kind):
    train, test = (np.stack([sets.noise(4, 4, 1, seed + i) for i in range(3)]) for seed in (0, 9))
    config = sets.config(kind, tmp_path, (4, 4), channels=1)
    save_part(sets, kind, tmp_path, "train", train)
    found = sources.load_held_out(config)
    np.testing.assert_array_equal(sets.everything(found)[..., 0], train)
    assert found.name.endswith(", train")
    file = save_part(sets, kind, tmp_path, "test", test)
    found = sources.load_held_out(config)
    np.testing.assert_array_equal(sets.everything(found)[..., 0], test)
    assert found.name.endswith(", test")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=file.name):
        sources.load_held_out(config)


@pytest.mark.parametrize("names", [("images",), ("x_train", "y_train")])
def test_a_file_without_a_test_part_holds_out_what_it_has(sets, tmp_path, names):
    pixels = np.stack([sets.noise(4, 4, 1, i) for i in range(3)])
    np.savez(tmp_path / "set.npz", **dict(zip(names, (pixels, np.arange(3)), strict=False)))
    found = sources.load_held_out(sets.config("npz", tmp_path / "set.npz", (4, 4), channels=1))
    np.testing.assert_array_equal(sets.everything(found)[..., 0], pixels)


def test_a_set_that_is_not_there_holds_out_nothing(sets, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        sources.load_held_out(sets.config("folder", tmp_path / "gone", (4, 4), channels=1))


def test_a_path_is_where_it_was_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sources.resolve(DataConfig(source="folder", path="images", channels=3)).path == str(tmp_path / "images")
    assert sources.resolve(DataConfig(source="tfds:cifar10", path="gs://bucket/data")).path == "gs://bucket/data"
    assert sources.resolve(DataConfig()).path == ""


@pytest.mark.parametrize("memory_gib", [1.0, 0.0])
def test_what_is_held_out_follows_from_the_pixels_alone(sets, tmp_path, memory_gib):
    pixels = np.stack([sets.noise(4, 4, 1, i) for i in range(100)])

    def parts(order):
        np.save(tmp_path / "set.npy", pixels[order])
        np.save(tmp_path / "set_labels.npy", order)
        config = sets.config("npy", tmp_path / "set.npy", (4, 4), holdout=0.2, memory_gib=memory_gib)
        train, held_out = sources.load_source(config), sources.load_held_out(config)
        assert (train.images is None) == (memory_gib == 0)
        for source in (train, held_out):  # labels stay with their images
            np.testing.assert_array_equal(sets.everything(source)[..., 0], pixels[source.labels])
        return set(train.labels), set(held_out.labels)

    some, few = parts(np.arange(60))
    assert some | few == set(range(60))
    assert 0 < len(few) < 30
    train, held_out = parts(np.arange(100)[::-1])
    assert some < train
    assert few < held_out


def test_a_part_is_held_out_of_a_set_that_has_no_other(sets, tmp_path):
    assert "use --data.holdout 0" in sets.refused(sets.config("digits", holdout=0.1))
    save_part(sets, "folder", tmp_path, "train", np.stack([sets.noise(4, 4, 1, i) for i in range(3)]))
    assert "holds out 0 of 3 images" in sets.refused(sets.config("folder", tmp_path, (4, 4), holdout=1e-9))


def test_a_path_that_would_not_be_looked_at_is_refused(sets, tmp_path):
    assert "would not be looked at: give --data.source" in sets.refused(sets.config("digits", tmp_path))
