"""How close samples are to real images, judged by a small classifier trained on the real ones.

For small labeled sets (the digits, Fashion-MNIST), on which FID's Inception features say little. The Frechet distance
in the classifier's hidden features is called FD-own: it compares runs and samplers on one set, and is not an FID.
"""

import dataclasses
import typing
import warnings
from pathlib import Path

import numpy as np
import threadpoolctl

from ddpm_jax.config import Config
from ddpm_jax.data.shared import count_shared
from ddpm_jax.data.source import Source
from ddpm_jax.data.sources import load_source, resolve
from ddpm_jax.evaluation.frechet import frechet_distance
from ddpm_jax.evaluation.image_sets import open_npz
from ddpm_jax.run.experiments import load_config
from ddpm_jax.run.record import read_run
from ddpm_jax.system.errors import NoSuchSplit, UserError
from ddpm_jax.system.files import write_json

_FEATURES = 64
# Images that the classifier sees in all its epochs: seconds on one core.
_IMAGES_SEEN = 300_000
_MOST_REAL = 20_000
_MOST_PIXELS = 64 * 64 * 3
_HALVINGS = 20


class Classifier:
    """A network of one hidden layer that classifies images, deterministic in its training images."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        """Trains it.

        Args:
          images: (N, H, W, C) uint8.
          labels: (N,) integers >= 0, of at least two classes.
        """
        from sklearn.exceptions import ConvergenceWarning  # slow to import
        from sklearn.neural_network import MLPClassifier

        epochs = min(200, max(5, _IMAGES_SEEN // len(images)))
        self._mean, self._scale = np.float32(images.mean()), np.float32(images.std() + 1e-6)
        self._network = MLPClassifier(hidden_layer_sizes=(_FEATURES,), max_iter=epochs, alpha=1e-3, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # there are few epochs on purpose
            self._network.fit(self._inputs(images), labels)

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Returns the probability of each class in the order of the labels: (N, H, W, C) uint8 to (N, classes)."""
        return self._network.predict_proba(self._inputs(images))

    def classify(self, images: np.ndarray) -> np.ndarray:
        """Returns the labels of the most likely classes: (N, H, W, C) uint8 to (N,)."""
        return self._network.predict(self._inputs(images))

    def features(self, images: np.ndarray) -> np.ndarray:
        """Returns the activations of the hidden layer: (N, H, W, C) uint8 to (N, 64), each >= 0."""
        return np.maximum(self._inputs(images) @ self._network.coefs_[0] + self._network.intercepts_[0], 0)

    def _inputs(self, images: np.ndarray) -> np.ndarray:
        return (images.reshape(len(images), -1).astype(np.float32) - self._mean) / self._scale


@dataclasses.dataclass(frozen=True)
class Quality:
    """Quality of generated images."""

    images: int
    """Number of generated images."""
    confidence: float
    """Probability of the most likely class, averaged over the generated images."""
    confidence_of_real: float | None
    """The same over held-out real images; None if there are none."""
    accuracy: float | None
    """Accuracy of the classifier on held-out real images."""
    counts: dict[str, int]
    """Number of generated images classified as each class."""
    fd_own: float
    """Frechet distance between generated and real images in the classifier's hidden features, not a FID."""
    fd_own_of_real: float
    """The same distance between two halves of the real images, for comparison."""
    ratio: float
    """`fd_own / fd_own_of_real`: 1 if samples are as close to real images as real images are to each other."""
    images_compared: int
    """Number of images on each side of a distance."""
    real: str
    """Which real images they are compared with."""
    held_out: str | None
    """Which real images were kept from the classifier; None if there are none."""
    held_out_shared: int | None = None
    """Number of these that are also among the real images; None if there are none, or that is not known."""


