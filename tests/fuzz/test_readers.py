"""Every reader of files that others may have made, on files that are damaged at random and on purpose.

Whatever the bytes, a reader returns what it promises or raises a `UserError` of one printable line. It raises nothing
else, does not hang, and takes little memory. `make test` reads a few dozen files per reader, always the same ones;
`make test-slow` reads others, for a minute per reader (FUZZ_SECONDS).
"""

import contextlib
import dataclasses
import functools
import gzip
import io
import json
import math
import os
import pickle
import resource
import shutil
import signal
import struct
import tarfile
import tempfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import strategies as st
from PIL import Image

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig
from ddpm_jax.data import sources
from ddpm_jax.data.decode import Unreadable, header, open_picture
from ddpm_jax.data.fingerprint import check_same_set, read_class_names
from ddpm_jax.data.source import in_memory
from ddpm_jax.evaluation.features import INCEPTION
from ddpm_jax.evaluation.image_sets import open_npz
from ddpm_jax.evaluation.report.charts import make_charts
from ddpm_jax.evaluation.report.contents import read_contents
from ddpm_jax.evaluation.statistics import is_statistics, read_statistics
from ddpm_jax.generation.store import Parts, StoredImages, checksum_of
from ddpm_jax.interop.checkpoints import read_checkpoint
from ddpm_jax.interop.diffusers import read_folder, write_folder
from ddpm_jax.interop.original import write_original
from ddpm_jax.interop.torch_files import read_torch
from ddpm_jax.networks import parameter_shapes
from ddpm_jax.run.build import build_network
from ddpm_jax.run.record import read_config, save_config
from ddpm_jax.run.validation import validate
from ddpm_jax.run.weights import load_weights, save_weights
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import dump_checked, write_npz
from ddpm_jax.training import metrics

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

SECONDS = float(os.environ.get("FUZZ_SECONDS", "60"))
MEMORY = 2**26  # bytes of Python objects and arrays that a reader may take for files this small
LIMIT = 2.0**-6  # GiB: the data.memory_gib of these sets
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
LABELS = np.arange(6) % 3

