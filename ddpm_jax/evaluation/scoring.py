"""FID and the scores beside it, of a run, a folder or a file of images, with the protocol to compare them by."""

import dataclasses
import importlib.metadata
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import ddpm_jax
from ddpm_jax.config import Config
from ddpm_jax.data.sources import load_source
from ddpm_jax.evaluation.efficientnet import load_efficientnet
from ddpm_jax.evaluation.extraction import extract
from ddpm_jax.evaluation.features import INCEPTION, Extractor, Features, users_features
from ddpm_jax.evaluation.image_sets import ARRAY, ImageSet, members_of, of_source, open_folder, open_npz
from ddpm_jax.evaluation.inception import load_inception
from ddpm_jax.evaluation.scores import (
    INCEPTION_SCORE_SPLITS,
    KID_SUBSET,
    LEAST_SUBSETS,
    MOST_REFERENCES,
    NEIGHBOR,
    Statistics,
    check_width,
    compute_scores,
    names_of_scores,
)
from ddpm_jax.evaluation.statistics import (
    Form,
    is_statistics,
    read_statistics,
    reference_statistics,
    statistics_of,
    write_statistics,
)
from ddpm_jax.generation.job import SamplingJob, default_folder, describe_job
from ddpm_jax.generation.sampler_config import SamplerConfig
from ddpm_jax.generation.store import Parts, Range, job_folder
from ddpm_jax.run.experiments import load_config
from ddpm_jax.run.pretrained import LOOKED_FOR, is_pretrained
from ddpm_jax.run.record import is_run, read_run
from ddpm_jax.system import user_code
from ddpm_jax.system.errors import UserError, printable
from ddpm_jax.system.files import crc32, read_json, read_or_set_aside, short_name, write_json
from ddpm_jax.system.hosts import appears, is_primary_host, of_primary_host, wait_for_all
from ddpm_jax.system.progress import say

NUMBER = 50_000
"""Images of a score as papers report it."""

_NETWORKS = {"inception": load_inception, "efficientnet-lite0": load_efficientnet}


class Reference(typing.NamedTuple):
    """What images are compared with: statistics that a file contains, images, or both."""

    name: str
    """As it was given, for the names of folders."""
    images: ImageSet | None = None
    statistics: Statistics | None = None
    options: tuple[str, ...] = ()
    """Of the command that opens it."""

    @property
    def identity(self) -> str:
        """A checksum of all that the scores depend on."""
        images = "" if self.images is None else self.images.identity
        known = [*(self.statistics.pool if self.statistics else ())]
        return f"{images} {' '.join(f'{crc32(array):08x}' for array in known)}".strip()

    def describe(self) -> dict[str, Any]:
        """Returns what it is, for the protocol."""
        images = {} if self.images is None else {"images": self.images.name, "checksum": self.images.identity}
        known = {} if self.statistics is None else {"statistics": self.statistics.name}
        number = self.statistics.number if self.statistics is not None else self.images and self.images.number
        return {**images, **known, "number": number, "options": [*self.options]}


def load_features(name: str, weights: str | None = None) -> Features:
    """Loads features by name: inception, efficientnet-lite0, or a user's `file.py:function`.

    Args:
      name: of the features.
      weights: file of the network's weights, if it is not where it is looked for.

    Raises:
      UserError: there are no such features, or their weights are missing or are others.
    """
    if user_code.is_named(name):
        if weights is not None:
            raise UserError("--weights is for inception and efficientnet-lite0: your function loads its own")
        return users_features(name)
    if name not in _NETWORKS:
        raise UserError(f"--features {name}: choose {', '.join(_NETWORKS)}, or your own file.py:function")
    return _NETWORKS[name](None if weights is None else Path(weights).expanduser())


def run_around(path: Path) -> Config | None:
    """Returns the configuration of the run in whose folder a file lies; None if there is none."""
    return next((read_run(folder) for folder in path.absolute().parents if is_run(folder)), None)


