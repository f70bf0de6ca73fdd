"""PyTorch's files without PyTorch: bit for bit what it reads itself, and nothing but tensors and plain values."""

import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_jax.interop.files import read_arrays
from ddpm_jax.interop.torch_files import read_torch
from ddpm_jax.system.errors import UserError

DATA = np.arange(6, dtype="<f4").tobytes()
FORMS = ["zip_of", "legacy_of"]


@pytest.fixture
def write(tmp_path):
    """Writes bytes to a file, and returns it."""

    def write(content):
        file = tmp_path / "weights.pt"
        file.write_bytes(content)
        return file

    return write


def refused(file, *words):
    """Reads a file that must be refused with one printable line that contains the words."""
    with pytest.raises(UserError) as raised:
        read_torch(file)
    message = str(raised.value)
    assert message.isprintable()
    assert all(word in message for word in words), message


@pytest.mark.parametrize("zipped", [True, False])
def test_everything_equals_what_pytorch_reads(zipped, tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.randn(40, generator=torch.Generator().manual_seed(0))
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    network(torch.ones(2, 3, 4, 4)).sum().backward()
    optimizer = torch.optim.Adam(network.parameters())
    optimizer.step()
    kinds = ["float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    saved = {
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "views": [base, base[3:13].view(5, 2).t(), base[::3], base[7], base[5:5], base[:1].expand(4, 3)],
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base[:2].clone()),
        "plain": (3, 2**70, -1.5, None, True, "\u00e9", [], {}, torch.Size([1, 2])),
        **{kind: (10 * base).to(getattr(torch, kind)) for kind in kinds},
    }
    file = tmp_path / "saved.pt"
    torch.save(saved, file, _use_new_zipfile_serialization=zipped)

    def compare(ours, theirs):
        if isinstance(theirs, torch.Tensor):
            bits = theirs.detach()
            bits = (bits.view(torch.int16) if bits.dtype == torch.bfloat16 else bits).numpy()
            assert (str(ours.dtype), ours.shape) == (str(theirs.dtype).removeprefix("torch."), tuple(theirs.shape))
            assert ours.tobytes() == bits.tobytes()
        elif isinstance(theirs, dict):
            assert list(ours) == list(theirs)
            for key in theirs:
                compare(ours[key], theirs[key])
        elif isinstance(theirs, list | tuple):
            assert len(ours) == len(theirs)
            for mine, other in zip(ours, theirs, strict=True):
                compare(mine, other)
        else:
            assert type(ours) is type(theirs)
            assert ours == theirs

    compare(read_torch(file), torch.load(file, weights_only=True))


@pytest.mark.parametrize("form", FORMS)
def test_a_tensor_is_the_view_that_its_file_describes(form, torch_files, write):
    pickled = torch_files.dict_of(
        [
            ("whole", torch_files.tensor()),
            ("columns", torch_files.tensor(offset=1, shape=(2, 2), strides=(1, 2))),
            ("none", torch_files.tensor(offset=6, shape=(0, 3), strides=(3, 1))),
        ]
    )
    read = read_torch(write(getattr(torch_files, form)(pickled, {"0": DATA})))
    np.testing.assert_array_equal(read["whole"], np.arange(6, dtype=np.float32))
    np.testing.assert_array_equal(read["columns"], np.array([[1, 3], [2, 4]], np.float32))
    assert read["none"].shape == (0, 3)
    assert np.shares_memory(read["whole"], read["columns"])