Files = dict[str, bytes]
"""Content by relative path."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """What is damaged, and what reads it."""

    files: Callable[[], Files]
    """Makes intact files; a name that ends in `!` is of the content before it is packed."""
    read: Callable[[Path], object]
    """Reads them in a folder, to the last pixel; raises AssertionError if it believes something impossible."""
    pack: Callable[[Files], Files] = lambda files: files
    """Packs damaged content as an intact archive with right checksums."""
    examples: int = 30
    """How many files `make test` reads; fewer of those that take long."""


# The files and their readers.


def whole(source):
    """Checks that a source is what it promises."""
    pixels = source.read(np.arange(source.num_examples))
    assert pixels.shape == (source.num_examples, *source.image_shape)
    assert pixels.dtype == np.uint8
    if source.labels is not None:
        assert source.labels.shape == (source.num_examples,)
        assert (source.labels >= 0).all()
        assert (source.labels < max(1, len(source.class_names))).all()
    assert all(map(str.isprintable, (source.name, source.describe(), *source.class_names, *source.notes)))


def read_set(kind, path, *, size=(8, 8), channels=3, memory_gib=LIMIT, **others):
    config = DataConfig(
        source=kind,
        path=str(path),
        height=size[0],
        width=size[1],
        channels=channels,
        memory_gib=memory_gib,
        max_megapixels=1.0,
        **others,
    )
    whole(sources.load_source(sources.resolve(config)))


def each(read, things):
    """Reads all of several things, and then raises the first error."""
    errors = []
    for thing in things:
        try:
            read(thing)
        except (UserError, Unreadable) as error:
            errors.append(UserError(error))
    if errors:
        raise errors[0]


def saved(write, *arguments, **named):
    file = io.BytesIO()
    write(file, *arguments, **named)
    return file.getvalue()


def pictures():
    image, gray = Image.fromarray(PIXELS[0]), Image.fromarray(PIXELS[0, ..., 0])
    deep = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    exif = Image.Exif()
    exif[0x0112] = 6
    made = {f"a.{kind}": saved(image.save, kind) for kind in ("png", "webp", "tiff", "bmp", "ppm", "qoi", "tga", "pcx")}
    made["a.jpg"] = saved(image.save, "jpeg", exif=exif)
    made["a.jp2"], made["a.avif"] = saved(image.save, "jpeg2000"), saved(image.save, "avif")
    made["deep.png"], made["lzw.tif"] = saved(deep.save, "png"), saved(gray.save, "tiff", compression="tiff_lzw")
    made["several.gif"] = saved(image.save, "gif", save_all=True, append_images=[Image.fromarray(PIXELS[1])])
    made["several.png"] = saved(image.save, "png", save_all=True, append_images=[Image.fromarray(PIXELS[1])])
    return made


def read_pictures(folder):
    read = lambda memory_gib: read_set("folder", folder, memory_gib=memory_gib, on_unreadable="skip", channels=3)
    each(read, (LIMIT, 0.0))
    each(lambda path: (header(path), open_picture(str(path))), sorted(folder.iterdir()))


def packed(files, compression=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def npz_members():
    arrays = {"train_images": PIXELS, "train_labels": LABELS, "test_images": PIXELS[:2], "other": np.array("text")}
    return {f"{name}.npy!": saved(np.save, array) for name, array in arrays.items()}


def read_npz(folder):
    each(lambda split: read_set("npz", folder / "a.npz", split=split), ("train", "test", "all"))


def idx_files():
    images = bytes([0, 0, 8, 3]) + struct.pack(">3I", 6, 8, 8) + PIXELS[..., 0].tobytes()
    labels = bytes([0, 0, 8, 1]) + struct.pack(">I", 6) + LABELS.astype("u1").tobytes()
    return {"train-images-idx3-ubyte!": images, "train-labels-idx1-ubyte!": labels}


def gzipped(files):
    return {f"{name[:-1]}.gz": gzip.compress(content, 1) for name, content in files.items()}


CIFAR = "cifar-10-batches-py"


def cifar_pickles():
    rows = np.random.default_rng(1).integers(0, 256, (2, 3072), np.uint8)
    files = {f"data_batch_{i}!": pickle.dumps({b"labels": [i, 9 - i], b"data": rows}, protocol=2) for i in range(1, 6)}
    files["test_batch!"] = pickle.dumps({b"labels": [0, 1], b"data": rows}, protocol=2)
    files["batches.meta!"] = pickle.dumps({b"label_names": [f"class {i}".encode() for i in range(10)]}, protocol=2)
    return files


def tar_of(files):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{CIFAR}/{name.removesuffix('!')}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return {"cifar-10-python.tar.gz": file.getvalue()}


def read_cifar(folder):
    each(lambda split: read_set("cifar10", folder, size=(32, 32), split=split), ("train", "test"))


class FuzzPictures(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        image = tfds.features.Image(shape=(8, 8, 3), encoding_format="png")
        features = {"image": image, "label": tfds.features.ClassLabel(names=["cat", "dog"])}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, pixels in enumerate(PIXELS[:2]):
            yield i, {"image": saved(Image.fromarray(pixels).save, "png"), "label": i}


@functools.cache
def tfds_files():
    """A prepared set, under a name of which TFDS has no program: it believes what the files say."""
    files = written(lambda folder: FuzzPictures(data_dir=folder, file_format="array_record").download_and_prepare())
    other = lambda text: text.replace("fuzz_pictures", "found")
    return {
        other(name): other(content.decode()).encode() if name.endswith(".json") else content
        for name, content in files.items()
    }


def read_tfds(folder):
    read_set("tfds:found", folder)
    read_set("tfds:found", folder, memory_gib=0.0, channels=None)


def written(write):
    """Returns the files that a function writes into a folder."""
    with tempfile.TemporaryDirectory() as place:
        write(Path(place))
        found = [path for path in Path(place).rglob("*") if path.is_file()]
        return {path.relative_to(place).as_posix(): path.read_bytes() for path in found}


def config_file():
    return written(lambda folder: save_config(Config(), folder / "config.json"))


def read_record(folder):
    config = read_config(folder / "config.json")
    validate(config)
    json.dumps(dataclasses.asdict(config), allow_nan=False)


def sealed(files):
    """Writes JSON anew with the checksum that it should have."""

    return {name: with_right_checksum(content, indent=2) for name, content in files.items()}


def with_right_checksum(content, *, indent=None):
    """Writes JSON anew with the checksum that it should have; other content is left as it is."""
    try:
        value = json.loads(content)
        return dump_checked({name: each for name, each in value.items() if name != "checksum"}, indent=indent) + b"\n"
    except (ValueError, RecursionError, AttributeError):
        return content


def metrics_file():
    lines = [
        {
            "step": step,
            "loss": 0.5 / step,
            "loss_quartiles": [0.5, None, 0.25, 0.1],
            "grad_norm": 1.5,
            "param_norm": 9.0,
        }
        for step in range(1, 4)
    ]
    return {"metrics.jsonl": b"".join(json.dumps(line).encode() + b"\n" for line in lines)}


def read_metrics(folder):
    warnings = []
    for values in metrics.read_lines(folder / "metrics.jsonl"):
        assert isinstance(values["step"], int)
    metrics.rewind(folder / "metrics.jsonl", 2, warn=warnings.append)
    assert all(len(line) < 1000 for line in warnings)


WEIGHTS = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.zeros(3, np.float16)}}


def weights_file():
    return written(lambda folder: save_weights(folder / "w.safetensors", WEIGHTS, config=Config(), step=7))


def read_weights(folder):
    (file,) = folder.iterdir()
    weights, metadata = load_weights(file)
    names = [*weights]
    assert all(isinstance(name, str) for name in (*names, *metadata))


def header_of_weights():
    content = weights_file()["w.safetensors"]
    size = int.from_bytes(content[:8], "little")
    return {"header!": content[8 : 8 + size], "data": content[8 + size :]}


def with_header(files):
    header = files["header!"]
    return {"w.safetensors": len(header).to_bytes(8, "little") + header + files["data"]}


def torch_members():
    pytest.importorskip("torch")
    import torch

    kernel = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tree = {"a.weight": kernel, "b": kernel.t()[1:], "c": torch.zeros(2, dtype=torch.bfloat16), "step": 7}
    return {"new": saved_by_torch(tree, new=True), "old": saved_by_torch(tree, new=False)}


def saved_by_torch(tree, *, new):
    import torch

    file = io.BytesIO()
    torch.save(tree, file, _use_new_zipfile_serialization=new)
    return file.getvalue()


def torch_files():
    return {"old.pt": torch_members()["old"]}


def torch_archive():
    with zipfile.ZipFile(io.BytesIO(torch_members()["new"])) as archive:
        return {f"{name}!": archive.read(name) for name in archive.namelist()}


def read_torch_tree(folder):
    (file,) = folder.iterdir()
    waiting = [read_torch(file, max_bytes=2**24)]
    while waiting:
        value = waiting.pop()
        assert isinstance(value, (dict, list, tuple, np.ndarray, int, float, str, bytes, type(None)))
        waiting.extend(value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [])
        if isinstance(value, np.ndarray):
            value.sum(dtype=np.float64) if value.dtype.kind in "biuf" else value.astype(np.float32).sum()


@functools.cache
def diffusers_folder():
    model = ModelConfig(width=4, channel_mult=(1, 2), num_res_blocks=1, num_groups=2, num_classes=2)
    config = Config(
        data=DataConfig(height=4, width=4), diffusion=DiffusionConfig("jsd", 9, prediction="v"), model=model
    )
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), parameter_shapes(build_network(config)))
    return written(lambda folder: write_folder(folder, params, config=config, step=7, class_names=["cat", "dog"]))


def diffusers_fields():
    return {name: content for name, content in diffusers_folder().items() if name.endswith(".json")}


def with_weights(files):
    return {**diffusers_folder(), **files}


def read_diffusers(folder):
    found = read_folder(folder)
    validate(found.config)
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {np.dtype(np.float32)}


ASKED = {"seed": 3}


def write_job(folder):
    stored = StoredImages(folder, (8, 8, 3), asked=ASKED, labels=[1, 2])
    stored.save(0, PIXELS[:2])
    stored.save(2, PIXELS[2:4])
    stored.pack()
    stored.save(4, PIXELS[4:])


def read_job(folder):
    stored = StoredImages(folder, (8, 8, 3), asked=ASKED, labels=[1, 2])
    done = stored.done()
    assert all(0 <= first <= stop for first, stop in done)
    number = stored.pack()
    assert sum(map(len, stored.read(number))) == number if number else True
    images = open_npz(folder / "samples.npz")
    images.read(np.arange(min(images.number, 10)))


def with_checksum(files):
    """Packs arrays as a part of a job, with the checksum that it should have."""

    def write(archive):
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name[:-1]), content)

    about = {"images": (0, 2), "part": "parts", "job": checksum_of(ASKED)}
    return written(lambda folder: write_npz(folder / "parts" / "00000000-00000002.npz", write, about))


def read_part(folder):
    parts = Parts(folder / "parts", ASKED)
    for first, stop in parts.ranges():
        assert all(isinstance(array, np.ndarray) for array in parts.load(first, stop).values())


def set_file():
    return written(lambda folder: check_same_set(folder / "data.json", in_memory(PIXELS, LABELS)))


def read_set_file(folder):
    assert all(map(str.isprintable, read_class_names(folder)))
    check_same_set(folder / "data.json", in_memory(PIXELS, LABELS))


def statistics_arrays():
    moments = {"mu": np.zeros(4), "sigma": np.eye(4)}
    arrays = {**moments, "mu_s": np.zeros(2), "sigma_s": np.eye(2), "feats": np.ones((5, 4), np.float32)}
    return {f"{name}.npy!": saved(np.save, array) for name, array in arrays.items()}


def statistics_files():
    array = lambda value: np.asarray(value, np.float64)
    pickled = pickle.dumps({"fid": {"mu": array(np.zeros(4)), "sigma": array(np.eye(4))}, "num_images": 9}, protocol=4)
    arrays = {name.removesuffix("!"): content for name, content in statistics_arrays().items()}
    return {"a.npz": packed(arrays), "b.pkl": pickled, "c.npz": saved(np.savez, PIXELS)}


def read_statistics_files(folder):
    def read(file):
        if not is_statistics(file):
            images = open_npz(file)
            assert images.read(np.arange(min(images.number, 10))).shape[1:] == images.shape
            return
        found = read_statistics(file, features=INCEPTION)
        assert found.pool.covariance.shape == (len(found.pool.mean),) * 2

    each(read, sorted(folder.iterdir()))


def run_files():
    """Of a run's folder, what its report reads besides config.json."""
    job = {"checkpoint": 7, "seed": 1, "sampler": "ddim", "steps": 5, "labels": [1], "diffusion.num_steps": 9}
    bits = {"bits_per_dim": 3.5, "standard_error": 0.1, "rate_bits": 1.5, "distortion_bits": 2.0, "rmse": 1.0}
    bits |= {"l_simple": 0.5, "images": 8, "trained_on": 0, "num": 0}
    bits["job"] = {**job, "split": "test", "data.source": "digits", "num_strata": 5, "sigma": "model", "cdf": "tanh"}
    quality = {"images": 8, "confidence": 0.5, "confidence_of_real": 0.5, "accuracy": None, "counts": {"0": 8}}
    quality |= {"fd_own": 2.0, "fd_own_of_real": 1.0, "ratio": 2.0, "images_compared": 8, "real": "a", "held_out": None}
    scores = {
        "scores": {"FID": 1.0, "sFID": 1.0, "IS": 2.0, "IS_std": 0.1, "KID": 0.1, "KID_standard_error": 0.1},
        "images": {"name": "a", "number": 8, "drawn": job},
        "reference": {"images": "digits, train", "number": 9, "options": []},
        "features": {"name": "Inception", "sha256": "0" * 64, "resize": "bilinear"},
        "settings": {"a": "b"},
        "versions": {"jax": "0"},
    }
    found = {
        "fid/a_train/scores.json": scores,
        "likelihood/a/likelihood.json": bits,
        "samples/a/job.json": job,
        "samples/a/quality.json": quality,
        "data.json": {"images": 9, "shape": [8, 8, 3], "class_names": []},
        "timing.jsonl": {"step": 1, "seconds": 2.0, "images_per_second": 64.0, "peak_memory_gib": 0.5},
    }
    files = {name: json.dumps(value).encode() for name, value in found.items()}
    return {**files, **metrics_file(), "samples/step_0000001.png": pictures()["a.png"]}


