"""How close samples are to real images, judged by a small classifier fitted on the real ones.

For small labeled sets (the digits, Fashion-MNIST), where the Inception network of FID says little and need not be at
hand. The Frechet distance in the classifier's hidden features is called FD-own: it compares runs and samplers on one
set with each other, and is no FID.
"""

import dataclasses
import typing
import warnings
from pathlib import Path

import numpy as np
import threadpoolctl

from ddpm_jax.config import Config
from ddpm_jax.data.source import Source
from ddpm_jax.data.sources import load_source, resolve
from ddpm_jax.evaluation.frechet import frechet_distance
from ddpm_jax.run.experiments import load_config
from ddpm_jax.run.record import read_config
from ddpm_jax.system.errors import NoSuchSplit, UserError
from ddpm_jax.system.files import write_json

_FEATURES = 64
# So many images the classifier sees in all, over its passes: seconds on one core.
_IMAGES_SEEN = 300_000
_MOST_REAL = 20_000
_MOST_PIXELS = 64 * 64 * 3
_HALVINGS = 20


class Classifier:
    """A network of one hidden layer that names the classes of images: the same one for the same images."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        """Fits it.

        Args:
          images: (N, H, W, C) uint8.
          labels: (N,) integers >= 0, of two classes at least.
        """
        from sklearn.exceptions import ConvergenceWarning  # slow to import
        from sklearn.neural_network import MLPClassifier

        passes = min(200, max(5, _IMAGES_SEEN // len(images)))
        self._mean, self._scale = np.float32(images.mean()), np.float32(images.std() + 1e-6)
        self._network = MLPClassifier(hidden_layer_sizes=(_FEATURES,), max_iter=passes, alpha=1e-3, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the passes are few on purpose
            self._network.fit(self._inputs(images), labels)

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Says how likely each class is: (N, H, W, C) uint8 to (N, classes), in the order of their numbers."""
        return self._network.predict_proba(self._inputs(images))

    def names(self, images: np.ndarray) -> np.ndarray:
        """Names the likeliest class: (N, H, W, C) uint8 to (N,) of the labels' numbers."""
        return self._network.predict(self._inputs(images))

    def features(self, images: np.ndarray) -> np.ndarray:
        """Gives the hidden layer: (N, H, W, C) uint8 to (N, 64), each >= 0."""
        return np.maximum(self._inputs(images) @ self._network.coefs_[0] + self._network.intercepts_[0], 0)

    def _inputs(self, images: np.ndarray) -> np.ndarray:
        return (images.reshape(len(images), -1).astype(np.float32) - self._mean) / self._scale


@dataclasses.dataclass(frozen=True)
class Quality:
    """What the classifier says of generated images."""

    images: int
    """How many were judged."""
    confidence: float
    """The probability of the likeliest class, mean over the generated images."""
    confidence_of_real: float | None
    """The same over real images that the classifier has not seen; None where no split holds such."""
    accuracy: float | None
    """The share of those real images that the classifier names rightly."""
    counts: dict[str, int]
    """How many generated images it takes for each class."""
    fd_own: float
    """Frechet distance between generated and real images in the classifier's hidden features, not a FID."""
    fd_own_of_real: float
    """The yardstick: the same distance between two halves of the real images."""
    ratio: float
    """`fd_own / fd_own_of_real`: 1 where samples are as close to real images as those are to each other."""
    images_compared: int
    """How many images there are on either side of each distance."""