@pytest.mark.parametrize("form", FORMS)
def test_a_function_is_refused_by_name_and_not_called(form, torch_files, write, tmp_path):
    called = tmp_path / "called"
    run = torch_files.name("os", "system") + torch_files.tuple_of(torch_files.text(f"touch {called}")) + b"R"
    refused(write(getattr(torch_files, form)(run, {})), "os.system")
    stacked = torch_files.text("os") + torch_files.text("system\x1b[2J") + b"\x93"
    refused(write(getattr(torch_files, form)(stacked, {})), r"os.system\x1b[2J")
    inner = torch_files.name("torch.serialization", "os.system")
    refused(write(getattr(torch_files, form)(inner, {})), "torch.serialization.os.system")
    assert not called.exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "wrong",
    [
        {"offset": 1},
        {"offset": -1},
        {"shape": (7,)},
        {"shape": (-1,)},
        {"shape": (2, 5), "strides": (2, 1)},
        {"strides": (-1,)},
        {"shape": (2,), "strides": (2**62,)},
        {"shape": (2**40, 2**40), "strides": (0, 0)},
        {"shape": (2**26,), "strides": (0,)},
        {"shape": (2**62, 0), "strides": (0, 0), "offset": 7},
        {"shape": (1, 1)},
        {"shape": (1,) * 70, "strides": (1,) * 70},
        {"count": 2**60},
        {"count": -6},
        {"count": 3, "shape": (3,)},
        {"kind": "DoubleStorage"},
        {"kind": "ComplexFloatStorage"},
        {"key": "../0"},
    ],
)
def test_a_tensor_outside_of_its_storage_is_refused(form, wrong, torch_files, write):
    content = getattr(torch_files, form)(torch_files.dict_of([("a", torch_files.tensor(**wrong))]), {"0": DATA})
    refused(write(content))


def test_hostile_pickles_end_in_one_line(torch_files, write):
    text, number, tensor = torch_files.text, torch_files.number, torch_files.tensor
    itself = b"]q\x00h\x00a"
    # A list of two lists, each of two lists, 28 times over: every one of them is there once.
    laughs = b"]q\x00" + b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(28))
    pickles = {
        "contains itself": itself,
        "has too many values": laughs,
        "nested more than": b"(" * 5000 + b"t" * 5000,
        "instruction POP": b"]0]",
        "Exceeds the limit": b"L" + b"1" * 5000 + b"L\n",
        "twice": torch_files.dict_of([("a", tensor()), ("a", tensor())]),
        "as a key": b"}" + tensor() + number(1) + b"s",
        "large number": b"}" + number(2**61 - 1) + number(1) + b"s",
        "without a value": b"}(" + text("a") + b"u",
        "one value": tensor() + tensor(),
        "where a list belongs": b"}" + number(1) + b"a",
        "where a value belongs": torch_files.storage(),
        "not a storage": torch_files.tuple_of(text("module")) + b"Q",
        "view of another": torch_files.storage()[:-2] + torch_files.tuple_of(text("1"), number(0), number(2)) + b"tQ",
        "with 1 arguments": torch_files.name("torch._utils", "_rebuild_tensor_v2") + b"]\x85R",
        "of something else than pairs": torch_files.name("collections", "OrderedDict") + b"](]e\x85R",
        "damaged or incomplete": b"h\x07",
        "takes more values": b"\x87",
        "but only 1 remain": b"\x8e" + b"\xff" * 7 + b"\x7f",
        "larger than that of any weights": b"N" * 2**22,
    }
    # A shape of 2^60 values in 300 bytes.
    doubled = b")q\x00" + b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60))
    made = b"h" + bytes([60])
    view = torch_files.storage() + number(0) + made + made + b"\x89}"
    rebuild = torch_files.name("torch._utils", "_rebuild_tensor_v2") + b"(" + view + b"tR"
    pickles["of other things than numbers"] = b"(" + doubled + rebuild + b"l"
    # Two storages of one name and different sizes; a memo entry of a huge number costs nothing.
    pickles["two types or sizes"] = torch_files.dict_of([("a", tensor()), ("b", tensor(kind="IntStorage"))])
    for words, pickled in pickles.items():
        tracemalloc.start()
        refused(write(torch_files.zip_of(pickled, {"0": DATA})), words)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**25 if len(pickled) < 2**20 else peak < 2**28, words
    memo = b"]r\xff\xff\xff\x7f"
    assert read_torch(write(torch_files.zip_of(memo, {}))) == []


