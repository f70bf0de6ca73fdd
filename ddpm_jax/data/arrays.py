"""Arrays that NumPy saved, .npy and .npz: mapped into memory, so that a set may be larger than it."""

import functools
import math
import pathlib
import typing
import zipfile
from collections.abc import Callable, Sequence

import numpy as np

from ddpm_jax.config import DataConfig
from ddpm_jax.data.source import Source, fits_memory, no_split, shape_of
from ddpm_jax.system.errors import NoSuchSplit, UserError

_SPLITS = ("train", "test", "all")
_IMAGES, _LABELS = ("images", "arr_0", "x"), ("labels", "arr_1", "y")
_LOOKED_AT = 64  # images by which the range of floats is judged


class _Array(typing.NamedTuple):
    """An array in a file, not yet read."""

    file: pathlib.Path
    member: str
    """Its place in an .npz; empty in an .npy."""
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    offset: int | None
    """Where its bytes begin in the file; None where they are compressed."""
    changed: int
    """When the file was last written, in ns: an array written anew is another one."""

    def __str__(self) -> str:
        name = self.member.removesuffix(".npy")
        return f"{name} in {self.file}" if name else str(self.file)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Part(typing.NamedTuple):
    images: _Array
    labels: np.ndarray | None


def load(config: DataConfig) -> Source:
    """Opens arrays of images, (N, H, W, C) or (N, H, W) uint8, with (N,) integer labels or none.

    An .npz holds `images` (or `arr_0`, `x`, or a single array) and `labels` (or `arr_1`, `y`), or both of them for each
    split, as `x_train` or `train_images`. An .npy has its labels beside it in `NAME_labels.npy`. A folder holds a file
    for each split, `train.npz` and `test.npz`.

    Args:
      config: which images; its `channels` is known.

    Returns:
      the source.

    Raises:
      UserError: a file is missing or damaged, or its arrays are no such images or not of the size asked for.
    """
    parts, shape = _parts(config), shape_of(config)
    for part in parts:
        height, width, channels = _image_shape(part.images)
        if (height, width) != shape[:2]:
            raise UserError(
                f"data: {part.images} holds images of {height}x{width}, not {shape[0]}x{shape[1]};"
                f" set data.height={height} and data.width={width}"
            )
        if channels != shape[2]:
            raise UserError(f"data.channels: {part.images} has {channels}; set it to {channels}, not {shape[2]}")
    counts = [part.images.shape[0] for part in parts]
    fits = fits_memory(config, sum(counts))
    for part in parts:
        if part.images.offset is None and not fits:
            raise UserError(
                f"data.path: {part.images} is compressed, and {part.images.num_bytes / 2**30:.3g} GiB do not fit"
                f" data.memory_gib={config.memory_gib:g}; save it with np.savez or np.save, which can be mapped"
            )
    read = functools.partial(_read_parts, tuple(part.images for part in parts), shape)
    if not fits:
        images = None
    elif len(parts) == 1:
        images = _open(parts[0].images).reshape(-1, *shape)
    else:
        images = np.concatenate([_open(part.images).reshape(-1, *shape) for part in parts])
    labels, class_names = _labels(parts)
    return Source(
        f"{config.source} {config.path}, {config.split}",
        sum(counts),
        shape,
        read if images is None else lambda indices: images[indices],
        images=images,
        read_labels=None if labels is None else lambda indices: labels[indices],
        class_names=class_names,
    )


def probe(config: DataConfig) -> int:
    """Gives the number of channels, from the heads of the files."""
    return _image_shape(_parts(config)[0].images)[2]


def _read_parts(arrays: tuple[_Array, ...], shape: tuple[int, int, int], indices: np.ndarray) -> np.ndarray:
    """Reads images from arrays that follow each other; the maps are not sent to other processes, their places are."""
    ends = np.cumsum([array.shape[0] for array in arrays])
    images = np.empty((len(indices), *shape), np.uint8)
    which = np.searchsorted(ends, indices, side="right")
    for number, array in enumerate(arrays):
        here = which == number
        images[here] = _open(array)[indices[here] - (ends[number] - array.shape[0])].reshape(-1, *shape)
    return images


