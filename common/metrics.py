"""Ranking and classification metrics, in numpy: a number for every user, and means with standard errors.

Ranks come first and everything about ranking follows from them. Nothing here is private by itself: these are
computed on public or held-out data, or leave a site as noisy sums through `privacy`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Seen = npt.NDArray[np.bool_] | Sequence[Sequence[int]] | None
"""What each user has seen: a mask [users, items], or a list of item indices for each user, or nothing."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A value over users with its standard error (nan with fewer than two users)."""

    value: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """The mean over users of a difference, its standard error, and their quotient z."""

    mean: float
    standard_error: float
    z: float


# Ranking


def ranks(scores: npt.ArrayLike, targets: npt.ArrayLike, seen: Seen = None) -> Floats:
    """The rank of each user's target among the items that the user has not seen: 1 is best, ties at mid-rank.

    A target with b unseen items above it and t others at the same score has rank 1 + b + t / 2. A target that
    the user has seen is never recommended: its rank is inf, a miss at every k.

    Args:
        scores: [users, items], higher is better; -inf and inf are allowed, nan is not.
        targets: [users], item indices.
        seen: what is masked.

    Returns:
        float64 [users].

    Raises:
        ValueError: shapes that do not fit, an index outside the items, or a score that is nan.
    """
    table, masked = _scores_and_mask(scores, seen)
    wanted = _indices(targets, table.shape[1], "targets")
    if wanted.shape != (table.shape[0],):
        raise ValueError(
            f"targets have shape {wanted.shape}, but must be [{table.shape[0]}], one for each user"
        )
    rows = np.arange(len(wanted))
    of_target = table[rows, wanted][:, None]  # [users, 1]
    above = ((table > of_target) & ~masked).sum(axis=1)
    level = ((table == of_target) & ~masked).sum(axis=1) - 1  # without the target itself
    return np.where(masked[rows, wanted], np.inf, 1.0 + above + level / 2)


def top_lists(scores: npt.ArrayLike, k: int, seen: Seen = None) -> npt.NDArray[np.int64]:
    """Each user's k best unseen items, best first; of equal scores the lower index comes first.

    Returns:
        int64 [users, k]; -1 fills the end of a list where a user has fewer than k unseen items.

    Raises:
        ValueError: as `ranks`, or k < 1.
    """
    _check_k(k)
    table, masked = _scores_and_mask(scores, seen)
    key = np.where(masked, np.nan, -table)  # what is seen comes last, behind every number
    most = min(k, table.shape[1])
    worst = np.partition(key, most - 1, axis=1)[:, most - 1]  # NaN where fewer are unseen
    best = np.full((len(table), k), -1, dtype=np.int64)
    for user, (own, limit) in enumerate(zip(key, worst, strict=True)):
        listed = np.flatnonzero(~np.isnan(own) if np.isnan(limit) else own <= limit)
        listed = listed[np.argsort(own[listed], kind="stable")[:most]]
        best[user, : len(listed)] = listed
    return best


def hit_rate(of_targets: npt.ArrayLike, k: int) -> Floats:
    """1 for each user whose target has rank at most k, else 0: [users]."""
    _check_k(k)
    return (_ranks(of_targets) <= k).astype(np.float64)


def ndcg(of_targets: npt.ArrayLike, k: int) -> Floats:
    """1 / log2(1 + rank) for each user whose target has rank at most k, else 0: [users].

    Normalised discounted cumulative gain (Järvelin & Kekäläinen 2002) with one relevant item a user.
    """
    _check_k(k)
    values = _ranks(of_targets)
    return np.where(values <= k, 1 / np.log2(1 + values), 0.0)


def reciprocal_rank(of_targets: npt.ArrayLike) -> Floats:
    """1 / rank for each user: [users]. Its mean is the MRR."""
    return 1 / _ranks(of_targets)


def coverage(lists: npt.ArrayLike, items: int) -> float:
    """The share of `items` items that stand in any user's list; entries of -1 are no item.

    Raises:
        ValueError: items < 1, or an index outside them.
    """
    counts = _list_counts(lists, items)
    return float((counts > 0).mean())