def in_a_run(files):
    """Writes JSON, and every line of metrics, with the checksum that it should have, beside a configuration."""
    lines = {name: content.split(b"\n") for name, content in files.items() if name.endswith("l")}
    lined = {name: b"".join(map(with_right_checksum, each)) for name, each in lines.items()}
    others = {name: content for name, content in files.items() if name not in lines}
    return {**sealed(others), **lined, **sealed(config_file())}


def read_report(folder):
    contents = read_contents(folder, name="run")
    assert all(map(str.isprintable, contents.notices))
    json.dumps([chart._asdict() for chart in make_charts([contents])], allow_nan=False)


TINY = Config(
    data=DataConfig(height=32, width=32, channels=3),
    diffusion=DiffusionConfig(variance="fixed_large"),
    model=ModelConfig(width=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=()),
)


def checkpoint_arrays():
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), parameter_shapes(build_network(TINY)))
    return {f"{name}.npy!": saved(np.save, array) for name, array in write_original(params, TINY, step=7).items()}


def shapes_of(name):
    """Names and shapes of the arrays of another program's network."""
    with np.load(Path(__file__).parents[1] / "interop" / "values.npz") as values:
        return {"shapes!": json.dumps(json.loads(str(values["shapes"]))[name]).encode()}


def with_shapes(files):
    """Writes arrays of zeros with the names and shapes that are given, as far as there can be such."""
    try:
        shapes = dict(json.loads(files["shapes!"]))
    except (ValueError, TypeError, RecursionError):
        shapes = {}
    arrays = {}
    for name, shape in shapes.items():
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            if math.prod(shape) < 2**20:
                arrays[f"{name.encode(errors='replace').decode()}.npy"] = saved(np.save, np.zeros(shape, np.float32))
    return {"a.npz": packed(arrays, zipfile.ZIP_STORED)}


