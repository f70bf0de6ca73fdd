import gzip
import io
import json
import shutil
import socket
import struct
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from ddpm_jax.config import DataConfig
from ddpm_jax.data import sources
from ddpm_jax.errors import UserError

few = hypothesis.settings(max_examples=25, deadline=None)


def config(source, path="", size=(8, 8), channels=None, **others):
    return DataConfig(source=source, path=str(path), height=size[0], width=size[1], channels=channels, **others)


def refused(wanted):
    """Loads what must be refused, and gives the message, which must be one line."""
    with pytest.raises(UserError) as raised:
        sources.load_source(wanted)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def noise(height, width, channels, seed=0):
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **options)
    return path


def everything(source):
    return source.read(np.arange(source.num_examples))


# --- digits ---


def test_the_digits_are_all_there_in_two_parts():
    images, labels = load_digits(return_X_y=True)
    parts = {name: sources.load_source(config("digits", channels=1, split=name)) for name in ("train", "test", "all")}
    assert [part.num_examples for part in parts.values()] == [1438, 359, 1797]
    whole = parts["all"]
    assert whole.image_shape == (8, 8, 1)
    assert everything(whole).dtype == np.uint8
    np.testing.assert_allclose(everything(whole).reshape(-1, 64) * (16 / 255), images, atol=0.5 * 16 / 255)
    np.testing.assert_array_equal(whole.labels, labels)
    assert whole.labels.dtype == np.int32
    held_out = np.arange(1797) % 5 == 4
    for name, chosen in (("test", held_out), ("train", ~held_out)):
        np.testing.assert_array_equal(everything(parts[name]), everything(whole)[chosen])
        np.testing.assert_array_equal(parts[name].labels, whole.labels[chosen])
    assert whole.class_names == tuple("0123456789")
    assert whole.describe() == "digits, all: 1797 images of 8x8x1, 10 classes, 0.1 MiB in memory"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"size": (16, 8)}, "8x8 with 1 channel, not 16x8"),
        ({"channels": 3}, "with 3; set data.height=8"),
        ({"split": "valid"}, "'valid'; choose from train, test, all"),
    ],
)
def test_the_digits_are_only_what_they_are(wrong, said):
    assert said in refused(config("digits", **{"channels": 1} | wrong))


def test_the_channels_are_filled_in():
    assert sources.resolve(config("digits")) == config("digits", channels=1)
    assert sources.resolve(config("folder", "nowhere", channels=3)).channels == 3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("digit", "did you mean digits?"),
        ("Folder", "did you mean folder?"),
        ("tfds", "did you mean tfds:NAME?"),
        ("tfds:", "did you mean tfds:NAME?"),
        ("folder:flowers", "did you mean folder?"),
        ("imagenet", "(digits, folder, idx or tfds:NAME)"),
    ],
)
def test_an_unknown_source_is_refused(name, said):
    message = refused(config(name))
    assert said in message
    assert repr(name) in message


# --- folder ---


def test_a_folder_gives_its_pixels_in_the_order_of_its_paths(tmp_path):
    pixels = [noise(6, 10, 3, seed) for seed in range(4)]
    for name, one in zip(["b/z.png", "a.png", "b/sub/y.PNG", "c.webp"], pixels, strict=True):
        save(tmp_path / name, one, **{"lossless": True} if name.endswith("webp") else {})
    (tmp_path / "notes.txt").write_text("no picture, and not looked at")
    save(tmp_path / ".hidden.png", noise(3, 3, 1))
    save(tmp_path / ".thumbnails" / "x.png", noise(3, 3, 1))
    source = sources.load_source(config("folder", tmp_path, (6, 10)))
    assert source.image_shape == (6, 10, 3)
    np.testing.assert_array_equal(everything(source), [pixels[1], pixels[2], pixels[0], pixels[3]])
    assert source.labels is None
    assert source.images is not None
    np.testing.assert_array_equal(source.read(np.array([3, 0, 3])), [pixels[3], pixels[1], pixels[3]])


