import gzip
import io
import os
import pickle
import struct
import tarfile
import tracemalloc

import numpy as np
import pytest

from ddpm_jax.data import cifar10, sources

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
EACH = 4
PIXELS = np.random.default_rng(0).integers(0, 256, (6 * EACH, 32, 32, 3), np.uint8)
LABELS = np.arange(6 * EACH) * 7 % 10
BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


class Python2(pickle._Pickler):
    """Writes text and bytes as Python 2 did, whose `str` was both: so were the archive's files written."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def _save_str(self, value):
        content = value.encode("latin1") if isinstance(value, str) else value
        self.write(b"T" + struct.pack("<i", len(content)) + content)

    dispatch[str] = dispatch[bytes] = _save_str


def pickled(value):
    file = io.BytesIO()
    Python2(file, 2).dump(value)
    # NumPy's module was still called so.
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def python_files():
    files = {"batches.meta": pickled({"label_names": list(NAMES), "num_vis": 3072}), "readme.html": b"<html>"}
    for i, name in enumerate(BATCHES):
        part = slice(i * EACH, (i + 1) * EACH)
        rows = PIXELS[part].transpose(0, 3, 1, 2).reshape(EACH, -1)
        files[name] = pickled({"batch_label": name, "labels": [int(x) for x in LABELS[part]], "data": rows.copy()})
    return "cifar-10-batches-py", files


def put(where, folder, files, *, packed, compresslevel=9):
    where.mkdir(exist_ok=True)
    if not packed:
        (where / folder).mkdir()
        for name, content in files.items():
            (where / folder / name).write_bytes(content)
        return where / folder
    archive = where / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=compresslevel) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return archive


def config(sets, path, **others):
    return sets.config("cifar10", path, (32, 32), **others)


@pytest.mark.parametrize("packed", [True, False])
def test_the_archive_is_read_packed_or_not(sets, tmp_path, packed):
    place = put(tmp_path / "here", *python_files(), packed=packed)
    train, test = slice(0, 5 * EACH), slice(5 * EACH, None)
    for split, part in {"train": train, "test": test, "all": slice(None)}.items():
        source = sources.load_source(config(sets, place if split == "test" else tmp_path / "here", split=split))
        np.testing.assert_array_equal(sets.everything(source), PIXELS[part])
        np.testing.assert_array_equal(source.labels, LABELS[part])
        assert source.class_names == NAMES


def test_without_it_one_line_says_what_to_download_and_where_to_put_it(sets, tmp_path, monkeypatch):
    message = sets.refused(config(sets, tmp_path))
    assert f"no CIFAR-10 in {tmp_path}; download https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz" in message
    assert "put it there as it is" in message
    monkeypatch.chdir(tmp_path)
    assert "no CIFAR-10 in data;" in sets.refused(config(sets, ""))
    put(tmp_path / "data", *python_files(), packed=True)
    assert sources.load_source(config(sets, "")).num_examples == 5 * EACH


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"split": "val"}, "choose from train, test, all"), ({"channels": 1}, "CIFAR-10 is 32x32 with 3 channels, not")],
)
def test_other_images_than_it_has_are_refused(sets, tmp_path, wrong, said):
    assert said in sets.refused(config(sets, tmp_path, **wrong))


class Program:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("data_batch_3", None, "data_batch_3 is missing"),
        ("data_batch_3", b"", "is damaged"),
        ("data_batch_3", pickled({"data": [1], "labels": [1]}), "holds no (N, 3072) uint8"),
        ("data_batch_3", pickle.dumps(Program()), "it asks for posix.system"),
        ("batches.meta", pickled({"label_names": ["cat"]}), "where there are 1 classes"),
        ("batches.meta", pickled(["cat"]), "a list where a dictionary belongs"),
        ("test_batch", b"\x80\x02}r\xff\xff\xff\x7f.", "it has LONG_BINPUT 2147483647"),
        ("test_batch", b"\x80\x05\x96" + (2**40).to_bytes(8, "little"), "is damaged"),
        ("test_batch", b"\x80\x02" + b"(" * 10**5 + b".", "is damaged"),
        ("test_batch", pickle.dumps({b"data": np.zeros((2, 3072), object)}, 2), "is damaged"),
    ],
)
def test_damaged_archives_are_refused_and_run_nothing(sets, tmp_path, monkeypatch, name, content, said):
    monkeypatch.chdir(tmp_path)
    folder, files = python_files()
    if content is None:
        del files[name]
    else:
        files[name] = content
    put(tmp_path / "here", folder, files, packed=True)
    message = sets.refused(config(sets, tmp_path / "here", split="all"))
    assert said in message
    assert "download" in message
    assert not (tmp_path / "ran").exists()


def test_a_download_that_broke_off_is_refused(sets, tmp_path):
    archive = put(tmp_path, *python_files(), packed=True)
    archive.write_bytes(archive.read_bytes()[:-5000])
    assert f"{archive} is damaged" in sets.refused(config(sets, archive))


@pytest.mark.parametrize("compresslevel", [0, 9])
def test_a_flipped_bit_is_no_other_picture(sets, tmp_path, compresslevel):
    """Also where gzip stores the pixels as they are, and nothing but its checksum tells."""
    archive = put(tmp_path, *python_files(), packed=True, compresslevel=compresslevel)
    whole = archive.read_bytes()
    places = np.linspace(100, len(whole) - 9, 40).astype(int)
    if not compresslevel:
        places[0] = whole.index(PIXELS[0, ..., 0].tobytes())
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 4
        archive.write_bytes(damaged)
        assert f"{archive} is damaged" in sets.refused(config(sets, archive))


def test_an_archive_unpacks_to_no_more_than_cifar10_has(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "_LARGEST_ARCHIVE", 2**24)
    archive = tmp_path / "cifar-10-python.tar.gz"
    info = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
    info.size = 2**26
    extended = tarfile.TarInfo("headers")
    extended.size, extended.type = 2**26, tarfile.XHDTYPE
    for entry in (info, extended):
        with gzip.open(archive, "wb", compresslevel=1) as file:
            file.write(entry.tobuf() + bytes(2**26))
        tracemalloc.start()
        try:
            assert "it unpacks to more than 16 MiB" in sets.refused(config(sets, archive))
            assert tracemalloc.get_traced_memory()[1] < 2**27
        finally:
            tracemalloc.stop()


def test_its_channels_are_known(sets):
    assert sources.probe_channels(config(sets, "nowhere")) == 3
    assert cifar10.probe(config(sets, "nowhere")) == 3
