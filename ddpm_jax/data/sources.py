"""Where images come from: scikit-learn's digits, a folder, idx files, TFDS.

Every source is the same thing: a count, a shape, labels or none, and `read(indices)`, random access to uint8 images.
Which images a training step reads is the pipeline's business.

Sources of another size or shape than the configuration's are cropped in the middle to its aspect ratio, then
resized with an antialiasing bicubic filter (the digits and idx files, which are pictures of a fixed kind, are not).
"""

import concurrent.futures
import contextlib
import dataclasses
import difflib
import gzip
import io
import logging
import math
import os
import pathlib
import struct
import typing
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from ddpm_jax.config import DataConfig
from ddpm_jax.errors import UserError

_KINDS = ("digits", "folder", "idx", "tfds")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_DEBIAN_FASHION_MNIST = pathlib.Path("/usr/share/datasets/fashion-mnist")
_NUM_THREADS = min(16, 2 * (os.cpu_count() or 1))
_CHUNK = 1024  # tasks handed to the threads at a time: a set of millions must not become a list of millions
_BAR_FROM = 2000  # images from which loading is long enough for a progress bar
_NAMES_SHOWN = 3

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A set of images with random access."""

    name: str
    """What it is and which split, for people."""
    num_examples: int
    """N."""
    image_shape: tuple[int, int, int]
    """(H, W, C)."""
    read_images: Callable[[np.ndarray], np.ndarray]
    """From (B,) indices to (B, H, W, C) uint8."""
    images: np.ndarray | None = None
    """All of them, (N, H, W, C) uint8, where they are held in memory; else None."""
    labels: np.ndarray | None = None
    """(N,) int32, each in [0, len(class_names)), or None where the images have none."""
    class_names: tuple[str, ...] = ()
    """The names of the classes; empty without labels."""

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Reads images.

        Args:
          indices: (B,) integers in [0, N), in any order, repeats allowed.

        Returns:
          (B, H, W, C) uint8.
        """
        return self.read_images(np.asarray(indices))

    def describe(self) -> str:
        """Says in one line what there is and where it is kept."""
        height, width, channels = self.image_shape
        classes = f", {len(self.class_names)} classes" if self.class_names else ""
        size = math.prod(self.image_shape) * self.num_examples / 2**20
        kept = "in memory" if self.images is not None else "on disk, read batch by batch"
        return f"{self.name}: {self.num_examples} images of {height}x{width}x{channels}{classes}, {size:.1f} MiB {kept}"


def load_source(config: DataConfig) -> Source:
    """Opens the images that a configuration names, and checks that all of them can be read.

    Args:
      config: which images; `channels` may be None.

    Returns:
      The source.

    Raises:
      UserError: there is no such source, file or split, it cannot be read, or its images do not fit the configuration.
    """
    return _dispatch(config)[0](resolve(config))


def resolve(config: DataConfig) -> DataConfig:
    """Fills in what a configuration leaves to the files: the number of channels.

    Args:
      config: which images.

    Returns:
      The configuration with `channels` a number.

    Raises:
      UserError: as `probe_channels`.
    """
    return config if config.channels is not None else dataclasses.replace(config, channels=probe_channels(config))


def probe_channels(config: DataConfig) -> int:
    """Finds how many channels the images have, without decoding them.

    Args:
      config: which images; its `channels` is not looked at.

    Returns:
      1 for grey, 3 for colour, 4 for colour with alpha.

    Raises:
      UserError: there are no such images, or they do not agree.
    """
    return _dispatch(config)[1](config)


def _dispatch(config: DataConfig) -> tuple[Callable[[DataConfig], Source], Callable[[DataConfig], int]]:
    kind, _, name = config.source.partition(":")
    match kind, bool(name):
        case "digits", False:
            return _load_digits, lambda config: 1
        case "folder", False:
            return _load_folder, _probe_folder
        case "idx", False:
            return _load_idx, lambda config: 1
        case "tfds", True:
            return _load_tfds, _probe_tfds
    near = difflib.get_close_matches(kind.lower(), _KINDS, n=1, cutoff=0.5)
    hint = f"; did you mean {'tfds:NAME' if near == ['tfds'] else near[0]}?" if near else ""
    raise UserError(f"data.source: there is no {config.source!r}{hint} (digits, folder, idx or tfds:NAME)")