def open_images(given: str, *, path: str | None = None) -> ImageSet:
    """Opens images that are not to be drawn: of an .npz file, a folder, or the data set of a config.

    Args:
      given: the file, the folder, or the name of the config.
      path: where the config's images are, if not where it says.

    Raises:
      UserError: there are none; the message says what was looked for.
    """
    place = Path(given).expanduser()
    if place.suffix == ".npz":
        return open_npz(place)
    if place.is_dir():
        return _open_folder(place)
    if place.exists() or (place.suffix != ".py" and (place.suffix or "/" in given)):
        raise UserError(
            f"{printable(given)} is neither a folder, nor an .npz file of images, nor a config such as cifar10"
        )
    return _training_images(load_config(given), path)


def _training_images(config: Config, path: str | None = None) -> ImageSet:
    data = config.data if path is None else dataclasses.replace(config.data, path=path)
    return of_source(load_source(data))


def _open_folder(folder: Path) -> ImageSet:
    try:
        return open_folder(folder)
    except UserError as error:
        if "no image file" not in str(error):
            raise
        raise UserError(
            f"{printable(folder)} is neither a run, nor a model of another program, nor a folder of images: looked for "
            f"{LOOKED_FOR}; image files in it or below"
        ) from None


def open_reference(
    given: str | None,
    *,
    features: Features,
    config: Config | None = None,
    evaluated: Path | None = None,
    number: int = 0,
    path: str | None = None,
) -> Reference:
    """Opens what images are compared with.

    Args:
      given: a file of statistics or of images, a folder of images, or a config, whose training images are meant; the
        training images of the run if not given.
      features: in which they are compared.
      config: of the run, if a run is evaluated.
      evaluated: the run, the folder or the file that is evaluated; a reference inside it is refused.
      number: of reference images to use, evenly spaced; 0: all.
      path: where the images of a given config are, if not where it says.

    Raises:
      UserError: there is no such reference, or it is what is evaluated.
    """
    part = f"_{number}" if number else ""
    options = {"reference": given, "reference-num": number or None, "data.path": path}
    words = tuple(f"--{name}={value}" for name, value in options.items() if value is not None)
    if given is None:
        if config is None:
            raise UserError(
                "--reference is missing: name the real images (a config such as cifar10, a folder, an .npz)"
            )
        return Reference(f"train{part}", _training_images(config).spaced(number), options=words)
    place = Path(given).expanduser()
    if evaluated is not None and place.exists():
        here, there = place.resolve(), evaluated.resolve()
        if here == there or there in here.parents:
            raise UserError(
                f"--reference {printable(given)} is, or lies inside, what is being evaluated: name real images, or "
                "leave it out to compare a run with its training images"
            )
    if is_run(place) or is_pretrained(place):
        raise UserError(f"--reference {printable(given)} is a model: name real images, or an .npz file of its samples")
    if not (place.is_file() and is_statistics(place)):
        return Reference(f"{_named(place)[1]}{part}", open_images(given, path=path).spaced(number), options=words)
    if number:
        raise UserError(
            f"--reference-num does not apply to {printable(given)}, which contains statistics: leave it out"
        )
    statistics = read_statistics(place, features=features.name)
    images = open_npz(place) if place.suffix == ".npz" and ARRAY in members_of(place) else None
    return Reference(place.stem, images, statistics, words)


def _named(path: Path) -> tuple[Path, str]:
    """Returns the folder that a file or folder is in, and what is derived from it is called."""
    if path.name in ("", ".."):
        path = path.resolve()
    return path.parent, path.name if path.is_dir() else path.stem


def lower_is_better(reference: Reference, features: Features, number: int) -> set[str]:
    """Returns the names of the scores of so many images of which lower is better."""
    frechet, kernel = names_of_scores(features.name)
    images, statistics = reference.images, reference.statistics
    names = {frechet}
    if features.name == INCEPTION and (statistics is None or statistics.spatial is not None):
        names.add("sFID")
    rows = None if statistics is None else statistics.features
    known = images.number if images is not None else 0 if rows is None else len(rows)
    return names | ({kernel} if min(number, known) >= 2 * LEAST_SUBSETS else set())