def summarise(
    of_targets: npt.ArrayLike, k: int = 10, *, lists: npt.ArrayLike | None = None, items: int | None = None
) -> dict[str, Metric]:
    """The usual figures by name: hit_rate@k, ndcg@k, mrr, and coverage@k where lists and items are given.

    Means have the standard error over users; coverage has the jackknife's (Efron & Stein 1981), leaving one
    user out at a time.

    Args:
        of_targets: ranks [users].
        k: length of the lists that are judged.
        lists: what `top_lists` gave for the same users, [users, at least k].
        items: the number of items there are.

    Raises:
        ValueError: no users, or only one of `lists` and `items`.
    """
    figures = {
        f"hit_rate@{k}": mean_metric(hit_rate(of_targets, k)),
        f"ndcg@{k}": mean_metric(ndcg(of_targets, k)),
        "mrr": mean_metric(reciprocal_rank(of_targets)),
    }
    if (lists is None) != (items is None):
        raise ValueError("coverage needs both the lists and the number of items")
    if lists is not None and items is not None:
        figures[f"coverage@{k}"] = _coverage_metric(np.asarray(lists)[:, :k], items)
    return figures


def mean_metric(values: npt.ArrayLike) -> Metric:
    """The mean of values [users] with its standard error.

    Raises:
        ValueError: no values, or one that is nan.
    """
    of_users = _vector(values, "values")
    return Metric(float(of_users.mean()), _standard_error(of_users))


def paired_difference(first: npt.ArrayLike, second: npt.ArrayLike) -> PairedDifference:
    """The mean of first - second over the same users, for which z is about normal if there is no difference.

    Raises:
        ValueError: no users, a value that is nan, or different numbers of users.
    """
    one, other = _vector(first, "first"), _vector(second, "second")
    if one.shape != other.shape:
        raise ValueError(
            f"the paired values are of {one.size} and {other.size} users, but must be of the same"
        )
    difference = one - other
    mean, error = float(difference.mean()), _standard_error(difference)
    if error > 0:
        return PairedDifference(mean, error, mean / error)
    return PairedDifference(
        mean, error, math.nan if math.isnan(error) else 0.0 if mean == 0 else math.copysign(math.inf, mean)
    )


def _coverage_metric(lists: npt.NDArray[np.int64], items: int) -> Metric:
    counts = _list_counts(lists, items)
    users = len(lists)
    if users < 2:
        return Metric(float((counts > 0).mean()), math.nan)
    # What would be lost without a user: the items that stand in that user's list alone.
    alone = np.array([np.count_nonzero(counts[np.unique(row[row >= 0])] == 1) for row in lists]) / items
    variance = (users - 1) / users * float(np.square(alone - alone.mean()).sum())
    return Metric(float((counts > 0).mean()), math.sqrt(variance))


def _list_counts(lists: npt.ArrayLike, items: int) -> npt.NDArray[np.int64]:
    """In how many lists each item stands: [items]."""
    if items < 1:
        raise ValueError(f"items is {items}, but must be at least 1")
    table = np.asarray(lists)
    if table.ndim != 2:
        raise ValueError(f"lists have shape {table.shape}, but must be [users, k]")
    counts = np.zeros(items, dtype=np.int64)
    for row in table:
        counts[np.unique(_indices(row[row >= 0], items, "lists"))] += 1
    return counts


# Beyond accuracy


_LISTS_AT_ONCE = 1024
"""Users whose lists' vectors are held at once."""