def _in_memory(
    name: str, images: np.ndarray, labels: np.ndarray | None = None, class_names: Sequence[str] = ()
) -> Source:
    return Source(
        name=name,
        num_examples=len(images),
        image_shape=typing.cast(tuple[int, int, int], images.shape[1:]),
        read_images=lambda indices: images[indices],
        images=images,
        labels=labels,
        class_names=tuple(class_names),
    )


def _fits(config: DataConfig, num_examples: int) -> bool:
    return num_examples * math.prod(_shape(config)) <= config.memory_gib * 2**30


def _shape(config: DataConfig) -> tuple[int, int, int]:
    assert config.channels is not None, "resolve the configuration first"
    return config.height, config.width, config.channels


def _refuse_split(config: DataConfig, splits: Iterable[str]) -> UserError:
    return UserError(f"data.split: {config.source} has no split {config.split!r}; choose from {', '.join(splits)}")


T = typing.TypeVar("T")
R = typing.TypeVar("R")


def _in_threads(function: Callable[[T], R], items: Sequence[T], *, label: str = "") -> Iterator[R]:
    """Maps in threads (decoding releases the interpreter's lock), in order, with a progress bar where it is long."""
    quiet = None if label and len(items) >= _BAR_FROM else True  # None: a bar on terminals alone
    with (
        concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as threads,
        tqdm(total=len(items), desc=label, unit=" images", disable=quiet) as bar,
    ):
        for start in range(0, len(items), _CHUNK):
            for result in threads.map(function, items[start : start + _CHUNK]):
                bar.update()
                yield result


# --- digits ---