def folder_of_scores(job: SamplingJob | None, given: str, reference: str, number: int, features: Features) -> Path:
    """Returns the default folder of the scores of some images: in the run's folder, or beside the images."""
    parent, name = _named(Path(given).expanduser())
    base = parent / f"{name}_fid" if job is None else job.trained.folder / "fid"
    drawn = "" if job is None else f"{default_folder(job).name}_"
    return base / short_name(f"{drawn}num_{number}_{features.name}_{reference}")


def check_comparable(shape: tuple[int, int, int], reference: Reference, extractor: Extractor) -> None:
    """Checks that images of a shape, (H, W, C), can be compared with a reference, before they are drawn.

    Raises:
      UserError: the images of the reference have another size, its statistics are of other features, or the features
        cannot be computed of such images.
    """
    real = reference.images
    if real is not None and real.shape[:2] != shape[:2]:
        here, there = (f"{height}x{width}" for height, width, _ in (shape, real.shape))
        raise UserError(
            f"--reference: the images of {real.name} are {there}, and those to be compared {here}: resize them first, "
            "as the training images were"
        )
    features = extractor(np.zeros((1, *shape), np.uint8))
    if reference.statistics is not None:
        check_width(reference.statistics, features, name=extractor.features.name)


def score(
    images: ImageSet,
    reference: Reference | None,
    extractor: Extractor,
    out: Path,
    *,
    drawn: Mapping[str, Any] | None = None,
    statistics: tuple[Path, Form] | None = None,
    cache: Path | None = None,
) -> dict[str, Any] | None:
    """Scores images, and writes `scores.json`; interrupted, it resumes where it was.

    Several hosts that share the folder call it together: each computes its part of the features, and host 0 the scores.

    Args:
      images: the generated images.
      reference: the real ones; None: statistics of the images are written, and no scores computed.
      extractor: of the features.
      out: the folder of the scores, and of the features until they are done.
      drawn: how the images were drawn, for the protocol.
      statistics: the file to which the statistics of the images are written, and its form.
      cache: folder of the statistics of references; that of `cache_folder` if not given.

    Returns:
      the scores and the protocol, as they are in the file; None without a reference.

    Raises:
      UserError: the images are too few or are the reference, or the reference is of other features.
    """
    if images.number < 2:
        raise UserError(f"{images.name}: scores need at least 2 images, and thousands to be meaningful")
    real = None if reference is None else reference.images
    if real is not None and real.whole == images.whole:
        raise UserError(f"--reference: {real.name} contains the images that are evaluated: name real images")
    if reference is not None:
        check_comparable(images.shape, reference, extractor)
    protocol = _protocol(images, reference, extractor.features, drawn or {})
    # Names and places may change, and so may the versions.
    known_by = {
        "images": images.identity,
        "number": images.number,
        "features": f"{extractor.features.name} {extractor.features.identity}",  # a file may have several functions
        "reference": None if reference is None else reference.identity,
    }
    file, parts = out / "scores.json", Parts(out / "parts", known_by)
    request = (extractor.batch_size, statistics)

    def done() -> list[Range]:
        is_finished = statistics is None and _saved(file, known_by) is not None
        return [(0, images.number)] if is_finished else parts.ranges()

    with job_folder(out, known_by, kind="fid", number=images.number, done=done, request=request):
        is_primary = is_primary_host()
        saved = _saved(file, known_by) if is_primary and statistics is None else None
        if of_primary_host(saved is not None):
            return saved or _written(file, known_by)
        known = _known(reference, extractor, cache) if reference is not None and is_primary else None
        wait_for_all("the statistics of the reference are known")
        features = extract(images, extractor, parts, by_all_hosts=True)
        if statistics is not None and is_primary:
            found = statistics_of(images.name, features)
            for written in write_statistics(
                statistics[0], found, images, form=statistics[1], features=extractor.features.name
            ):
                say(f"statistics of {images.name}: {written}")
        result = None
        if known is not None:
            scores = compute_scores(features, known, name=extractor.features.name)
            result = {"scores": scores, **protocol, "job": known_by}
            write_json(file, result)
        if is_primary:
            parts.remove()
        wait_for_all("the scores are written")
        return result if reference is None or is_primary else _written(file, known_by)


