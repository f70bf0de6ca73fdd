"""Arrays that NumPy saved: .npy files are mapped, so that a set may be larger than memory; .npz are read into it."""

import contextlib
import functools
import math
import pathlib
import typing
import zipfile
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ddpm_jax.config import DataConfig
from ddpm_jax.data.source import Source, fits_memory, no_split, shape_of
from ddpm_jax.system.errors import NoSuchSplit, UserError, few, printable
from ddpm_jax.system.files import open_file
from ddpm_jax.system.npy import headers_of, read_header, read_npz

_SPLITS = ("train", "test", "all")
_IMAGES = ("images", "image", "imgs", "data", "x", "arr_0", "pixels", "samples")
_LABELS = ("labels", "label", "y", "targets", "target", "classes", "class", "fine_labels", "fine_label", "arr_1")
_SPELLED = {"train": ("train", "training"), "test": ("test", "testing"), "validation": ("val", "valid", "validation")}
_MOST_CLASSES = 10_000  # larger labels are numbers of something else, unless there are as many images
_MOST_CHANNELS = 4  # of pictures
_LOOKED_AT = 64  # images by which the range of floats is judged
_LABELS_GIB = 0.25  # for labels, whatever data.memory_gib


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
        return printable(f"{self.name:.200} in {self.file}" if self.name else self.file)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Part(typing.NamedTuple):
    images: _Array
    labels: np.ndarray | None
    num_classes: int
    label_fault: str
    unused: tuple[str, ...]
    """Names of the other arrays, or files."""
    label_name: str


