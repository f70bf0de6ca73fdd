"""Sets that tensorflow-datasets has prepared, read without TensorFlow."""

import contextlib
import difflib
import io
import logging
import pathlib
import textwrap
import typing
from collections.abc import Iterator

import numpy as np
from PIL import Image

from ddpm_jax.config import DataConfig
from ddpm_jax.data.decode import Unreadable, decode, to_array
from ddpm_jax.data.source import Source, fits_memory, in_memory, in_threads, shape_of
from ddpm_jax.system.errors import NoSuchSplit, UserError


class _Prepared(typing.NamedTuple):
    examples: typing.Any
    features: typing.Any


def load(config: DataConfig) -> Source:
    """Opens a prepared set; one that fits the memory is decoded into it.

    Args:
      config: which images; its `channels` is known.

    Returns:
      the source.

    Raises:
      UserError: the set is unknown or not prepared, has no such split, or an image cannot be read.
    """
    examples, features = _open_set(config)
    shape, num_examples = shape_of(config), len(examples)
    if shape[2] not in (1, 3, 4):
        raise UserError(f"data.channels: must be 1, 3 or 4, not {shape[2]}")
    if num_examples == 0:
        raise UserError(f"data.split: {config.split!r} of {config.source} is empty")
    # Only classes with names; TFDS calls other things label too (text, several numbers).
    class_names = tuple(getattr(dict(features.items()).get("label"), "names", None) or ())

    def image(i: int) -> np.ndarray:
        return _decode(config, i, examples[i]["image"])

    def image_and_label(i: int) -> tuple[np.ndarray, int]:
        example = examples[i]
        return _decode(config, i, example["image"]), example["label"] if class_names else -1

    def read_images(indices: np.ndarray) -> np.ndarray:
        return np.stack(list(in_threads(image, [int(i) for i in indices])))

    def read_labels(indices: np.ndarray) -> np.ndarray:
        return np.array([examples[int(i)]["label"] for i in indices], np.int32)

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
        )
    images, labels = np.empty((num_examples, *shape), np.uint8), np.empty(num_examples, np.int32)
    for i, (pixels, number) in enumerate(in_threads(image_and_label, range(num_examples), label="reading images")):
        images[i], labels[i] = pixels, number
    return in_memory(images, labels if class_names else None, class_names, name=name)


def probe(config: DataConfig) -> int:
    """Returns the number of channels that the set declares."""
    channels = _open_set(config).features["image"].shape[-1]
    if channels not in (1, 3, 4):
        raise UserError(f"data.channels: {config.source} does not say how many channels it has; set it to 1, 3 or 4")
    return channels


def _decode(config: DataConfig, i: int, image: bytes | np.ndarray) -> np.ndarray:
    if isinstance(image, np.ndarray):
        return to_array(
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), shape_of(config), white=config.white
        )
    try:
        return to_array(
            decode(io.BytesIO(image), max_megapixels=config.max_megapixels), shape_of(config), white=config.white
        )
    except Unreadable as error:
        raise UserError(
            f"data.source: image {i} of {config.source} cannot be read ({error}); prepare it anew"
        ) from None


def _open_set(config: DataConfig) -> _Prepared:
    """Opens a prepared data set; of one that is not prepared it says so at once, and touches no network."""
    name = config.source.removeprefix("tfds:")
    with _quiet("absl"):
        try:
            import tensorflow_datasets as tfds

            builder = tfds.builder(name, data_dir=str(pathlib.Path(config.path).expanduser()) if config.path else None)
            prepared = builder.is_prepared()
        except ModuleNotFoundError as error:
            raise UserError(
                f"data.source: {config.source} needs the package {error.name}: `pip install -r requirements.txt`"
            ) from error
        except Exception as error:  # an unknown name, configuration or version: TFDS has a kind for each
            raise _unknown(name, error) from error
        features = builder.info.features
        if "image" not in features or len(features["image"].shape or ()) != 3:
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
        skip = {"image": tfds.decode.SkipDecoding()} if isinstance(features["image"], tfds.features.Image) else None
        try:
            return _Prepared(builder.as_data_source(config.split, decoders=skip), features)
        except NotImplementedError as error:
            raise UserError(
                f"data.source: {name} in {builder.data_dir} is prepared as {builder.info.file_format.value}, which has"
                f" no random access; move it away and do `tfds build {name} --file_format=array_record`"
            ) from error
        except ValueError as error:
            raise NoSuchSplit(
                f"data.split: {config.source} has no split {config.split!r}; it has {', '.join(builder.info.splits)},"
                " and parts such as train[:90%]"
            ) from error


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
    """Silences the warnings of a library's logger where our own message is clearer."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