@pytest.mark.parametrize(
    ("mode", "channels"), [("1", 1), ("L", 1), ("I;16", 1), ("RGB", 3), ("P", 3), ("CMYK", 3), ("LA", 4), ("RGBA", 4)]
)
def test_channels_are_those_of_the_files(tmp_path, mode, channels):
    image = Image.fromarray(noise(5, 7, 1)).convert(mode)
    save(tmp_path / ("x.jpg" if mode == "CMYK" else "x.png"), image)
    wanted = config("folder", tmp_path, (5, 7))
    assert sources.probe_channels(wanted) == channels
    assert sources.load_source(wanted).image_shape == (5, 7, channels)


@pytest.mark.parametrize("byte_order", ["<u2", ">u2"])
def test_sixteen_bit_grey_is_scaled(tmp_path, byte_order):
    deep = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    save(tmp_path / "deep.png", Image.fromarray(deep.astype(byte_order)))
    (found,) = everything(sources.load_source(config("folder", tmp_path, (16, 16))))
    np.testing.assert_array_equal(found[..., 0], deep // 257)


def test_a_palette_becomes_its_colours(tmp_path):
    image = Image.new("P", (2, 2))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2, 1])
    save(tmp_path / "p.png", image)
    (found,) = everything(sources.load_source(config("folder", tmp_path, (2, 2))))
    np.testing.assert_array_equal(found, [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 255, 0]]])


def test_alpha_is_kept_or_becomes_white(tmp_path):
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = [0, 255, 128]  # clear, black, half black
    save(tmp_path / "x.png", pixels)
    for channels, wanted in ((3, [255, 0, 127]), (1, [255, 0, 127])):
        (found,) = everything(sources.load_source(config("folder", tmp_path, (1, 3), channels)))
        np.testing.assert_allclose(found[0], np.array(wanted)[:, None].repeat(channels, 1), atol=1)
    (found,) = everything(sources.load_source(config("folder", tmp_path, (1, 3))))
    np.testing.assert_array_equal(found, pixels)


def test_a_camera_held_upright_is_turned_upright(tmp_path):
    pixels = np.zeros((32, 16, 3), np.uint8)
    pixels[:16] = 255  # as it was seen: white above black
    turned = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # as stored, it must be turned by 90 degrees clockwise
    save(tmp_path / "x.jpg", turned, exif=exif, quality=95)
    (found,) = everything(sources.load_source(config("folder", tmp_path, (32, 16))))
    np.testing.assert_allclose(found.astype(int), pixels, atol=12)


@few
@hypothesis.given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.integers(1, 20))
def test_pictures_of_any_size_keep_their_middle(height, width, new_height, new_width):
    # A picture whose value is its distance from the middle stays symmetric.
    rows, columns = np.abs(np.arange(height) - (height - 1) / 2), np.abs(np.arange(width) - (width - 1) / 2)
    pixels = (4 * (rows[:, None] + columns[None, :])).astype(np.uint8)
    found = sources._to_array(Image.fromarray(pixels), (new_height, new_width, 1))
    assert found.shape == (new_height, new_width, 1)
    np.testing.assert_allclose(found.astype(int), found[::-1].astype(int), atol=2)
    np.testing.assert_allclose(found.astype(int), found[:, ::-1].astype(int), atol=2)


