"""Sets that tensorflow-datasets has prepared, read without TensorFlow."""

import contextlib
import difflib
import io
import logging
import os
import pathlib
import re
import sys
import textwrap
import typing
from collections.abc import Iterator

import numpy as np
from PIL import Image

from ddpm_jax.config import DataConfig
from ddpm_jax.data.decode import Unreadable, read_picture, to_array
from ddpm_jax.data.source import Source, fits_memory, in_memory, in_threads, shape_of
from ddpm_jax.system.errors import NoSuchSplit, UserError, printable

_LARGEST_JSON = 2**24


class _Prepared(typing.NamedTuple):
    records: typing.Any
    """Examples by index, as bytes."""
    features: typing.Any
    """The image and its label; nothing else of an example is decoded."""
    decoders: dict[str, typing.Any]
    """Leaves a picture in its file, such as a PNG, as it is."""
    places: tuple[tuple[str, int, int], ...]
    """As in `Source`."""


def load(config: DataConfig) -> Source:
    """Opens a prepared set; one that fits the memory is decoded into it.

    Args:
      config: which images; its `channels` is known.

    Returns:
      the source.

    Raises:
      UserError: the set is unknown or not prepared, has no such split, or an image cannot be read.
    """
    prepared = _open_set(config)
    shape, num_examples = shape_of(config), len(prepared.records)
    if shape[2] not in (1, 3, 4):
        raise UserError(f"data.channels: must be 1, 3 or 4, not {shape[2]}")
    if num_examples == 0:
        raise UserError(f"data.split: {config.split!r} of {config.source} is empty")
    # Only classes with names; TFDS calls other things label too (text, several numbers).
    class_names = tuple(map(printable, getattr(dict(prepared.features.items()).get("label"), "names", None) or ()))

    def example(i: int) -> typing.Any:
        with _clear_damage(config, f"example {i} of "):
            return prepared.features.deserialize_example_np(prepared.records[i], decoders=prepared.decoders)

    def label_of(i: int, example: typing.Any) -> int:
        label = int(example["label"])
        if not -1 <= label < len(class_names):
            raise UserError(f"data.source: example {i} of {config.source} has a label {label}; prepare it anew")
        return label

    def image(i: int) -> np.ndarray:
        return _decode(config, i, example(i)["image"])

    def image_and_label(i: int) -> tuple[np.ndarray, int]:
        found = example(i)
        return _decode(config, i, found["image"]), label_of(i, found) if class_names else -1

    def read_images(indices: np.ndarray) -> np.ndarray:
        return np.stack(list(in_threads(image, [int(i) for i in indices])))

    def read_labels(indices: np.ndarray) -> np.ndarray:
        return np.array([label_of(int(i), example(int(i))) for i in indices], np.int32)

    if class_names and read_labels(np.array([0]))[0] < 0:  # test parts hide their labels as -1
        class_names = ()
    name = f"{config.source}, {config.split}"
    if not fits_memory(config, num_examples):
        # All labels of millions of examples would take minutes to read.
        return Source(
            num_examples,
            shape,
            read_images,
            read_labels=read_labels if class_names else None,
            class_names=class_names,
            name=name,
            places=prepared.places,
        )
    images, labels = np.empty((num_examples, *shape), np.uint8), np.empty(num_examples, np.int32)
    for i, (pixels, number) in enumerate(in_threads(image_and_label, range(num_examples), label="reading images")):
        images[i], labels[i] = pixels, number
    return in_memory(images, labels if class_names else None, class_names, name=name, places=prepared.places)


def probe(config: DataConfig) -> int:
    """Returns the number of channels that the set declares."""
    with _clear_damage(config):
        channels = _open_set(config).features["image"].shape[-1]
    if channels not in (1, 3, 4):
        raise UserError(f"data.channels: {config.source} does not say how many channels it has; set it to 1, 3 or 4")
    return channels


def _decode(config: DataConfig, i: int, image: bytes | np.ndarray) -> np.ndarray:
    if not isinstance(image, np.ndarray):
        try:
            return read_picture(
                io.BytesIO(image), shape_of(config), max_megapixels=config.max_megapixels, white=config.white
            )[0]
        except Unreadable as error:
            raise UserError(
                f"data.source: image {i} of {config.source} cannot be read ({error}); prepare it anew"
            ) from None
    with _clear_damage(config, f"image {i} of "):
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        return to_array(picture, shape_of(config), white=config.white)


