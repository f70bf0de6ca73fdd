import dataclasses
import errno
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.data import decode, sources
from ddpm_jax.system.errors import UserError


def test_a_folder_gives_its_pixels_in_the_order_of_its_paths(sets, tmp_path):
    pixels = [sets.noise(6, 10, 3, seed) for seed in range(4)]
    for name, one in zip(["b/z.png", "a.png", "b/sub/y.PNG", "c.webp"], pixels, strict=True):
        sets.save(tmp_path / name, one, **{"lossless": True} if name.endswith("webp") else {})
    (tmp_path / "notes.txt").write_text("no picture, and not looked at")
    sets.save(tmp_path / ".hidden.png", sets.noise(3, 3, 1))
    sets.save(tmp_path / ".thumbnails" / "x.png", sets.noise(3, 3, 1))
    source = sources.load_source(sets.config("folder", tmp_path, (6, 10)))
    assert source.image_shape == (6, 10, 3)
    np.testing.assert_array_equal(sets.everything(source), [pixels[1], pixels[2], pixels[0], pixels[3]])
    assert source.labels is None
    assert source.images is not None
    np.testing.assert_array_equal(source.read(np.array([3, 0, 3])), [pixels[3], pixels[1], pixels[3]])


@pytest.mark.parametrize(
    ("mode", "channels"), [("1", 1), ("L", 1), ("I;16", 1), ("RGB", 3), ("P", 3), ("CMYK", 3), ("LA", 4), ("RGBA", 4)]
)
def test_channels_are_those_of_the_files(sets, tmp_path, mode, channels):
    image = Image.fromarray(sets.noise(5, 7, 1)).convert(mode)
    sets.save(tmp_path / ("x.jpg" if mode == "CMYK" else "x.png"), image)
    wanted = sets.config("folder", tmp_path, (5, 7))
    assert sources.probe_channels(wanted) == channels
    assert sources.load_source(wanted).image_shape == (5, 7, channels)


@pytest.mark.parametrize("byte_order", ["<u2", ">u2"])
def test_sixteen_bit_grey_is_scaled(sets, tmp_path, byte_order):
    deep = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    sets.save(tmp_path / "deep.png", Image.fromarray(deep.astype(byte_order)))
    (found,) = sets.everything(sources.load_source(sets.config("folder", tmp_path, (16, 16))))
    np.testing.assert_array_equal(found[..., 0], deep // 257)


def test_a_palette_becomes_its_colors(sets, tmp_path):
    image = Image.new("P", (2, 2))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2, 1])
    sets.save(tmp_path / "p.png", image)
    (found,) = sets.everything(sources.load_source(sets.config("folder", tmp_path, (2, 2))))
    np.testing.assert_array_equal(found, [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 255, 0]]])


def test_alpha_is_kept_or_becomes_white(sets, tmp_path):
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = [0, 255, 128]  # clear, black, half black
    sets.save(tmp_path / "x.png", pixels)
    for channels, wanted in ((3, [255, 0, 127]), (1, [255, 0, 127])):
        (found,) = sets.everything(sources.load_source(sets.config("folder", tmp_path, (1, 3), channels)))
        np.testing.assert_allclose(found[0], np.array(wanted)[:, None].repeat(channels, 1), atol=1)
    (found,) = sets.everything(sources.load_source(sets.config("folder", tmp_path, (1, 3))))
    np.testing.assert_array_equal(found, pixels)


def test_a_camera_held_upright_is_turned_upright(sets, tmp_path):
    pixels = np.zeros((32, 16, 3), np.uint8)
    pixels[:16] = 255  # as it was seen: white above black
    turned = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # as stored, it must be turned by 90 degrees clockwise
    sets.save(tmp_path / "x.jpg", turned, exif=exif, quality=95)
    (found,) = sets.everything(sources.load_source(sets.config("folder", tmp_path, (32, 16))))
    np.testing.assert_allclose(found.astype(int), pixels, atol=12)


