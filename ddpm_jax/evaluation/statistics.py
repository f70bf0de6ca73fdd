"""Statistics of reference images: computed once and cached, and in the files of other evaluators.

Read are the files of pytorch-fid and EDM (.npz with `mu` and `sigma`), ADM (also `mu_s` and `sigma_s` of the spatial
features, and images in `arr_0`), clean-fid (also `feats` in NAME_kid.npz) and EDM2 (.pkl); written is each of these.
"""

import hashlib
import json
import pickle
import typing
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.evaluation.extraction import extract
from ddpm_jax.evaluation.features import INCEPTION, Extractor
from ddpm_jax.evaluation.frechet import Moments, moments
from ddpm_jax.evaluation.image_sets import DAMAGE, ImageSet, members_of
from ddpm_jax.evaluation.scores import MOST_REFERENCES, Statistics, evenly_spaced
from ddpm_jax.generation.store import Parts
from ddpm_jax.names import Form
from ddpm_jax.system.errors import UserError, printable
from ddpm_jax.system.files import (
    cache_folder,
    claimed,
    open_file,
    read_arrays,
    read_or_set_aside,
    write_arrays,
    write_whole,
)
from ddpm_jax.system.npy import read_npz
from ddpm_jax.system.plain_pickle import read_dictionary
from ddpm_jax.system.progress import say

_DAMAGE = (
    *DAMAGE,
    *(TypeError, AttributeError, IndexError, pickle.UnpicklingError, ArithmeticError, MemoryError),
)
# Features that are kept for KID: 410 MB of Inception's.
_MOST_FEATURES = 50_000
_MOST_BYTES = 2**32  # of all arrays in a file
_KID = "_kid.npz"


def _write_npz(file: Path, arrays: dict[str, Any]) -> None:
    write_whole(file, lambda opened: np.savez(opened, **arrays))


def statistics_of(name: str, features: dict[str, np.ndarray]) -> Statistics:
    """Computes the statistics of a set from its features, (N, ...) by name, N >= 2."""
    pool, spatial = features["pool"], features.get("spatial")
    return Statistics(
        name,
        len(pool),
        moments(pool),
        None if spatial is None else moments(spatial),
        evenly_spaced(pool, _MOST_FEATURES),
    )


def reference_statistics(images: ImageSet, extractor: Extractor, *, cache: Path | None = None) -> Statistics:
    """Returns the statistics of a set of images, from the cache if they are there; else computes and caches them.

    They are found by the checksum of the images and that of the features; damaged files are computed anew.

    Args:
      images: at least two.
      extractor: of the features.
      cache: the folder; that of `cache_folder` if not given.

    Raises:
      UserError: an image cannot be read, the cache cannot be written, or another process computes the same.
    """
    if images.number < 2:
        raise UserError(
            f"{images.name} has {images.number} image: a reference needs at least 2, and thousands to be meaningful"
        )
    folder = (cache_folder() if cache is None else cache) / "statistics"
    what = {"images": images.identity, "number": images.number, "shape": images.shape}
    what |= {"features": extractor.features.name, "identity": extractor.features.identity}
    key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    file = folder / f"{key}.npz"
    cached = read_or_set_aside(file, lambda file: read_arrays(file, what)) if file.exists() else None
    if cached is not None:
        spatial = Moments(cached["mu_s"], cached["sigma_s"]) if "mu_s" in cached else None
        pool = Moments(cached["mu"], cached["sigma"])
        return Statistics(images.name, int(cached["number"]), pool, spatial, cached["feats"])
    parts = Parts(folder / f"{key}_parts", what)
    with claimed(parts.folder):
        found = statistics_of(images.name, extract(images, extractor, parts, names=("pool", "spatial")))
        arrays: dict[str, Any] = {"mu": found.pool.mean, "sigma": found.pool.covariance, "feats": found.features}
        if found.spatial is not None:
            arrays |= {"mu_s": found.spatial.mean, "sigma_s": found.spatial.covariance}
        write_arrays(file, {"number": np.array(found.number), **arrays}, {"name": images.name, **what})
    (parts.folder / ".lock").unlink(missing_ok=True)
    parts.remove()
    say(f"statistics of {images.name} are cached in {file}")
    return found


def is_statistics(file: Path) -> bool:
    """Returns whether a file contains statistics: a .pkl, or an .npz with `mu` or `feats`."""
    return file.suffix == ".pkl" or not members_of(file).isdisjoint(("mu.npy", "feats.npy"))


