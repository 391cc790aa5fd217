from __future__ import annotations

import json
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, roc_auc_score, roc_curve
from sklearn.model_selection import KFold

from partial_fc.errors import ConfigError, DataError, NonFiniteError
from partial_fc.evaluate.verification import VerificationResult, best_threshold, pair_cosines, verification


def a_set(pairs: int = 600, size: int = 16, noise: float = 1.0, seed: int = 0, digits: int | None = None) -> dict:
    """Noisy embeddings of identities; few ``digits`` make many equal cosines."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((40, size))
    identity = np.arange(160) % 40
    embeddings = centres[identity] + noise * random.standard_normal((160, size))
    if digits is not None:
        embeddings = embeddings.round(digits)
    left = random.integers(0, 160, pairs)
    same = random.random(pairs) < 0.5
    right = np.where(
        same, (left + 40 * random.integers(1, 4, pairs)) % 160, (left + random.integers(1, 40, pairs)) % 160
    )
    return {"embeddings": embeddings, "left": left, "right": right, "same": identity[left] == identity[right]}


def cosines(embeddings: np.ndarray, left: np.ndarray, right: np.ndarray, same: np.ndarray) -> np.ndarray:
    del same
    return pair_cosines(embeddings, left, right)


def of_scores(scores: list[float], same: list[bool], **arguments: object) -> VerificationResult:
    """A set whose pairs have exactly these cosines: each against the first axis."""
    rows = [[1.0, 0.0]] + [[score, math.sqrt(1 - score * score)] for score in scores]
    count = len(scores)
    return verification(rows, [0] * count, np.arange(1, count + 1), np.array(same), **arguments)  # type: ignore[arg-type]


SETS = [{}, {"noise": 0.3}, {"noise": 3.0, "seed": 1}, {"digits": 0, "size": 3, "seed": 2}, {"pairs": 137, "seed": 3}]


def test_cosines_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    data = a_set(pairs=101)
    expected = [
        (a @ b) / (np.linalg.norm(a) * np.linalg.norm(b))
        for a, b in zip(data["embeddings"][data["left"]], data["embeddings"][data["right"]], strict=True)
    ]
    np.testing.assert_allclose(cosines(**data), expected, rtol=1e-12)
    whole = cosines(**data)
    monkeypatch.setitem(pair_cosines.__globals__, "_ROWS", 7)
    assert (cosines(**data) == whole).all()


def test_a_zero_embedding_has_cosine_zero() -> None:
    assert pair_cosines(np.array([[0.0, 0], [1, 2]]), np.array([0, 0]), np.array([1, 0])).tolist() == [0, 0]


def brute_thresholds(scores: np.ndarray) -> Iterator[float]:
    """From the strictest: the highest score, all middles, and below the lowest."""
    distinct = sorted(set(scores.tolist()), reverse=True)
    yield distinct[0]
    yield from ((a + b) / 2 for a, b in zip(distinct[:-1], distinct[1:], strict=True))
    yield distinct[-1] - 1e-9


@pytest.mark.parametrize("arguments", SETS)
@pytest.mark.parametrize("folds", [2, 7, 10])
def test_accuracy_is_that_of_brute_force_over_kfold(arguments: dict, folds: int) -> None:
    data = a_set(**arguments)
    scores, same = cosines(**data), data["same"]
    result = verification(**data, folds=folds)
    expected = []
    for fold, (train, test) in enumerate(KFold(folds, shuffle=False).split(scores)):
        # max() keeps the first of equally good ones, which is the strictest.
        best = max(brute_thresholds(scores[train]), key=lambda t: np.sum((scores[train] > t) == same[train]))  # noqa: B023
        assert result.fold_thresholds[fold] == pytest.approx(best, abs=1e-8)
        expected.append(accuracy_score(same[test], scores[test] > best))
    np.testing.assert_allclose(result.fold_accuracies, expected, rtol=1e-12)
    assert result.accuracy == pytest.approx(np.mean(expected)) and result.accuracy_std == pytest.approx(
        np.std(expected)
    )
    assert result.threshold == pytest.approx(result.fold_thresholds.mean())


def grid_accuracies(scores: np.ndarray, same: np.ndarray) -> Iterator[tuple[float, float]]:
    """(accuracy on the other folds, on the fold) by 400 squared distances of unit embeddings, as insightface does."""
    distances = 2 - 2 * scores
    for train, test in KFold(10, shuffle=False).split(scores):
        accuracies = [np.mean((distances[train] < t) == same[train]) for t in np.arange(0, 4, 0.01)]
        best = np.argmax(accuracies) * 0.01
        yield accuracies[np.argmax(accuracies)], np.mean((distances[test] < best) == same[test])


@pytest.mark.parametrize("arguments", SETS)
def test_the_threshold_is_never_worse_than_that_of_the_usual_grid(arguments: dict) -> None:
    data = a_set(**arguments)
    scores, same = cosines(**data), data["same"]
    result = verification(**data)
    theirs = list(grid_accuracies(scores, same))
    for fold, (train, _) in enumerate(KFold(10, shuffle=False).split(scores)):
        ours = np.mean((scores[train] > result.fold_thresholds[fold]) == same[train])
        assert ours >= theirs[fold][0]
    assert result.accuracy == pytest.approx(np.mean([held_out for _, held_out in theirs]), abs=0.02)


@pytest.mark.parametrize("arguments", SETS)
def test_roc_and_auc_are_those_of_scikit_learn(arguments: dict) -> None:
    data = a_set(**arguments)
    scores, same = cosines(**data), data["same"]
    result = verification(**data)
    far, tar, _ = roc_curve(same, scores, drop_intermediate=False)
    np.testing.assert_allclose(result.roc_far, far, atol=1e-15)
    np.testing.assert_allclose(result.roc_tar, tar, atol=1e-15)
    assert result.auc == pytest.approx(roc_auc_score(same, scores), abs=1e-12)
    for index in range(0, len(far), 13):
        accepted = scores > result.roc_thresholds[index]
        assert accepted[~same].mean() == pytest.approx(far[index]) and accepted[same].mean() == pytest.approx(
            tar[index]
        )
    assert (np.diff(result.roc_thresholds) < 0).all()


@pytest.mark.parametrize("arguments", SETS)
def test_tar_at_far_is_the_best_point_of_the_roc(arguments: dict) -> None:
    data = a_set(**arguments)
    rates = (1.0, 0.5, 0.1, 0.03, 1e-2)
    result = verification(**data, false_accept_rates=rates)
    far, tar, _ = roc_curve(data["same"], cosines(**data), drop_intermediate=False)
    for rate in rates:
        if rate * result.different_pairs < 1:
            assert math.isnan(result.tar_at_far[rate])
        else:
            assert result.tar_at_far[rate] == pytest.approx(tar[far <= rate + 1e-12].max())


def test_a_rate_needs_enough_different_pairs_and_none_is_lost_to_rounding() -> None:
    # One different pair above two of four same pairs, 99 or 98 different pairs below all.
    for different in (100, 99):
        scores = [0.9, 0.8, 0.4, 0.3, 0.5] + [0.1] * (different - 1)
        result = of_scores(scores, [True] * 4 + [False] * different, folds=2)
        if different == 100:
            assert result.tar_at_far[1e-2] == 1.0
            assert result.notes == (
                "TAR at FAR 0.001 needs 1000 different pairs: there are 100",
                "TAR at FAR 0.0001 needs 10000 different pairs: there are 100",
            )
        else:
            assert math.isnan(result.tar_at_far[1e-2]) and len(result.notes) == 3
    # 0.01 x 300 is 3 and not 2.999...
    scores = [0.5] + [0.9, 0.8, 0.7] + [0.1] * 297
    assert of_scores(scores, [True] + [False] * 300, folds=2).tar_at_far[1e-2] == 1.0


def test_equal_cosines_are_accepted_or_rejected_together() -> None:
    result = of_scores([0.5] * 4 + [0.1] * 4, [True, False, True, True, False, False, False, True], folds=2)
    assert result.roc_far.tolist() == [0, 0.25, 1] and result.roc_tar.tolist() == [0, 0.75, 1]
    assert of_scores([0.5] * 4, [True, False] * 2, folds=2).auc == 0.5
    # Half of the different pairs may pass, but three quarters are tied with the same pairs.
    tied = of_scores([0.5] * 5 + [0.1], [False] * 3 + [True] * 2 + [False], folds=2, false_accept_rates=[0.5, 0.75])
    assert tied.tar_at_far == {0.5: 0.0, 0.75: 1.0}


def test_separable_pairs_are_cut_in_the_middle() -> None:
    result = of_scores([0.9, 0.2, 0.8, 0.1] * 5, [True, False] * 10, folds=5)
    assert result.accuracy == 1 and result.accuracy_std == 0 and result.auc == 1
    np.testing.assert_allclose(result.fold_thresholds, 0.5)


def test_the_strictest_of_equally_good_thresholds_counts() -> None:
    # 1 of 3 is wrong at 0.7 (a same pair rejected) as well as at 0.1 (a different pair accepted).
    assert best_threshold(np.array([0.9, 0.5, 0.3]), np.array([True, False, True])) == pytest.approx(0.7)
    assert best_threshold(np.array([0.5, 0.3]), np.array([False, True])) == 0.5
    assert best_threshold(np.array([0.5, 0.3]), np.array([True, True])) == np.nextafter(0.3, -1)


def test_a_threshold_between_neighbouring_floats_separates_them() -> None:
    low = 0.3
    high = float(np.nextafter(low, 1))
    threshold = best_threshold(np.array([high, low]), np.array([True, False]))
    assert high > threshold and not low > threshold


@given(
    st.lists(st.tuples(st.sampled_from([-1.0, -0.5, 0.0, 0.1, 0.25, 0.5, 0.75, 1.0]), st.booleans()), min_size=1),
)
def test_best_threshold_by_brute_force(pairs: list[tuple[float, bool]]) -> None:
    scores, same = np.array([score for score, _ in pairs]), np.array([answer for _, answer in pairs])
    order = np.argsort(-scores)
    best = max(brute_thresholds(scores), key=lambda t: np.sum((scores > t) == same))
    assert best_threshold(scores[order], same[order]) == pytest.approx(best, abs=1e-8)


def test_scale_and_type_of_embeddings_do_not_matter() -> None:
    data = a_set()
    expected = verification(**data)
    scaled = data["embeddings"] * np.linspace(0.1, 10, len(data["embeddings"]))[:, None]
    assert verification(**{**data, "embeddings": scaled}).accuracy == expected.accuracy
    single = verification(**{**data, "embeddings": data["embeddings"].astype(np.float32)})
    assert single.accuracy == pytest.approx(expected.accuracy, abs=0.005)


def test_arguments_are_not_changed() -> None:
    data = a_set()
    before = {key: value.copy() for key, value in data.items()}
    verification(**data)
    assert all((data[key] == before[key]).all() for key in data)


def test_summary_is_json() -> None:
    summary = json.loads(json.dumps(verification(**a_set()).summary(), allow_nan=False))
    assert summary["tar_at_far"]["0.0001"] is None and 0 < summary["tar_at_far"]["0.01"] <= 1
    assert summary["same_pairs"] + summary["different_pairs"] == 600 and len(summary["notes"]) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_embeddings_are_an_error(value: float) -> None:
    data = a_set()
    data["embeddings"][[3, 8], [1, 2]] = value
    with pytest.raises(NonFiniteError, match="2 of 160 embeddings .* the first in row 3"):
        verification(**data)


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"folds": 1}, ConfigError, r"folds is 1: expected 2 \.\. 600"),
        ({"folds": 601}, ConfigError, "folds is 601"),
        ({"embeddings": np.zeros(3)}, ConfigError, r"embeddings have the shape \(3,\)"),
        ({"left": np.arange(5)}, ConfigError, r"the shapes \(5,\), \(600,\), \(600,\)"),
        ({"left": np.full(600, 160)}, ConfigError, r"left\[0\] is 160: expected a row in \[0, 160\)"),
        ({"right": np.full(600, -1)}, ConfigError, r"right\[0\] is -1"),
        ({"left": np.zeros(600)}, ConfigError, "hold float64, int64, bool"),
        ({"same": np.zeros(600, int)}, ConfigError, "hold int64, int64, int64"),
        ({"same": np.zeros(600, bool)}, DataError, "0 same and 600 different pairs"),
        ({"same": np.ones(600, bool)}, DataError, "600 same and 0 different pairs"),
        ({"false_accept_rates": [0.0]}, ConfigError, "a false accept rate is 0.0"),
        ({"false_accept_rates": [math.nan]}, ConfigError, "a false accept rate is nan"),
    ],
)
def test_arguments_that_cannot_be_used(change: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        verification(**{**a_set(), **change})
