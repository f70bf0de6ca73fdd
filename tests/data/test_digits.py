import numpy as np
import pytest
from sklearn.datasets import load_digits

from ddpm_jax.data import sources


def test_the_digits_are_all_there_in_two_parts(sets):
    images, labels = load_digits(return_X_y=True)
    parts = {
        name: sources.load_source(sets.config("digits", channels=1, split=name)) for name in ("train", "test", "all")
    }
    assert [part.num_examples for part in parts.values()] == [1438, 359, 1797]
    whole = parts["all"]
    assert whole.image_shape == (8, 8, 1)
    assert sets.everything(whole).dtype == np.uint8
    np.testing.assert_allclose(sets.everything(whole).reshape(-1, 64) * (16 / 255), images, atol=0.5 * 16 / 255)
    np.testing.assert_array_equal(whole.labels, labels)
    assert whole.labels.dtype == np.int32
    held_out = np.arange(1797) % 5 == 4
    for name, chosen in (("test", held_out), ("train", ~held_out)):
        np.testing.assert_array_equal(sets.everything(parts[name]), sets.everything(whole)[chosen])
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
def test_the_digits_are_only_what_they_are(sets, wrong, said):
    assert said in sets.refused(sets.config("digits", **{"channels": 1} | wrong))