def _load_digits(config: DataConfig) -> Source:
    from sklearn.datasets import load_digits

    if _shape(config) != (8, 8, 1):
        raise UserError(
            f"data: the digits are 8x8 with 1 channel, not {config.height}x{config.width} with {config.channels};"
            " set data.height=8, data.width=8, data.channels=1"
        )
    images, labels = load_digits(return_X_y=True)
    held_out = np.arange(len(images)) % 5 == 4
    splits = {"train": ~held_out, "test": held_out, "all": np.ones_like(held_out)}
    if config.split not in splits:
        raise _refuse_split(config, splits)
    chosen = splits[config.split]
    pixels = np.round(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    return _in_memory(
        f"digits, {config.split}", pixels[chosen], labels[chosen].astype(np.int32), [str(i) for i in range(10)]
    )


# --- pictures of any kind and size ---


class _Unreadable(Exception):
    """A file is no picture; the reason in a few words."""


def _open(file: pathlib.Path | io.BytesIO) -> Image.Image:
    try:
        with Image.open(file) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except Exception as error:  # damaged files make Pillow raise a dozen kinds
        raise _Unreadable(_reason(error)) from error


def _check_readable(path: pathlib.Path) -> str | None:
    """Decodes a file as cheaply as can be, and says what is wrong with it."""
    try:
        with Image.open(path) as image:
            image.draft(None, (1, 1))  # a JPEG is decoded at an eighth of its size
            image.load()
    except Exception as error:
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    match error:
        case PermissionError():
            return "not permitted"
        case FileNotFoundError():
            return "gone"
        case Image.UnidentifiedImageError():
            return "no picture"
        case Image.DecompressionBombError():
            return "too many pixels"
        case _:
            return "damaged"


def _channels(image: Image.Image) -> int:
    """Counts the channels of a picture as it is in its file; palettes count as colour."""
    if image.has_transparency_data:
        return 4
    return 1 if image.mode in ("1", "L") or image.mode.startswith("I") else 3


def _to_eight_bit(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey to 8 bits; Pillow's own conversion clips it at 255."""
    if not image.mode.startswith("I"):
        return image
    values = np.clip(np.asarray(image).astype(np.float64), 0, 65535)
    return Image.fromarray(np.round(values / 257).astype(np.uint8))


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """Converts to grey, colour or colour with alpha; what was transparent becomes white where there is no alpha."""
    if channels == 4:
        return image.convert("RGBA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def _to_array(image: Image.Image, shape: tuple[int, int, int]) -> np.ndarray:
    """Crops a picture in the middle to the aspect ratio of `shape`, resizes it with antialiasing, and converts it."""
    height, width, channels = shape
    image = _convert(_to_eight_bit(image), channels)
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(shape)


def read_picture(file: str, shape: tuple[int, int, int]) -> np.ndarray:
    """Reads a picture as a run's folder of images is read: cropped in the middle, resized, converted.

    Args:
      file: PNG, JPEG, or whatever Pillow reads.
      shape: (H, W, C) to bring it to.

    Returns:
      (H, W, C) uint8.

    Raises:
      UserError: it is not there or no picture.
    """
    try:
        return _to_array(_open(pathlib.Path(file).expanduser()), shape)
    except _Unreadable as error:
        reason = "there is no such file" if not pathlib.Path(file).expanduser().is_file() else error
        raise UserError(f"cannot read {file} as a picture ({reason}): give a PNG or JPEG file") from error


# --- folder ---


@dataclasses.dataclass(frozen=True)
class _Files:
    paths: list[pathlib.Path]
    labels: np.ndarray | None
    class_names: tuple[str, ...]


def _list_folder(config: DataConfig) -> _Files:
    """Lists the pictures of a folder's split in the order of their paths, with the classes that sub-folders name."""
    if not config.path:
        raise UserError("data.path: name the folder of images, as in --data.path=/home/me/flowers")
    folder = pathlib.Path(config.path).expanduser()
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"data.path: {config.path} {what}; name the folder that holds the images")
    if config.split not in ("train", "test", "all"):
        raise _refuse_split(config, ("train", "test", "all"))
    parts = {name: folder / name for name in ("train", "test") if (folder / name).is_dir()}
    if config.split == "test" and not parts.get("test"):
        raise UserError(f"data.split: {config.path} has no test part; put those images into its sub-folder 'test'")
    if config.split == "train" and list(parts) == ["test"]:
        raise UserError(
            f"data.split: {config.path} has a sub-folder 'test' but none 'train'; put the images to learn from there"
        )
    listed = {name: _walk(part) for name, part in (parts or {"all": folder}).items()}
    chosen = [name for name in listed if name == config.split or config.split == "all" or not parts]
    roots = [parts.get(name, folder) for name in chosen for _ in listed[name]]
    files = [path for name in chosen for path in listed[name]]
    if not files:
        where = roots[0] if roots else parts.get(config.split, folder)
        raise UserError(f"data.path: no PNG, JPEG or WebP file in {where} or in the folders below it")
    everything = [path for paths in listed.values() for path in paths]
    paths = [root / path for root, path in zip(roots, files, strict=True)]
    if any(len(path.parts) == 1 for path in everything):
        return _Files(paths, None, ())
    number = {name: i for i, name in enumerate(sorted({path.parts[0] for path in everything}))}
    return _Files(paths, np.array([number[path.parts[0]] for path in files], np.int32), tuple(number))


def _walk(folder: pathlib.Path) -> list[pathlib.Path]:
    """Lists the pictures below a folder, by relative path, sorted; follows links, passes by what is hidden."""
    found, entered = [], set()
    for where, folders, files in os.walk(folder, followlinks=True):
        here = os.path.realpath(where)
        if here in entered:  # a link that leads back
            folders.clear()
            continue
        entered.add(here)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            pathlib.Path(where, name).relative_to(folder)
            for name in files
            if name.lower().endswith(_SUFFIXES) and not name.startswith(".")
        ]
    return sorted(found, key=lambda path: path.as_posix())


def _probe_folder(config: DataConfig) -> int:
    def header(path: pathlib.Path) -> int | None:
        try:
            with Image.open(path) as image:
                return _channels(image)
        except Exception:
            return None  # named when the files are loaded

    paths = _list_folder(config).paths
    seen: dict[int, pathlib.Path] = {}
    for path, channels in zip(paths, _in_threads(header, paths, label="looking at the files"), strict=True):
        if channels is not None:
            seen.setdefault(channels, path)
    if not seen:
        raise UserError(f"data.path: none of the {len(paths)} files in {config.path} can be read as an image")
    if len(seen) > 1:
        kinds = ", ".join(f"{path} has {channels}" for channels, path in sorted(seen.items()))
        raise UserError(f"data.channels: the images do not agree ({kinds}); set it to 1, 3 or 4 to convert them")
    return next(iter(seen))


def _load_folder(config: DataConfig) -> Source:
    files, shape = _list_folder(config), _shape(config)
    if shape[2] not in (1, 3, 4):
        raise UserError(f"data.channels: must be 1, 3 or 4 for a folder of images, not {shape[2]}")
    fits = _fits(config, len(files.paths))
    images = np.empty((len(files.paths), *shape), np.uint8) if fits else None

    def look(path: pathlib.Path) -> np.ndarray | str | None:
        if images is None:
            return _check_readable(path)
        try:
            return _to_array(_open(path), shape)
        except _Unreadable as error:
            return str(error)

    readable: list[int] = []
    unreadable: dict[pathlib.Path, str] = {}
    results = _in_threads(look, files.paths, label="reading images" if fits else "checking images")
    for i, result in enumerate(results):
        if isinstance(result, str):
            unreadable[files.paths[i]] = result
            continue
        if images is not None:
            images[len(readable)] = typing.cast(np.ndarray, result)
        readable.append(i)
    if unreadable:
        _report_unreadable(config, unreadable, len(files.paths))
    labels = None if files.labels is None else files.labels[readable]
    name = f"folder {config.path}, {config.split}"
    if images is not None:
        return _in_memory(name, images[: len(readable)], labels, files.class_names)
    paths = [files.paths[i] for i in readable]

    def read_one(path: pathlib.Path) -> np.ndarray:
        try:
            return _to_array(_open(path), shape)
        except _Unreadable as error:
            raise UserError(f"data.path: {path} can no longer be read ({error}); it could when the run began") from None

    def read_images(indices: np.ndarray) -> np.ndarray:
        return np.stack(list(_in_threads(read_one, [paths[i] for i in indices])))

    return Source(name, len(paths), shape, read_images, labels=labels, class_names=files.class_names)


def _report_unreadable(config: DataConfig, unreadable: dict[pathlib.Path, str], num_files: int) -> None:
    named = [f"{path} ({reason})" for path, reason in list(unreadable.items())[:_NAMES_SHOWN]]
    if len(unreadable) > _NAMES_SHOWN:
        named.append(f"and {len(unreadable) - _NAMES_SHOWN} more")
    count = f"{len(unreadable)} of {num_files} files in {config.path} cannot be read as images: {', '.join(named)}"
    if len(unreadable) == num_files:
        raise UserError(f"data.path: {count}")
    if config.on_unreadable == "refuse":
        raise UserError(f"data.path: {count}; mend or remove them, or set data.on_unreadable=skip")
    _log.warning("skipped: %s", count)


# --- idx, the format of MNIST's files ---

_IDX_PARTS = {"train": ("train",), "test": ("t10k",), "all": ("train", "t10k")}


def _load_idx(config: DataConfig) -> Source:
    folder = _idx_folder(config)
    if config.channels != 1:
        raise UserError(f"data.channels: idx files hold grey images; set it to 1, not {config.channels}")
    if config.split not in _IDX_PARTS:
        raise _refuse_split(config, _IDX_PARTS)
    images, labels = [], []
    for part in _IDX_PARTS[config.split]:
        images_file = _find_idx(folder, part, "images", 3)
        if images_file is None:
            raise UserError(f"data.path: {folder} holds no {part}-images-idx3-ubyte or .gz; {_WHERE_IDX_IS_FROM}")
        pixels = _read_idx(images_file, 3)
        images.append(_pad(config, pixels))
        labels_file = _find_idx(folder, part, "labels", 1)
        if labels_file is not None:
            labels.append(_read_idx(labels_file, 1).astype(np.int32))
            if len(labels[-1]) != len(pixels):
                raise UserError(f"data.path: {labels_file} has {len(labels[-1])} labels for {len(pixels)} images")
    name = f"idx {folder}, {config.split}"
    if len(labels) < len(images):
        return _in_memory(name, np.concatenate(images))
    numbers = np.concatenate(labels)
    return _in_memory(name, np.concatenate(images), numbers, [str(i) for i in range(int(numbers.max()) + 1)])


_WHERE_IDX_IS_FROM = (
    "apt-get install dataset-fashion-mnist puts such files into"
    f" {_DEBIAN_FASHION_MNIST}, MNIST's own are at https://ossci-datasets.s3.amazonaws.com/mnist"
)


def _idx_folder(config: DataConfig) -> pathlib.Path:
    if not config.path:
        if _DEBIAN_FASHION_MNIST.is_dir():
            return _DEBIAN_FASHION_MNIST
        raise UserError(f"data.path: name the folder of idx files; {_WHERE_IDX_IS_FROM}")
    folder = pathlib.Path(config.path).expanduser()
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"data.path: {config.path} {what}; {_WHERE_IDX_IS_FROM}")
    return folder