def test_the_crop_is_of_the_target_s_aspect_ratio(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = [200, 100, 50]  # the middle square
    save(tmp_path / "wide.png", pixels)
    save(tmp_path / "tall.png", pixels.transpose(1, 0, 2))
    found = everything(sources.load_source(config("folder", tmp_path, (10, 10))))
    middle = found[:, 2:-2, 2:-2]  # at its edges the filter sees the neighbours that were cut away
    np.testing.assert_array_equal(middle, np.broadcast_to(np.array([200, 100, 50]), middle.shape))
    assert found.min() > 40


def test_a_fine_pattern_becomes_grey(tmp_path):
    # Without antialiasing a checkerboard of single pixels becomes black, white or stripes.
    rows, columns = np.indices((96, 96))
    save(tmp_path / "board.png", (255 * ((rows + columns) % 2)).astype(np.uint8))
    (found,) = everything(sources.load_source(config("folder", tmp_path, (12, 12))))
    np.testing.assert_allclose(found[2:-2, 2:-2].astype(float), 127.5, atol=2)


def test_sub_folders_name_the_classes(tmp_path):
    for name in ("dog/1.png", "cat/deep/2.png", "cat/3.png"):
        save(tmp_path / name, noise(4, 4, 1))
    source = sources.load_source(config("folder", tmp_path, (4, 4)))
    assert source.class_names == ("cat", "dog")
    np.testing.assert_array_equal(source.labels, [0, 0, 1])
    assert source.labels.dtype == np.int32
    assert "2 classes" in source.describe()


def test_the_parts_of_a_folder_are_its_sub_folders(tmp_path):
    for name in ("train/cat/a.png", "train/dog/b.png", "test/dog/c.png"):
        save(tmp_path / name, np.full((4, 4), ord(name[-5]), np.uint8))
    found = {
        name: sources.load_source(config("folder", tmp_path, (4, 4), split=name)) for name in ("train", "test", "all")
    }
    letters = {name: [chr(value) for value in everything(source)[:, 0, 0, 0]] for name, source in found.items()}
    assert letters == {"train": ["a", "b"], "test": ["c"], "all": ["a", "b", "c"]}
    assert {source.class_names for source in found.values()} == {("cat", "dog")}  # a class has one number in all parts
    assert [list(source.labels) for source in found.values()] == [[0, 1], [1], [0, 1, 1]]


def test_a_folder_without_parts_is_all_for_training(tmp_path):
    save(tmp_path / "a.png", noise(4, 4, 1))
    wanted = config("folder", tmp_path, (4, 4))
    assert sources.load_source(wanted).num_examples == 1
    assert sources.load_source(config("folder", tmp_path, (4, 4), split="all")).num_examples == 1
    assert "no test part" in refused(config("folder", tmp_path, (4, 4), split="test"))
    assert "choose from train, test, all" in refused(config("folder", tmp_path, (4, 4), split="val"))


def test_test_images_are_never_learned_from(tmp_path):
    save(tmp_path / "test" / "a.png", noise(4, 4, 1))
    save(tmp_path / "b.png", noise(4, 4, 1))
    assert "a sub-folder 'test' but none 'train'" in refused(config("folder", tmp_path, (4, 4)))


def test_links_are_followed_once(tmp_path):
    save(tmp_path / "real" / "a.png", noise(4, 4, 1))
    (tmp_path / "set" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "cat" / "away").symlink_to(tmp_path / "real", target_is_directory=True)
    (tmp_path / "set" / "cat" / "back").symlink_to(tmp_path / "set", target_is_directory=True)
    assert sources.load_source(config("folder", tmp_path / "set", (4, 4))).num_examples == 1


@pytest.mark.parametrize(
    ("path", "said"),
    [("", "name the folder"), ("nowhere", "nowhere does not exist"), ("file", "is not a folder"), ("empty", "no PNG")],
)
def test_a_folder_that_is_none_is_refused(tmp_path, path, said):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    assert said in refused(config("folder", tmp_path / path if path else ""))


def test_images_that_do_not_agree_are_refused_or_converted(tmp_path):
    save(tmp_path / "a.png", noise(4, 4, 1))
    save(tmp_path / "b.png", noise(4, 4, 3))
    message = refused(config("folder", tmp_path, (4, 4)))
    assert "do not agree" in message
    assert "a.png has 1" in message
    assert "b.png has 3" in message
    assert sources.load_source(config("folder", tmp_path, (4, 4), 3)).image_shape == (4, 4, 3)
    assert "must be 1, 3 or 4" in refused(config("folder", tmp_path, (4, 4), 2))


def damaged_folder(tmp_path):
    """Four good files and five that are damaged, each in another way."""
    for i in range(4):
        save(tmp_path / f"good{i}.png", np.full((64, 64, 3), i, np.uint8))
    picture = noise(64, 64, 3)
    (tmp_path / "bad1.png").write_bytes(b"")
    (tmp_path / "bad2.jpg").write_text("this is no picture")
    whole = save(tmp_path / "bad3.jpg", picture).read_bytes()
    (tmp_path / "bad3.jpg").write_bytes(whole[: len(whole) // 2])
    whole = save(tmp_path / "bad4.png", picture).read_bytes()
    (tmp_path / "bad4.png").write_bytes(whole[: len(whole) // 2])
    whole = save(tmp_path / "bad5.webp", picture).read_bytes()
    (tmp_path / "bad5.webp").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize("memory_gib", [8.0, 0.0])
def test_unreadable_files_are_refused(tmp_path, memory_gib):
    damaged_folder(tmp_path)
    message = refused(config("folder", tmp_path, memory_gib=memory_gib))
    assert "5 of 9 files" in message
    assert f"{tmp_path / 'bad1.png'} (no picture)" in message
    assert f"{tmp_path / 'bad3.jpg'} (damaged)" in message
    assert "and 2 more" in message
    assert "data.on_unreadable=skip" in message


@pytest.mark.parametrize("memory_gib", [8.0, 0.0])
def test_unreadable_files_are_skipped_aloud(tmp_path, caplog, memory_gib):
    damaged_folder(tmp_path)
    source = sources.load_source(config("folder", tmp_path, memory_gib=memory_gib, on_unreadable="skip"))
    np.testing.assert_array_equal(everything(source)[:, 0, 0, 0], [0, 1, 2, 3])
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "skipped: 5 of 9 files" in record.getMessage()


def test_labels_stay_with_their_images_when_files_are_skipped(tmp_path):
    for i, name in enumerate(["ant/0.png", "bee/1.png", "cow/2.png"]):
        save(tmp_path / name, np.full((4, 4), i, np.uint8))
    (tmp_path / "ant" / "0.png").write_bytes(b"")
    source = sources.load_source(config("folder", tmp_path, (4, 4), on_unreadable="skip"))
    np.testing.assert_array_equal(source.labels, everything(source)[:, 0, 0, 0])
    assert source.class_names == ("ant", "bee", "cow")


@pytest.mark.parametrize("channels", [1, None])
def test_a_folder_with_nothing_readable_is_refused(tmp_path, channels):
    (tmp_path / "a.png").write_bytes(b"")
    assert "can" in (message := refused(config("folder", tmp_path, channels=channels, on_unreadable="skip")))
    assert str(tmp_path) in message


def test_a_set_too_large_for_memory_is_read_from_disk(tmp_path):
    for i in range(5):
        save(tmp_path / f"{'ab'[i % 2]}/{i}.jpg", noise(20, 30, 3, i))
    held, read = (
        sources.load_source(config("folder", tmp_path, (10, 12), memory_gib=gib))
        for gib in (5 * 10 * 12 * 3 / 2**30, 4.9 * 10 * 12 * 3 / 2**30)
    )
    assert held.images is not None
    assert read.images is None
    assert "in memory" in held.describe()
    assert "on disk" in read.describe()
    np.testing.assert_array_equal(held.labels, read.labels)
    indices = np.array([4, 0, 0, 2])
    np.testing.assert_array_equal(held.read(indices), read.read(indices))
    for path in tmp_path.rglob("*.jpg"):
        path.unlink()
    with pytest.raises(UserError, match="can no longer be read"):
        read.read(indices)


# --- idx ---


def write_idx(path, values):
    content = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def idx_folder(tmp_path):
    random = np.random.default_rng(0)
    for part, count in (("train", 7), ("t10k", 3)):
        end = ".gz" if part == "train" else ""
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{end}", random.integers(1, 256, (count, 5, 6), np.uint8))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{end}", (np.arange(count) % 4).astype(np.uint8))
    return tmp_path


def test_idx_files_are_read(idx_folder):
    found = {
        name: sources.load_source(config("idx", idx_folder, (5, 6), split=name)) for name in ("train", "test", "all")
    }
    assert [source.num_examples for source in found.values()] == [7, 3, 10]
    random = np.random.default_rng(0)
    np.testing.assert_array_equal(everything(found["train"])[..., 0], random.integers(1, 256, (7, 5, 6), np.uint8))
    np.testing.assert_array_equal(everything(found["test"])[..., 0], random.integers(1, 256, (3, 5, 6), np.uint8))
    np.testing.assert_array_equal(found["all"].labels, [0, 1, 2, 3, 0, 1, 2, 0, 1, 2])
    assert found["all"].class_names == ("0", "1", "2", "3")
    assert sources.probe_channels(config("idx", idx_folder)) == 1


def test_idx_images_are_padded_with_black(idx_folder):
    plain = everything(sources.load_source(config("idx", idx_folder, (5, 6))))
    padded = everything(sources.load_source(config("idx", idx_folder, (8, 8))))
    assert padded.shape == (7, 8, 8, 1)
    np.testing.assert_array_equal(padded[:, 1:6, 1:7], plain)
    assert padded.sum(dtype=int) == plain.sum(dtype=int)


def test_idx_images_need_no_labels(idx_folder):
    (idx_folder / "train-labels-idx1-ubyte.gz").unlink()
    assert sources.load_source(config("idx", idx_folder, (5, 6))).labels is None


def test_the_other_spelling_of_idx_names_is_found(idx_folder):
    (idx_folder / "t10k-images-idx3-ubyte").rename(idx_folder / "t10k-images.idx3-ubyte")
    assert sources.load_source(config("idx", idx_folder, (5, 6), split="test")).num_examples == 3


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: content[:-1], "data where its header says 90"),
        (lambda content: content + b"x", "data where its header says 90"),
        (lambda content: content[:9], "no idx file of 3 dimensions"),
        (lambda content: b"", "no idx file of 3 dimensions"),
        (lambda content: b"\x00\x00\x0d\x03" + content[4:], "no idx file of 3 dimensions"),
        (lambda content: gzip.compress(content)[:-20], "cannot be read"),
        (lambda content: b"\x1f\x8b" + content, "cannot be read"),
        (lambda content: content[:4] + bytes(4) + content[8:16], "is empty"),
        (lambda content: content[:4] + struct.pack(">I", 2) + content[8:-30], "3 labels for 2 images"),
    ],
)
def test_damaged_idx_files_are_refused(idx_folder, damage, said):
    path = idx_folder / "t10k-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    message = refused(config("idx", idx_folder, (5, 6), split="test"))
    assert said in message
    assert str(idx_folder) in message


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"size": (4, 6)}, "are 5x6, larger than 4x6; set data.height=5 and data.width=6"),
        ({"size": (5, 6), "channels": 3}, "grey images; set it to 1, not 3"),
        ({"size": (5, 6), "split": "val"}, "choose from train, test, all"),
    ],
)
def test_idx_files_that_do_not_fit_are_refused(idx_folder, wrong, said):
    assert said in refused(config("idx", idx_folder, **wrong))