@contextlib.contextmanager
def _clear_damage(config: DataConfig, what: str = "") -> Iterator[None]:
    """Names a set in one line where what was prepared is damaged, for which TFDS has a dozen kinds of error."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"data.source: {what}{config.source} is damaged ({reason}): prepare it anew") from error


def _open_set(config: DataConfig) -> _Prepared:
    """Opens a prepared data set; of one that is not prepared it says so at once, and touches no network."""
    name = config.source.removeprefix("tfds:")
    with _quiet("absl"):
        try:
            import tensorflow_datasets as tfds

            if re.match(r"[\w-]+:[A-Za-z_]", name):
                raise UserError(
                    f"data.source: {name!r} is a community data set, whose code would be downloaded and run: prepare it"
                    " with `tfds build`, and name it without its community"
                )
            _check_files(config, name)
            with _own_features(tfds):
                builder = tfds.builder(
                    name, data_dir=str(pathlib.Path(config.path).expanduser()) if config.path else None
                )
            prepared = builder.is_prepared()
        except ModuleNotFoundError as error:
            raise UserError(
                f"data.source: {config.source} needs the package {error.name}: `pip install -r requirements.txt`"
            ) from error
        except UserError:
            raise
        except Exception as error:  # an unknown name, configuration or version: TFDS has a kind for each
            raise _unknown(name, error) from error
        with _clear_damage(config):
            return _open_split(config, tfds, builder, prepared=prepared)


def _check_files(config: DataConfig, name: str) -> None:
    """Checks that what TFDS will read of a set has an end."""
    folder = pathlib.Path(config.path or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    for path in (folder / re.split("[/:]", name)[0]).rglob("*"):
        if not path.exists():
            continue  # a dangling link, which TFDS need not read
        if not (path.is_file() or path.is_dir()) or (path.suffix == ".json" and path.stat().st_size > _LARGEST_JSON):
            raise UserError(f"data.source: {path} is no file that TFDS wrote: remove it, or prepare the set anew")


def _open_split(config: DataConfig, tfds: typing.Any, builder: typing.Any, *, prepared: bool) -> _Prepared:
    name, whole = config.source.removeprefix("tfds:"), builder.info.features
    features = dict(whole.items()) if isinstance(whole, tfds.features.FeaturesDict) else {}
    if len(getattr(features.get("image"), "shape", None) or ()) != 3:
        raise UserError(
            f"data.source: {name} has no feature 'image' that is one picture; it has {', '.join(sorted(features))}"
        )
    if not prepared:
        where = f" --data_dir={config.path}" if config.path else ""
        raise UserError(
            f"data.source: {name} is not prepared in {builder.data_dir}; where there is a network do once"
            f" `pip install -r requirements-tfds.txt` and `tfds build {name} --file_format=array_record{where}`"
            f" (TensorFlow, which the first brings, is not needed after that){_by_hand(builder, config)}"
        )
    image = features["image"]
    encoded = isinstance(image, tfds.features.Image)
    if not encoded and image.get_serialized_info().np_dtype != image.np_dtype:
        raise UserError(f"data.source: the images of {name} are compressed arrays, not pictures; save them as PNG")
    try:
        files = builder.info.splits[config.split].file_instructions
    except (KeyError, ValueError, AssertionError) as error:
        raise NoSuchSplit(
            f"data.split: {config.source} has no split {config.split!r}; it has {', '.join(builder.info.splits)},"
            " and parts such as train[:90%]"
        ) from error
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    try:
        records = builder.as_data_source(config.split, deserialize_method=raw)
    except NotImplementedError as error:
        raise UserError(
            f"data.source: {name} in {builder.data_dir} is prepared as {builder.info.file_format.value}, which has"
            f" no random access; move it away and do `tfds build {name} --file_format=array_record`"
        ) from error
    # Other features could be pictures that start a program, or unpack without end.
    chosen = {each: features[each] for each in ("image", "label") if each in features}
    return _Prepared(
        records,
        tfds.features.FeaturesDict(chosen),
        {"image": tfds.decode.SkipDecoding()} if encoded else {},
        tuple((pathlib.PurePath(file.filename).name, file.skip, file.skip + file.take) for file in files),
    )


@contextlib.contextmanager
def _own_features(tfds: typing.Any) -> Iterator[None]:
    """Admits the kinds of features that TFDS itself has: to find others, it imports any module that a set names."""
    connector, find = tfds.features.FeatureConnector, tfds.features.FeatureConnector.cls_from_name
    inherited = vars(connector)["cls_from_name"]

    def find_own(name: str) -> typing.Any:
        module = name.rpartition(".")[0]
        if not module.startswith("tensorflow_datasets.core.features.") or module not in sys.modules:
            raise UserError(
                f"data.source: features.json asks for the module {module:.100}, which would be run: prepare the set"
                " with TFDS's own kinds of features alone"
            )
        return find(name)

    connector.cls_from_name = staticmethod(find_own)
    try:
        yield
    finally:
        connector.cls_from_name = inherited


def _by_hand(builder: typing.Any, config: DataConfig) -> str:
    """What must be downloaded by hand before a set can be prepared, and where to put it."""
    instructions = " ".join((builder.MANUAL_DOWNLOAD_INSTRUCTIONS or "").split())
    if not instructions:
        return ""
    where = pathlib.Path(config.path or "~/tensorflow_datasets", "downloads", "manual")
    return f"; its files are to be downloaded by hand, into {where}: {textwrap.shorten(instructions, 400)}"


def _unknown(name: str, error: Exception) -> UserError:
    import tensorflow_datasets as tfds

    base, _, variant = name.partition("/")
    known = tfds.list_builders(with_community_datasets=False)
    if base.partition(":")[0] not in known and isinstance(error, tfds.core.DatasetNotFoundError):
        near = difflib.get_close_matches(base, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see https://www.tensorflow.org/datasets/catalog"
        return UserError(f"data.source: TFDS knows no data set {base!r}; {hint}")
    variants = list(tfds.builder_cls(base).builder_configs) if (base := base.partition(":")[0]) in known else []
    if variants and variant and variant not in variants:
        near = difflib.get_close_matches(variant, variants, n=3) or variants[:10]
        return UserError(f"data.source: {base} of TFDS has no configuration {variant!r}; it has {', '.join(near)}")
    return UserError(f"data.source: TFDS cannot open {name}: {' '.join(str(error).split())[:500]}")


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Silences the warnings of a library's logger where our own message is clearer."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