def _parts(config: DataConfig) -> list[_Part]:
    """Finds the arrays of the split asked for."""
    if not config.path:
        raise UserError("data.path: name the .npz or .npy file, as in --data.path=/home/me/images.npz")
    path = pathlib.Path(config.path).expanduser()
    if config.split not in _SPLITS:
        raise no_split(config, _SPLITS)
    if path.is_dir():
        wanted = ("train", "test") if config.split == "all" else (config.split,)
        found = [
            next((path / f"{name}.{end}" for end in ("npz", "npy") if (path / f"{name}.{end}").is_file()), None)
            for name in wanted
        ]
        for name, file in zip(wanted, found, strict=True):
            if file is None:
                raise NoSuchSplit(f"data.path: {path} holds no {name}.npz or {name}.npy; name a file, or put it there")
        return [_part(config, _members(file), "all") for file in found if file is not None]
    if not path.is_file():
        raise UserError(f"data.path: there is no file {config.path}; name the .npz or .npy file that holds the images")
    arrays = _members(path)
    if not any(_of_split(arrays, name) for name in ("train", "test")):
        if config.split == "test":
            raise NoSuchSplit(
                f"data.split: {config.path} has no test part: name a folder that holds train{path.suffix} and"
                f" test{path.suffix}, or save them as x_train and x_test in one .npz"
            )
        return [_part(config, arrays, "all")]
    return [_part(config, arrays, name) for name in (("train", "test") if config.split == "all" else (config.split,))]


def _of_split(arrays: dict[str, _Array], split: str) -> str | None:
    return next((name for name in (f"{split}_images", f"x_{split}") if name in arrays), None)


def _part(config: DataConfig, arrays: dict[str, _Array], split: str) -> _Part:
    if split == "all":
        labels = next((arrays[name] for name in _LABELS if name in arrays), None)
        images = next((arrays[name] for name in _IMAGES if name in arrays), None)
        rest = [array for name, array in arrays.items() if name not in _LABELS]
        if images is None and len(rest) == 1:
            images = rest[0]
        wanted = "images"
    else:
        images = arrays.get(_of_split(arrays, split) or "")
        labels = next((arrays[name] for name in (f"{split}_labels", f"y_{split}") if name in arrays), None)
        wanted = f"x_{split}"
    if images is None:
        kind = UserError if split == "all" else NoSuchSplit
        raise kind(f"data.path: {config.path} holds no array {wanted}, but {', '.join(arrays) or 'none'}")
    _check_images(images)
    return _Part(images, None if labels is None else _read_labels(labels, images.shape[0]))


def _image_shape(images: _Array) -> tuple[int, int, int]:
    _, height, width, *channels = images.shape
    return height, width, channels[0] if channels else 1


def _check_images(images: _Array) -> None:
    shape = "x".join(map(str, images.shape))
    if len(images.shape) not in (3, 4) or 0 in images.shape:
        raise UserError(
            f"data.path: {images} is {shape}, not (N, H, W, C) or (N, H, W); reshape it so and save it anew"
        )
    if len(images.shape) == 4 and images.shape[1] in (1, 3, 4) and min(images.shape[2:]) > 4:
        raise UserError(
            f"data.path: {images} is {shape}, which has the channels first; save images.transpose(0, 2, 3, 1)"
        )
    if images.dtype == np.uint8:
        return
    if images.dtype.kind != "f":
        raise UserError(f"data.path: {images} is of {images.dtype}, not uint8; save the pixels as 0 to 255 in uint8")
    some = np.asarray(_open(images)[:_LOOKED_AT])
    least, most = float(some.min()), float(some.max())
    if least >= -1.001 and most <= 1.001:
        recipe = "images * 255" if least >= 0 else "(images + 1) * 127.5"
        recipe = f"np.round({recipe}).astype(np.uint8)"
    else:
        recipe = (
            "np.round(images).astype(np.uint8)" if least >= 0 and most <= 255 else "the pixels as 0 to 255 in uint8"
        )
    raise UserError(
        f"data.path: {images} is of {images.dtype} from {least:.3g} to {most:.3g}, not uint8; save {recipe}"
    )


