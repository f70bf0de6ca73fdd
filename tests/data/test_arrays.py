import tracemalloc
import zipfile

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from ddpm_jax.config import Config, ModelConfig
from ddpm_jax.data import sources
from ddpm_jax.data.check import check_classes
from ddpm_jax.data.source import Source
from ddpm_jax.system.errors import UserError

few = hypothesis.settings(max_examples=20, deadline=None)
PIXELS = np.random.default_rng(0).integers(0, 256, (9, 5, 6, 3), np.uint8)
LABELS = np.arange(9) % 4


def loaded(sets, path, **others):
    return sources.load_source(sets.config("npz", path, (5, 6), **others))


@pytest.mark.parametrize("name", ["images", "arr_0", "x", "faces"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_are_found_by_name_or_because_they_are_alone(sets, tmp_path, save, name):
    save(tmp_path / "a.npz", **{name: PIXELS})
    source = loaded(sets, tmp_path / "a.npz")
    np.testing.assert_array_equal(sets.everything(source), PIXELS)
    assert source.image_shape == (5, 6, 3)
    assert source.read_labels is None
    indices = np.array([8, 0, 8])
    np.testing.assert_array_equal(source.read(indices), PIXELS[indices])


@pytest.mark.parametrize(
    ("name", "labels"), [("labels", LABELS), ("y", LABELS[:, None]), ("arr_1", LABELS.astype("u1"))]
)
def test_labels_are_found_by_name(sets, tmp_path, name, labels):
    np.savez(tmp_path / "a.npz", **{"arr_0": PIXELS, name: labels})
    source = loaded(sets, tmp_path / "a.npz")
    np.testing.assert_array_equal(source.labels, LABELS)
    assert source.labels.dtype == np.int32
    assert source.class_names == ("0", "1", "2", "3")


@pytest.mark.parametrize(
    "name", ["label", "Labels", "Y", "targets", "target", "class", "classes", "fine_labels", "arr_1"]
)
@pytest.mark.parametrize("labels", [LABELS, LABELS[:, None].astype(float), np.eye(4, dtype=np.uint8)[LABELS]])
def test_labels_have_the_names_and_shapes_that_are_common(sets, tmp_path, name, labels):
    np.savez(tmp_path / "a.npz", **{"data": PIXELS, name: labels})
    source = loaded(sets, tmp_path / "a.npz")
    np.testing.assert_array_equal(source.labels, LABELS)
    assert source.class_names == ("0", "1", "2", "3")
    assert source.notes == ()


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (LABELS[:5], "labels of shape (9,), integers from 0"),
        (LABELS / 2, "is float64 with fractions"),
        (LABELS - 1, "has a label -1; number the classes from 0"),
        (LABELS * 10**6, "has a label 3000000 for 9 images; number the classes from 0: save np.unique(labels"),
        (np.array(list("abcabcabc")), "holds text; save np.unique(labels, return_inverse=True)[1]"),
        (np.ones((9, 14), np.uint8), "has 14 numbers an image, which are not one-hot"),
    ],
)
def test_labels_that_cannot_be_used_are_for_those_who_want_labels(sets, tmp_path, labels, said):
    np.savez(tmp_path / "a.npz", train_images=PIXELS, train_labels=labels)
    source = loaded(sets, tmp_path / "a.npz")
    assert source.labels is None
    assert said in source.label_fault
    with pytest.raises(UserError, match=r"the images have no labels \(train_labels in .*a.npz "):
        check_classes(Config(model=ModelConfig(num_classes=4)), source)
    check_classes(Config(), source)


def test_arrays_that_are_not_used_are_named(sets, tmp_path):
    held = {"train_images": PIXELS, "numbers": LABELS, "val_images": PIXELS, "test_images": PIXELS[:3]}
    np.savez(tmp_path / "a.npz", **held)
    source = loaded(sets, tmp_path / "a.npz")
    assert source.notes == (f"not used in {tmp_path / 'a.npz'}: numbers, test_images, val_images",)
    assert source.label_fault == "numbers looks like labels: save it as y_train"
    assert loaded(sets, tmp_path / "a.npz", split="test").num_examples == 3
    np.savez(tmp_path / "val.npz", PIXELS)
    np.save(tmp_path / "train.npy", PIXELS)
    np.save(tmp_path / "train_labels.npy", LABELS)
    assert loaded(sets, tmp_path, split="train").notes == (f"not used in {tmp_path}: a.npz, val.npz",)
    assert loaded(sets, tmp_path, split="all").notes == (f"not used in {tmp_path}: a.npz",)
    assert loaded(sets, tmp_path, split="test").num_examples == 9


def test_volumes_are_no_pictures_of_many_channels(sets, tmp_path):
    np.savez(tmp_path / "a.npz", train_images=np.zeros((3, 28, 28, 28), np.uint8))
    assert "is 3x28x28x28, which would be pictures of 28 channels: volumes cannot be trained on" in sets.refused(
        sets.config("npz", tmp_path / "a.npz", (28, 28))
    )
    assert "if these are channels" in sets.refused(sets.config("npz", tmp_path / "a.npz", (28, 28), 1))
    assert sources.load_source(sets.config("npz", tmp_path / "a.npz", (28, 28), 28)).image_shape == (28, 28, 28)