def _saved(file: Path, known_by: Mapping[str, Any]) -> dict[str, Any] | None:
    saved = read_or_set_aside(file, read_json) if file.exists() else None
    return saved if saved is not None and saved.get("job") == known_by else None


def _written(file: Path, known_by: Mapping[str, Any]) -> dict[str, Any]:
    appears(lambda: _saved(file, known_by) is not None)  # host 0 has written it
    saved = _saved(file, known_by)
    if saved is None:
        raise UserError(f"the scores that host 0 wrote do not appear in {file}: run the same command again")
    return saved


def _known(reference: Reference, extractor: Extractor, cache: Path | None) -> Statistics:
    found = reference.statistics
    if reference.images is None:
        return typing.cast(Statistics, found)
    of_images = reference_statistics(reference.images, extractor, cache=cache)
    return of_images if found is None else found._replace(features=of_images.features)


def _protocol(
    images: ImageSet, reference: Reference | None, features: Features, drawn: Mapping[str, Any]
) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    versions["ddpm_jax"] = ddpm_jax.__version__
    return {
        "images": {"name": images.name, "number": images.number, "checksum": images.identity, "drawn": dict(drawn)},
        "reference": None if reference is None else reference.describe(),
        "features": {"name": features.name, "sha256": features.identity, "resize": features.resize},
        "settings": {
            "covariance": "divisor N - 1, float64",
            "IS": f"{INCEPTION_SCORE_SPLITS} splits in order, logits without bias",
            "KID": f"disjoint subsets of at most {KID_SUBSET} images",
            "precision and recall": f"k = {NEIGHBOR}, {MOST_REFERENCES} reference images at most",
        },
        "versions": versions,
    }


def describe_drawn(job: SamplingJob) -> dict[str, Any]:
    """Returns how the images of a job are drawn, for the protocol."""
    return {"run": job.trained.folder.name, **describe_job(job)}


def summary(result: Mapping[str, Any]) -> str:
    """Returns scores and protocol as lines of text."""
    scores, images, reference, features = (result[name] for name in ("scores", "images", "reference", "features"))
    frechet, kernel = names_of_scores(features["name"])
    lines = [f"{frechet} {scores[frechet]:.4f} ({images['number']:,} images)"]
    more = [f"sFID {scores['sFID']:.4f}"] if "sFID" in scores else []
    more += [f"IS {scores['IS']:.3f} ({scores['IS_std']:.3f})"] if "IS" in scores else []
    if kernel in scores:
        more.append(f"{kernel} {scores[kernel]:.6f} (standard error {scores[f'{kernel}_standard_error']:.6f})")
    if "precision" in scores:
        more.append(f"precision {scores['precision']:.4f}, recall {scores['recall']:.4f}")
    lines += ["; ".join(more)] if more else []
    if images["number"] < NUMBER:
        unbiased = f"; {kernel} has no such bias" if kernel in scores else ""
        lines.append(
            f"warning: {frechet} of {images['number']:,} images is biased upwards relative to the {NUMBER:,} that "
            f"papers use: compare it only with scores of as many images{unbiased}"
        )
    drawn = images["drawn"]
    if drawn:
        default = {**dataclasses.asdict(SamplerConfig()), "sampler": None}
        keys = ["checkpoint", "sigma_rel", "seed", *default]
        shown = ", ".join(f"{key} {drawn[key]}" for key in keys if drawn.get(key) not in (None, [], default.get(key)))
        lines.append(f"images: {drawn['run']}, {shown}")
    else:
        lines.append(f"images: {images['name']}")
    of = f" ({reference['number']:,} images)" if reference["number"] else ""
    lines.append(f"reference: {reference.get('statistics') or reference['images']}{of}")
    lines.append(f"features: {features['name']}, SHA-256 {features['sha256'][:8]}, {features['resize']}")
    if features["name"] != INCEPTION:
        lines.append(f"{frechet} is not FID: it compares only with distances in the same features")
    return "\n".join(lines)
