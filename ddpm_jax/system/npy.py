"""NumPy's files, .npy and .npz, whose headers are checked before they are believed: a few bytes may claim any size."""

import contextlib
import io
import math
import typing
import zipfile
from collections.abc import Iterable

import numpy as np

_LONGEST_HEADER = 10_000  # bytes, as NumPy's own limit
_END = ".npy"


class Header(typing.NamedTuple):
    """What the header of an array says."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    """Whether the first index varies fastest."""
    begin: int
    """Offset of the data."""

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: typing.IO[bytes]) -> Header:
    """Reads the header of an array in an open file, up to its data.

    Raises:
      ValueError: it is none, its shape cannot be, or the array holds Python objects.
    """
    try:
        version = np.lib.format.read_magic(file)
        size = file.read(2 if version == (1, 0) else 4)
        length = int.from_bytes(size, "little")
        if length > _LONGEST_HEADER:  # NumPy would read all of it first
            raise ValueError(f"a header of {length} bytes")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(io.BytesIO(size + file.read(length)))
    except (OSError, ValueError):
        raise
    except Exception as error:  # NumPy raises a dozen kinds
        raise ValueError(f"its header is damaged ({type(error).__name__})") from error
    if not all(type(each) is int and 0 <= each < 2**63 for each in shape):
        raise ValueError(f"a shape of {shape}")
    if dtype.hasobject:
        raise ValueError("it holds Python objects; save plain numbers")
    return Header(shape, dtype, fortran, 8 + len(size) + length)


def headers_of(archive: zipfile.ZipFile) -> dict[str, Header]:
    """Reads the headers of the arrays in an .npz by name, and not the arrays; other entries are left out.

    Raises:
      ValueError: a header is damaged, or the array does not have the size that it says.
    """
    found = {}
    for entry in archive.infolist():
        name = entry.filename.removesuffix(_END)
        if name == entry.filename:
            continue
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{entry.filename} is compressed as NumPy never does")
        try:
            with archive.open(entry) as member:
                header = read_header(member)
        except (OSError, ValueError):
            raise
        except Exception as error:  # and zipfile half a dozen
            raise ValueError(f"{entry.filename} is damaged ({error or type(error).__name__})") from error
        if entry.file_size != header.begin + header.num_bytes:
            raise ValueError(f"{entry.filename} has {entry.file_size} bytes, which is not the size in its header")
        if name in found:
            raise ValueError(f"two arrays have the same name, {name:.100}")
        found[name] = header
    return found


def read_npz(
    file: zipfile.ZipFile | typing.IO[bytes], names: Iterable[str] | None = None, *, most_bytes: float = math.inf
) -> dict[str, np.ndarray]:
    """Reads arrays of an .npz file.

    Args:
      file: the opened file, or the archive in it.
      names: of the arrays to read, as far as they are there; all if None.
      most_bytes: that the arrays may take together.

    Returns:
      the arrays by name.

    Raises:
      ValueError: the file is damaged (a checksum of an array that is read differs, too), or its arrays are larger than
        they may be or hold objects.
      OSError: it can no longer be read.
    """
    try:
        with contextlib.ExitStack() as opened:
            archive = file if isinstance(file, zipfile.ZipFile) else opened.enter_context(zipfile.ZipFile(file))
            headers = headers_of(archive)
            chosen = [name for name in headers if names is None or name in names]
            if sum(headers[name].num_bytes for name in chosen) > most_bytes:
                raise ValueError(f"its arrays take more than {most_bytes / 2**30:.3g} GiB")
            arrays = {}
            for name in chosen:
                with archive.open(f"{name}{_END}") as member:
                    arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
                    member.read(1)  # the checksum is compared at the end
            return arrays
    except (OSError, ValueError):
        raise
    except Exception as error:  # zipfile and NumPy raise a dozen kinds
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