def test_the_crop_is_of_the_target_s_aspect_ratio(sets, tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = [200, 100, 50]  # the middle square
    sets.save(tmp_path / "wide.png", pixels)
    sets.save(tmp_path / "tall.png", pixels.transpose(1, 0, 2))
    found = sets.everything(sources.load_source(sets.config("folder", tmp_path, (10, 10))))
    middle = found[:, 2:-2, 2:-2]  # at its edges the filter sees the neighbors that were cut away
    np.testing.assert_array_equal(middle, np.broadcast_to(np.array([200, 100, 50]), middle.shape))
    assert found.min() > 40


def test_a_fine_pattern_becomes_grey(sets, tmp_path):
    # Without antialiasing a checkerboard of single pixels becomes black, white or stripes.
    rows, columns = np.indices((96, 96))
    sets.save(tmp_path / "board.png", (255 * ((rows + columns) % 2)).astype(np.uint8))
    (found,) = sets.everything(sources.load_source(sets.config("folder", tmp_path, (12, 12))))
    np.testing.assert_allclose(found[2:-2, 2:-2].astype(float), 127.5, atol=2)


def test_sub_folders_name_the_classes(sets, tmp_path):
    for name in ("dog/1.png", "cat/deep/2.png", "cat/3.png"):
        sets.save(tmp_path / name, sets.noise(4, 4, 1))
    source = sources.load_source(sets.config("folder", tmp_path, (4, 4)))
    assert source.class_names == ("cat", "dog")
    np.testing.assert_array_equal(source.labels, [0, 0, 1])
    assert source.labels.dtype == np.int32
    assert "2 classes" in source.describe()


def test_the_parts_of_a_folder_are_its_sub_folders(sets, tmp_path):
    for name in ("train/cat/a.png", "train/dog/b.png", "test/dog/c.png"):
        sets.save(tmp_path / name, np.full((4, 4), ord(name[-5]), np.uint8))
    found = {
        name: sources.load_source(sets.config("folder", tmp_path, (4, 4), split=name))
        for name in ("train", "test", "all")
    }
    letters = {name: [chr(value) for value in sets.everything(source)[:, 0, 0, 0]] for name, source in found.items()}
    assert letters == {"train": ["a", "b"], "test": ["c"], "all": ["a", "b", "c"]}
    assert {source.class_names for source in found.values()} == {("cat", "dog")}  # a class has one number in all parts
    assert [list(source.labels) for source in found.values()] == [[0, 1], [1], [0, 1, 1]]


def test_a_folder_without_parts_is_all_for_training(sets, tmp_path):
    sets.save(tmp_path / "a.png", sets.noise(4, 4, 1))
    wanted = sets.config("folder", tmp_path, (4, 4))
    assert sources.load_source(wanted).num_examples == 1
    assert sources.load_source(sets.config("folder", tmp_path, (4, 4), split="all")).num_examples == 1
    assert "no test split" in sets.refused(sets.config("folder", tmp_path, (4, 4), split="test"))
    assert "choose from train, test, all" in sets.refused(sets.config("folder", tmp_path, (4, 4), split="val"))


def test_test_images_are_never_learned_from(sets, tmp_path):
    sets.save(tmp_path / "test" / "a.png", sets.noise(4, 4, 1))
    sets.save(tmp_path / "b.png", sets.noise(4, 4, 1))
    assert "a subfolder 'test' but none 'train'" in sets.refused(sets.config("folder", tmp_path, (4, 4)))


def tree(sets, folder, *names):
    for i, name in enumerate(names):
        if name.endswith(("txt", "json", "db")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
        else:
            sets.save(folder / name, np.full((4, 4, 3), i, np.uint8))
    return folder


def loaded(sets, folder, **others):
    return sources.load_source(sets.config("folder", folder, (4, 4), **others))


@pytest.mark.parametrize(
    ("names", "classes", "train", "test"),
    [
        # Tiny ImageNet's form
        (["train/n1/images/0.JPEG", "train/n2/images/0.JPEG", "test/images/0.JPEG"], ("n1", "n2"), [0, 1], None),
        (["Training/cat/0.png", "Training/dog/0.png", "Testing/dog/0.png"], ("cat", "dog"), [0, 1], [1]),
        (["train/cat/0.png", "train/dog/0.png", "test/0.png"], ("cat", "dog"), [0, 1], None),  # Kaggle's
        (["train/a/0.png", "valid/a/0.png"], ("a",), [0], [0]),
        (["train/a/0.png", "val/a/0.png", "val/b/0.png", "test/a/0.png"], ("a",), [0], [0]),
        (["train/10/0.png", "train/9/0.png", "test/10/0.png"], ("9", "10"), [0, 1], [1]),
    ],
)
def test_the_classes_are_those_of_the_training_split(sets, tmp_path, names, classes, train, test):
    tree(sets, tmp_path, *names)
    source, held_out = (loaded(sets, tmp_path, split=split) for split in ("train", "test"))
    assert source.class_names == classes
    assert sorted(source.labels) == train
    assert (None if held_out.labels is None else list(held_out.labels)) == test
    if test is None:
        assert "none of the class folders of the training split" in held_out.label_fault


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["train/a/0.png", "training/a/0.png"], "both name the train split"),
        (["val/a/0.png", "b/0.png"], "a subfolder 'val' but none 'train'"),
        (["set/train/0.png", "set/test/0.png"], "holds one folder, whose subfolders are splits: use --data.path"),
    ],
)
def test_splits_that_are_not_clear_are_refused(sets, tmp_path, names, said):
    assert said in sets.refused(sets.config("folder", tree(sets, tmp_path, *names), (4, 4)))