@pytest.mark.parametrize("order", ["C", "F"])
def test_an_npy_is_mapped_with_its_labels_beside_it(sets, tmp_path, order):
    np.save(tmp_path / "a.npy", np.asarray(PIXELS[..., 0], order=order))
    np.save(tmp_path / "a_labels.npy", LABELS)
    source = loaded(sets, tmp_path / "a.npy")
    np.testing.assert_array_equal(sets.everything(source), PIXELS[..., :1])
    np.testing.assert_array_equal(source.labels, LABELS)
    assert isinstance(source.images, np.memmap)
    assert "mapped from disk" in source.describe()
    assert sources.probe_channels(sets.config("npy", tmp_path / "a.npy")) == 1


@pytest.mark.parametrize("names", [("x_{}", "y_{}"), ("{}_images", "{}_labels")])
def test_the_splits_of_one_file(sets, tmp_path, names):
    parts = {"train": slice(0, 6), "test": slice(6, 9)}
    held = {names[0].format(split): PIXELS[part] for split, part in parts.items()}
    np.savez(tmp_path / "a.npz", **held, **{names[1].format(split): LABELS[part] for split, part in parts.items()})
    for split, part in {**parts, "all": slice(None)}.items():
        source = loaded(sets, tmp_path / "a.npz", split=split)
        np.testing.assert_array_equal(sets.everything(source), PIXELS[part])
        np.testing.assert_array_equal(source.labels, LABELS[part])


def test_the_splits_of_a_folder(sets, tmp_path):
    np.savez(tmp_path / "train.npz", PIXELS[:6])
    np.save(tmp_path / "test.npy", PIXELS[6:])
    assert [loaded(sets, tmp_path, split=split).num_examples for split in ("train", "test", "all")] == [6, 3, 9]
    np.testing.assert_array_equal(sets.everything(loaded(sets, tmp_path, split="all")), PIXELS)
    (tmp_path / "test.npy").unlink()
    assert "holds no test.npz or test.npy" in sets.refused(sets.config("npz", tmp_path, (5, 6), split="test"))


@few
@hypothesis.given(st.lists(st.integers(0, 8), min_size=1, max_size=12), st.integers(1, 8))
def test_a_set_larger_than_memory_is_read_from_where_it_lies(sets, tmp_path_factory, indices, cut):
    folder = tmp_path_factory.mktemp("arrays")
    np.save(folder / "train.npy", PIXELS[:cut])
    np.save(folder / "test.npy", PIXELS[cut:])
    source = loaded(sets, folder, split="all", memory_gib=0.0)
    assert source.images is None
    np.testing.assert_array_equal(source.read(np.array(indices)), PIXELS[indices])


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": PIXELS.transpose(0, 3, 1, 2)}, "images.transpose(0, 2, 3, 1)"),
        ({"images": PIXELS / 255}, "from 0 to 1, not uint8; save np.round(images * 255).astype(np.uint8)"),
        ({"images": PIXELS / np.float32(127.5) - 1}, "save np.round((images + 1) * 127.5).astype(np.uint8)"),
        ({"images": PIXELS.astype(np.float64)}, "save np.round(images).astype(np.uint8)"),
        ({"images": PIXELS.astype(np.int64)}, "is of int64 from 0 to 255, not uint8; save images.astype(np.uint8)"),
        ({"images": PIXELS.astype(np.uint16) * 16}, "save np.round(images * (255 / 4095)).astype(np.uint8)"),
        ({"images": PIXELS.view(np.int8)}, "save (images.astype(np.int16) + 128).astype(np.uint8)"),
        ({"images": PIXELS > 99}, "save np.round(images * 255).astype(np.uint8)"),
        ({"images": np.zeros((20, 24, 3), np.uint8)}, "which is one picture; save images[None]"),
        ({"images": PIXELS[0, 0]}, "is 6x3, not (N, H, W, C)"),
        ({"images": PIXELS[:0]}, "is 0x5x6x3, not"),
        ({"images": PIXELS.astype(object)}, "holds Python objects"),
        ({"a": PIXELS, "b": PIXELS}, "holds no array images, but a, b"),
        ({"x_train": PIXELS[:, :4], "y_train": LABELS}, "are of 4x6, not 5x6; set data.height=4 and data.width=6"),
    ],
)
def test_arrays_that_are_no_images_are_refused_with_what_to_do(sets, tmp_path, arrays, said):
    np.savez(tmp_path / "a.npz", **arrays)
    message = sets.refused(sets.config("npz", tmp_path / "a.npz", (5, 6), 3))
    assert said.replace("are of", "holds images of") in message
    assert "a.npz" in message


