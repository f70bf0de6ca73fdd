import numpy as np
import pytest
from PIL import Image

from ddpm_jax.data import sources
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
    assert "no test part" in sets.refused(sets.config("folder", tmp_path, (4, 4), split="test"))
    assert "choose from train, test, all" in sets.refused(sets.config("folder", tmp_path, (4, 4), split="val"))


def test_test_images_are_never_learned_from(sets, tmp_path):
    sets.save(tmp_path / "test" / "a.png", sets.noise(4, 4, 1))
    sets.save(tmp_path / "b.png", sets.noise(4, 4, 1))
    assert "a sub-folder 'test' but none 'train'" in sets.refused(sets.config("folder", tmp_path, (4, 4)))


def test_links_are_followed_once(sets, tmp_path):
    sets.save(tmp_path / "real" / "a.png", sets.noise(4, 4, 1))
    (tmp_path / "set" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "cat" / "away").symlink_to(tmp_path / "real", target_is_directory=True)
    (tmp_path / "set" / "cat" / "back").symlink_to(tmp_path / "set", target_is_directory=True)
    assert sources.load_source(sets.config("folder", tmp_path / "set", (4, 4))).num_examples == 1


@pytest.mark.parametrize(
    ("path", "said"),
    [("", "name the folder"), ("nowhere", "nowhere does not exist"), ("file", "is not a folder"), ("empty", "no PNG")],
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
    assert f"{tmp_path / 'bad1.png'} (no picture)" in message
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