def test_a_picture_beside_the_classes_is_named(sets, tmp_path):
    source = loaded(sets, tree(sets, tmp_path, "a/0.png", "b/0.png", "overview.png", "valid/0.png"))
    assert source.num_examples == 4
    assert source.labels is None
    assert "overview.png is beside the class folders a, b, valid" in source.label_fault


def test_what_is_not_used_is_counted_in_one_line(sets, tmp_path):
    names = ["train/a/0.png", "train/a/notes.txt", "train/a/@eaDir/0.jpg/T.jpg", "train/b/Thumbs.db", "train/c/x.txt"]
    tree(sets, tmp_path, *names, "train/b/1.TIF", "test/a/2.png", "extra/3.png", "labels.json", ".git/x.txt")
    (tmp_path / "train" / "a" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "train" / "b" / "pipe.png")
    source = loaded(sets, tmp_path, split="train")
    assert source.class_names == ("a", "b")
    assert source.notes == (
        f"12 files in {tmp_path}: 2 used; passed over: 1 in hidden or system folders (@eaDir); 2 broken links or "
        "special files (lost.png, pipe.png); 2 without an image ending (.txt 2); 1 hidden or system files (Thumbs.db); "
        "1 folders without an image (c); 1 of the test split (test); 3 beside the splits (.git, extra, labels.json)",
    )
    assert loaded(sets, tree(sets, tmp_path / "all", "0.png", "1.png")).notes == ()


def test_every_picture_that_pillow_reads_is_used(sets, tmp_path):
    pixels = sets.noise(4, 4, 1)
    for name in ("a.PNG", "b.tif", "c.bmp", "d.gif", "e.pgm", "f.tga", "g.jp2"):
        sets.save(tmp_path / name, pixels)
    for name, kind in (("h", "PNG"), ("i.2", "BMP")):
        sets.save(tmp_path / name, pixels, format=kind)
    for name in ("x.jfif", "y.JPE", "z.avif"):
        sets.save(tmp_path / name, pixels, format="AVIF" if name == "z.avif" else "JPEG")
    source = loaded(sets, tmp_path, channels=1)
    assert source.num_examples == 12
    np.testing.assert_array_equal(sets.everything(source)[:9, ..., 0], np.broadcast_to(pixels, (9, 4, 4)))


