import numpy as np
import pytest
from PIL import Image

from ddpm_jax.config import Config, DataConfig, ModelConfig
from ddpm_jax.data.check import check_classes, check_data, for_training, histogram
from ddpm_jax.data.source import in_memory
from ddpm_jax.data.sources import load_source
from ddpm_jax.system.errors import UserError


def looked_at(config, grid):
    """The lines, and the error at their end if there is one."""
    lines = []
    try:
        lines.extend(check_data(config, grid))
    except UserError as error:
        return lines, str(error)
    return lines, None


def test_the_digits_are_described(tmp_path):
    source = load_source(DataConfig())
    lines, error = looked_at(Config(), tmp_path / "new" / "data.png")
    assert error is None
    assert lines[0] == source.describe()
    mean, deviation = source.images.mean(), source.images.std()
    assert lines[1] == (
        f"pixels: uint8 from 0 to 255; mean and deviation of each channel: {mean:.1f} +- {deviation:.1f}"
    )
    counts = np.bincount(source.labels)
    assert lines[2].startswith(f"classes: 10 (0 {counts[0]}, 1 {counts[1]}, ")
    assert lines[3].startswith("the first 64 images of training: ")
    with Image.open(tmp_path / "new" / "data.png") as picture:
        assert picture.size == (730, 730)  # 8 times 8 pixels and a line, ten times as large


def test_levels_are_counted_channel_by_channel_from_memory_and_from_disk(sets, tmp_path):
    pixels = sets.noise(140, 3, 3).reshape(70, 2, 3, 3)
    np.save(tmp_path / "a.npy", pixels)
    for gib in (1.0, 0.0):
        counts = histogram(load_source(sets.config("npy", tmp_path / "a.npy", (2, 3), 3, memory_gib=gib)))
        np.testing.assert_array_equal(counts, [np.bincount(pixels[..., c].ravel(), minlength=256) for c in range(3)])


@pytest.mark.parametrize("memory_gib", [1.0, 0.0])
def test_a_set_of_any_number_of_channels_can_be_looked_at(sets, tmp_path, memory_gib):
    np.save(tmp_path / "a.npy", sets.noise(5 * 4, 4, 5).reshape(5, 4, 4, 5))
    config = Config(data=sets.config("npy", tmp_path / "a.npy", (4, 4), 5, memory_gib=memory_gib))
    lines, error = looked_at(config, tmp_path / "data.png")
    assert error is None
    assert lines[1].count("+-") == 5
    assert lines[2] == "classes: none"
    assert lines[3].startswith("the first 5 images")


def test_all_files_unreadable_are_all_named(sets, tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    lines, error = looked_at(Config(data=sets.config("folder", tmp_path, channels=3)), tmp_path / "data.png")
    assert lines == ["unreadable: 9 files", *(f"  {tmp_path / f'{i}.png'} (no picture)" for i in range(9))]
    assert "9 of 9 files" in error
    assert not (tmp_path / "data.png").exists()


def test_classes_that_do_not_go_with_the_network_are_refused_after_all_is_told(tmp_path):
    lines, error = looked_at(Config(model=ModelConfig(num_classes=7)), tmp_path / "data.png")
    assert len(lines) == 4
    assert error == "model.num_classes=7, but the images have 10 classes (digits, train): use --model.num-classes 10"
    check_classes(Config(model=ModelConfig(num_classes=10)), load_source(DataConfig()))


def test_a_held_out_set_may_lack_classes_but_not_have_others():
    config = Config(model=ModelConfig(num_classes=3))
    images = np.zeros((2, 4, 4, 1), np.uint8)
    check_classes(config, in_memory(images, [0, 1]), training=False)
    for source, message in ((in_memory(images, [0, 3]), "have 4 classes"), (in_memory(images), "have no labels")):
        with pytest.raises(UserError, match=message):
            check_classes(config, source, training=False)


def test_images_of_few_levels_are_told_of_in_training_too(sets, tmp_path, capsys):
    for i in range(3):
        levels = np.random.default_rng(i).integers(0, 4096, (9, 9)).astype(np.uint16)
        levels[0, 0] = 4095
        sets.save(tmp_path / "deep" / f"{i}.png", Image.fromarray(levels))
    config = Config(data=sets.config("folder", tmp_path / "deep", (4, 4)))
    lines, _ = looked_at(config, tmp_path / "data.png")
    (warning,) = (line for line in lines if line.startswith("warning"))
    assert warning.endswith("are used: the files have 12 bits in 16; use --data.white 4095")
    for_training(config, load_source(config.data))
    assert warning in capsys.readouterr().err.splitlines()
    scaled = Config(data=sets.config("folder", tmp_path / "deep", (4, 4), white=4095))
    assert not [line for line in looked_at(scaled, tmp_path / "data.png")[0] if line.startswith("warning")]
    np.save(tmp_path / "a.npy", np.arange(17, dtype=np.uint8).reshape(1, 1, 17, 1))
    lines, _ = looked_at(Config(data=sets.config("npy", tmp_path / "a.npy", (1, 17))), tmp_path / "data.png")
    assert (
        "warning: only levels 0 to 16 of 0 to 255 are used: scale the pixels, as by np.round(images * (255 / 16))"
        in ("".join(lines))
    )


def test_classes_without_an_image_are_told_of_with_advice_that_can_be_followed(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 1), np.uint8)
    source = in_memory(images, np.arange(20) % 10 + 1)
    with pytest.raises(UserError, match=r"the labels are 1 to 10; save them as labels - 1, .*; or use .*-classes 11$"):
        check_classes(Config(model=ModelConfig(num_classes=10)), source)
    config = Config(model=ModelConfig(num_classes=11))
    check_classes(config, for_training(config, source))
    assert "warning: no image of class 0, which" in capsys.readouterr().err
    followed = in_memory(images, source.labels - 1)
    config = Config(model=ModelConfig(num_classes=10))
    check_classes(config, for_training(config, followed))
    assert "warning" not in capsys.readouterr().err
    assert for_training(Config(), source).read_labels is None