def read_network(folder, **options):
    read = read_checkpoint(folder / "a.npz", **options)
    validate(read.config)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(read.params))


def reader_of(name, **options):
    return Reader(lambda: shapes_of(name), lambda folder: read_network(folder, **options), with_shapes, 10)


READERS = {
    "pictures": Reader(pictures, read_pictures),
    "npz": Reader(lambda: {"a.npz": packed({k[:-1]: v for k, v in npz_members().items()})}, read_npz),
    "npz, its arrays": Reader(
        npz_members, read_npz, lambda files: {"a.npz": packed({k[:-1]: v for k, v in files.items()})}
    ),
    "npy": Reader(
        lambda: {"a.npy": saved(np.save, PIXELS), "a_labels.npy": saved(np.save, LABELS)},
        lambda folder: read_set("npy", folder / "a.npy", channels=None),
    ),
    "idx": Reader(
        lambda: {name[:-1]: content for name, content in idx_files().items()},
        lambda folder: read_set("idx", folder, channels=1),
    ),
    "idx, gzip": Reader(lambda: gzipped(idx_files()), lambda folder: read_set("idx", folder, channels=1)),
    "idx, its content": Reader(idx_files, lambda folder: read_set("idx", folder, channels=1), gzipped),
    "CIFAR-10": Reader(lambda: tar_of(cifar_pickles()), read_cifar),
    "CIFAR-10, its pickles": Reader(
        cifar_pickles, read_cifar, lambda files: {f"{CIFAR}/{k[:-1]}": v for k, v in files.items()}
    ),
    "TFDS": Reader(tfds_files, read_tfds),
    "config.json": Reader(config_file, read_record),
    "config.json, sealed": Reader(config_file, read_record, sealed),
    "data.json, sealed": Reader(set_file, read_set_file, sealed),
    "metrics.jsonl": Reader(metrics_file, read_metrics),
    "data.json": Reader(set_file, read_set_file),
    "a report's, sealed": Reader(run_files, read_report, in_a_run, 10),
    "weights": Reader(weights_file, read_weights),
    "weights, their header": Reader(header_of_weights, read_weights, with_header),
    "PyTorch": Reader(torch_files, read_torch_tree),
    "PyTorch, its pickle": Reader(
        torch_archive,
        read_torch_tree,
        lambda files: {"new.pt": packed({k[:-1]: v for k, v in files.items()}, zipfile.ZIP_STORED)},
    ),
    "diffusers": Reader(diffusers_folder, read_diffusers),
    "diffusers, its fields": Reader(diffusers_fields, read_diffusers, with_weights),
    "samples": Reader(lambda: written(write_job), read_job),
    "the original's checkpoints": Reader(
        checkpoint_arrays,
        read_network,
        lambda files: {"a.npz": packed({k[:-1]: v for k, v in files.items()}, zipfile.ZIP_STORED)},
    ),
    "pesser's networks": reader_of("pesser"),
    "improved-diffusion's networks": reader_of(
        "classes_learned_variance",
        program="improved-diffusion",
        flags="--image_size 16 --num_heads 1 --rescale_timesteps False --class_cond True",
    ),
    "guided-diffusion's networks": reader_of(
        "resampling_blocks",
        program="guided-diffusion",
        flags="--image_size 16 --num_head_channels 32 --noise_schedule cosine",
    ),
    "statistics": Reader(statistics_files, read_statistics_files),
    "statistics, their arrays": Reader(
        statistics_arrays,
        read_statistics_files,
        lambda files: {"a.npz": packed({k[:-1]: v for k, v in files.items()})},
    ),
    "parts, sealed": Reader(lambda: {"images.npy!": saved(np.save, PIXELS[:2])}, read_part, with_checksum),
}


