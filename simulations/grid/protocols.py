"""What is held out of whole histories, and how lists are judged by it: leave-one-out, and the whole last invoice.

Leave-one-out asks for a user's last event (test) or the one before (validation). In a shop's log most of these are
the rest of a basket, so the strict protocol holds out everything that a user bought at the last time of buying, and
asks for all of it from what was bought before (utility: 93 % of Online Retail's leave-one-out targets stand in the
same invoice as the event before). Ranking is against the full catalog, seen items masked, ties at mid-rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.events.histories import Histories
from common.models.batches import HistoryBatch
from simulations.splits import first_events

TOP = 10
Protocol = Literal["leave-one-out", "last-invoice"]
LEAVE_ONE_OUT: Protocol = "leave-one-out"
LAST_INVOICE: Protocol = "last-invoice"
Split = Literal["validation", "test"]
Scorer = Callable[[HistoryBatch], Tensor]
"""[users, items] scores of what comes next."""

_USERS_AT_ONCE = 256
_DISCOUNTS = 1 / np.log2(np.arange(2, TOP + 2))


@dataclass(frozen=True)
class Question:
    """Histories to predict from, and the items that came next: user r's are wanted[offsets[r] : offsets[r + 1]]."""

    histories: Histories
    wanted: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]


@dataclass(frozen=True)
class HeldOut:
    """What a model may learn from, and what it is asked on each split."""

    training: Histories
    validation: Question
    test: Question

    def question(self, split: Split) -> Question:
        """By name."""
        return self.validation if split == "validation" else self.test


def hold_out(whole: Histories, protocol: Protocol) -> HeldOut:
    """Cuts whole histories by a protocol.

    With leave-one-out, users with fewer than three events hold nothing out. With the last invoice, users with one
    invoice hold nothing out, and those with two hold out a test alone.
    """
    starts = _group_starts(whole, protocol)
    lengths = whole.lengths
    last, before = _last_starts(whole, starts)  # first event of the last group and of the one before, or 0
    if protocol == LEAVE_ONE_OUT:
        before = np.where(lengths >= 3, before, 0)
        last = np.where(lengths >= 3, last, 0)
    kept = np.where(before > 0, before, np.where(last > 0, last, lengths))
    return HeldOut(
        training=first_events(whole, kept),
        validation=_question(whole, before, np.where(before > 0, last, 0)),
        test=_question(whole, last, np.where(last > 0, lengths, 0)),
    )


def _group_starts(whole: Histories, protocol: Protocol) -> npt.NDArray[np.bool_]:
    """[events] whether an event begins a group of those that are held out together."""
    if protocol == LEAVE_ONE_OUT:
        return np.ones(whole.events, dtype=np.bool_)
    begins = np.ones(whole.events, dtype=np.bool_)
    begins[1:] = np.diff(whole.times) != 0
    begins[whole.offsets[:-1]] = True
    return begins


def _last_starts(
    whole: Histories, starts: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """[users] where the last group begins within a history, and the one before that; 0 where that is the first."""
    last = np.zeros(len(whole), dtype=np.int64)
    before = np.zeros(len(whole), dtype=np.int64)
    for row in range(len(whole)):
        begins = np.flatnonzero(starts[whole.offsets[row] : whole.offsets[row + 1]])
        last[row] = begins[-1] if len(begins) else 0
        before[row] = begins[-2] if len(begins) > 1 else 0
    return last, before


def _question(whole: Histories, first: npt.NDArray[np.int64], end: npt.NDArray[np.int64]) -> Question:
    """From the events before `first` to those from it to `end`, for users with both."""
    rows = np.flatnonzero((first > 0) & (end > first))
    chosen = whole.select(rows)
    wanted = [
        whole.items[whole.offsets[row] + first[row] : whole.offsets[row] + end[row]].astype(np.int64)
        for row in rows
    ]
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in wanted])]).astype(np.int64)
    items = np.concatenate(wanted) if wanted else np.zeros(0, dtype=np.int64)
    return Question(first_events(chosen, first[rows]), items, offsets)


@dataclass(frozen=True)
class Judged:
    """[users] NDCG@10 and HR@10 (any of what came next among the first ten)."""

    ndcg: npt.NDArray[np.float64]
    hits: npt.NDArray[np.float64]


def judge(scorer: Scorer, question: Question, items: int, max_events: int) -> Judged:
    """How well a scorer answers; NDCG with as many relevant items as came next (Järvelin & Kekäläinen 2002).

    Args:
        items: size of the catalog.
        max_events: the most recent events that the scorer reads; all seen items are masked all the same.
    """
    histories = question.histories
    found, hit = np.zeros(len(histories)), np.zeros(len(histories))
    for start in range(0, len(histories), _USERS_AT_ONCE):
        rows = np.arange(start, min(start + _USERS_AT_ONCE, len(histories)))
        padded, times = histories.padded(rows, max_events)
        with torch.no_grad():
            scores = scorer(HistoryBatch.of(padded, times)).numpy().astype(np.float64)
        for place, row in enumerate(rows):
            wanted = np.unique(question.wanted[question.offsets[row] : question.offsets[row + 1]])
            found[row], hit[row] = one_user(scores[place], wanted, histories.history(int(row)), items)
    return Judged(found, hit)


def one_user(
    scores: npt.NDArray[np.float64],
    wanted: npt.NDArray[np.int64],
    seen: npt.NDArray[np.int32],
    items: int,
) -> tuple[float, float]:
    """NDCG@10 and HR@10 of one user's list; wanted items that were seen count as misses."""
    masked = scores.copy()
    masked[seen] = -np.inf
    values = masked[wanted]
    real = np.isfinite(values)
    above = (masked[None, :] > values[real][:, None]).sum(axis=1)
    level = (masked[None, :] == values[real][:, None]).sum(axis=1) - 1
    ranks = 1.0 + above + level / 2  # of each wanted item among all unseen
    near = ranks <= TOP
    ideal = _DISCOUNTS[: min(TOP, len(wanted))].sum()
    return float((1 / np.log2(1 + ranks[near])).sum() / ideal), float(near.any())
