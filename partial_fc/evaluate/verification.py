"""Verification of pairs by the cosine of their embeddings: accuracy over folds, TAR at a FAR, ROC. Pure NumPy.

Legend: m embeddings of size d; n pairs, of which the *same* pairs show one identity and the *different* pairs two. A
pair is accepted at threshold t where its cosine is > t. FAR is the fraction of different pairs that are accepted, TAR
that of same pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from partial_fc.errors import ConfigError, DataError, NonFiniteError

FALSE_ACCEPT_RATES = (1e-2, 1e-3, 1e-4)
_ROWS = 65536  # pairs whose embeddings are gathered at once: n x d numbers need not fit into memory


@dataclass(frozen=True, eq=False)
class VerificationResult:
    """How well embeddings tell same pairs from different ones.

    Attributes:
        accuracy: mean over the folds of the fraction of pairs decided rightly.
        accuracy_std: standard deviation over the folds (divided by the number of folds, as insightface does).
        threshold: mean over the folds of the cosine threshold.
        fold_accuracies: float64 ``[folds]``.
        fold_thresholds: float64 ``[folds]``.
        tar_at_far: TAR by FAR; NaN where the different pairs are too few to measure that FAR (``notes`` says so).
        auc: area under the ROC.
        roc_far: float64 ``[k]``, FAR at ``roc_thresholds``, growing from 0 to 1.
        roc_tar: float64 ``[k]``, TAR there.
        roc_thresholds: float64 ``[k]``, falling: one between each two neighbouring distinct cosines.
        same_pairs: number of same pairs.
        different_pairs: number of different pairs.
        notes: what could not be measured, and why.
    """

    accuracy: float
    accuracy_std: float
    threshold: float
    fold_accuracies: NDArray[np.float64]
    fold_thresholds: NDArray[np.float64]
    tar_at_far: dict[float, float]
    auc: float
    roc_far: NDArray[np.float64]
    roc_tar: NDArray[np.float64]
    roc_thresholds: NDArray[np.float64]
    same_pairs: int
    different_pairs: int
    notes: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """The figures without the arrays, ready for JSON: what could not be measured is None."""
        return {
            "accuracy": self.accuracy,
            "accuracy_std": self.accuracy_std,
            "threshold": self.threshold,
            "auc": self.auc,
            "tar_at_far": {f"{far:g}": None if math.isnan(tar) else tar for far, tar in self.tar_at_far.items()},
            "same_pairs": self.same_pairs,
            "different_pairs": self.different_pairs,
            "notes": list(self.notes),
        }


def verification(
    embeddings: ArrayLike,
    left: ArrayLike,
    right: ArrayLike,
    same: ArrayLike,
    folds: int = 10,
    false_accept_rates: Sequence[float] = FALSE_ACCEPT_RATES,
) -> VerificationResult:
    """Score pairs by the cosine of their embeddings and measure how well it separates them.

    The accuracy is that of the LFW protocol: the pairs are cut into consecutive folds in the order of the file (sizes
    as scikit-learn's ``KFold(folds, shuffle=False)``), and each fold is decided at the threshold of the highest
    accuracy on all other folds. The threshold is the best of all, found from cumulative counts over the sorted
    cosines: halfway between two neighbouring cosines, or just below the lowest, or at the highest. insightface tries
    400 squared distances instead, 0.01 apart (0.005 in cosine), so its threshold is never better on the other folds,
    though by chance its fold may come out slightly higher or lower. Among equally good thresholds the strictest
    (highest cosine) counts, as there.

    TAR at a FAR f is pooled over all pairs: the largest TAR of any threshold at which at most
    floor(f x different pairs) different pairs are accepted. (insightface interpolates a threshold on nine folds and
    measures the tenth, which at f = 1e-3 and 300 different pairs a fold is a fraction of one pair.) With fewer than 1/f
    different pairs it is NaN.

    Args:
        embeddings: floating ``[m, d]``; need not be normalised. A zero row has the cosine 0 with everything.
        left: integers ``[n]``, row of each pair's first image.
        right: integers ``[n]``, row of the second.
        same: booleans ``[n]``.
        folds: 2 .. n.
        false_accept_rates: each in (0, 1].

    Raises:
        NonFiniteError: where an embedding has a NaN or an infinity; names the row.
        DataError: where there is no same or no different pair.
        ConfigError: for shapes, indices, folds or rates that can't be used.
    """
    vectors, first, second, answers = _checked(embeddings, left, right, same)
    if not 2 <= folds <= len(answers):
        raise ConfigError(f"folds is {folds}: expected 2 .. {len(answers)}, the number of pairs")
    scores = pair_cosines(vectors, first, second)
    order = np.argsort(-scores, kind="stable")
    ranked, ranked_same = scores[order], answers[order]

    bounds = _fold_bounds(len(answers), folds)
    accuracies, thresholds = np.empty(folds), np.empty(folds)
    for fold, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        others = (order < begin) | (order >= end)
        thresholds[fold] = best_threshold(ranked[others], ranked_same[others])
        accuracies[fold] = np.mean((scores[begin:end] > thresholds[fold]) == answers[begin:end])

    far, tar, roc_thresholds = _roc(ranked, ranked_same)
    different = int(np.sum(~answers))
    rates, notes = {}, []
    for rate in false_accept_rates:
        rates[float(rate)] = _tar_at_far(ranked, ranked_same, rate)
        if math.isnan(rates[float(rate)]):
            notes.append(
                f"TAR at FAR {rate:g} needs {math.ceil(1 / rate - 1e-9)} different pairs: there are {different}"
            )
    return VerificationResult(
        accuracy=float(accuracies.mean()),
        accuracy_std=float(accuracies.std()),
        threshold=float(thresholds.mean()),
        fold_accuracies=accuracies,
        fold_thresholds=thresholds,
        tar_at_far=rates,
        auc=float(np.sum(np.diff(far) * (tar[1:] + tar[:-1])) / 2),
        roc_far=far,
        roc_tar=tar,
        roc_thresholds=roc_thresholds,
        same_pairs=len(answers) - different,
        different_pairs=different,
        notes=tuple(notes),
    )


def pair_cosines(
    embeddings: NDArray[np.float64], left: NDArray[np.int64], right: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Cosine of each pair of rows: ``[m, d]``, ``[n]``, ``[n]`` -> float64 ``[n]``, clamped to [-1, 1]."""
    unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    cosines = np.empty(len(left))
    for begin in range(0, len(left), _ROWS):
        rows = slice(begin, begin + _ROWS)
        cosines[rows] = np.einsum("nd,nd->n", unit[left[rows]], unit[right[rows]])
    return cosines.clip(-1, 1)


def best_threshold(ranked: NDArray[np.float64], ranked_same: NDArray[np.bool_]) -> float:
    """The threshold that decides the most pairs rightly; the strictest of equally good ones.

    Args:
        ranked: float64 ``[n]``, cosines, falling.
        ranked_same: bool ``[n]``, their answers.
    """
    accepted, thresholds = _cuts(ranked)
    same_accepted = np.concatenate([[0], np.cumsum(ranked_same)])[accepted]
    different_rejected = np.sum(~ranked_same) - (accepted - same_accepted)
    return float(thresholds[np.argmax(same_accepted + different_rejected)])


def _cuts(ranked: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """All ways to accept the highest of falling cosines ``[n]``: how many each accepts, and at which threshold."""
    steps = np.flatnonzero(ranked[:-1] > ranked[1:]) + 1
    above, below = ranked[steps - 1], ranked[steps]
    middle = below + (above - below) / 2
    # Between two neighbouring floating numbers there is no middle; the lower one separates them as well.
    middle = np.where(middle < above, middle, below)
    accepted = np.concatenate([[0], steps, [len(ranked)]])
    return accepted, np.concatenate([ranked[:1], middle, [np.nextafter(ranked[-1], -np.inf)]])


def _roc(
    ranked: NDArray[np.float64], ranked_same: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    accepted, thresholds = _cuts(ranked)
    same_accepted = np.concatenate([[0], np.cumsum(ranked_same)])[accepted]
    same = same_accepted[-1]
    return (accepted - same_accepted) / (len(ranked) - same), same_accepted / same, thresholds


def _tar_at_far(ranked: NDArray[np.float64], ranked_same: NDArray[np.bool_], rate: float) -> float:
    if not 0 < rate <= 1:
        raise ConfigError(f"a false accept rate is {rate}: expected a number in (0, 1]")
    different = ranked[~ranked_same]
    # The small number keeps 0.01 x 300 from becoming two.
    allowed = math.floor(rate * len(different) + 1e-9)
    if allowed == 0:
        return math.nan
    if allowed >= len(different):
        return 1.0
    return float(np.mean(ranked[ranked_same] > different[allowed]))


def _fold_bounds(pairs: int, folds: int) -> NDArray[np.int64]:
    """Where the consecutive folds begin and end, ``[folds + 1]``; the first ``pairs % folds`` have one pair more."""
    sizes = np.full(folds, pairs // folds, np.int64)
    sizes[: pairs % folds] += 1
    return np.concatenate([[0], np.cumsum(sizes)])


def _checked(
    embeddings: ArrayLike, left: ArrayLike, right: ArrayLike, same: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    vectors = np.asarray(embeddings, np.float64)
    if vectors.ndim != 2 or 0 in vectors.shape:
        raise ConfigError(f"embeddings have the shape {vectors.shape}: expected [m, d]")
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise NonFiniteError(
            f"{len(bad)} of {len(vectors)} embeddings have a NaN or an infinity, the first in row {bad[0]}: "
            "there is nothing to verify; did the training diverge?"
        )
    answers = np.asarray(same)
    first, second = np.asarray(left), np.asarray(right)
    if answers.ndim != 1 or first.shape != answers.shape or second.shape != answers.shape:
        raise ConfigError(
            f"left, right and same have the shapes {first.shape}, {second.shape}, {answers.shape}: expected one length"
        )
    if answers.dtype != np.bool_ or first.dtype.kind not in "iu" or second.dtype.kind not in "iu":
        raise ConfigError(
            f"left, right and same hold {first.dtype}, {second.dtype}, {answers.dtype}: expected integers and booleans"
        )
    for name, rows in (("left", first), ("right", second)):
        outside = np.flatnonzero((rows < 0) | (rows >= len(vectors)))
        if len(outside):
            raise ConfigError(f"{name}[{outside[0]}] is {rows[outside[0]]}: expected a row in [0, {len(vectors)})")
    count = int(answers.sum())
    if count in (0, len(answers)):
        raise DataError(f"{count} same and {len(answers) - count} different pairs: verification needs both kinds")
    return vectors, first.astype(np.int64), second.astype(np.int64), answers
