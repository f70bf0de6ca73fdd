"""Arrays that NumPy saved: .npy files are mapped, so that a set may be larger than memory; .npz are read into it."""

import contextlib
import functools
import math
import pathlib
import typing
import zipfile
from collections.abc import Iterator, Sequence

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
    name: str
    """Its name in an .npz; empty for an .npy."""
    shape: tuple[int, ...]
    dtype: np.dtype
    changed: int
    """When the file was last written, in ns: an array written again is another one."""

    def __str__(self) -> str:
        return f"{self.name} in {self.file}" if self.name else str(self.file)

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
      UserError: a file is missing or damaged, or its arrays are not images, or not of the requested size.
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
        if part.images.name and not fits:
            raise UserError(
                f"data.path: {part.images} has {part.images.num_bytes / 2**30:.3g} GiB, more than data.memory_gib="
                f"{config.memory_gib:g}: save the array with np.save, whose .npy files are read from disk as needed"
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
        sum(counts),
        shape,
        read if images is None else lambda indices: images[indices],
        images=images,
        read_labels=None if labels is None else lambda indices: labels[indices],
        class_names=class_names,
        name=f"{config.source} {config.path}, {config.split}",
    )


def probe(config: DataConfig) -> int:
    """Returns the number of channels, from the headers of the files."""
    return _image_shape(_parts(config)[0].images)[2]


def _read_parts(arrays: tuple[_Array, ...], shape: tuple[int, int, int], indices: np.ndarray) -> np.ndarray:
    """Reads images of several arrays, one after the other; other processes get the files, not the maps."""
    ends = np.cumsum([array.shape[0] for array in arrays])
    images = np.empty((len(indices), *shape), np.uint8)
    which = np.searchsorted(ends, indices, side="right")
    for number, array in enumerate(arrays):
        here = which == number
        images[here] = _open(array)[indices[here] - (ends[number] - array.shape[0])].reshape(-1, *shape)
    return images


def _parts(config: DataConfig) -> list[_Part]:
    """Finds the arrays of the requested split."""
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
                f"data.split: {config.path} has no test split: name a folder that holds train{path.suffix} and"
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


def _members(file: pathlib.Path) -> dict[str, _Array]:
    """Lists the arrays of a file by name, from their headers; those of an .npy and its labels as `images`, `labels`."""
    beside = file.with_name(f"{file.stem}_labels.npy")
    with _clear_damage(f"{file} is not a readable .npy or .npz file"):
        changed = file.stat().st_mtime_ns
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
                return {name: _Array(file, name, *_header(archive, name), changed) for name in names}
        found = {"images": file} | ({"labels": beside} if beside.is_file() else {})
        arrays = {name: (each, np.load(each, mmap_mode="r")) for name, each in found.items()}
        return {
            name: _Array(each, "", array.shape, array.dtype, each.stat().st_mtime_ns)
            for name, (each, array) in arrays.items()
        }


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Reads shape and type of an array in an .npz, and not the array."""
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
    if dtype.hasobject:
        raise ValueError("it holds Python objects; save the pixels as uint8")
    return shape, dtype


@functools.lru_cache(maxsize=16)
def _open(array: _Array) -> np.ndarray:
    """Maps an array of an .npy; reads one of an .npz, whose CRC-32 is then checked."""
    with _clear_damage(f"{array} cannot be read"):
        if not array.name:
            return typing.cast(np.ndarray, np.load(array.file, mmap_mode="r"))
        with np.load(array.file, allow_pickle=False) as arrays:
            return typing.cast(np.ndarray, arrays[array.name])


@contextlib.contextmanager
def _clear_damage(what: str) -> Iterator[None]:
    """Names the file in one line where NumPy or zipfile, which raise half a dozen kinds, find damage."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise UserError(f"data.path: {what} ({reason}): download or save it again") from error
