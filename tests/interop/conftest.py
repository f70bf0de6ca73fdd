"""PyTorch's files written by hand, byte for byte, so that any of their bytes can be wrong."""

import io
import struct
import types
import zipfile

import pytest

MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value):
    size = (value.bit_length() + 8) // 8
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def tuple_of(*items):
    return b"(" + b"".join(items) + b"t"


def dict_of(items):
    return b"}(" + b"".join(text(key) + value for key, value in items) + b"u"


def storage(key="0", count=6, kind="FloatStorage"):
    return tuple_of(text("storage"), name("torch", kind), text(key), text("cpu"), number(count)) + b"Q"


def tensor(key="0", count=6, *, offset=0, shape=(6,), strides=(1,), kind="FloatStorage"):
    numbers = lambda values: tuple_of(*map(number, values))
    args = (storage(key, count, kind), number(offset), numbers(shape), numbers(strides), b"\x89", b"}")
    return name("torch._utils", "_rebuild_tensor_v2") + tuple_of(*args) + b"R"


def zip_of(pickled, storages, *, compression=zipfile.ZIP_STORED, extra=()):
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + pickled + b".")
        for key, content in [*((f"data/{key}", content) for key, content in storages.items()), *extra]:
            archive.writestr(f"archive/{key}", content)
    return written.getvalue()


def legacy_of(pickled, storages, *, itemsize=4, protocol=1001, little=b"\x88"):
    system = b"}(" + text("little_endian") + little + b"u"
    keys = b"](" + b"".join(map(text, storages)) + b"e"
    pickles = (MAGIC, number(protocol), system, pickled, keys)
    counted = (struct.pack("<q", len(content) // itemsize) + content for content in storages.values())
    return b"".join(b"\x80\x02" + part + b"." for part in pickles) + b"".join(counted)


@pytest.fixture(scope="session")
def torch_files():
    """Writes pickles and the files around them."""
    return types.SimpleNamespace(
        text=text,
        number=number,
        name=name,
        tuple_of=tuple_of,
        dict_of=dict_of,
        storage=storage,
        tensor=tensor,
        zip_of=zip_of,
        legacy_of=legacy_of,
    )
