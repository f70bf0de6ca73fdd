import shutil

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from ddpm_jax.generation.store import Parts, StoredImages, missing_ranges
from ddpm_jax.system.errors import UserError

SHAPE = (3, 2, 1)


def images(first, stop):
    """Images whose pixels tell their index."""
    return np.arange(first * 6, stop * 6).astype(np.uint8).reshape(-1, *SHAPE)


def stored_in(folder, *, labels=()):
    return StoredImages(folder, SHAPE, asked={"seed": 0}, labels=labels)


@given(
    ends=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=6),
    number=st.integers(1, 40),
    longest=st.integers(1, 50),
)
def test_missing_ranges_are_all_that_is_not_done_once_each(ends, number, longest):
    done = [(min(pair), max(pair)) for pair in ends]
    ranges = missing_ranges(done, number, longest=longest)
    listed = [index for first, stop in ranges for index in range(first, stop)]
    assert listed == [i for i in range(number) if not any(first <= i < stop for first, stop in done)]
    assert all(0 < stop - first <= longest for first, stop in ranges)


def test_images_are_packed_as_public_evaluators_read_them(tmp_path):
    stored = stored_in(tmp_path)
    stored.save(2, images(2, 5))
    stored.save(0, images(0, 2))
    assert stored.pack() == 5
    with np.load(tmp_path / "samples.npz") as file:
        assert file.files == ["arr_0"]
        assert file["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(file["arr_0"], images(0, 5))
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]
    np.testing.assert_array_equal(np.concatenate(list(stored.read(3))), images(0, 3))


def test_labels_are_packed_beside_the_images(tmp_path):
    for first, stop in ((0, 4), (4, 7)):
        stored = stored_in(tmp_path, labels=(3, 5, 5))
        stored.save(first, images(first, stop))
        assert stored.pack() == stop
        with np.load(tmp_path / "samples.npz") as file:
            assert file.files == ["arr_0", "arr_1"]
            assert file["arr_1"].dtype == np.int64
            np.testing.assert_array_equal(file["arr_1"], [3, 5, 5, 3, 5, 5, 3][:stop])
            np.testing.assert_array_equal(file["arr_0"], images(0, stop))
    stored.export(tmp_path / "two.npz", 2)
    with np.load(tmp_path / "two.npz") as file:
        assert (file["arr_0"].shape, file["arr_1"].tolist()) == ((2, *SHAPE), [3, 5])


def test_a_disk_without_room_to_pack_is_refused_before_drawing(tmp_path, monkeypatch):
    def of(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - free, free))
        return stored_in(tmp_path / "new")

    # 1000 images of 6 bytes twice, and a block for the file of the first time.
    of(12_000 + 4096).check_space([(0, 1000)])
    with pytest.raises(UserError, match=r"has 0.0 MB free, and 1000 more images need .* draw 999 or fewer$"):
        of(12_000 + 4095).check_space([(0, 1000)])
    of(0).check_space([])


def test_packing_resumes_and_keeps_images_beyond_a_gap(tmp_path):
    stored = stored_in(tmp_path)
    stored.save(0, images(0, 300))  # more than is read at once
    assert stored.pack() == 300
    stored.save(290, images(290, 310))
    stored.save(320, images(320, 330))
    assert stored.pack() == 310
    assert stored.done() == [(0, 310), (320, 330)]
    np.testing.assert_array_equal(np.load(stored.file)["arr_0"], images(0, 310))
    stored.save(310, images(310, 320))
    assert stored.pack() == 330
    np.testing.assert_array_equal(np.load(stored.file)["arr_0"], images(0, 330))
    assert stored.done() == [(0, 330)]


def test_the_same_images_give_the_same_bytes(tmp_path):
    for name, cuts in (("one", [0, 5]), ("two", [0, 1, 3, 5])):
        stored = stored_in(tmp_path / name)
        for first, stop in zip(cuts[:-1], cuts[1:], strict=True):
            stored.save(first, images(first, stop))
        stored.pack()
    assert (tmp_path / "one" / "samples.npz").read_bytes() == (tmp_path / "two" / "samples.npz").read_bytes()


def test_parts_that_were_asked_for_by_another_job_or_range_are_not_packed(tmp_path, capsys):
    parts = Parts(tmp_path / "parts", {"seed": 0})
    parts.save(0, 2, {"images": images(0, 2)})
    Parts(tmp_path / "parts", {"seed": 1}).save(2, 4, {"images": images(2, 4)})
    Parts(tmp_path / "frames", {"seed": 0}).save(4, 6, {"images": images(4, 6)})
    (tmp_path / "frames" / "00000004-00000006.npz").rename(tmp_path / "parts" / "00000004-00000006.npz")
    shutil.copy(tmp_path / "parts" / "00000000-00000002.npz", tmp_path / "parts" / "00000006-00000008.npz")
    np.savez(tmp_path / "parts" / "00000008-00000010.npz", images=images(8, 10))
    np.savez(tmp_path / "parts" / "mine.npz", images=images(0, 2))
    assert parts.ranges() == [(0, 2)]
    said = capsys.readouterr().err.splitlines()
    reasons = ("it is of job ", "it is of part frames, not parts", "it is of images [0, 2], not [6, 8]", "no checksum")
    assert len(said) == 4
    assert all(reason in line for reason, line in zip(reasons, said, strict=True))
    assert len([*(tmp_path / "parts").glob("*.damaged")]) == 4
    with pytest.raises(UserError, match="^images 2 to 3 are missing in"):
        list(parts.read(0, 4))


@pytest.mark.parametrize("at", [0.02, 0.3, 0.5, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("packed", [True, False])
def test_what_is_damaged_is_set_aside_and_its_images_are_missing(tmp_path, capsys, packed, at):
    stored = stored_in(tmp_path)
    stored.save(0, images(0, 9))
    if packed:
        stored.pack()
    file = stored.file if packed else tmp_path / "parts" / "00000000-00000009.npz"
    content = file.read_bytes()
    changed = bytearray(content)
    changed[int(at * len(content))] ^= 1
    for spoiled in (bytes(changed), content[: int(at * len(content))]):
        file.write_bytes(spoiled)
        stored = stored_in(tmp_path)
        assert missing_ranges(stored.done(), 9, longest=9) == [(0, 9)]
        assert f"{file} is damaged (" in capsys.readouterr().err
    assert (file.with_name(f"{file.name}.damaged1")).read_bytes() == spoiled
    stored.save(0, images(0, 9))
    assert stored.pack() == 9
    np.testing.assert_array_equal(np.load(stored.file)["arr_0"], images(0, 9))


def test_what_is_damaged_after_it_was_looked_at_is_not_read(tmp_path):
    stored = stored_in(tmp_path)
    stored.save(0, images(0, 9))
    stored.pack()
    data = bytearray(stored.file.read_bytes())
    data[data.index(images(0, 9).tobytes()) + 7] ^= 1
    stored.file.write_bytes(data)
    with pytest.raises(UserError, match=r"samples.npz is damaged \(its checksum differs\): run the same command again"):
        list(stored.read(2))


def test_a_full_disk_while_packing_loses_nothing(tmp_path, monkeypatch):
    stored = stored_in(tmp_path)
    stored.save(0, images(0, 2))
    stored.pack()
    stored.save(2, images(2, 4))

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "write_array_header_1_0", full)
        with pytest.raises(UserError, match=r"^cannot write .*samples.npz: No space left on device$"):
            stored.pack()
    assert stored.done() == [(0, 2), (2, 4)]
    assert stored.pack() == 4