def own_frechet_distances(generated: np.ndarray, real: np.ndarray) -> tuple[float, float, int]:
    r"""Compares features of generated images with real ones, and real ones with each other, at equal sizes.

    The distance depends on how many there are. So the real set is cut into two halves A and B, m of the generated
    images G are taken, m = min(generated, half), and d(G, A) is held against d(B, A). Both are means over 20 random
    cuts, the same on every call.

    Args:
      generated: (N, D) features, N >= 2.
      real: (M, D) features, M >= 4.

    Returns:
      the mean of d(G, A), the mean of d(B, A), and m.
    """
    size = min(len(generated), len(real) // 2)
    distances = []
    for cut in range(_HALVINGS):
        random = np.random.default_rng(cut)
        order, chosen = random.permutation(len(real)), random.permutation(len(generated))[:size]
        half, other = real[order[:size]], real[order[size : 2 * size]]
        distances.append((frechet_distance(generated[chosen], half), frechet_distance(other, half)))
    of_generated, of_real = np.mean(distances, axis=0)
    return float(of_generated), float(of_real), size


def check_real(source: Source) -> None:
    """Checks that real images are such that others can be judged by them, before any are drawn.

    Raises:
      UserError: they have no labels, or are too large or too few.
    """
    if source.labels is None:
        raise UserError(f"{source.name}: the images have no labels, and quality is judged by naming their classes")
    if np.prod(source.image_shape) > _MOST_PIXELS:
        shape = "x".join(map(str, source.image_shape))
        raise UserError(f"{source.name}: images of {shape} are too large for quality, which is for 64x64x3 and less")
    if len(np.unique(source.labels)) < 2 or source.num_examples < 4:
        raise UserError(f"{source.name}: quality needs at least 4 real images of at least 2 classes")


def judge(images: np.ndarray, source: Source, held_out: Source | None = None) -> Quality:
    """Judges generated images by a classifier fitted on real ones.

    Args:
      images: (N, H, W, C) uint8, N >= 2.
      source: the real images, with labels; of more than 20,000 so many are taken, evenly spaced.
      held_out: real images that the classifier does not see, with labels, if there are such.

    Returns:
      what it says.

    Raises:
      UserError: the real images have no labels, are too large or too few, or the generated ones are of another shape
        or too few.
    """
    check_real(source)
    if images.shape[1:] != source.image_shape or images.dtype != np.uint8:
        raise UserError(
            f"the generated images are {images.shape[1:]} {images.dtype}, the real ones {source.image_shape} uint8: "
            "compare like with like"
        )
    if len(images) < 2:
        raise UserError(f"--num must be at least 2 to compare with real images, not {len(images)}")
    # On matrices as small as these BLAS is a hundred times slower with more threads than free cores.
    with threadpoolctl.threadpool_limits(1):
        return _judge(images, source, held_out)


def _judge(images: np.ndarray, source: Source, held_out: Source | None) -> Quality:
    real, labels = _labeled(source)
    classifier = Classifier(real, labels)
    names = classifier.names(images)
    classes = source.class_names or tuple(map(str, range(int(labels.max()) + 1)))
    fd_own, fd_own_of_real, compared = own_frechet_distances(classifier.features(images), classifier.features(real))
    confidence_of_real = accuracy = None
    if held_out is not None and held_out.labels is not None:
        unseen, right = _labeled(held_out)
        confidence_of_real = float(classifier.probabilities(unseen).max(axis=1).mean())
        accuracy = float((classifier.names(unseen) == right).mean())
    return Quality(
        images=len(images),
        confidence=float(classifier.probabilities(images).max(axis=1).mean()),
        confidence_of_real=confidence_of_real,
        accuracy=accuracy,
        counts={name: int((names == i).sum()) for i, name in enumerate(classes)},
        fd_own=fd_own,
        fd_own_of_real=fd_own_of_real,
        ratio=fd_own / fd_own_of_real,
        images_compared=compared,
    )


def judge_file(file: Path, config: Config, *, number: int) -> Quality:
    """Judges the images of an .npz file, and writes `quality.json` beside it.

    Args:
      file: holds `arr_0`, (N, H, W, C) uint8, as `sample.py` writes it.
      config: whose images are the real ones: its own split; "test" is held out where it is another.
      number: how many of the images to judge, the first ones.

    Returns:
      what it says.

    Raises:
      UserError: the file is not there or holds no such images, or as `judge`.
    """
    if number < 2:
        raise UserError(f"--num must be at least 2 to compare with real images, not {number}")
    images = read_images(file)
    if len(images) < number:
        raise UserError(f"{file} holds {len(images)} images: use --num {len(images)} or draw more")
    source, held_out = load_source(config.data), None
    if config.data.split == "train":
        try:
            held_out = load_source(dataclasses.replace(resolve(config.data), split="test"))
        except NoSuchSplit:
            held_out = None
    quality = judge(images[:number], source, held_out)
    write_json(file.with_name("quality.json"), dataclasses.asdict(quality))
    return quality


def read_images(file: Path) -> np.ndarray:
    """Reads `arr_0` of an .npz file: (N, H, W, C) uint8.

    Raises:
      UserError: the file is not there, is damaged, or holds no such array.
    """
    try:
        with np.load(file) as arrays:
            images = typing.cast(np.ndarray, arrays["arr_0"])
    except FileNotFoundError:
        raise UserError(f"there is no file {file}") from None
    except Exception as error:  # damaged archives make NumPy raise half a dozen kinds
        raise UserError(f"{file} holds no arr_0 that can be read ({str(error) or type(error).__name__})") from error
    if images.ndim != 4 or images.dtype != np.uint8:
        raise UserError(f"{file}: arr_0 must be (N, H, W, C) uint8, not {images.shape} {images.dtype}")
    return images


def config_of(file: Path, experiment: str | None) -> Config:
    """Finds the configuration that says which images are the real ones.

    Args:
      file: the images; in the folder of a run, the run's configuration is meant.
      experiment: a config file or the name of one, which goes first.

    Raises:
      UserError: there is none, or no such file.
    """
    if not file.is_file():
        raise UserError(f"there is no file {file}")
    if experiment is not None:
        return load_config(experiment)
    for folder in file.absolute().parents:
        if (folder / "config.json").is_file():
            return read_config(folder / "config.json")
    raise UserError(f"{file} is not in the folder of a run: say with --config which images are the real ones")


def summary(quality: Quality) -> str:
    """Says it in three lines."""
    counts = "  ".join(f"{name}: {count}" for name, count in quality.counts.items())
    unseen = (
        ""
        if quality.confidence_of_real is None or quality.accuracy is None
        else f" (held-out real images: {quality.confidence_of_real:.3f}, named rightly {quality.accuracy:.1%})"
    )
    return (
        f"confidence of the classifier: {quality.confidence:.3f}{unseen}\n"
        f"classes: {counts}\n"
        f"FD-own: {quality.fd_own:.3f}, between halves of the real images {quality.fd_own_of_real:.3f} "
        f"({quality.ratio:.2f} times; {quality.images_compared} images on either side)"
    )


def _labeled(source: Source) -> tuple[np.ndarray, np.ndarray]:
    count = min(source.num_examples, _MOST_REAL)
    indices = np.arange(count) * source.num_examples // count
    return source.read(indices), typing.cast(np.ndarray, source.labels)[indices]
