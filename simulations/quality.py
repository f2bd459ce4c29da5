"""From predictions to metrics, one function a task: what a table, a plot and a paired comparison need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from common import metrics
from common.metrics import Metric

TOP = 10
_SHOWN = {
    f"hit_rate@{TOP}": f"HR@{TOP}",
    f"ndcg@{TOP}": f"NDCG@{TOP}",
    "mrr": "MRR",
    f"coverage@{TOP}": f"coverage@{TOP}",
}
_SURE = 1e-6

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Quality:
    """Metrics of one recommender on one split, with standard errors over users.

    Attributes:
        metrics: by name.
        headline: the metric that curves show.
        per_user: [users] what is compared in pairs and chosen by; higher is better.
        per_user_name: its name.
        by_user: metric -> [users], of those metrics that are means over users; never shown.
        users, targets: [users] pseudonyms of those who judge, and the items that they judge by.
    """

    metrics: Mapping[str, Metric]
    headline: str
    per_user: Floats
    per_user_name: str
    by_user: Mapping[str, Floats] = field(default_factory=dict)
    users: npt.NDArray[np.str_] | None = None
    targets: npt.NDArray[np.int64] | None = None

    def as_json(self) -> dict[str, dict[str, float]]:
        """name -> value and standard error."""
        return {n: {"value": m.value, "standard_error": m.standard_error} for n, m in self.metrics.items()}


def ranking_quality(
    ranks: Floats,
    lists: npt.NDArray[np.int64],
    items: int,
    *,
    popularity: npt.NDArray[np.int64] | None = None,
    vectors: npt.NDArray[np.float32] | None = None,
) -> Quality:
    """Of lists of next items.

    Args:
        ranks: [users] of the held-out items, from 1.
        lists: [users, TOP].
        items: size of the catalog.
        popularity: [items] counts, for novelty.
        vectors: [items, width], for diversity.
    """
    found = metrics.summarise(ranks, TOP, lists=lists, items=items)
    shown = {_SHOWN[name]: metric for name, metric in found.items()}
    by_user = {
        f"HR@{TOP}": metrics.hit_rate(ranks, TOP),
        f"NDCG@{TOP}": metrics.ndcg(ranks, TOP),
        "MRR": metrics.reciprocal_rank(ranks),
    }
    if vectors is not None:
        by_user["diversity"] = metrics.intra_list_diversity(vectors, lists)
        shown["diversity"] = metrics.mean_metric(by_user["diversity"])
    if popularity is not None:
        by_user["novelty"] = metrics.novelty(popularity, lists)
        shown["novelty"] = metrics.mean_metric(by_user["novelty"])
    return Quality(shown, f"NDCG@{TOP}", by_user[f"NDCG@{TOP}"], f"NDCG@{TOP}", by_user)


def interest_quality(probabilities: Floats, labels: npt.NDArray[np.int64]) -> Quality:
    """Of probabilities that users like one item each.

    Args:
        probabilities: [users].
        labels: [users], 0 or 1.
    """
    guess = (probabilities >= 0.5).astype(np.int64)
    hits = (guess == labels).astype(np.float64)
    right = metrics.mean_metric(hits)

    def plain(value: float) -> Metric:
        return Metric(value, float("nan"))

    shown = {"accuracy": right}
    shown["precision"] = plain(metrics.precision(labels, guess))
    shown["recall"] = plain(metrics.recall(labels, guess))
    shown["F1"] = plain(metrics.f1(labels, guess))
    if 0 < labels.sum() < len(labels):
        area = metrics.roc_auc(labels, probabilities)
        shown["ROC-AUC"] = Metric(area, _area_error(area, int(labels.sum()), int((1 - labels).sum())))
        shown["PR-AUC"] = plain(metrics.pr_auc(labels, probabilities))
    shown["calibration error"] = plain(metrics.expected_calibration_error(labels, probabilities))
    sure = np.clip(probabilities, _SURE, 1 - _SURE)
    likelihood = np.where(labels == 1, np.log(sure), np.log(1 - sure))
    headline = "ROC-AUC" if "ROC-AUC" in shown else "accuracy"
    by_user = {"accuracy": hits, "log-likelihood": likelihood}
    return Quality(shown, headline, likelihood, "log-likelihood", by_user)


def _area_error(area: float, positives: int, negatives: int) -> float:
    """Standard error of an area under the ROC curve (Hanley & McNeil 1982)."""
    one, two = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (positives - 1) * (one - area**2) + (negatives - 1) * (two - area**2)
    return float(np.sqrt(variance / (positives * negatives)))


def category_quality(scores: Floats, right: npt.NDArray[np.bool_]) -> Quality:
    """Of scores of categories; a user's rank is that of the best of the next item's categories.

    Args:
        scores: [users, categories].
        right: [users, categories] the next item's, at least one a user.
    """
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    others = ~right
    above, level = ((scores > best) & others).sum(axis=1), ((scores == best) & others).sum(axis=1)
    ranks = 1.0 + above + level / 2
    first = metrics.top_lists(scores, 1)
    by_user = {
        "HR@1": metrics.hit_rate(ranks, 1),
        "HR@3": metrics.hit_rate(ranks, 3),
        "MRR": metrics.reciprocal_rank(ranks),
    }
    shown = {name: metrics.mean_metric(values) for name, values in by_user.items()}
    shown["coverage@1"] = Metric(metrics.coverage(first, scores.shape[1]), float("nan"))
    by_user["reciprocal rank"] = by_user["MRR"]
    return Quality(shown, "HR@1", by_user["MRR"], "reciprocal rank", by_user)