def test_the_first_of_several_frames_is_used_and_said(sets, tmp_path):
    frames = [Image.fromarray(np.full((4, 4, 3), level, np.uint8)) for level in (10, 200)]
    for name in ("a.gif", "b.tiff"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    source = loaded(sets, tmp_path, channels=3)
    assert (sets.everything(source) == 10).all()
    assert source.notes == ("2 files have several frames or pages, of which the first is used",)


def test_the_size_that_pictures_are_given_is_said(sets, tmp_path):
    sets.save(tmp_path / "a.png", sets.noise(20, 30, 3))
    sets.save(tmp_path / "b.png", sets.noise(3, 5, 1))
    (note,) = loaded(sets, tmp_path, channels=1).notes
    assert note.startswith("the files are 3x5 to 20x30 with 1 or 3 channels, cropped and resized to 4x4 with 1, 1 of")


def test_a_folder_that_may_not_be_listed_is_an_error(sets, tmp_path, monkeypatch):
    tree(sets, tmp_path, "a/0.png", "b/0.png")
    scandir = os.scandir

    def scan(where):
        if Path(where).name == "b":
            raise PermissionError(errno.EACCES, "Permission denied", str(where))
        return scandir(where)

    monkeypatch.setattr(os, "scandir", scan)  # the tests may run as root, who may list everything
    assert f"the folder {tmp_path / 'b'} cannot be listed (permission denied)" in sets.refused(
        sets.config("folder", tmp_path, (4, 4))
    )


def test_names_are_printed_with_escapes(sets, tmp_path):
    tree(sets, tmp_path, "b/0.png")
    os.mkdir(bytes(tmp_path) + b"/caf\xe9")
    shutil.copy(tmp_path / "b" / "0.png", os.fsdecode(bytes(tmp_path) + b"/caf\xe9/bad\n\xff.png"))
    source = loaded(sets, tmp_path)
    assert source.class_names == ("b", r"caf\xe9")
    assert source.describe().isprintable()
    Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9/bad\n\xff.png")).write_bytes(b"")
    assert r"caf\xe9/bad\n\xff.png (empty)" in sets.refused(sets.config("folder", tmp_path, (4, 4)))


def test_pictures_of_many_pixels_are_allowed_by_an_option(sets, tmp_path, recwarn):
    Image.new("L", (10_000, 9_000)).save(tmp_path / "map.png")  # from 89 megapixels on, Pillow warns
    assert loaded(sets, tmp_path).num_examples == 1
    message = sets.refused(sets.config("folder", tmp_path, (4, 4), max_megapixels=50.0))
    assert "map.png (too large: 90 megapixels, allowed by --data.max-megapixels 90)" in message
    assert not recwarn.list


def test_what_is_not_damaged_is_not_called_so(sets, tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "f.tif")
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(tmp_path / "i.tif")
    (tmp_path / "l.png").write_text("version https://git-lfs.github.com/spec/v1")
    for gib in (1.0, 0.0):
        message = sets.refused(sets.config("folder", tmp_path, (4, 4), channels=1, memory_gib=gib))
        assert "f.tif (floating-point pixels: save it with 8 or 16 bits)" in message
        assert "i.tif (levels from 70000 to 70000: save it with 8 or 16 bits)" in message
        assert "l.png (a pointer of Git LFS: run git lfs pull)" in message
        assert "(damaged" not in message


@pytest.mark.parametrize(
    ("bits", "color", "clear"), [(1, 0, 1), (2, 0, 2), (4, 0, 9), (8, 0, 7), (16, 0, 30_000), (8, 2, 7), (16, 2, 770)]
)
def test_a_transparent_level_is_clear_at_every_depth(sets, tmp_path, bits, color, clear):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    samples = 3 if color else 1
    level = int(clear).to_bytes(2, "big") if bits == 16 else bytes([clear << (8 - bits) if bits < 8 else clear])
    rows = [b"\0" + content * samples for content in (level, bytes(len(level)))]  # a clear pixel above a black one
    head = struct.pack(">IIBBBBB", 1, 2, bits, color, 0, 0, 0)
    clear_level = struct.pack(">H", clear) * samples
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"tRNS", clear_level)
        + chunk(b"IDAT", zlib.compress(b"".join(rows)))
        + chunk(b"IEND", b"")
    )
    images = {
        channels: sets.everything(sources.load_source(sets.config("folder", tmp_path, (2, 1), channels)))[0, :, 0]
        for channels in (1, 3, 4, None)
    }
    assert images[1].tolist() == [[255], [0]]
    assert images[3].tolist() == [[255] * 3, [0] * 3]
    assert images[4][:, 3].tolist() == [0, 255]
    np.testing.assert_array_equal(images[None], images[4])