def test_other_channels_and_splits_are_refused(sets, tmp_path):
    np.save(tmp_path / "a.npy", PIXELS)
    assert "has 3; set it to 3, not 1" in sets.refused(sets.config("npy", tmp_path / "a.npy", (5, 6), 1))
    assert "name a folder that holds train.npy" in sets.refused(sets.config("npy", tmp_path / "a.npy", split="test"))
    assert "choose from train, test, all" in sets.refused(sets.config("npy", tmp_path / "a.npy", split="val"))
    assert "name the .npz or .npy file" in sets.refused(sets.config("npy"))
    assert "there is no file" in sets.refused(sets.config("npy", tmp_path / "b.npy"))


def test_an_npz_larger_than_memory_is_refused_with_what_to_do(sets, tmp_path):
    np.savez(tmp_path / "a.npz", PIXELS)
    message = sets.refused(sets.config("npz", tmp_path / "a.npz", (5, 6), memory_gib=0.0))
    assert "more than data.memory_gib=0: save the array with np.save" in message


@pytest.mark.parametrize("name", ["a.npz", "a.npy"])
@pytest.mark.parametrize(
    "damage", [lambda whole: whole[:-30], lambda whole: whole[:40], lambda whole: b"", lambda whole: b"no"]
)
def test_damaged_files_are_refused(sets, tmp_path, name, damage):
    file = tmp_path / name
    (np.savez if name.endswith("z") else np.save)(file, PIXELS)
    file.write_bytes(damage(file.read_bytes()))
    assert str(file) in sets.refused(sets.config("npz", file, (5, 6)))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_within_an_array_of_an_archive_is_found(sets, tmp_path, save):
    save(tmp_path / "a.npz", np.random.default_rng(1).integers(0, 256, (200, 5, 6, 3), np.uint8))
    whole = bytearray((tmp_path / "a.npz").read_bytes())
    whole[len(whole) // 2] ^= 4
    (tmp_path / "a.npz").write_bytes(whole)
    assert "a.npz cannot be read" in sets.refused(sets.config("npz", tmp_path / "a.npz", (5, 6), 3))


def test_a_file_written_anew_is_read_anew(sets, tmp_path):
    for value in (1, 2):
        np.save(tmp_path / "b.npy", np.full_like(PIXELS, value))
        (tmp_path / "b.npy").replace(tmp_path / "a.npy")
        source: Source = loaded(sets, tmp_path / "a.npy")
        assert (sets.everything(source) == value).all()


def header_of(shape, *, descr="|u1", version=b"\x01\x00", pad=0):
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}" + " " * pad + "\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2 if version[0] == 1 else 4, "little") + text.encode()


HOSTILE = {
    "negative": (header_of("(-1, 5, 6, 3)") + bytes(90), "a shape of (-1, 5, 6, 3)"),
    "boolean": (header_of("(True, 5, 6, 3)") + bytes(90), "a shape of (True, 5, 6, 3)"),
    "large": (header_of(f"({2**62}, 5, 6, 3)") + bytes(90), "header"),
    "short": (header_of("(3, 5, 6, 3)") + bytes(90), "header"),
    "objects": (header_of("(1,)", descr="|O") + b"cposix\nsystem\n(S'touch ran'\ntR.", "Python objects"),
    "long header": (header_of("(1, 5, 6, 3)", version=b"\x02\x00", pad=2**20) + bytes(90), "a header of 1048"),
    "nested header": (header_of("(" * 4000 + "1" + ")" * 4000) + bytes(90), "not a readable"),
    "minus": (header_of("(" + "-" * 9000 + "1,)") + bytes(90), "not a readable"),
    "a program": (header_of("(__import__('os').system('touch ran'),)"), "not a readable"),
    "a pickle": (b"cposix\nsystem\n(S'touch ran'\ntR.", "not a readable"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_one_line(sets, tmp_path, monkeypatch, name, packed):
    monkeypatch.chdir(tmp_path)
    content, said = HOSTILE[name]
    path = tmp_path / ("a.npz" if packed else "a.npy")
    if packed:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("images.npy", content)
    else:
        path.write_bytes(content)
    tracemalloc.start()
    try:
        message = sets.refused(sets.config("npz", path, (5, 6), 3))
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert said in message
    assert len(message) < 500
    assert not (tmp_path / "ran").exists()


def test_no_array_takes_more_than_the_memory_that_is_configured(sets, tmp_path):
    def refused(**arrays):
        path = tmp_path / "a.npz"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, (shape, descr, size) in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    member.write(header_of(str(shape), descr=descr))
                    for first in range(0, size, 2**24):
                        member.write(bytes(min(2**24, size - first)))
        tracemalloc.start()
        try:
            wanted = sets.config("npz", path, (8, 8), 3, memory_gib=2**-10)
            try:
                return sources.load_source(wanted).label_fault
            except UserError as error:
                return str(error)
            finally:
                assert tracemalloc.get_traced_memory()[1] < 2**25
        finally:
            tracemalloc.stop()

    assert "more than data.memory_gib" in refused(images=((2**18, 8, 8, 3), "|u1", 2**18 * 192))
    assert "is of float64, not uint8" in refused(images=((2**15, 8, 8, 3), "<f8", 2**15 * 192 * 8))
    assert "more than fit data.memory_gib" in refused(
        images=((64, 8, 8, 3), "|u1", 64 * 192), labels=((64, 2**20), "|u1", 2**26)
    )