def _find_idx(folder: pathlib.Path, part: str, what: str, rank: int) -> pathlib.Path | None:
    names = [f"{part}-{what}{dot}idx{rank}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_idx(path: pathlib.Path, rank: int) -> np.ndarray:
    """Reads one file: two zero bytes, the type (8: uint8), the rank, the big-endian shape, the data; gzipped or not."""
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data.path: {path} cannot be read ({error}); fetch it again") from error
    begin = 4 + 4 * rank
    if content[:4] != bytes([0, 0, 8, rank]) or len(content) < begin:
        raise UserError(f"data.path: {path} is no idx file of {rank} dimensions of bytes; fetch it again")
    shape = struct.unpack(f">{rank}I", content[4:begin])
    if len(content) - begin != math.prod(shape):
        raise UserError(
            f"data.path: {path} has {len(content) - begin} bytes of data where its header says {math.prod(shape)};"
            " fetch it again"
        )
    if shape[0] == 0:
        raise UserError(f"data.path: {path} is empty; fetch it again")
    return np.frombuffer(content, np.uint8, offset=begin).reshape(shape)


def _pad(config: DataConfig, images: np.ndarray) -> np.ndarray:
    """Surrounds (N, h, w) images with black to the configuration's size; an odd row or column goes below or right."""
    height, width = images.shape[1:]
    rows, columns = config.height - height, config.width - width
    if rows < 0 or columns < 0:
        raise UserError(
            f"data: the images of {config.source} are {height}x{width}, larger than {config.height}x{config.width};"
            f" set data.height={height} and data.width={width}, or more: what is more is padded with black"
        )
    sides = ((0, 0), (rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2))
    return np.pad(images, sides)[..., None]


# --- TFDS ---


class _Prepared(typing.NamedTuple):
    examples: typing.Any
    features: typing.Any


def _load_tfds(config: DataConfig) -> Source:
    examples, features = _open_tfds(config)
    shape, num_examples = _shape(config), len(examples)
    if shape[2] not in (1, 3, 4):
        raise UserError(f"data.channels: must be 1, 3 or 4, not {shape[2]}")
    if num_examples == 0:
        raise UserError(f"data.split: {config.split!r} of {config.source} is empty")
    # Only classes with names; TFDS calls other things label too (text, several numbers).
    class_names = tuple(getattr(dict(features.items()).get("label"), "names", None) or ())

    def image(i: int) -> np.ndarray:
        return _decode_tfds(config, i, examples[i]["image"])

    def label(i: int) -> int:
        return examples[i]["label"]

    def image_and_label(i: int) -> tuple[np.ndarray, int]:
        example = examples[i]
        return _decode_tfds(config, i, example["image"]), example["label"] if class_names else -1

    def read_images(indices: np.ndarray) -> np.ndarray:
        return np.stack(list(_in_threads(image, [int(i) for i in indices])))

    images = np.empty((num_examples, *shape), np.uint8) if _fits(config, num_examples) else None
    labels = np.full(num_examples, -1, np.int32)
    if images is not None:
        for i, (pixels, number) in enumerate(_in_threads(image_and_label, range(num_examples), label="reading images")):
            images[i], labels[i] = pixels, number
    elif class_names:
        for i, number in enumerate(_in_threads(label, range(num_examples), label="reading labels")):
            labels[i] = number
    known, names = (labels, class_names) if labels.min() >= 0 else (None, ())  # test parts may hide their labels as -1
    name = f"{config.source}, {config.split}"
    if images is not None:
        return _in_memory(name, images, known, names)
    return Source(name, num_examples, shape, read_images, labels=known, class_names=names)


def _probe_tfds(config: DataConfig) -> int:
    channels = _open_tfds(config).features["image"].shape[-1]
    if channels not in (1, 3, 4):
        raise UserError(f"data.channels: {config.source} does not say how many channels it has; set it to 1, 3 or 4")
    return channels


def _decode_tfds(config: DataConfig, i: int, image: bytes | np.ndarray) -> np.ndarray:
    if isinstance(image, np.ndarray):
        return _to_array(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), _shape(config))
    try:
        return _to_array(_open(io.BytesIO(image)), _shape(config))
    except _Unreadable as error:
        raise UserError(
            f"data.source: image {i} of {config.source} cannot be read ({error}); prepare it anew"
        ) from None