def own_frechet_distances(generated: np.ndarray, real: np.ndarray) -> tuple[float, float, int]:
    r"""Compares features of generated images with real ones, and real ones with each other, at equal sizes.

    The distance depends on the number of images. So the real set is split into two halves A and B, m = min(generated,
    half) of the generated images G are taken, and d(G, A) is compared with d(B, A). Both are means over 20 random
    splits, the same on every call.

    Args:
      generated: (N, D) features, N >= 2.
      real: (M, D) features, M >= 4.

    Returns:
      the mean of d(G, A), the mean of d(B, A), and m.
    """
    size = min(len(generated), len(real) // 2)
    distances = []
    for split in range(_HALVINGS):
        random = np.random.default_rng(split)
        order, chosen = random.permutation(len(real)), random.permutation(len(generated))[:size]
        half, other = real[order[:size]], real[order[size : 2 * size]]
        distances.append((frechet_distance(generated[chosen], half), frechet_distance(other, half)))
    of_generated, of_real = np.mean(distances, axis=0)
    return float(of_generated), float(of_real), size


def check_real(source: Source) -> None:
    """Checks that quality can be judged by a set of real images, before any are drawn.

    Raises:
      UserError: they have no labels, or are too large or too few.
    """
    if source.labels is None:
        raise UserError(f"{source.name}: the images have no labels, which quality's classifier needs")
    if np.prod(source.image_shape) > _MOST_PIXELS:
        shape = "x".join(map(str, source.image_shape))
        raise UserError(f"{source.name}: images of {shape} are too large for quality: at most 64x64x3")
    if len(np.unique(source.labels)) < 2 or source.num_examples < 4:
        raise UserError(f"{source.name}: quality needs at least 4 real images of at least 2 classes")


def judge(images: np.ndarray, source: Source, held_out: Source | None = None) -> Quality:
    """Judges generated images by a classifier trained on real ones.

    Args:
      images: (N, H, W, C) uint8, N >= 2.
      source: the real images, with labels; at most 20,000 of them are used, evenly spaced.
      held_out: real images for the classifier's accuracy, with labels, if there are any.

    Returns:
      the quality.

    Raises:
      UserError: the real images have no labels, are too large or too few, or the generated ones are of another shape
        or too few.
    """
    check_real(source)
    if images.shape[1:] != source.image_shape or images.dtype != np.uint8:
        raise UserError(
            f"the generated images are {images.shape[1:]} {images.dtype}, but the real ones {source.image_shape} "
            "uint8: both must be the same"
        )
    if len(images) < 2:
        raise UserError(f"--num must be at least 2 to compare with real images, not {len(images)}")
    # On such small matrices BLAS is a hundred times slower with more threads than free cores.
    with threadpoolctl.threadpool_limits(1):
        return _judge(images, source, held_out)


def _judge(images: np.ndarray, source: Source, held_out: Source | None) -> Quality:
    real, labels = _labeled(source)
    classifier = Classifier(real, labels)
    labels_of_generated = classifier.classify(images)
    classes = source.class_names or tuple(map(str, range(int(labels.max()) + 1)))
    fd_own, fd_own_of_real, compared = own_frechet_distances(classifier.features(images), classifier.features(real))
    confidence_of_real = accuracy = shared = None
    if held_out is not None and held_out.labels is not None:
        unseen, labels_of_unseen = _labeled(held_out)
        shared = count_shared(held_out, source, _evenly(held_out))
        confidence_of_real = float(classifier.probabilities(unseen).max(axis=1).mean())
        accuracy = float((classifier.classify(unseen) == labels_of_unseen).mean())
    return Quality(
        images=len(images),
        confidence=float(classifier.probabilities(images).max(axis=1).mean()),
        confidence_of_real=confidence_of_real,
        accuracy=accuracy,
        counts={name: int((labels_of_generated == i).sum()) for i, name in enumerate(classes)},
        fd_own=fd_own,
        fd_own_of_real=fd_own_of_real,
        ratio=fd_own / fd_own_of_real,
        images_compared=compared,
        real=f"{source.name} ({len(real)} images)",
        held_out=None if confidence_of_real is None or held_out is None else f"{held_out.name} ({len(unseen)} images)",
        held_out_shared=shared,
    )


def judge_file(file: Path, config: Config, *, number: int) -> Quality:
    """Judges the images of an .npz file, and writes `quality.json` beside it.

    Args:
      file: contains `arr_0`, (N, H, W, C) uint8, as `sample.py` writes it.
      config: its training images are the real ones; those of its split "test" are held out, if there is one.
      number: of images to judge, the first ones.

    Returns:
      the quality.

    Raises:
      UserError: the file does not exist or contains no such images, or as `judge`.
    """
    if number < 2:
        raise UserError(f"--num must be at least 2 to compare with real images, not {number}")
    generated = open_npz(file)
    if generated.number < number:
        raise UserError(f"{file} contains {generated.number} images: use --num {generated.number} or draw more")
    source, held_out = load_source(config.data), None
    if config.data.split == "train":
        try:
            held_out = load_source(dataclasses.replace(resolve(config.data), split="test"))
        except NoSuchSplit:
            held_out = None
    quality = judge(generated.read(np.arange(number)), source, held_out)
    write_json(file.with_name("quality.json"), dataclasses.asdict(quality))
    return quality


def config_of(file: Path, experiment: str | None) -> Config:
    """Finds the configuration that names the real images.

    Args:
      file: the generated images; in the folder of a run, the default is the run's configuration.
      experiment: a config file or the name of one.

    Raises:
      UserError: there is no such file or configuration.
    """
    if not file.is_file():
        raise UserError(f"there is no file {file}")
    if experiment is not None:
        return load_config(experiment)
    for folder in file.absolute().parents:
        if (folder / "config.json").is_file():
            return read_run(folder)
    raise UserError(f"{file} is not in the folder of a run: name the real images with --config")


def summary(quality: Quality) -> str:
    """Returns the quality as four lines of text."""
    counts = "  ".join(f"{name}: {count}" for name, count in quality.counts.items())
    unseen = (
        ""
        if quality.confidence_of_real is None or quality.accuracy is None
        else f" (held-out real images: {quality.confidence_of_real:.3f}, accuracy {quality.accuracy:.1%})"
    )
    also = (
        f"\nwarning: {quality.held_out_shared} of the held-out images are also among the real images, which the"
        " classifier was trained on"
        if quality.held_out_shared
        else ""
    )
    return (
        f"confidence of the classifier: {quality.confidence:.3f}{unseen}\n"
        f"classes: {counts}\n"
        f"FD-own {quality.fd_own:.3f}; real vs real {quality.fd_own_of_real:.3f}; ratio {quality.ratio:.2f} "
        f"({quality.images_compared} images per side)\n"
        f"real images: {quality.real}; held out: {quality.held_out or 'none, there is no labeled test split'}{also}"
    )


def _evenly(source: Source) -> np.ndarray:
    count = min(source.num_examples, _MOST_REAL)
    return np.arange(count) * source.num_examples // count


def _labeled(source: Source) -> tuple[np.ndarray, np.ndarray]:
    indices = _evenly(source)
    return source.read(indices), typing.cast(np.ndarray, source.labels)[indices]
