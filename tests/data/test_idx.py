import gzip
import struct
import tracemalloc

import numpy as np
import pytest

from ddpm_jax.data import idx, sources


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


def test_idx_files_are_read(sets, idx_folder):
    found = {
        name: sources.load_source(sets.config("idx", idx_folder, (5, 6), split=name))
        for name in ("train", "test", "all")
    }
    assert [source.num_examples for source in found.values()] == [7, 3, 10]
    random = np.random.default_rng(0)
    np.testing.assert_array_equal(sets.everything(found["train"])[..., 0], random.integers(1, 256, (7, 5, 6), np.uint8))
    np.testing.assert_array_equal(sets.everything(found["test"])[..., 0], random.integers(1, 256, (3, 5, 6), np.uint8))
    np.testing.assert_array_equal(found["all"].labels, [0, 1, 2, 3, 0, 1, 2, 0, 1, 2])
    assert found["all"].class_names == ("0", "1", "2", "3")
    assert sources.probe_channels(sets.config("idx", idx_folder)) == 1


def test_idx_images_are_padded_with_black(sets, idx_folder):
    plain = sets.everything(sources.load_source(sets.config("idx", idx_folder, (5, 6))))
    padded = sets.everything(sources.load_source(sets.config("idx", idx_folder, (8, 8))))
    assert padded.shape == (7, 8, 8, 1)
    np.testing.assert_array_equal(padded[:, 1:6, 1:7], plain)
    assert padded.sum(dtype=int) == plain.sum(dtype=int)


def test_idx_images_need_no_labels(sets, idx_folder):
    (idx_folder / "train-labels-idx1-ubyte.gz").unlink()
    assert sources.load_source(sets.config("idx", idx_folder, (5, 6))).labels is None


def test_the_other_spelling_of_idx_names_is_found(sets, idx_folder):
    (idx_folder / "t10k-images-idx3-ubyte").rename(idx_folder / "t10k-images.idx3-ubyte")
    assert sources.load_source(sets.config("idx", idx_folder, (5, 6), split="test")).num_examples == 3


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: content[:-1], "data where its header says 90"),
        (lambda content: content + b"x", "more of data where its header says 90"),
        (lambda content: content[:9], "no idx file of 3 dimensions"),
        (lambda content: b"", "no idx file of 3 dimensions"),
        (lambda content: b"\x00\x00\x0d\x03" + content[4:], "no idx file of 3 dimensions"),
        (lambda content: gzip.compress(content)[:-20], "cannot be read"),
        (lambda content: b"\x1f\x8b" + content, "cannot be read"),
        (lambda content: content[:4] + bytes(4) + content[8:16], "is empty"),
    ],
)
def test_damaged_idx_files_are_refused(sets, idx_folder, damage, said):
    path = idx_folder / "t10k-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    message = sets.refused(sets.config("idx", idx_folder, (5, 6), split="test"))
    assert said in message
    assert str(idx_folder) in message


def test_no_more_is_unpacked_than_fits_the_memory(sets, tmp_path):
    tracemalloc.start()
    try:
        for shape in ((2**16, 2**8, 2**8), (2**32 - 1, 1, 1), (2**10, 2**10, 2**10)):
            header = bytes([0, 0, 8, 3]) + struct.pack(">3I", *shape)
            with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb", compresslevel=1) as file:
                file.write(header + bytes(2**25))
            said = sets.refused(sets.config("idx", tmp_path, shape[1:], memory_gib=1 / 64))
            assert "unpacks to more than data.memory_gib=0.015625" in said
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(header[:4] + struct.pack(">3I", 16, 1, 1) + bytes(2**25))
        )
        assert "more of data where" in sets.refused(sets.config("idx", tmp_path, (1, 1), memory_gib=1 / 64))
        assert tracemalloc.get_traced_memory()[1] < 2**27
    finally:
        tracemalloc.stop()


def test_damaged_labels_are_for_those_who_want_labels(sets, idx_folder):
    path = idx_folder / "t10k-labels-idx1-ubyte"
    for content, said in ((b"", "no idx file of 1 dimensions"), (bytes([0, 0, 8, 1, 0, 0, 0, 1, 5]), "1 labels for 3")):
        path.write_bytes(content)
        source = sources.load_source(sets.config("idx", idx_folder, (5, 6), split="test"))
        assert source.labels is None
        assert said in source.label_fault


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"size": (4, 6)}, "are 5x6, larger than 4x6; set data.height=5 and data.width=6"),
        ({"size": (5, 6), "channels": 3}, "gray images; set it to 1, not 3"),
        ({"size": (5, 6), "split": "val"}, "choose from train, test, all"),
    ],
)
def test_idx_files_that_do_not_fit_are_refused(sets, idx_folder, wrong, said):
    assert said in sets.refused(sets.config("idx", idx_folder, **wrong))


def test_missing_idx_files_are_named_with_where_to_get_them(sets, idx_folder, monkeypatch):
    (idx_folder / "t10k-images-idx3-ubyte").unlink()
    message = sets.refused(sets.config("idx", idx_folder, (5, 6), split="test"))
    assert "no t10k-images-idx3-ubyte" in message
    assert "apt-get install dataset-fashion-mnist" in message
    assert "nowhere does not exist" in sets.refused(sets.config("idx", idx_folder / "nowhere"))
    monkeypatch.setattr(idx, "_DEBIAN_FASHION_MNIST", idx_folder / "nowhere")
    assert "name the folder of idx files" in sets.refused(sets.config("idx"))
    monkeypatch.setattr(idx, "_DEBIAN_FASHION_MNIST", idx_folder)
    assert sources.load_source(sets.config("idx", size=(5, 6))).num_examples == 7