def test_missing_idx_files_are_named_with_where_to_get_them(idx_folder, monkeypatch):
    (idx_folder / "t10k-images-idx3-ubyte").unlink()
    message = refused(config("idx", idx_folder, (5, 6), split="test"))
    assert "no t10k-images-idx3-ubyte" in message
    assert "apt-get install dataset-fashion-mnist" in message
    assert "nowhere does not exist" in refused(config("idx", idx_folder / "nowhere"))
    monkeypatch.setattr(sources, "_DEBIAN_FASHION_MNIST", idx_folder / "nowhere")
    assert "name the folder of idx files" in refused(config("idx"))
    monkeypatch.setattr(sources, "_DEBIAN_FASHION_MNIST", idx_folder)
    assert sources.load_source(config("idx", size=(5, 6))).num_examples == 7


# --- TFDS ---


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        image = tfds.features.Image(shape=(6, 8, 3), encoding_format="png")
        label = tfds.features.ClassLabel(names=["cat", "dog"])
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({"image": image, "label": label})
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(5), "test": self._generate_examples(3)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"image": png(np.full((6, 8, 3), 10 * count + i, np.uint8)), "label": i % 2}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    TinyPictures(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_a_prepared_set_is_read(prepared):
    source = sources.load_source(config("tfds:tiny_pictures", prepared, (6, 8)))
    assert source.num_examples == 5
    assert source.image_shape == (6, 8, 3)
    assert source.class_names == ("cat", "dog")
    values = everything(source)[:, 0, 0, 0].astype(int)
    np.testing.assert_array_equal(np.sort(values), 50 + np.arange(5))
    np.testing.assert_array_equal(source.labels, (values - 50) % 2)
    assert sources.probe_channels(config("tfds:tiny_pictures", prepared)) == 3
    whole = sources.load_source(config("tfds:tiny_pictures", prepared, (6, 8), split="all"))
    assert whole.num_examples == 8
    part = sources.load_source(config("tfds:tiny_pictures", prepared, (6, 8), split="train[:2]"))
    np.testing.assert_array_equal(everything(part), everything(source)[:2])


def test_a_prepared_set_is_read_from_disk_resized_and_converted(prepared):
    held, read = (
        sources.load_source(config("tfds:tiny_pictures", prepared, (3, 3), 1, memory_gib=gib)) for gib in (1.0, 0.0)
    )
    assert held.images is not None
    assert read.images is None
    assert read.image_shape == (3, 3, 1)
    indices = np.array([4, 1, 1])
    np.testing.assert_array_equal(held.read(indices), read.read(indices))
    np.testing.assert_array_equal(held.labels, read.labels)


@pytest.mark.parametrize(
    ("name", "others", "said"),
    [
        ("tfds:tiny_pictures", {"split": "val"}, "no split 'val'; it has train, test"),
        ("tfds:tiny_pictures", {"channels": 2}, "must be 1, 3 or 4"),
        ("tfds:cifar10", {}, "`tfds build cifar10 --file_format=array_record --data_dir="),
        ("tfds:cifer10", {}, "did you mean cifar10"),
        ("tfds:lsun/bedrom", {}, "no configuration 'bedrom'; it has bedroom"),
        ("tfds:cifar10:9.9.9", {}, "cannot be loaded at version 9.9.9"),
        ("tfds:imdb_reviews", {}, "no feature 'image' that is one picture; it has label, text"),
    ],
)
def test_a_set_that_tfds_cannot_give_is_refused_without_a_look_at_the_network(
    prepared, monkeypatch, name, others, said
):
    def no_network(*arguments, **named):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    assert said in refused(config(name, prepared, **others))


def test_a_set_without_random_access_is_refused(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "copy")
    (info,) = (tmp_path / "copy").rglob("dataset_info.json")
    described = json.loads(info.read_text()) | {"fileFormat": "tfrecord"}
    info.write_text(json.dumps(described))
    for old in info.parent.glob("*.array_record-*"):
        old.rename(old.with_name(old.name.replace("array_record", "tfrecord")))
    message = refused(config("tfds:tiny_pictures", tmp_path / "copy", (6, 8), 3))
    assert "prepared as tfrecord" in message


def test_tfds_is_read_without_tensorflow_and_imported_only_when_asked_for(prepared):
    program = f"""
import sys
from ddpm_jax.config import DataConfig
from ddpm_jax.data.sources import load_source
load_source(DataConfig())
assert "tensorflow_datasets" not in sys.modules
config = DataConfig(source="tfds:tiny_pictures", path={str(prepared)!r}, height=6, width=8, channels=None)
assert load_source(config).read([0]).shape == (1, 6, 8, 3)
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
