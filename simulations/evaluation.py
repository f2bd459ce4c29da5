"""How good a recommender is, on the researcher's side: held-out events of a simulation's public data.

Leave-one-out: a user's last event is the test, the one before it the validation. Ranking is against the full
catalog, seen items masked, ties at mid-rank. No site takes part, and nothing here is a release.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.events.histories import Histories
from common.metrics import Metric, ndcg, ranks, summarise, top_lists
from common.models.batches import HistoryBatch
from common.models.interface import InterestModel

Split = Literal["validation", "test"]
Scorer = Callable[[HistoryBatch], Tensor]
"""From histories to [users, items] scores."""

TOP = 10
_USERS_AT_ONCE = 128
_SHOWN = {
    f"hit_rate@{TOP}": f"HR@{TOP}",
    f"ndcg@{TOP}": f"NDCG@{TOP}",
    "mrr": "MRR",
    f"coverage@{TOP}": f"coverage@{TOP}",
}


@dataclass(frozen=True)
class HeldOut:
    """Whole histories of a simulation's users, from which each split is cut.

    Attributes:
        whole: [users] histories with every event.
        max_events: how many of the latest a model reads.
    """

    whole: Histories
    max_events: int

    def split(self, split: Split) -> tuple[Histories, npt.NDArray[np.int64]]:
        """Histories to rank from, and the item to find; users too short to hold out two are left out."""
        long_enough = np.flatnonzero(self.whole.lengths >= 3)
        chosen = self.whole.select(long_enough)
        without_one, last = chosen.without_last(1)
        if split == "test":
            return without_one, last.reshape(len(chosen), -1)[:, -1].astype(np.int64)
        without_two, before = without_one.without_last(1)
        return without_two, before.reshape(len(chosen), -1)[:, -1].astype(np.int64)


@dataclass(frozen=True)
class Quality:
    """Metrics of one recommender on one split, with standard errors over users.

    Attributes:
        ranks: [users] mid-ranks, from 1, for paired comparisons.
        metrics: by name.
    """

    ranks: npt.NDArray[np.float64]
    metrics: Mapping[str, Metric]

    @property
    def ndcg(self) -> npt.NDArray[np.float64]:
        """[users] NDCG@10."""
        return ndcg(self.ranks, TOP)

    def as_json(self) -> dict[str, dict[str, float]]:
        """name -> value and standard error."""
        return {n: {"value": m.value, "standard_error": m.standard_error} for n, m in self.metrics.items()}


def evaluate(scorer: Scorer, held_out: HeldOut, split: Split, items: int) -> Quality:
    """Ranks the held-out item of each user among all items that the user has not had.

    Args:
        scorer: gives [users, items] scores.
        items: size of the catalog.
    """
    histories, targets = held_out.split(split)
    found: list[npt.NDArray[np.float64]] = []
    lists: list[npt.NDArray[np.int64]] = []
    for start in range(0, len(histories), _USERS_AT_ONCE):
        rows = np.arange(start, min(start + _USERS_AT_ONCE, len(histories)))
        padded, times = histories.padded(rows, held_out.max_events)
        scores = scorer(HistoryBatch.of(padded, times)).detach().cpu().numpy().astype(np.float64)
        seen = np.zeros((len(rows), items), dtype=bool)
        for place, row in enumerate(rows):
            seen[place, histories.history(int(row))] = True
        found.append(ranks(scores, targets[rows], seen))
        lists.append(top_lists(scores, min(TOP, items), seen))
    all_ranks = np.concatenate(found)
    found_metrics = summarise(all_ranks, TOP, lists=np.concatenate(lists), items=items)
    return Quality(ranks=all_ranks, metrics={_SHOWN[name]: metric for name, metric in found_metrics.items()})


def model_scorer(model: InterestModel) -> Scorer:
    """The model's own scores, in eval mode."""

    def score(batch: HistoryBatch) -> Tensor:
        model.eval()
        device = next(iter(model.buffers())).device
        moved = HistoryBatch(items=batch.items.to(device), times=batch.times.to(device))
        with torch.no_grad():
            return model.scores(moved)

    return score
