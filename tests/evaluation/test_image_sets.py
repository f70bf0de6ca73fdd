import numpy as np
import pytest

from ddpm_jax.data.source import in_memory
from ddpm_jax.evaluation.image_sets import of_source, open_folder, open_npz
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.pictures import save_png

IMAGES = np.random.default_rng(0).integers(0, 256, (11, 6, 5, 3), np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_of_a_file_by_index_in_any_order(save, tmp_path):
    save(tmp_path / "images.npz", arr_0=IMAGES, arr_1=np.arange(11))
    images = open_npz(tmp_path / "images.npz")
    assert (images.number, images.shape) == (11, (6, 5, 3))
    for indices in ([0, 1, 2], [5, 9], [3]):
        assert np.array_equal(images.read(np.array(indices)), IMAGES[indices])
    spaced = images.spaced(4)
    assert np.array_equal(spaced.read(np.arange(4)), IMAGES[[0, 2, 5, 8]])
    assert "4 of 11 evenly spaced" in spaced.name
    assert images.spaced(0) is images
    assert images.first(7).number == 7
    assert len({images.identity, spaced.identity, images.first(7).identity}) == 3


def test_the_same_images_in_another_place_are_the_same(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=IMAGES)
    np.savez_compressed(tmp_path / "b.npz", arr_0=IMAGES)
    np.savez(tmp_path / "c.npz", arr_0=IMAGES[::-1])
    identities = [open_npz(tmp_path / f"{name}.npz").identity for name in "abc"]
    assert identities[0] == identities[1] != identities[2]


def test_the_first_images_of_a_set_that_grows_stay_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr("ddpm_jax.evaluation.image_sets._READ_AT_ONCE", 4)
    sets = {}
    for number in (7, 9, 11):
        np.savez(tmp_path / f"{number}.npz", arr_0=IMAGES[:number])
        sets[number] = open_npz(tmp_path / f"{number}.npz").first(7).by_content()
    assert sets[7].identity == sets[9].identity == sets[11].identity != sets[9].first(6).by_content().identity
    assert sets[9].whole == open_npz(tmp_path / "9.npz").identity != sets[11].whole


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (dict(images=IMAGES), "must be arr_0, and there are images"),
        (dict(arr_0=IMAGES[0]), r"must be \(N, H, W, C\) uint8 .* not \(6, 5, 3\) uint8"),
        (dict(arr_0=IMAGES / 255), r"values 0 to 255, not \(11, 6, 5, 3\) float64"),
        (dict(arr_0=IMAGES[:0]), r"not \(0, 6, 5, 3\)"),
        (dict(arr_0=IMAGES.transpose(0, 3, 1, 2)), "channels first"),
        (dict(arr_0=np.asfortranarray(IMAGES)), "Fortran order"),
        (dict(arr_0=np.array([{}])), "arr_0"),
    ],
)
def test_other_arrays_are_one_line(arrays, words, tmp_path):
    np.savez(tmp_path / "images.npz", **arrays)
    with pytest.raises(UserError, match=words):
        open_npz(tmp_path / "images.npz")


def test_damaged_files_are_one_line(tmp_path):
    file = tmp_path / "images.npz"
    with pytest.raises(UserError, match="there is no file"):
        open_npz(file)
    file.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(UserError, match="no readable arr_0"):
        open_npz(file)
    np.savez(file, arr_0=np.repeat(IMAGES, 50, axis=0))
    content = bytearray(file.read_bytes())
    content[40_000] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="no readable arr_0.*Bad CRC"):
        open_npz(file)


def test_a_folder_is_read_as_it_is_and_refused_if_sizes_differ(tmp_path):
    for i, image in enumerate(IMAGES[:3]):
        save_png(tmp_path / f"{i}.png", image)
    assert np.array_equal(open_folder(tmp_path).read(np.arange(3)), IMAGES[:3])
    assert open_folder(tmp_path).identity == of_source(in_memory(IMAGES[:3])).identity
    save_png(tmp_path / "other.png", IMAGES[0, :4])
    with pytest.raises(UserError, match=r"images of 2 sizes \(\S+other.png is 4x5, \S+0.png 6x5\)"):
        open_folder(tmp_path)
