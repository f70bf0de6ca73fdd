import numpy as np
import pytest

from ddpm_jax.evaluation.frechet import distance_of_moments, moments
from ddpm_jax.evaluation.scores import (
    Statistics,
    compute_scores,
    evenly_spaced,
    inception_score,
    kernel_distance,
    precision_and_recall,
)
from ddpm_jax.system.errors import UserError

RANDOM = np.random.default_rng(5)


def reference(features, **fields):
    return Statistics("real", len(features), moments(features), features=features, **fields)


def test_kernel_distance_is_the_unbiased_estimate_over_disjoint_subsets():
    a, b = RANDOM.normal(size=(43, 7)), RANDOM.normal(size=(40, 7)) + 0.3
    kernel = lambda x, y: (x @ y / 7 + 1) ** 3
    random = np.random.default_rng(0)
    a_, b_ = a[random.permutation(43)], b[random.permutation(40)]
    estimates = []
    for first in range(0, 40, 4):
        x, y = a_[first : first + 4], b_[first : first + 4]
        others = [(i, j) for i in range(4) for j in range(4) if i != j]
        within = np.mean([kernel(x[i], x[j]) for i, j in others]) + np.mean([kernel(y[i], y[j]) for i, j in others])
        estimates.append(within - 2 * np.mean([kernel(p, q) for p in x for q in y]))
    assert kernel_distance(a, b) == pytest.approx((np.mean(estimates), np.std(estimates, ddof=1) / 10**0.5))


def test_kernel_distance_is_zero_on_average_between_sets_of_one_distribution_and_says_how_sure_it_is():
    pairs = [kernel_distance(RANDOM.normal(size=(200, 6)), RANDOM.normal(size=(200, 6))) for _ in range(60)]
    distances, errors = np.array(pairs).T
    assert abs(distances.mean()) < 3 * distances.std() / 60**0.5
    assert errors.mean() == pytest.approx(distances.std(), rel=0.25)


def test_precision_and_recall_as_defined():
    a, b = RANDOM.normal(size=(60, 4)), 0.7 * RANDOM.normal(size=(50, 4)) + 1

    def share_within(points, centers):
        radii = [np.sort(np.linalg.norm(centers - center, axis=1))[3] for center in centers]
        return np.mean([any(np.linalg.norm(centers - point, axis=1) <= radii) for point in points])

    found = precision_and_recall(a, b)
    assert found == pytest.approx((share_within(a, b), share_within(b, a)))
    assert 0.1 < found[0] < 0.9
    assert 0.1 < found[1] < 0.98
    # Far from the origin, where float32 squares lose the distances.
    assert precision_and_recall(a + 3000, b + 3000) == found


def test_blocks_do_not_change_precision_and_recall(monkeypatch):
    a, b = RANDOM.normal(size=(61, 4)), RANDOM.normal(size=(50, 4)) + 0.4
    whole = precision_and_recall(a, b)
    monkeypatch.setattr("ddpm_jax.evaluation.scores._DISTANCES_AT_ONCE", 7 * 50)
    assert precision_and_recall(a, b) == whole


def test_inception_score_of_certain_and_even_classes_is_their_number():
    certain = 50.0 * np.eye(4)[np.arange(400) % 4]
    assert inception_score(certain) == pytest.approx((4, 0))
    assert inception_score(np.zeros((400, 4))) == pytest.approx((1, 0))
    assert inception_score(certain[:, :2] + 1000) == pytest.approx(inception_score(certain[:, :2]))
    halves = np.concatenate([certain[:200], np.zeros((200, 4))])  # five splits of each
    assert inception_score(halves) == pytest.approx((2.5, 1.5))


def test_all_scores_that_are_possible_and_their_names():
    drawn, real = RANDOM.normal(size=(80, 5)).astype(np.float32), RANDOM.normal(size=(90, 5)).astype(np.float32)
    spatial = {"drawn": RANDOM.normal(size=(80, 3)), "real": RANDOM.normal(size=(90, 3))}
    features = {"pool": drawn, "spatial": spatial["drawn"], "logits": RANDOM.normal(size=(80, 4))}
    full = reference(real, spatial=moments(spatial["real"]))
    scores = compute_scores(features, full, name="Inception")
    assert [*scores] == ["FID", "sFID", "IS", "IS_std", "KID", "KID_standard_error", "precision", "recall"]
    assert scores["FID"] == distance_of_moments(moments(drawn), moments(real))
    assert scores["sFID"] == distance_of_moments(moments(spatial["drawn"]), moments(spatial["real"]))
    assert (scores["KID"], scores["KID_standard_error"]) == kernel_distance(drawn, real)

    own = compute_scores({"pool": drawn}, full, name="mine")
    assert [*own] == ["FD-mine", "KD-mine", "KD-mine_standard_error", "precision", "recall"]
    assert [*compute_scores({"pool": drawn}, full._replace(features=None), name="mine")] == ["FD-mine"]
    with pytest.raises(UserError, match="of 5-dimensional features, but --features mine has 4"):
        compute_scores({"pool": drawn[:, :4]}, full, name="mine")
    with pytest.raises(UserError, match="of 3-dimensional spatial features, but --features Inception has 2"):
        compute_scores({**features, "spatial": spatial["drawn"][:, :2]}, full, name="Inception")


def test_evenly_spaced_rows():
    assert evenly_spaced(np.arange(10), 4).tolist() == [0, 2, 5, 7]
    assert evenly_spaced(np.arange(3), 4).tolist() == [0, 1, 2]