def test_scans_of_twelve_bits_are_scaled_by_an_option(sets, tmp_path):
    levels = np.linspace(0, 4095, 16).reshape(4, 4).astype(np.uint16)
    sets.save(tmp_path / "a.png", Image.fromarray(levels))
    dark, scaled = (sets.everything(loaded(sets, tmp_path, white=white))[0, ..., 0] for white in (65535, 4095))
    assert dark.max() == 16
    np.testing.assert_array_equal(scaled, np.round(levels / 4095 * 255))


def test_links_are_followed_once(sets, tmp_path):
    sets.save(tmp_path / "real" / "a.png", sets.noise(4, 4, 1))
    (tmp_path / "set" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "cat" / "away").symlink_to(tmp_path / "real", target_is_directory=True)
    (tmp_path / "set" / "cat" / "back").symlink_to(tmp_path / "set", target_is_directory=True)
    assert sources.load_source(sets.config("folder", tmp_path / "set", (4, 4))).num_examples == 1


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("", "name the folder"),
        ("nowhere", "nowhere does not exist"),
        ("file", "is not a folder"),
        ("empty", "no image file"),
    ],
)
def test_a_folder_that_is_none_is_refused(sets, tmp_path, path, said):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    assert said in sets.refused(sets.config("folder", tmp_path / path if path else ""))


def test_images_that_do_not_agree_are_refused_or_converted(sets, tmp_path):
    sets.save(tmp_path / "a.png", sets.noise(4, 4, 1))
    sets.save(tmp_path / "b.png", sets.noise(4, 4, 3))
    message = sets.refused(sets.config("folder", tmp_path, (4, 4)))
    assert "do not agree" in message
    assert "a.png has 1" in message
    assert "b.png has 3" in message
    assert sources.load_source(sets.config("folder", tmp_path, (4, 4), 3)).image_shape == (4, 4, 3)
    assert "must be 1, 3 or 4" in sets.refused(sets.config("folder", tmp_path, (4, 4), 2))


