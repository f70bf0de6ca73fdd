"""Whether a set is the one that a run was begun on, wherever it lies now."""

import hashlib
import typing
import zlib
from pathlib import Path

import numpy as np

from ddpm_jax.data.source import Source, in_threads
from ddpm_jax.system.errors import Damage, UserError, printable
from ddpm_jax.system.files import read_json, write_json

_LOOKED_AT = 64
_CHUNK = 64  # images whose checksum is taken at a time: what is mapped need not be copied as one
_MAPPED_GIB = 4  # a mapped array that is larger is not read from end to end at every start
_DIFFERENT = {
    "crc32": "other pixels or labels",
    "crc32_all": "other pixels or labels",
    "crc32_files": "other bytes in the files, or other labels",
}


def fingerprint(source: Source) -> dict[str, typing.Any]:
    """Returns what identifies a set by its content: two copies of a set in different places have the same.

    Args:
      source: the images.

    Returns:
      the count, the shape, the names of the classes, and as `crc32` the CRC-32 of 64 images and their labels, evenly
      spaced. As `crc32_all` that of all pixels and labels, of a set that is in memory or mapped and up to 4 GiB; as
      `crc32_files` that of the bytes of all files and the labels, of a folder that is streamed. Of what else lies on
      disk (a larger array, a set of TFDS) there are the 64 images alone.
    """
    number = min(_LOOKED_AT, source.num_examples)
    indices = np.arange(number) * source.num_examples // number
    crc = zlib.crc32(source.read(indices).tobytes())
    if source.read_labels is not None:
        crc = _add_labels(crc, source.read_labels(indices))
    return {
        "images": source.num_examples,
        "shape": list(source.image_shape),
        "class_names": list(source.class_names),
        "crc32": crc,
        **_of_every_image(source),
    }


def pixel_hashes(source: Source, indices: np.ndarray | None = None, *, label: str) -> np.ndarray:
    """Returns a 64-bit hash of the pixels of each image.

    Args:
      source: the images.
      indices: (M,) which of them; all N if None.
      label: of the progress bar.

    Returns:
      (M,) uint64, BLAKE2b in big-endian order.
    """
    chosen = np.arange(source.num_examples) if indices is None else indices

    def hashes(first: int) -> bytes:
        images = source.read(chosen[first : first + _CHUNK])
        return b"".join(hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in images)

    found = in_threads(hashes, range(0, len(chosen), _CHUNK), label=label, unit=f" x{_CHUNK}")
    return np.frombuffer(b"".join(found), ">u8").astype(np.uint64)


def _of_every_image(source: Source) -> dict[str, int]:
    images = source.images
    if images is not None and not (isinstance(images, np.memmap) and images.nbytes > _MAPPED_GIB * 2**30):
        name, crc = "crc32_all", 0
        for first in range(0, len(images), _CHUNK):
            crc = zlib.crc32(np.ascontiguousarray(images[first : first + _CHUNK]).data, crc)
    elif source.files_crc32 is not None:
        name, crc = "crc32_files", source.files_crc32
    else:
        return {}
    return {name: crc if source.labels is None else _add_labels(crc, source.labels)}


def read_class_names(run: Path) -> tuple[str, ...]:
    """Returns the names of the classes that a run was trained on, in the order of their labels.

    Args:
      run: the run's folder.

    Returns:
      the names; none if the run is unconditional, or its folder has no `data.json`.

    Raises:
      UserError: the file is damaged.
    """
    file = run / "data.json"
    names = _read(file).get("class_names") if file.exists() else None
    return tuple(map(printable, names)) if isinstance(names, list) else ()


def _read(file: Path) -> dict[str, typing.Any]:
    try:
        return read_json(file)
    except Damage as damage:
        raise UserError(
            f"{file}, the record of the run's images, is damaged ({damage}): restore it, or delete it to continue "
            "without this check"
        ) from None


def _add_labels(crc: int, labels: np.ndarray) -> int:
    return zlib.crc32(labels.astype("<i4").tobytes(), crc)


def check_same_set(file: Path, source: Source, *, write: bool = True) -> None:
    """Writes a set's fingerprint into a run's folder, or holds it against the one that is there.

    What both of them have is compared; what only this one has is noted for the next time: a set may be streamed now
    that was in memory, and runs of older versions noted less.

    Args:
      file: the fingerprint, in the run's folder.
      source: the images.
      write: whether to write the file where it is missing or has less; of many hosts one does.

    Raises:
      UserError: the run was begun on another set, and in what they differ; or the file is damaged.
    """
    here = fingerprint(source)
    there = _read(file) if file.exists() else {}
    different = [
        _DIFFERENT.get(name) or f"{name} {there[name]!s:.200} there, {here[name]!s:.200} here"
        for name in here
        if name in there and there[name] != here[name]
    ]
    if different:
        raise UserError(
            f"{file.parent} was begun on other images than {source.name} ({'; '.join(dict.fromkeys(different))}): give "
            f"it those, or another --workdir; to go on with these all the same, remove {file}"
        )
    if write and not here.keys() <= there.keys():
        write_json(file, {**there, **here})