def _read_labels(labels: _Array, number: int) -> np.ndarray:
    if labels.dtype.kind not in "iu" or labels.shape not in ((number,), (number, 1)):
        raise UserError(
            f"data.path: {labels} is {labels.dtype} of shape {labels.shape}, where {number} images need labels of shape"
            f" ({number},), integers from 0"
        )
    values = np.asarray(_open(labels)).reshape(-1)
    if values.min() < 0 or values.max() >= 2**31:
        raise UserError(f"data.path: {labels} has a label {values.min()}; number the classes from 0")
    return values.astype(np.int32)


def _labels(parts: Sequence[_Part]) -> tuple[np.ndarray | None, tuple[str, ...]]:
    if any(part.labels is None for part in parts):
        return None, ()
    labels = np.concatenate([typing.cast(np.ndarray, part.labels) for part in parts])
    return labels, tuple(str(i) for i in range(int(labels.max()) + 1))


# Files and what is in them


def _members(file: pathlib.Path) -> dict[str, _Array]:
    """Lists the arrays of a file by name, from their heads; those of an .npy and its labels as `images`, `labels`."""
    beside = file.with_name(f"{file.stem}_labels.npy")
    try:
        if not zipfile.is_zipfile(file):
            found = {"images": _head_in_file(file)}
            return found | ({"labels": _head_in_file(beside)} if beside.is_file() else {})
        with zipfile.ZipFile(file) as archive:
            infos = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            return {info.filename.removesuffix(".npy"): _head_in_archive(file, archive, info) for info in infos}
    except UserError:
        raise
    except Exception as error:  # damaged files make NumPy and zipfile raise half a dozen kinds
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise UserError(f"data.path: {file} is no .npy or .npz file that can be read ({reason})") from error


def _head_in_file(file: pathlib.Path) -> _Array:
    with file.open("rb") as opened:
        shape, fortran, dtype = _head(file, opened)
        array = _Array(file, "", shape, dtype, fortran, opened.tell(), file.stat().st_mtime_ns)
    _check_length(array)
    return array


def _head_in_archive(file: pathlib.Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Array:
    with archive.open(info) as member:
        shape, fortran, dtype = _head(file, member)
        begin = member.tell()
    changed = file.stat().st_mtime_ns
    if info.compress_type != zipfile.ZIP_STORED:
        return _Array(file, info.filename, shape, dtype, fortran, None, changed)
    with file.open("rb") as opened:
        # The member's own header may have more extra bytes than the archive's list says.
        opened.seek(info.header_offset + 26)
        lengths = np.frombuffer(opened.read(4), "<u2")
    offset = info.header_offset + 30 + int(lengths.sum()) + begin
    array = _Array(file, info.filename, shape, dtype, fortran, offset, changed)
    _check_length(array)
    return array


def _head(file: pathlib.Path, opened: typing.IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(opened)
    readers: dict[tuple[int, int], Callable] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, fortran, dtype = readers.get(version, np.lib.format.read_array_header_2_0)(opened)
    if dtype.hasobject:
        raise UserError(f"data.path: {file} holds Python objects, which are not read; save the pixels as uint8")
    return shape, fortran, dtype


def _check_length(array: _Array) -> None:
    missing = typing.cast(int, array.offset) + array.num_bytes - array.file.stat().st_size
    if missing > 0:
        raise UserError(f"data.path: {array.file} is cut short by {missing} bytes; fetch or save it again")


@functools.lru_cache(maxsize=16)
def _open(array: _Array) -> np.ndarray:
    """Maps an array; one that is compressed is read."""
    if array.offset is not None:
        order: typing.Literal["F", "C"] = "F" if array.fortran else "C"
        return np.memmap(array.file, array.dtype, "r", array.offset, array.shape, order)
    try:
        with np.load(array.file, allow_pickle=False) as arrays:
            return typing.cast(np.ndarray, arrays[array.member.removesuffix(".npy")])
    except Exception as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise UserError(f"data.path: {array} cannot be read ({reason}); fetch or save it again") from error