def damaged_folder(sets, tmp_path):
    """Four good files and five that are damaged, each in another way."""
    for i in range(4):
        sets.save(tmp_path / f"good{i}.png", np.full((64, 64, 3), i, np.uint8))
    picture = sets.noise(64, 64, 3)
    (tmp_path / "bad1.png").write_bytes(b"")
    (tmp_path / "bad2.jpg").write_text("this is no picture")
    whole = sets.save(tmp_path / "bad3.jpg", picture).read_bytes()
    (tmp_path / "bad3.jpg").write_bytes(whole[: len(whole) // 2])
    whole = sets.save(tmp_path / "bad4.png", picture).read_bytes()
    (tmp_path / "bad4.png").write_bytes(whole[: len(whole) // 2])
    whole = sets.save(tmp_path / "bad5.webp", picture).read_bytes()
    (tmp_path / "bad5.webp").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize("memory_gib", [8.0, 0.0])
def test_unreadable_files_are_refused(sets, tmp_path, memory_gib):
    damaged_folder(sets, tmp_path)
    message = sets.refused(sets.config("folder", tmp_path, memory_gib=memory_gib))
    assert "5 of 9 files" in message
    assert f"{tmp_path / 'bad1.png'} (empty)" in message
    assert f"{tmp_path / 'bad3.jpg'} (damaged)" in message
    assert "and 2 more" in message
    assert "data.on_unreadable=skip" in message


@pytest.mark.parametrize("memory_gib", [8.0, 0.0])
def test_unreadable_files_are_skipped_aloud(sets, tmp_path, capsys, memory_gib):
    damaged_folder(sets, tmp_path)
    source = sources.load_source(sets.config("folder", tmp_path, memory_gib=memory_gib, on_unreadable="skip"))
    np.testing.assert_array_equal(sets.everything(source)[:, 0, 0, 0], [0, 1, 2, 3])
    assert capsys.readouterr().err.count("skipped: 5 of 9 files") == 1


def test_labels_stay_with_their_images_when_files_are_skipped(sets, tmp_path):
    for i, name in enumerate(["ant/0.png", "bee/1.png", "cow/2.png"]):
        sets.save(tmp_path / name, np.full((4, 4), i, np.uint8))
    (tmp_path / "ant" / "0.png").write_bytes(b"")
    source = sources.load_source(sets.config("folder", tmp_path, (4, 4), on_unreadable="skip"))
    np.testing.assert_array_equal(source.labels, sets.everything(source)[:, 0, 0, 0])
    assert source.class_names == ("ant", "bee", "cow")


@pytest.mark.parametrize("channels", [1, None])
def test_a_folder_with_nothing_readable_is_refused(sets, tmp_path, channels):
    (tmp_path / "a.png").write_bytes(b"")
    assert "can" in (message := sets.refused(sets.config("folder", tmp_path, channels=channels, on_unreadable="skip")))
    assert str(tmp_path) in message


def test_a_set_too_large_for_memory_is_read_from_disk(sets, tmp_path):
    for i in range(5):
        sets.save(tmp_path / f"{'ab'[i % 2]}/{i}.jpg", sets.noise(20, 30, 3, i))
    held, read = (
        sources.load_source(sets.config("folder", tmp_path, (10, 12), memory_gib=gib))
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


# Pillow would start Ghostscript for the first; a reader would wait for the second, or read the third, for ever.
def test_what_is_no_picture_by_its_content_is_neither_run_nor_opened(sets, tmp_path):
    sets.save(tmp_path / "set" / "good.png", sets.noise(4, 4, 3))
    (tmp_path / "set" / "eps.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    )
    os.mkfifo(tmp_path / "set" / "fifo.png")
    (tmp_path / "set" / "device.png").symlink_to("/dev/zero")
    (tmp_path / "set" / "loop.png").symlink_to("loop.png")
    (tmp_path / "set" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "folder.png").mkdir()
    (tmp_path / "set" / "no\x1b[31m\u202ename.png").write_bytes(b"")
    wanted = sets.config("folder", tmp_path / "set", (4, 4), 3)
    message = sets.refused(wanted)
    assert "2 of 3 files" in message
    assert "eps.png (no picture)" in message
    assert "no\\x1b[31m\\u202ename.png (empty)" in message
    source = sources.load_source(dataclasses.replace(wanted, on_unreadable="skip"))
    assert source.num_examples == 1
    assert "3 broken links or special files" in source.notes[0]
    for name in ("eps.png", "fifo.png", "device.png", "folder.png"):
        with pytest.raises(UserError, match="cannot read"):
            decode.open_picture(str(tmp_path / "set" / name))


@pytest.mark.slow
def test_many_large_pictures_take_the_memory_of_one(tmp_path):
    """A few kB each, 240 MB decoded: a thread each would take many GB on a machine with many cores."""
    Image.fromarray(np.zeros((9000, 9000), np.uint8)).save(tmp_path / "0.png")
    for name in range(1, 12):
        shutil.copy(tmp_path / "0.png", tmp_path / f"{name}.png")
    with (tmp_path / "endless.png").open("wb") as file:
        file.truncate(2**40)
    program = f"""
import os, resource
os.cpu_count = lambda: 12
from ddpm_jax.config import DataConfig
from ddpm_jax.data.sources import load_source
for gib in (1.0, 0.0):
    config = DataConfig("folder", {str(tmp_path)!r}, channels=3, on_unreadable="skip", memory_gib=gib)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert load_source(config).num_examples == 12
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 2**20, f"{{(after - before) / 2**20:.1f}} GiB"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