def load(config: DataConfig) -> Source:
    """Opens arrays of images, (N, H, W, C) or (N, H, W) uint8, with (N,) integer labels or none.

    An .npz holds `images` (or `data`, `x`, `arr_0`, .., or a single array) and `labels` (or `label`, `y`, `targets`,
    `class`, `fine_labels`, `arr_1`, ..), or both of them for each split, as `x_train` or `train_images`; in any case
    of letters. An .npy has its labels beside it in `NAME_labels.npy`. A folder holds a file for each split, `train.npz`
    and `test.npz`. A validation split is the test split where there is no other. Labels are (N,) or (N, 1) integers, or
    (N, K) one-hot.

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
            volumes = " if these are channels (volumes cannot be trained on)" if channels > _MOST_CHANNELS else ""
            raise UserError(
                f"data.channels: {part.images} has {channels}; set it to {channels}, not {shape[2]}{volumes}"
            )
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
    labels, class_names, fault = _labels(parts)
    unused = sorted({name for part in parts for name in part.unused})
    return Source(
        sum(counts),
        shape,
        read if images is None else lambda indices: images[indices],
        images=images,
        read_labels=None if labels is None else lambda indices: labels[indices],
        class_names=class_names,
        name=f"{config.source} {printable(config.path)}, {config.split}",
        label_fault=fault,
        notes=(f"not used in {printable(config.path)}: {few(unused, 20)}",) if unused else (),
    )


def probe(config: DataConfig) -> int:
    """Returns the number of channels, from the headers of the files."""
    images = _parts(config)[0].images
    channels = _image_shape(images)[2]
    if channels > _MOST_CHANNELS:
        raise UserError(
            f"data.channels: {images} is {_by(images.shape)}, which would be pictures of {channels} channels: volumes"
            f" cannot be trained on; if these are channels, say so with --data.channels {channels}"
        )
    return channels


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
        return _parts_of_folder(config, path)
    if not path.is_file():
        raise UserError(
            f"data.path: there is no file {printable(config.path)}; name the .npz or .npy file that holds the images"
        )
    arrays = _members(path)
    splits = [name for name in _SPELLED if _find(arrays, _IMAGES, name)]
    if not splits:
        if config.split == "test":
            raise NoSuchSplit(
                f"data.split: {printable(config.path)} has no test split: name a folder that holds train{path.suffix}"
                f" and test{path.suffix}, or save them as x_train and x_test in one .npz"
            )
        return [_part(config, arrays, "all")]
    return _without_what_others_use(
        [_part(config, arrays, name) for name in _wanted(config, splits, ("train", "test"))]
    )


def _parts_of_folder(config: DataConfig, folder: pathlib.Path) -> list[_Part]:
    files: dict[str, pathlib.Path] = {}
    for split, names in _SPELLED.items():
        for file in (folder / f"{name}.{end}" for name in names for end in ("npz", "npy")):
            if split not in files and file.is_file():
                files[split] = file
    parts = []
    for split in _wanted(config, list(files), ("train", "test")):
        if split not in files:
            raise NoSuchSplit(
                f"data.path: {printable(folder)} holds no {split}.npz or {split}.npy; name a file, or put it there"
            )
        part = _part(config, _members(files[split]), "all")
        used = {files[split].name, f"{files[split].stem}_labels.npy"}
        beside = {entry.name for entry in folder.iterdir()} - used
        parts.append(part._replace(unused=(*part.unused, *beside)))
    return _without_what_others_use(parts, files=True)


def _wanted(config: DataConfig, found: Sequence[str], splits: tuple[str, ...]) -> list[str]:
    """Returns the splits to read; the validation split stands in for a test split that is missing."""
    wanted = list(splits) if config.split == "all" else [config.split]
    stand_in = "validation" in found and "test" not in found
    return ["validation" if name == "test" and stand_in else name for name in wanted]


def _without_what_others_use(parts: list[_Part], *, files: bool = False) -> list[_Part]:
    """Leaves out of what a part does not use what another one does."""
    used = {name for part in parts for name in _used_by(part, files=files)}
    return [part._replace(unused=tuple(name for name in part.unused if name not in used)) for part in parts]


def _used_by(part: _Part, *, files: bool) -> Iterator[str]:
    yield part.images.file.name if files else part.images.name
    if files:
        yield f"{part.images.file.stem}_labels.npy"
    elif part.label_name:
        yield part.label_name


def _find(arrays: Mapping[str, _Array], names: Sequence[str], split: str) -> _Array | None:
    """Finds an array by one of the names it may have, in any case of letters."""
    lower = {name.lower(): array for name, array in arrays.items()}
    if split != "all":
        spelled = _SPELLED[split]
        bare = spelled if names is _IMAGES else ()
        names = [*(form for one in spelled for name in names for form in (f"{one}_{name}", f"{name}_{one}")), *bare]
    return next((lower[name] for name in names if name in lower), None)


def _part(config: DataConfig, arrays: Mapping[str, _Array], split: str) -> _Part:
    images, labels = _find(arrays, _IMAGES, split), _find(arrays, _LABELS, split)
    if images is None and split == "all":
        rest = [array for array in arrays.values() if array is not labels]
        rest = rest if len(rest) == 1 else [array for array in rest if len(array.shape) in (3, 4)]
        images = rest[0] if len(rest) == 1 else None
    if images is None:
        kind, wanted = (UserError, "images") if split == "all" else (NoSuchSplit, f"x_{split}")
        raise kind(f"data.path: {printable(config.path)} holds no array {wanted}, but {few(arrays, 20) or 'none'}")
    _check_images(images, config.memory_gib)
    unused = {name: array for name, array in arrays.items() if array is not images and array is not labels}
    found, num_classes, fault = None, 0, ""
    if labels is not None:
        found, num_classes, fault = _read_labels(labels, images.shape[0], config.memory_gib)
    else:
        alike = [name for name, array in unused.items() if _like_labels(array, images.shape[0])]
        if alike:
            fault = (
                f"{printable(alike[0])} looks like labels: save it as {'labels' if split == 'all' else f'y_{split}'}"
            )
    return _Part(images, found, num_classes, fault, tuple(unused), labels.name if labels else "")


def _like_labels(array: _Array, number: int) -> bool:
    return array.shape in ((number,), (number, 1)) and array.dtype.kind in "iu"


def _image_shape(images: _Array) -> tuple[int, int, int]:
    _, height, width, *channels = images.shape
    return height, width, channels[0] if channels else 1


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _check_images(images: _Array, memory_gib: float) -> None:
    shape = _by(images.shape)
    if len(images.shape) not in (3, 4) or 0 in images.shape:
        raise UserError(
            f"data.path: {images} is {shape}, not (N, H, W, C) or (N, H, W); reshape it so and save it anew"
        )
    if len(images.shape) == 3 and images.shape[2] in (1, 3, 4) and min(images.shape[:2]) >= 16:
        raise UserError(f"data.path: {images} is {shape}, which is one picture; save images[None] for a set of one")
    if len(images.shape) == 4 and images.shape[1] in (1, 3, 4) and min(images.shape[2:]) > 4:
        raise UserError(
            f"data.path: {images} is {shape}, which has the channels first; save images.transpose(0, 2, 3, 1)"
        )
    if images.dtype == np.uint8:
        return
    number = min(_LOOKED_AT, images.shape[0])
    looked_at = images.num_bytes * (1.0 if images.name else number / images.shape[0])
    if images.dtype.kind not in "biuf" or looked_at > memory_gib * 2**30:
        raise UserError(
            f"data.path: {images} is of {images.dtype!s:.100}, not uint8; save the pixels as 0 to 255 in uint8"
        )
    chosen = np.arange(number) * images.shape[0] // number
    some = np.asarray(_open(images)[chosen])
    least, most = float(some.min()), float(some.max())
    raise UserError(
        f"data.path: {images} is of {images.dtype} from {least:.5g} to {most:.5g}, not uint8; save"
        f" {_recipe(images.dtype.kind, least, most)}"
    )


def _recipe(kind: str, least: float, most: float) -> str:
    """Returns how to bring pixels of this range to 0 to 255."""
    if kind in "iu" and 1 < most <= 255 and least >= 0:
        return "images.astype(np.uint8)"
    if kind in "iu" and -128 <= least < -1 and most <= 127:
        return "(images.astype(np.int16) + 128).astype(np.uint8)"
    if least >= -1.001 and most <= 1.001:
        scaled = "images * 255" if least >= 0 else "(images + 1) * 127.5"
    elif least >= 0 and most <= 255:
        scaled = "images"
    elif least >= 0 and most < 2**16:
        scaled = f"images * (255 / {2 ** int(most).bit_length() - 1})"
    else:  # one that is not finite, too
        return "the pixels as 0 to 255 in uint8"
    return f"np.round({scaled}).astype(np.uint8)"


def _read_labels(labels: _Array, number: int, memory_gib: float) -> tuple[np.ndarray | None, int, str]:
    """Returns the labels and the number of classes, or None, 0 and why they cannot be used."""
    try:
        values, classes = _labels_of(labels, number, memory_gib), 0
        if values.shape == (number,):
            numbers = values
        elif ((values == 0) | (values == 1)).all() and (values.sum(axis=1) == 1).all():
            numbers, classes = values.argmax(axis=1), values.shape[1]
        else:
            raise UserError(
                f"{labels} has {values.shape[1]} numbers an image, which are not one-hot: give one label an image"
            )
    except UserError as error:  # which an unconditional run need not know
        return None, 0, str(error).removeprefix("data.path: ")
    least, most = int(numbers.min()), int(numbers.max())
    renumber = "save np.unique(labels, return_inverse=True)[1]"
    if least < 0:
        return None, 0, f"{labels} has a label {least}; number the classes from 0: {renumber}"
    if most >= max(_MOST_CLASSES, number):
        return None, 0, f"{labels} has a label {most} for {number} images; number the classes from 0: {renumber}"
    return numbers.astype(np.int32), max(classes, most + 1), ""


def _labels_of(labels: _Array, number: int, memory_gib: float) -> np.ndarray:
    """Reads labels as (N,), or (N, K) integers."""
    if labels.dtype.kind in "US":
        raise UserError(f"{labels} holds text; save np.unique(labels, return_inverse=True)[1], and note the names")
    rank, shape = len(labels.shape), labels.shape
    if labels.dtype.kind not in "biuf" or rank not in (1, 2) or shape[0] != number:
        raise UserError(
            f"{labels} is {labels.dtype!s:.100} of shape {labels.shape}, where {number} images need labels of shape"
            f" ({number},), integers from 0"
        )
    if 8 * math.prod(shape) > max(memory_gib, _LABELS_GIB) * 2**30:
        raise UserError(f"{labels} has {math.prod(shape)} numbers, more than fit data.memory_gib={memory_gib:g}")
    values = np.asarray(_open(labels))
    if values.dtype.kind == "f" and not (np.abs(values) < 2**53).all():
        raise UserError(f"{labels} has a label that is no number, or too large")
    if values.dtype.kind == "f" and not (values == np.round(values)).all():
        raise UserError(f"{labels} is {labels.dtype} with fractions, where labels are integers from 0")
    values = values.astype(np.int64)
    return values.reshape(-1) if values.shape == (number, 1) else values


def _labels(parts: Sequence[_Part]) -> tuple[np.ndarray | None, tuple[str, ...], str]:
    if any(part.labels is None for part in parts):
        return None, (), next((part.label_fault for part in parts if part.label_fault), "")
    labels = np.concatenate([typing.cast(np.ndarray, part.labels) for part in parts])
    return labels, tuple(str(i) for i in range(max(part.num_classes for part in parts))), ""


def _members(file: pathlib.Path) -> dict[str, _Array]:
    """Lists the arrays of a file by name, from their headers; those of an .npy and its labels as `images`, `labels`."""
    beside = file.with_name(f"{file.stem}_labels.npy")
    with _clear_damage(f"{file} is not a readable .npy or .npz file"):
        changed = file.stat().st_mtime_ns
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                headers = headers_of(archive)
                return {name: _Array(file, name, each.shape, each.dtype, changed) for name, each in headers.items()}
        found = {"images": file} | ({"labels": beside} if beside.is_file() else {})
        return {name: _mapped(each) for name, each in found.items()}


def _mapped(file: pathlib.Path) -> _Array:
    with open_file(file) as opened:
        header = read_header(opened)
    if (size := file.stat().st_size - header.begin) < header.num_bytes:
        raise ValueError(f"{size} bytes of data where its header says {header.num_bytes}")
    return _Array(file, "", header.shape, header.dtype, file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _open(array: _Array) -> np.ndarray:
    """Maps an array of an .npy; reads one of an .npz, whose CRC-32 is then checked."""
    with _clear_damage(f"{array} cannot be read"):
        if not array.name:
            return typing.cast(np.ndarray, np.load(array.file, mmap_mode="r"))
        with open_file(array.file) as opened:
            return read_npz(opened, [array.name], most_bytes=array.num_bytes)[array.name]


@contextlib.contextmanager
def _clear_damage(what: str) -> Iterator[None]:
    """Names the file in one line where NumPy or zipfile, which raise half a dozen kinds, find damage."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise UserError(f"data.path: {what} ({reason}): download or save it again") from error
