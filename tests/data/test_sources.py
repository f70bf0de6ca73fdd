import pytest

from ddpm_jax.data import sources


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
        ("imagenet", "(digits, folder, npz, npy, idx, cifar10 or tfds:NAME)"),
    ],
)
def test_an_unknown_source_is_refused(sets, name, said):
    message = sets.refused(sets.config(name))
    assert said in message
    assert repr(name) in message
