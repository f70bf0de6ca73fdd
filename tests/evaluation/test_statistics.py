import os
import pickle

import numpy as np
import pytest

from ddpm_jax.data.source import in_memory
from ddpm_jax.evaluation.features import Extractor, Features
from ddpm_jax.evaluation.frechet import moments
from ddpm_jax.evaluation.image_sets import of_source
from ddpm_jax.evaluation.statistics import (
    is_statistics,
    read_statistics,
    reference_statistics,
    statistics_of,
    write_statistics,
)
from ddpm_jax.system.errors import UserError

RANDOM = np.random.default_rng(0)
IMAGES = of_source(in_memory(RANDOM.integers(0, 256, (40, 4, 4, 3), np.uint8), name="set"))
POOL, SPATIAL = RANDOM.normal(size=(40, 6)).astype(np.float32), RANDOM.normal(size=(40, 4)).astype(np.float32)
KNOWN = statistics_of("set", {"pool": POOL, "spatial": SPATIAL})


def counting(calls):
    """Features that note how many images they see."""

    def apply(params, images):
        calls.append(len(images))
        return {"pool": images.reshape(len(images), -1)[:, :6].astype(np.float32)}

    return Extractor(Features("own", apply, None, "1", "as they are", on_host=True), batch_size=8)


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("form", "name", "has_spatial", "has_features"),
    [
        ("pytorch-fid", "s.npz", False, False),
        ("adm", "s.npz", True, False),
        ("clean-fid", "s.npz", False, True),
        ("edm2", "s.pkl", False, False),
    ],
)
def test_what_is_written_for_an_evaluator_is_read_again(form, name, has_spatial, has_features, tmp_path):
    files = write_statistics(tmp_path / name, KNOWN, IMAGES, form=form, features="Inception")
    assert all(map(is_statistics, files))
    found = read_statistics(files[0], features="Inception")
    assert equal(found.pool, KNOWN.pool)
    assert (found.spatial is not None) == has_spatial
    assert not has_spatial or equal(found.spatial, KNOWN.spatial)
    assert (found.features is not None) == has_features
    assert not has_features or np.array_equal(found.features, POOL)


def test_the_layouts_of_the_evaluators(tmp_path):
    write = lambda name, form: write_statistics(tmp_path / name, KNOWN, IMAGES, form=form, features="Inception")
    write("adm.npz", "adm")
    with np.load(tmp_path / "adm.npz") as arrays:
        assert sorted(arrays.files) == ["arr_0", "mu", "mu_s", "sigma", "sigma_s"]
        assert np.array_equal(arrays["arr_0"], IMAGES.read(np.arange(40)))
    write("edm.pkl", "edm2")
    content = pickle.loads((tmp_path / "edm.pkl").read_bytes())
    assert content["num_images"] == 40
    assert equal(content["fid"].values(), KNOWN.pool)
    write("clean.npz", "clean-fid")
    assert np.array_equal(np.load(tmp_path / "clean_kid.npz")["feats"], POOL)
    alone = read_statistics(tmp_path / "clean_kid.npz", features="Inception")
    assert equal(alone.pool, KNOWN.pool)
    with pytest.raises(UserError, match=r"are a \.pkl file"):
        write("edm.npz", "edm2")
    with pytest.raises(UserError, match="spatial features, which own does not have"):
        write_statistics(tmp_path / "s.npz", KNOWN._replace(spatial=None), IMAGES, form="adm", features="own")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (dict(mu=np.zeros(3)), "must contain both mu and sigma"),
        (dict(mu=np.zeros(3), sigma=np.eye(2)), r"sigma \(D, D\), not \(3,\) and \(2, 2\)"),
        (dict(mu=np.zeros(3), sigma=np.full((3, 3), np.nan)), "sigma contains NaN"),
        (dict(mu=np.zeros(3, int), sigma=np.eye(3)), "floating-point"),
        (dict(mu=np.zeros(3), sigma=np.eye(3), mu_s=np.zeros(2)), "both mu_s and sigma_s"),
        (dict(mu=np.zeros(3), sigma=np.eye(3), feats=np.zeros((4, 2))), "of 3 features"),
        (dict(feats=np.zeros(4)), r"feats must be \(N, D\)"),
        (dict(mu=np.array([None]), sigma=np.eye(1)), "no readable statistics"),
    ],
)
def test_other_files_are_one_line(arrays, words, tmp_path):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(UserError, match=words):
        read_statistics(tmp_path / "s.npz", features="Inception")


class Program:
    def __reduce__(self):
        return os.system, ("true",)


def test_pickles_are_read_without_running_them(tmp_path):
    file = tmp_path / "s.pkl"
    mu, sigma = KNOWN.pool
    content = {"num_images": np.int64(40), "fid": {"mu": mu, "sigma": sigma}, "fd_dinov2": {"mu": mu, "sigma": sigma}}
    file.write_bytes(pickle.dumps(content, protocol=4))
    found = read_statistics(file, features="Inception")
    assert found.number == 40
    assert equal(found.pool, KNOWN.pool)
    with pytest.raises(UserError, match="has no statistics of own, only of fid, fd_dinov2"):
        read_statistics(file, features="own")
    file.write_bytes(pickle.dumps({"fid": Program()}))
    with pytest.raises(UserError, match=r"asks for \w+\.system"):
        read_statistics(file, features="Inception")
    file.write_bytes(pickle.dumps({"fid": {"mu": np.array([{}]), "sigma": sigma}}, protocol=4))
    with pytest.raises(UserError, match="an array of 'O8'"):
        read_statistics(file, features="Inception")
    for damaged in (b"", pickle.dumps(content)[:-9], pickle.dumps([1])):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="no readable statistics"):
            read_statistics(file, features="Inception")
    with pytest.raises(UserError, match="there is no file"):
        read_statistics(tmp_path / "absent.pkl", features="Inception")


def test_statistics_of_a_reference_are_computed_once(tmp_path):
    calls = []
    found = reference_statistics(IMAGES, counting(calls), cache=tmp_path)
    pixels = IMAGES.read(np.arange(40)).reshape(40, -1)[:, :6].astype(np.float32)
    assert equal(found.pool, moments(pixels))
    assert np.array_equal(found.features, pixels)
    assert calls == [8] * 5
    again = reference_statistics(IMAGES, counting(calls), cache=tmp_path)
    assert len(calls) == 5
    assert equal(again.pool, found.pool)
    (file,) = tmp_path.glob("statistics/*")  # and nothing else is left

    other = IMAGES._replace(identity="of other pixels")
    reference_statistics(other, counting(calls), cache=tmp_path)
    reference_statistics(IMAGES.spaced(20), counting(calls), cache=tmp_path)
    assert len(calls) == 5 + 5 + 3

    file.write_bytes(file.read_bytes()[:-40])
    assert equal(reference_statistics(IMAGES, counting(calls), cache=tmp_path).pool, found.pool)
    assert len(calls) == 18
    with pytest.raises(UserError, match="at least 2"):
        reference_statistics(IMAGES.first(1), counting(calls), cache=tmp_path)