# What is done to them.

NUMBERS = [0, 1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
TOKENS = [
    *(
        number.to_bytes(size, order)
        for number in NUMBERS
        for size in (1, 2, 4, 8)
        for order in ("little", "big")
        if number < 256**size
    ),
    *(str(number).encode() for number in (-1, 0, 10**12, 10**400, 1e308, "NaN", "Infinity", "null", "true", "{}")),
    *(b"[" * 3000, b"(" * 3000, b'{"a":' * 3000, b"-" * 3000, b"9" * 5000, b"\x1b[31m\x07\x9b", "\u202e".encode()),
    *(b"\xff\xfe\xed", b"\0" * 64, b"\n", b'"', b"\\ud800", b"True", b"|O", b"<f8", b"V9999999", b"evil.Feature"),
    # Instructions of pickles: memory, functions, calls, and values of many kinds.
    *(b"r\xff\xff\xff\x7f", b"\x96\xff\xff\xff\xff\x7f\0\0\0", b"cposix\nsystem\n", b"cbuiltins\neval\n"),
    *(bytes([code]) for code in b"Rb(tldeus012N}]).Q\x81\x93\x94"),
    *(b"h\0", b"q\0", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"cnumpy._core.multiarray\n_reconstruct\n"),
]
VALUES = st.sampled_from(
    [None, True, -1, 0, 10**12, 10**400, 1e308, float("nan"), float("inf"), 0.5, "", "9" * 5000, "\x1b[31m", "\ud800"]
    + [[], {}, [[[[]]]], {"a": {"a": {}}}, ["train"], "evil.Feature", "<python>", "x.py:f", "NaN", 2**31, 2**63]
)


@st.composite
def damages(draw):
    """One change of a content, as a function of it: of its bytes, or if it is JSON, of one of its values."""
    kind = draw(st.sampled_from(["flip", "flip", "write", "insert", "cut", "remove", "repeat", "json", "json"]))
    place, length = draw(st.integers(0, 2**16)), draw(st.integers(1, 64))
    token, value, bit = draw(st.sampled_from(TOKENS)), draw(VALUES), draw(st.integers(0, 7))

    def damage(content):
        if not content:
            return token
        at = place % len(content)
        match kind:
            case "flip":
                return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]
            case "write":
                return content[:at] + token + content[at + len(token) :]
            case "insert":
                return content[:at] + token + content[at:]
            case "cut":
                return content[:at]
            case "remove":
                return content[:at] + content[at + length :]
            case "repeat":
                return content[: at + length] + content[at:]
        return with_other_value(content, place, value)

    return damage