def intra_list_diversity(vectors: npt.ArrayLike, lists: npt.ArrayLike) -> Floats:
    """The mean of 1 - cosine over the pairs of a user's list (Ziegler et al. 2005): [users].

    Args:
        vectors: [items, dim]; a zero vector has cosine 0 with every other.
        lists: [users, k], item indices, -1 for none. A list of fewer than two items has diversity 0.

    Raises:
        ValueError: vectors that are not finite or not [items, dim], or an index outside them.
    """
    table = np.asarray(vectors, dtype=np.float64)
    if table.ndim != 2 or not np.isfinite(table).all():
        raise ValueError("vectors must be finite numbers [items, dim]")
    norms = np.linalg.norm(table, axis=1, keepdims=True)
    unit = table / np.where(norms > 0, norms, 1.0)
    rows = np.asarray(lists)
    _indices(rows[rows >= 0], len(unit), "lists")
    diversities = np.zeros(len(rows))
    for first in range(0, len(rows), _LISTS_AT_ONCE):
        some = rows[first : first + _LISTS_AT_ONCE]
        listed = unit[some] * (some >= 0)[:, :, None]  # [users, k, dim]
        pairs = np.maximum(1, (counts := (some >= 0).sum(axis=1)) * (counts - 1))
        # The sum of cosines over ordered pairs, from that over all pairs of an item, itself included.
        own = np.square(listed).sum(axis=(1, 2))
        cosines = np.square(listed.sum(axis=1)).sum(axis=1) - own
        diversities[first : first + len(some)] = np.where(counts > 1, 1 - cosines / pairs, 0.0)
    return diversities


def novelty(popularity: npt.ArrayLike, lists: npt.ArrayLike) -> Floats:
    """The mean surprise -log2 p(item) of a user's list, in bits (Zhou et al. 2010): [users].

    Args:
        popularity: [items], counts of events, not negative; p(item) is (count + 1) / (sum of counts + items), so
            that an item without events has a surprise too.
        lists: [users, k], item indices, -1 for none. An empty list has novelty 0.

    Raises:
        ValueError: popularity that is negative or not finite, or an index outside the items.
    """
    counts = _vector(popularity, "popularity")
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError("popularity must be finite counts of at least 0")
    surprise = -np.log2((counts + 1) / (counts.sum() + counts.size))
    rows = [_indices(row[row >= 0], counts.size, "lists") for row in np.asarray(lists)]
    return np.array([float(surprise[row].mean()) if row.size else 0.0 for row in rows])


# Classification


def accuracy(labels: npt.ArrayLike, predicted: npt.ArrayLike) -> float:
    """The share of predictions that are right; labels and predictions are 0 or 1, [n]."""
    truth, guess = _two_labels(labels, predicted)
    return float((truth == guess).mean())


def precision(labels: npt.ArrayLike, predicted: npt.ArrayLike) -> float:
    """The share of predicted positives that are positive; 0 where none is predicted."""
    truth, guess = _two_labels(labels, predicted)
    return float(truth[guess].mean()) if guess.any() else 0.0


def recall(labels: npt.ArrayLike, predicted: npt.ArrayLike) -> float:
    """The share of positives that are predicted; 0 where there is none."""
    truth, guess = _two_labels(labels, predicted)
    return float(guess[truth].mean()) if truth.any() else 0.0


def f1(labels: npt.ArrayLike, predicted: npt.ArrayLike) -> float:
    """The harmonic mean of precision and recall; 0 where there is no true positive."""
    truth, guess = _two_labels(labels, predicted)
    wrong = int((truth != guess).sum())
    right = int((truth & guess).sum())
    return 2 * right / (2 * right + wrong) if right else 0.0


