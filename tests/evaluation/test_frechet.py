import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from ddpm_jax.evaluation.frechet import Moments, distance_of_moments, frechet_distance, moments


def with_moments(mean, covariance, number, seed=0):
    """Features whose sample mean and covariance are exactly these."""
    features = np.random.default_rng(seed).normal(size=(number, len(mean)))
    features -= features.mean(axis=0)
    whiten = np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(features, rowvar=False))))
    return features @ whiten.T @ np.linalg.cholesky(covariance).T + mean


def random_covariance(size, seed):
    factor = np.random.default_rng(seed).normal(size=(size, size))
    return factor @ factor.T + 0.1 * np.eye(size)


def test_one_dimension_is_the_distance_of_means_and_deviations():
    a, b = with_moments(np.array([1.0]), np.array([[4.0]]), 10), with_moments(np.array([-2.0]), np.array([[0.25]]), 7)
    assert frechet_distance(a, b) == pytest.approx(3**2 + (2 - 0.5) ** 2, rel=1e-12)


def test_covariances_that_commute_have_a_closed_form():
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))
    of_a, of_b = np.array([1, 2, 3, 4, 5.0]), np.array([0.3, 7, 1, 2, 0.01])
    a = with_moments(np.zeros(5), basis * of_a @ basis.T, 40)
    b = with_moments(np.ones(5), basis * of_b @ basis.T, 60, seed=1)
    assert frechet_distance(a, b) == pytest.approx(5 + ((np.sqrt(of_a) - np.sqrt(of_b)) ** 2).sum(), rel=1e-10)


@given(size=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_the_optimal_map_between_the_gaussians_reaches_it(size, seed):
    # N(0, A) is carried to N(0, B) by x -> M x, M = A^-1/2 (A^1/2 B A^1/2)^1/2 A^-1/2, at the cost E |x - M x|^2.
    of_a, of_b = random_covariance(size, seed), random_covariance(size, seed + 1)

    def root(matrix, power):
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * values**power) @ vectors.T

    half, inverse = root(of_a, 0.5), root(of_a, -0.5)
    move = np.eye(size) - inverse @ root(half @ of_b @ half, 0.5) @ inverse
    a, b = with_moments(np.zeros(size), of_a, 30), with_moments(np.zeros(size), of_b, 20, seed=1)
    assert frechet_distance(a, b) == pytest.approx(np.trace(move @ of_a @ move.T), rel=1e-7, abs=1e-8)


@given(size=st.integers(1, 6), seed=st.integers(0, 10**6), number=st.integers(2, 8))
def test_symmetric_zero_for_equal_sets_and_blind_to_rotations(size, seed, number):
    # Fewer images than features: the covariances have no full rank.
    random = np.random.default_rng(seed)
    a, b = random.normal(size=(number, size)), 2 * random.normal(size=(number + 1, size)) + 1
    rotation, _ = np.linalg.qr(random.normal(size=(size, size)))
    scale = np.trace(np.atleast_2d(np.cov(b.T)))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), abs=1e-6 * scale)
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(frechet_distance(a, b), abs=1e-6 * scale)
    assert frechet_distance(b, b[::-1]) == pytest.approx(0, abs=1e-6 * scale)


@pytest.mark.parametrize("shapes", [((3,), (3,)), ((3, 2), (3, 4)), ((1, 2), (3, 2)), ((3, 2), (0, 2))])
def test_what_has_no_covariance_is_refused(shapes):
    with pytest.raises(ValueError, match="needs"):
        frechet_distance(*(np.zeros(shape) for shape in shapes))


def sets_of_features():
    random = np.random.default_rng(3)
    mix = random.normal(size=(256, 256)) / 16
    full = lambda number: np.maximum(random.normal(size=(number, 256)) @ mix + 0.2, 0)
    yield full(2000), full(1500) * 1.1
    low = random.normal(size=(40, 256)) / 6
    yield (
        random.normal(size=(1000, 40)) @ low,
        random.normal(size=(900, 40)) @ (low + 0.05 * random.normal(size=low.shape)) + 0.1,
    )
    yield full(12), full(9) + 0.3


@pytest.mark.parametrize(
    ("number", "of_pytorch_fid", "rel"),
    # Of pytorch-fid 0.3.0: full rank, singular, fewer images than features. It takes the root of the product itself,
    # which is less exact where that is singular.
    [(0, 8.614159890068805, 1e-12), (1, 31.47153731155845, 2e-6), (2, 204.4404431219806, 2e-7)],
)
def test_distances_equal_those_of_pytorch_fid(number, of_pytorch_fid, rel):
    a, b = list(sets_of_features())[number]
    distance = frechet_distance(a, b)
    assert distance == pytest.approx(of_pytorch_fid, rel=rel)
    # The trace of the root, from the images alone: the sum of the singular values of all their products.
    a_, b_ = ((each - each.mean(axis=0)) / (len(each) - 1) ** 0.5 for each in (a, b))
    root = np.linalg.svd(a_ @ b_.T, compute_uv=False).sum()
    exact = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + (a_**2).sum() + (b_**2).sum() - 2 * root
    assert distance == pytest.approx(exact, rel=1e-11)


def test_moments_are_those_of_numpy_whatever_the_type_and_the_blocks():
    features = (5 + np.random.default_rng(0).normal(size=(5000, 3))).astype(np.float32)
    found = moments(features)
    assert found.mean == pytest.approx(features.astype(np.float64).mean(axis=0), rel=1e-13)
    assert found.covariance == pytest.approx(np.cov(features.astype(np.float64), rowvar=False), rel=1e-12)
    with pytest.raises(ValueError, match="features"):
        distance_of_moments(found, Moments(np.zeros(2), np.eye(2)))