def with_other_value(content, place, value):
    """Replaces a value in JSON, or its key, or writes a value beside it; other content is left as it is."""
    before, ending, content = (
        content.rstrip(b"\n").rpartition(b"\n") if b"\n{" in content else (b"", b"", content)
    )  # of many lines
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return before + ending + content
    spots = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        items = [*node.items()] if isinstance(node, dict) else [*enumerate(node)] if isinstance(node, list) else []
        spots += [(node, key) for key, _ in items]
        waiting += [each for _, each in items]
    if not spots:
        return before + ending + json.dumps(value).encode()
    node, key = spots[place % len(spots)]
    how = place // len(spots) % 3
    if how == 0 or isinstance(node, list):
        node[key] = value
    elif how == 1:
        node[str(value)[:50]] = node.pop(key)
    else:
        node[f"{key}.x"] = value
    return before + ending + json.dumps(tree).encode()


CHANGES = st.lists(st.tuples(st.integers(0, 100), damages()), min_size=1, max_size=4)


class Hangs(BaseException):
    """No reader may take it for an error of its file."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fails if what is inside hangs or takes more memory than it may."""

    def hang(number, frame):
        raise Hangs("a reader hangs")

    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, 20)
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEMORY, "a reader takes too much memory"
    finally:
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check(reader, files, folder, *, intact=False):
    """Reads files; of intact ones nothing may be refused."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in reader.pack(files).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    line = "refused"
    with bounded(), contextlib.nullcontext() if intact else contextlib.suppress(UserError):
        try:
            reader.read(folder)
        except UserError as error:
            line = str(error)
            raise
    assert line.isprintable()
    assert 0 < len(line) < 2000


def damaged(files, changes):
    files = dict(files)
    names = sorted(name for name in files)
    for which, damage in changes:
        name = names[which % len(names)]
        files[name] = damage(files[name])
    return files


def run(reader, files, folder, *, examples, seed=None):
    settings = hypothesis.settings(
        max_examples=examples,
        derandomize=seed is None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    test = hypothesis.given(CHANGES)(lambda changes: check(reader, damaged(files, changes), folder))
    (settings(test) if seed is None else hypothesis.seed(seed)(settings(test)))()


@pytest.mark.parametrize("name", READERS)
def test_intact_files_are_read(name, tmp_path):
    reader = READERS[name]
    check(reader, reader.files(), tmp_path / "read", intact=True)


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_named(name, tmp_path):
    reader = READERS[name]
    run(reader, reader.files(), tmp_path / "read", examples=reader.examples)


def with_byte(content, mark, offset, value):
    """Writes a byte behind the last mark of a content."""
    at = content.rindex(mark) + offset
    return content[:at] + bytes([value]) + content[at + 1 :]


# What was found so, and mended.
FOUND = [
    ("npz", "a.npz", lambda content: with_byte(content, b"PK\1\2", 6, 255)),  # a version of zip that is to come
    ("samples", "samples.npz", lambda content: with_byte(content, b"PK\1\2", 6, 255)),
    ("samples", "samples.npz", lambda content: content.replace(b"(4, 8, 8, 3)", b"(4, 9**9, 8)")),
    ("npz, its arrays", "train_images.npy!", lambda content: content.replace(b"}", b"(", 1)),
    ("npy", "a.npy", lambda content: content.replace(b"(6, ", b"(-6,")),
    ("config.json", "config.json", lambda content: content.replace(b'"format": ', b'"format": ' + b"9" * 4000)),
    ("config.json, sealed", "config.json", lambda content: content.replace(b": 0.0002", b": 1" + b"0" * 400)),
    ("parts, sealed", "images.npy!", lambda content: content.replace(b"}", b"(", 1)),
    ("parts, sealed", "images.npy!", lambda content: content.replace(b"(2, 8", b"(9**9")),
    ("data.json, sealed", "data.json", lambda content: content.replace(b'"class_names"', b'"class_names": null, "a"')),
    ("a report's, sealed", "metrics.jsonl", lambda content: content.replace(b"0.5,", b"1" + b"0" * 400 + b",")),
    ("a report's, sealed", "metrics.jsonl", lambda content: content.replace(b'"step": 1', b'"step": 1' + b"0" * 40)),
    ("a report's, sealed", "samples/a/quality.json", lambda content: content.replace(b"0.5", b"1" + b"0" * 400)),
    ("TFDS", "found/1.0.0/dataset_info.json", lambda content: content.replace(b'"train"', b'"' + b"9" * 5000 + b'"')),
    ("statistics", "b.pkl", lambda content: content[:2] + b"\x95" + b"\xff" * 8 + content[2:]),
    ("TFDS", "found/1.0.0/features.json", lambda content: b"[" * 10**5),
    ("CIFAR-10, its pickles", "test_batch!", lambda content: b"\x80\2}r\xff\xff\xff\x7f."),
]


@pytest.mark.parametrize(("name", "file", "change"), FOUND)
def test_what_was_found_before_is_mended(name, file, change, tmp_path):
    files = READERS[name].files()
    changed = {**files, file: change(files[file])}
    assert changed != files
    check(READERS[name], changed, tmp_path / "read")


@pytest.mark.parametrize("name", READERS)
def test_no_reader_waits_for_a_fifo(name, tmp_path):
    """Each of a reader's files in turn is one."""
    reader = READERS[name]
    packed_files = reader.pack(reader.files())
    for fifo in sorted(packed_files)[:4]:
        shutil.rmtree(tmp_path / "read", ignore_errors=True)
        for each, content in packed_files.items():
            path = tmp_path / "read" / each
            path.parent.mkdir(parents=True, exist_ok=True)
            os.mkfifo(path) if each == fifo else path.write_bytes(content)
        with bounded(), contextlib.suppress(UserError):
            reader.read(tmp_path / "read")


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_named_for_a_minute(name, tmp_path):
    reader, end = READERS[name], time.monotonic() + SECONDS
    files, seed = reader.files(), time.time_ns() % 2**32
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while time.monotonic() < end:
        print(f"seed {seed}")
        run(reader, files, tmp_path / "read", examples=100, seed=seed)
        seed += 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 2**20  # KiB: also of Pillow and its like