def roc_auc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """The probability that a positive scores above a negative, ties counted half (Mann & Whitney 1947).

    Raises:
        ValueError: labels other than 0 and 1, only one class, lengths that differ, or a score that is nan.
    """
    truth, values = _labels_and_scores(labels, scores)
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if positives == 0 or negatives == 0:
        raise ValueError("the area under the ROC curve needs labels of both classes")
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    middle = np.cumsum(sizes) - (sizes - 1) / 2  # mid-rank of each group of equal scores, lowest first
    rank_sum = float(middle[group][truth].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def pr_auc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """Average precision: the sum over thresholds of the rise in recall times precision, ties taken at once.

    Raises:
        ValueError: labels other than 0 and 1, no positive, lengths that differ, or a score that is nan.
    """
    truth, values = _labels_and_scores(labels, scores)
    if not truth.any():
        raise ValueError("the area under the precision-recall curve needs a positive label")
    order = np.argsort(-values, kind="stable")
    truth, values = truth[order], values[order]
    last = np.append(np.flatnonzero(values[1:] != values[:-1]), values.size - 1)  # last of each group of ties
    found = np.cumsum(truth)[last]
    precisions = found / (last + 1)
    return float(np.sum(np.diff(found, prepend=0) * precisions) / truth.sum())


def expected_calibration_error(labels: npt.ArrayLike, probabilities: npt.ArrayLike, bins: int = 15) -> float:
    """The mean gap between probability and frequency over equal-width bins (Naeini et al. 2015), by weight.

    Raises:
        ValueError: probabilities outside [0, 1], bins < 1, labels other than 0 and 1, or lengths that differ.
    """
    truth, values = _labels_and_scores(labels, probabilities)
    if bins < 1:
        raise ValueError(f"bins is {bins}, but must be at least 1")
    if (values < 0).any() or (values > 1).any():
        raise ValueError("probabilities must lie in [0, 1]: pass them through a sigmoid first")
    which = np.minimum((values * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(which, weights=values - truth, minlength=bins)
    return float(np.abs(gaps).sum() / values.size)


# Checks


def _scores_and_mask(scores: npt.ArrayLike, seen: Seen) -> tuple[Floats, npt.NDArray[np.bool_]]:
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] == 0:
        raise ValueError(
            f"scores have shape {table.shape}, but must be [users, items] with at least one item"
        )
    if np.isnan(table).any():
        raise ValueError("scores hold nan, which has no rank: the model has diverged or was given nan")
    masked = np.zeros(table.shape, dtype=np.bool_)
    if isinstance(seen, np.ndarray):
        if seen.shape != table.shape or seen.dtype != np.bool_:
            raise ValueError(f"the seen mask is {seen.dtype} {seen.shape}, but must be bool {table.shape}")
        masked = seen
    elif seen is not None:
        if len(seen) != len(table):
            raise ValueError(f"seen items are given for {len(seen)} users, but scores for {len(table)}")
        for row, items in zip(masked, seen, strict=True):
            row[_indices(items, table.shape[1], "seen items")] = True
    return table, masked


def _indices(values: npt.ArrayLike, items: int, name: str) -> npt.NDArray[np.int64]:
    given = np.asarray(values)
    if given.size and not np.issubdtype(given.dtype, np.integer):
        raise ValueError(f"{name} must be whole numbers, item indices, but are {given.dtype}")
    indices = given.astype(np.int64)
    if indices.size and (indices.min() < 0 or indices.max() >= items):
        raise ValueError(f"{name} must be item indices from 0 to {items - 1}")
    return indices


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k is {k}, but must be at least 1")


def _vector(values: npt.ArrayLike, name: str) -> Floats:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or vector.size == 0 or np.isnan(vector).any():
        raise ValueError(f"{name} must be one number for each of at least one user, and none of them nan")
    return vector


def _ranks(of_targets: npt.ArrayLike) -> Floats:
    values = _vector(of_targets, "ranks")
    if (values < 1).any():
        raise ValueError("ranks start at 1")
    return values


def _standard_error(values: Floats) -> float:
    return float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else math.nan


def _two_labels(
    labels: npt.ArrayLike, predicted: npt.ArrayLike
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    truth, guess = _vector(labels, "labels"), _vector(predicted, "predictions")
    if truth.shape != guess.shape:
        raise ValueError(f"there are {truth.size} labels, but {guess.size} predictions")
    if not np.isin(truth, (0, 1)).all() or not np.isin(guess, (0, 1)).all():
        raise ValueError("labels and predictions must be 0 or 1")
    return truth == 1, guess == 1


def _labels_and_scores(labels: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[npt.NDArray[np.bool_], Floats]:
    truth, values = _vector(labels, "labels"), _vector(scores, "scores")
    if truth.shape != values.shape:
        raise ValueError(f"there are {truth.size} labels, but {values.size} scores")
    if not np.isin(truth, (0, 1)).all():
        raise ValueError("labels must be 0 or 1")
    return truth == 1, values