def read_statistics(file: Path, *, features: str) -> Statistics:
    """Reads statistics that any of the evaluators wrote.

    Args:
      file: an .npz or a .pkl; beside NAME.npz, NAME_kid.npz is read as well if it exists.
      features: name of the features that are used, which chooses among those of EDM2.

    Returns:
      the statistics; without features where the file has moments only.

    Raises:
      UserError: the file is damaged or has other contents, or its statistics are not finite.
    """
    shown = printable(file)
    try:
        arrays = _of_pickle(file, features) if file.suffix == ".pkl" else _of_npz(file)
    except FileNotFoundError:
        raise UserError(f"there is no file {shown}") from None
    except _DAMAGE as error:
        reason = printable(" ".join(str(error).split()))[:100]
        raise UserError(f"{shown} contains no readable statistics ({reason or type(error).__name__})") from error
    rows = _finite(shown, "feats", arrays["feats"]).astype(np.float32) if "feats" in arrays else None
    if rows is not None and (rows.ndim != 2 or len(rows) < 2):
        raise UserError(f"{shown}: feats must be (N, D) with N >= 2, not {rows.shape}")
    if rows is not None and "mu" not in arrays:
        return Statistics(shown, len(rows), moments(rows), None, rows)
    pool = _moments(shown, arrays, "mu", "sigma")
    spatial = _moments(shown, arrays, "mu_s", "sigma_s") if "mu_s" in arrays else None
    if rows is not None and rows.shape[1] != len(pool.mean):
        raise UserError(f"{shown} is of {len(pool.mean)} features, and the feats beside it of {rows.shape[1]}")
    return Statistics(shown, arrays.get("number"), pool, spatial, rows)


def _of_npz(file: Path) -> dict[str, Any]:
    with open_file(file) as opened:
        arrays = read_npz(opened, ("mu", "sigma", "mu_s", "sigma_s", "feats"), most_bytes=_MOST_BYTES)
    beside = file.with_name(f"{file.stem}{_KID}")
    if "feats" not in arrays and beside.is_file():
        with open_file(beside) as opened:
            arrays["feats"] = read_npz(opened, ("feats",), most_bytes=_MOST_BYTES)["feats"]
    return arrays


def _of_pickle(file: Path, features: str) -> dict[str, Any]:
    if file.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{file.stat().st_size / 2**30:.3g} GiB")
    with open_file(file) as opened:
        found = read_dictionary(opened.read())
    name = "fid" if features == INCEPTION else features
    entries = [each for each, value in found.items() if isinstance(value, dict)]
    if name not in entries:
        raise UserError(f"{printable(file)} has no statistics of {name}, only of {', '.join(map(printable, entries))}")
    number = found.get("num_images")
    arrays = {each: getattr(found[name].get(each), "value", None) for each in ("mu", "sigma")}
    return {**arrays, "number": None if number is None else int(number)}


def _moments(shown: str, arrays: dict[str, Any], mean: str, covariance: str) -> Moments:
    if arrays.get(mean) is None or arrays.get(covariance) is None:
        raise UserError(f"{shown} must contain both {mean} and {covariance}")
    found = Moments(_finite(shown, mean, arrays[mean]), _finite(shown, covariance, arrays[covariance]))
    size = found.mean.shape
    if len(size) != 1 or found.covariance.shape != (*size, *size):
        raise UserError(
            f"{shown}: {mean} must be (D,) and {covariance} (D, D), not {size} and {found.covariance.shape}"
        )
    return found


def _finite(shown: str, name: str, array: Any) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype.kind != "f":
        raise UserError(f"{shown}: {name} must be floating-point numbers, not {array.dtype}")
    if not np.isfinite(array).all():
        raise UserError(f"{shown}: {name} contains NaN or infinity: compute the statistics again")
    return array.astype(np.float64)


def check_form(file: Path, form: Form, *, has_spatial: bool, features: str) -> None:
    """Checks that statistics can be written, before they are computed.

    Args:
      file: where to.
      form: whose evaluator is to read it.
      has_spatial: whether there are spatial features.
      features: name of the features.

    Raises:
      UserError: the file has another ending, or the form needs what the features do not have.
    """
    ending = ".pkl" if form == "edm2" else ".npz"
    if file.suffix != ending:
        raise UserError(f"--save-statistics {file}: the statistics of {form} are a {ending} file")
    if form == "adm" and not has_spatial:
        raise UserError(f"--statistics-form adm needs spatial features, which {features} does not have")


def write_statistics(file: Path, statistics: Statistics, images: ImageSet, *, form: Form, features: str) -> list[Path]:
    """Writes statistics for another evaluator.

    Args:
      file: where to; with the ending .npz, for EDM2 .pkl.
      statistics: of the images, with features.
      images: the images, of which ADM's form holds 10,000, evenly spaced.
      form: whose evaluator is to read it.
      features: name of the features.

    Returns:
      the files.

    Raises:
      UserError: the file cannot be written, or as `check_form`.
    """
    pool, spatial = statistics.pool, statistics.spatial
    check_form(file, form, has_spatial=spatial is not None, features=features)
    both = {"mu": pool.mean, "sigma": pool.covariance}
    match form:
        case "pytorch-fid":
            _write_npz(file, both)
        case "clean-fid":
            beside = file.with_name(f"{file.stem}{_KID}")
            _write_npz(file, both)
            _write_npz(beside, {"feats": statistics.features})
            return [file, beside]
        case "adm":
            spatial = typing.cast(Moments, spatial)
            some = images.spaced(MOST_REFERENCES)
            pixels = some.read(np.arange(some.number))
            more = {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
            _write_npz(file, {"arr_0": pixels, **both, **more})
        case "edm2":
            content = {"num_images": statistics.number, "fid" if features == INCEPTION else features: both}
            write_whole(file, lambda opened: pickle.dump(content, opened, protocol=4))
        case _:
            typing.assert_never(form)
    return [file]