def _open_tfds(config: DataConfig) -> _Prepared:
    """Opens a prepared data set; of one that is not prepared it says so at once, and touches no network."""
    import tensorflow_datasets as tfds

    name = config.source.removeprefix("tfds:")
    with _quiet("absl"):
        try:
            builder = tfds.builder(name, data_dir=str(pathlib.Path(config.path).expanduser()) if config.path else None)
            prepared = builder.is_prepared()
        except Exception as error:  # an unknown name, configuration or version: TFDS has a kind for each
            raise _unknown_tfds(name, error) from error
        features = builder.info.features
        if "image" not in features or len(features["image"].shape or ()) != 3:
            raise UserError(
                f"data.source: {name} has no feature 'image' that is one picture; it has {', '.join(sorted(features))}"
            )
        if not prepared:
            where = f" --data_dir={config.path}" if config.path else ""
            raise UserError(
                f"data.source: {name} is not prepared in {builder.data_dir}; where there is a network do once"
                f" `pip install tensorflow` and `tfds build {name} --file_format=array_record{where}`"
                " (TensorFlow is not needed after that)"
            )
        skip = {"image": tfds.decode.SkipDecoding()} if isinstance(features["image"], tfds.features.Image) else None
        try:
            return _Prepared(builder.as_data_source(config.split, decoders=skip), features)
        except NotImplementedError as error:
            raise UserError(
                f"data.source: {name} in {builder.data_dir} is prepared as {builder.info.file_format.value}, which has"
                f" no random access; move it away and do `tfds build {name} --file_format=array_record`"
            ) from error
        except ValueError as error:
            raise UserError(
                f"data.split: {config.source} has no split {config.split!r}; it has {', '.join(builder.info.splits)},"
                " and parts such as train[:90%]"
            ) from error


def _unknown_tfds(name: str, error: Exception) -> UserError:
    import tensorflow_datasets as tfds

    base, _, variant = name.partition("/")
    known = tfds.list_builders(with_community_datasets=False)
    if base.partition(":")[0] not in known:
        near = difflib.get_close_matches(base, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see https://www.tensorflow.org/datasets/catalog"
        return UserError(f"data.source: TFDS knows no data set {base!r}; {hint}")
    variants = list(tfds.builder_cls(base.partition(":")[0]).builder_configs)
    if variant and variant not in variants:
        near = difflib.get_close_matches(variant, variants, n=3) or variants[:10]
        return UserError(f"data.source: {base} of TFDS has no configuration {variant!r}; it has {', '.join(near)}")
    return UserError(f"data.source: TFDS cannot open {name}: {' '.join(str(error).split())}")


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Holds back the warnings of a library's logger, where our own line says it better."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