def test_archives_that_pytorch_does_not_write_are_refused(torch_files, write):
    good = torch_files.dict_of([("a", torch_files.tensor())])
    zeros = torch_files.dict_of([("a", torch_files.tensor(count=2**24, shape=(2**24,)))])
    bomb = torch_files.zip_of(zeros, {"0": bytes(2**26)}, compression=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 2**20
    refused(write(bomb), "compressed")
    with pytest.warns(UserWarning, match="Duplicate name"):
        double = torch_files.zip_of(good, {"0": DATA}, extra=[("data/0", DATA)])
    refused(write(double), "same name")
    refused(write(torch_files.zip_of(good, {"0": DATA}, extra=[("byteorder", "big")])), "little-endian")
    refused(write(torch_files.zip_of(good, {"0": DATA}, extra=[("constants.pkl", "")])), "TorchScript")
    refused(write(torch_files.zip_of(good, {"0": DATA}).replace(b"data.pkl", b"data.txt")), "no data.pkl")
    refused(write(torch_files.legacy_of(good, {"0": DATA}, little=b"\x89")), "little-endian")
    refused(write(torch_files.legacy_of(good, {"0": DATA}, protocol=1)), "protocol")
    refused(write(torch_files.legacy_of(good, {"0": DATA, "1": DATA})), "no tensor uses")
    refused(write(torch_files.legacy_of(good, {})), "damaged")
    refused(write(b"not one of PyTorch's"), "not a file of PyTorch's")
    flipped = bytearray(torch_files.zip_of(good, {"0": DATA}))
    flipped[flipped.index(DATA) + 5] ^= 1
    refused(write(bytes(flipped)), "CRC-32")


@pytest.mark.parametrize("form", FORMS)
def test_no_truncated_file_is_read(form, torch_files, write):
    content = getattr(torch_files, form)(torch_files.dict_of([("a", torch_files.tensor())]), {"0": DATA})
    for length in range(len(content)):
        refused(write(content[:length]))


@given(st.data())
def test_a_changed_file_is_read_or_refused_in_one_line(torch_files, tmp_path_factory, data):
    form = data.draw(st.sampled_from(FORMS))
    pickled = torch_files.dict_of(
        [("a", torch_files.tensor()), ("b", torch_files.tensor(shape=(2, 2), strides=(1, 3)))]
    )
    content = bytearray(getattr(torch_files, form)(pickled, {"0": DATA}))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "changed.pt"
    file.write_bytes(content)
    message = ""
    try:
        read_torch(file)
    except UserError as error:
        message = str(error)
    assert not message or message.isprintable()


def test_a_file_larger_than_allowed_is_not_opened(torch_files, write):
    file = write(torch_files.zip_of(torch_files.dict_of([("a", torch_files.tensor())]), {"0": DATA}))
    with pytest.raises(UserError, match="too large"):
        read_torch(file, max_bytes=100)
    with pytest.raises(UserError, match="no file"):
        read_torch(file.parent)


def test_the_one_set_of_weights_in_a_file_is_found(torch_files, write):
    arrays = torch_files.dict_of([("a", torch_files.tensor())])
    other = torch_files.dict_of([("epoch", torch_files.number(3))])
    for pickled in (
        arrays,
        torch_files.dict_of([("epoch", torch_files.number(3)), ("state_dict", arrays)]),
        b"](" + arrays + other + b"e",
    ):
        found, metadata = read_arrays(write(torch_files.zip_of(pickled, {"0": DATA})))
        assert list(found) == ["a"]
        assert metadata.get("entry") != "ema"
    averages = torch_files.dict_of([("b", torch_files.tensor())])
    number = torch_files.number(3)
    for pickled in (
        torch_files.dict_of([("model", arrays), ("model_ema", averages)]),
        b"](" + arrays + b"}" + number + number + averages + b"e",
    ):
        found, metadata = read_arrays(write(torch_files.zip_of(pickled, {"0": DATA})))
        assert (list(found), metadata) == (["b"], {"entry": "ema"})
    for pickled, words in ((b"](" + arrays + arrays + b"e", "several"), (other, "no weights")):
        with pytest.raises(UserError, match=words):
            read_arrays(write(torch_files.zip_of(pickled, {"0": DATA})))
