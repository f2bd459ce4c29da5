"""How good a recommender is, on the researcher's side: held-out events of a simulation.

Which events are held out is the split's (`simulations.splits`). Ranking is against the full catalog, seen items
masked, ties at mid-rank. No site takes part, and nothing here is a release.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.events.histories import Histories
from common.events.labels import LabelRule, padded_labels
from common.metrics import ranks, top_lists
from common.model_plan import ModelPlan
from common.models.batches import HistoryBatch
from common.models.interface import InterestModel
from simulations.quality import TOP, Quality, category_quality, interest_quality, ranking_quality
from simulations.splits import LeaveOneOut, Part, Split

Scorer = Callable[[HistoryBatch, Tensor], Tensor]
"""From histories, and the item [users] that each is asked about, to what the task predicts: scores of candidates
[users, candidates], which do not look at that item; or, for `interest`, the probability [users] that it is liked."""

_USERS_AT_ONCE = 128
_SCORES_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class HeldOut:
    """Whole histories of a simulation's users, what is held out of them, and what is asked of it.

    Attributes:
        whole: [users] histories with every event.
        max_events: how many of the latest a model reads.
        task: of the plan.
        labels: how events are labelled, for `interest`.
        membership: [items, categories] bool, for `next-category`.
        vectors: [items, width], for the diversity of lists; None leaves it out.
        split: which events are held out.
    """

    whole: Histories
    max_events: int
    task: str = "next-item"
    labels: LabelRule | None = None
    membership: npt.NDArray[np.bool_] | None = None
    vectors: npt.NDArray[np.float32] | None = None
    split: Split = field(default_factory=LeaveOneOut)

    @classmethod
    def of(
        cls,
        whole: Histories,
        plan: ModelPlan,
        *,
        vectors: Tensor | None = None,
        membership: Tensor | None = None,
        split: Split | None = None,
    ) -> HeldOut:
        """For a plan's task, over a built model's vectors."""
        return cls(
            whole=whole,
            max_events=plan.max_events,
            task=plan.task,
            labels=plan.label_rule,
            membership=None if membership is None else membership.numpy(),
            vectors=None if vectors is None else vectors.numpy(),
            split=split or LeaveOneOut(),
        )

    def some(self, users: int) -> HeldOut:
        """The same for so many users at most, evenly chosen, as judges of what is tried often."""
        if len(self.whole) <= users:
            return self
        rows = np.linspace(0, len(self.whole) - 1, users).astype(np.int64)
        return replace(self, whole=self.whole.select(rows))

    def training(self) -> Histories:
        """What sites hold, all together."""
        return self.split.training(self.whole)

    def part(self, part: Part) -> tuple[Histories, npt.NDArray[np.int64]]:
        """Histories to predict from, and the item that came next."""
        judged = self.split.judged(self.whole, part)
        return judged.without_last(1)[0], judged.items[judged.offsets[1:] - 1].astype(np.int64)

    def part_labels(self, part: Part) -> npt.NDArray[np.float32]:
        """[users] labels of the items that came next, NaN where unknown."""
        assert self.labels is not None
        judged = self.split.judged(self.whole, part)
        return self.labels.labels(judged)[judged.offsets[1:] - 1]

    def batch(self, histories: Histories, rows: npt.NDArray[np.int64]) -> HistoryBatch:
        """Some users' histories as a model reads them."""
        items, times = histories.padded(rows, self.max_events)
        return HistoryBatch.of(
            items, times, labels=padded_labels(histories, rows, self.max_events, self.labels)
        )


def evaluate(
    scorer: Scorer,
    held_out: HeldOut,
    part: Part,
    items: int,
    on_users: Callable[[int, int], None] = lambda done, of: None,
) -> Quality:
    """How well a scorer foretells what each user did next.

    For `next-item` the held-out item is ranked among all that the user has not had; for `interest` users whose
    held-out event has no label are left out; for `next-category` those whose item has no category.

    Args:
        scorer: see `Scorer`.
        items: size of the catalog.
        on_users: told of how many users it is known, and of how many it is to be.
    """
    histories, targets = held_out.part(part)
    rows = _judging(held_out, part, targets)
    found = _judged(scorer, held_out, part, histories, targets, rows, items, on_users)
    return replace(found, users=histories.users[rows], targets=targets[rows])


def _judging(held_out: HeldOut, part: Part, targets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The rows of those by whom the task can be judged."""
    if held_out.task == "interest":
        return np.flatnonzero(~np.isnan(held_out.part_labels(part)))
    if held_out.task == "next-category":
        assert held_out.membership is not None
        return np.flatnonzero(held_out.membership[targets].any(axis=1))
    return np.arange(len(targets))


def _judged(
    scorer: Scorer,
    held_out: HeldOut,
    part: Part,
    histories: Histories,
    targets: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
    items: int,
    on_users: Callable[[int, int], None],
) -> Quality:
    found = _predict(scorer, held_out, histories, targets, rows, items, on_users)
    if held_out.task == "interest":
        labels = held_out.part_labels(part)[rows].astype(np.int64)
        return interest_quality(np.concatenate(list(found)), labels)
    if held_out.task == "next-category":
        assert held_out.membership is not None
        return category_quality(np.concatenate(list(found)), held_out.membership[targets[rows]])
    all_ranks: list[npt.NDArray[np.float64]] = []
    lists: list[npt.NDArray[np.int64]] = []
    for some, scores in zip(_parts(rows, items), found, strict=True):
        seen = np.zeros((len(some), items), dtype=bool)
        for place, row in enumerate(some):
            seen[place, histories.history(int(row))] = True
        all_ranks.append(ranks(scores, targets[some], seen))
        lists.append(top_lists(scores, min(TOP, items), seen))
    return ranking_quality(
        np.concatenate(all_ranks),
        np.concatenate(lists),
        items,
        popularity=np.bincount(held_out.training().items, minlength=items),
        vectors=held_out.vectors,
    )


def _parts(rows: npt.NDArray[np.int64], items: int) -> list[npt.NDArray[np.int64]]:
    at_once = max(1, min(_USERS_AT_ONCE, _SCORES_AT_ONCE // items))
    return [rows[start : start + at_once] for start in range(0, len(rows), at_once)]


def _predict(
    scorer: Scorer,
    held_out: HeldOut,
    histories: Histories,
    targets: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
    items: int,
    on_users: Callable[[int, int], None],
) -> Iterator[npt.NDArray[np.float64]]:
    """Predictions for `rows`, part by part (`_parts`), each made when it is asked for."""
    if not len(rows):
        raise ValueError(f"no user has a held-out event that the task {held_out.task} can be judged by")
    done = 0
    for part in _parts(rows, items):
        said = scorer(held_out.batch(histories, part), torch.from_numpy(targets[part]))
        done += len(part)
        on_users(done, len(rows))
        yield said.detach().cpu().numpy().astype(np.float64)


def model_scorer(model: InterestModel, task: str = "next-item") -> Scorer:
    """The model's own predictions, in eval mode."""

    def score(batch: HistoryBatch, asked: Tensor) -> Tensor:
        model.eval()
        device = next(iter(model.buffers())).device
        with torch.no_grad():
            if task == "interest":
                return model.interest(batch.to(device), asked.to(device))
            return model.scores(batch.to(device))

    return score
