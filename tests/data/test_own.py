"""A user's own source of images: loaded by name, and refused in one line where it does not fit."""

import numpy as np
import pytest

from ddpm_jax.data import sources

FILE = """
import numpy as np
from ddpm_jax.data.source import Source, in_memory

pixels = np.arange(5 * 4 * 6 * 3, dtype=np.uint8).reshape(5, 4, 6, 3)
read = lambda indices: pixels[indices]
arrays = lambda config: in_memory(pixels, [0, 1, 2, 1, 0]) if config.split == "train" else None
functions = lambda config: Source(5, (4, 6, 3), read, lambda indices: (indices % 2).astype(np.int32), ("a", "b"))
a_dict = lambda config: {"images": pixels}
floats = lambda config: in_memory(pixels / 255)
flat = lambda config: in_memory(pixels[0])
too_many_labels = lambda config: in_memory(pixels, range(6))
unnamed_class = lambda config: in_memory(pixels, [0, 1, 2, 3, 4], ["a", "b"])
negative = lambda config: in_memory(pixels, [0, -1, 0, 0, 0], ["a"])
no_names = lambda config: Source(5, (4, 6, 3), read, lambda indices: indices.astype(np.int32))
int64 = lambda config: Source(5, (4, 6, 3), read, lambda indices: indices % 2, ("a", "b"))
wrong_reading = lambda config: Source(5, (4, 6, 3), lambda indices: pixels[indices[0]])
too_long = lambda config: Source(6, (4, 6, 3), read)
empty = lambda config: in_memory(pixels[:0])
"""


@pytest.fixture(scope="module")
def config(sets, tmp_path_factory):
    file = tmp_path_factory.mktemp("code") / "my.py"
    file.write_text(FILE)
    return lambda function, size=(4, 6), channels=3, **others: sets.config(
        f"{file}:{function}", size=size, channels=channels, **others
    )


def test_arrays_are_a_source_of_named_classes(sets, config):
    source = sources.load_source(config("arrays"))
    assert source.name.endswith("my.py:arrays, train")
    assert sets.everything(source).shape == (5, 4, 6, 3)
    assert (source.labels.tolist(), source.class_names) == ([0, 1, 2, 1, 0], ("0", "1", "2"))
    assert sources.probe_channels(config("arrays", channels=None)) == 3


def test_functions_are_a_source_that_is_streamed(sets, config):
    source = sources.load_source(config("functions"))
    assert source.images is None
    np.testing.assert_array_equal(sets.everything(source), sets.everything(sources.load_source(config("arrays"))))
    assert source.labels.tolist() == [0, 1, 0, 1, 0]


def test_none_is_a_split_that_there_is_not(sets, config):
    assert "my.py:arrays has no split 'test'" in sets.refused(config("arrays", split="test"))
    assert sources.load_held_out(config("arrays")).name.endswith(", train")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("a_dict", "must return a ddpm_jax.data.source.Source (of arrays, in_memory(images, labels)), not dict"),
        ("floats", "images must be a NumPy array of uint8 and of shape (5, 4, 6, 3), not float64 of shape"),
        ("flat", "image_shape must be (H, W, C), not (6, 3)"),
        ("too_many_labels", "ValueError: 5 images need labels of shape (5,), not (6,)"),
        ("unnamed_class", "label 4 is not one of the 2 classes, which count from 0"),
        ("negative", "label -1 is not one of the 1 classes"),
        ("no_names", "class_names must name each class"),
        ("int64", "labels must be a NumPy array of int32, one per image, not int64 of shape (2,)"),
        ("wrong_reading", "read_images of 2 indices must be a NumPy array of uint8 and of shape (2, 4, 6, 3), not"),
        ("too_long", "IndexError: index 5 is out of bounds"),
        ("empty", "num_examples must be an integer of at least 1, not 0"),
        ("nothing", "has no function nothing"),
    ],
)
def test_what_is_no_source_is_one_line(sets, config, function, message):
    refused = sets.refused(config(function))
    assert message in refused
    assert refused.startswith("data.source: ")


def test_another_size_than_the_configuration_s_is_refused_with_the_options(sets, config):
    refused = sets.refused(config("arrays", size=(8, 8), channels=1))
    assert "are 4x6 with 3 channels, not 8x8 with 1: set --data.height 4 --data.width 6 --data.channels 3" in refused
