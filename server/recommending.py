"""Recommends and predicts with a trained run's model: from titles that a person types to a ranked list.

    from server.recommending import load_recommender
    recommender = load_recommender("runs/...")
    for each in recommender.top(recommender.read(["Star Wars", "Alien"]), 10):
        print(each.rank, each.text, each.because)

A title of the catalog is found by its words; any other text is read by the language model and placed in the
space of item vectors, so a history may hold what the catalog does not. "-Title" is an event that was not liked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from common.finished import FinishedModel, load_finished
from common.models.batches import HistoryBatch
from common.models.language_model import embed_texts

NEIGHBOURS = 50
"""Items that each event of a history speaks for, in a neighbour-weighted list."""
NEIGHBOUR_DECAY = 0.9
_SCORES_AT_ONCE = 1 << 23


class HistoryError(ValueError):
    """The history given cannot be read; the message says why and what to do."""


@dataclass(frozen=True)
class Recommendation:
    """One item of the list.

    Attributes:
        because: places in the history, of the events that spoke most for it, most first.
    """

    rank: int
    item: str
    text: str
    score: float
    because: tuple[int, ...] = ()


@dataclass(frozen=True)
class Prediction:
    """What the model says of one candidate.

    Attributes:
        given: what was asked about, as typed.
        text: the candidate that it was read as.
        exact: whether the catalog has it; else it was read by its text, as the nearest.
        probability: that it is next, or liked; by the model's task.
        rank: among all candidates of the catalog, from 1.
    """

    given: str
    text: str
    exact: bool
    probability: float
    rank: int


@dataclass(frozen=True)
class ReadEvent:
    """How one title of the history was understood.

    Attributes:
        given: as typed.
        row: of the catalog; the nearest item by text where the catalog lacks the title.
        exact: whether the catalog has it.
        liked: whether it counts for or against its like.
    """

    given: str
    row: int
    exact: bool
    liked: bool = True


@dataclass(frozen=True)
class Recommender:
    """A run's model and its public catalog."""

    finished: FinishedModel

    @cached_property
    def _names(self) -> dict[str, int]:
        """Row of each whole title, then of each title without its year; the first where several share it."""
        rows: dict[str, int] = {}
        for row, text in enumerate(self._plain):
            rows.setdefault(text, row)
        for row, text in enumerate(self._plain):
            rows.setdefault(text.rpartition(" (")[0], row)
        return rows

    @cached_property
    def _plain(self) -> list[str]:
        return [text.casefold() for text in self.finished.catalog.texts]

    def read(self, titles: Sequence[str]) -> list[ReadEvent]:
        """Finds each title: whole, then without its year, then as a part of one title only, then by meaning.

        Of more titles than the model reads, the most recent are kept.

        Raises:
            HistoryError: no title is left.
        """
        titles = [title.strip() for title in titles if title.strip().removeprefix("-").strip()]
        if not titles:
            raise HistoryError("the history is empty: give titles, oldest first, separated by semicolons")
        return [self._find(title) for title in titles[-self.finished.plan.max_events :]]

    def _find(self, title: str) -> ReadEvent:
        liked, wanted = not title.startswith("-"), title.removeprefix("-").strip()
        plain = wanted.casefold()
        row = self._names.get(plain)
        if row is None:
            parts = [row for row, text in enumerate(self._plain) if plain in text]
            row = parts[0] if len(parts) == 1 else None
        if row is not None:
            return ReadEvent(wanted, row, True, liked)
        built = self.finished.built
        vector = built.projection(embed_texts(built.language_model, [wanted]))[0]
        return ReadEvent(wanted, int((self._units @ vector).argmax()), False, liked)

    @property
    def _units(self) -> Tensor:
        """[items, width] of unit norm; zeros for an item without text."""
        return self.finished.built.vectors

    def batch(self, histories: Sequence[Sequence[ReadEvent]]) -> HistoryBatch:
        """Histories as the model reads them, the most recent events of each."""
        most = self.finished.plan.max_events
        longest = max([1, *(min(len(history), most) for history in histories)])
        items = torch.full((len(histories), longest), -1, dtype=torch.int64)
        labels = torch.full((len(histories), longest), float("nan"))
        for user, history in enumerate(histories):
            for place, event in enumerate(list(history)[-most:]):
                items[user, place], labels[user, place] = event.row, float(event.liked)
        return HistoryBatch(items=items, times=torch.zeros_like(items), labels=labels)

    def scores(self, histories: Sequence[Sequence[ReadEvent]]) -> Tensor:
        """[histories, candidates]: every history against every candidate, in one matrix product."""
        return self.finished.built.model.scores(self.batch(histories))

    def top(self, events: Sequence[ReadEvent], count: int = 10, *, because: int = 2) -> list[Recommendation]:
        """The best candidates that the history does not hold.

        Args:
            because: how many events of the history to name for each; 0 leaves the explanation out.
        """
        scores = self._unseen(self.scores([events])[0], events)
        return self._listed(scores, events, count, because)

    def above(
        self, events: Sequence[ReadEvent], threshold: float, *, because: int = 2
    ) -> list[Recommendation]:
        """Items whose cosine with the user's state is at least `threshold`: by content alone, no prior.

        Raises:
            HistoryError: the model predicts categories, or the threshold is no cosine.
        """
        self._needs_items("a threshold list")
        if not -1 <= threshold <= 1:
            raise HistoryError(f"the threshold is {threshold:g}, but a cosine lies between -1 and 1")
        state = normalize(self.finished.built.model.last_states(self.batch([events]))[0], dim=-1)
        cosines = self._unseen(self._units @ state, events)
        cosines = cosines.masked_fill(cosines < threshold, float("-inf"))
        return self._listed(cosines, events, len(cosines), because)

    def by_neighbours(
        self, events: Sequence[ReadEvent], count: int = 10, *, because: int = 2
    ) -> list[Recommendation]:
        """Items near to those of the history: each event speaks for its nearest items, later ones more.

        score_i = sum over events h of decay^age * sim(h, i), over the nearest items of each h; sim is the cosine of
        texts, plus what released transitions say of (h, i), where the run released them.

        Raises:
            HistoryError: the model predicts categories.
        """
        self._needs_items("a neighbour-weighted list")
        total = torch.zeros(len(self._units))
        released = self.finished.built.model.released
        for age, event in enumerate(reversed(events)):
            near = self._units @ self._units[event.row]
            if released is not None:
                near = near + released.after_last(torch.tensor([[event.row]]))[0] - released.log_popularity
            best = near.topk(min(NEIGHBOURS + 1, len(near)))
            sign = 1.0 if event.liked else -1.0
            total[best.indices] += sign * NEIGHBOUR_DECAY**age * best.values
        total = total.masked_fill(total <= 0, float("-inf"))
        return self._listed(self._unseen(total, events), events, count, because)

    def predict(self, events: Sequence[ReadEvent], candidates: Sequence[str]) -> list[Prediction]:
        """What the model says of some candidates: titles, or names of categories.

        Raises:
            HistoryError: the catalog has no such category.
        """
        finished, model = self.finished, self.finished.built.model
        scores = self.scores([events])[0]
        read = [self._candidate(name.strip()) for name in candidates]
        places = [place for place, _ in read]
        if finished.plan.task == "interest":
            batch = self.batch([events] * len(places))
            probabilities = model.interest(batch, torch.tensor(places)).tolist()
        else:
            probabilities = torch.softmax(scores, dim=0)[places].tolist()
        return [
            Prediction(
                given.strip(),
                finished.candidates[place],
                exact,
                probability,
                int((scores > scores[place]).sum()) + 1,
            )
            for given, (place, exact), probability in zip(candidates, read, probabilities, strict=True)
        ]

    def _candidate(self, name: str) -> tuple[int, bool]:
        """The column of scores that a name is about, and whether the catalog has it."""
        if self.finished.plan.task != "next-category":
            event = self._find(name)
            return event.row, event.exact
        known = {each.casefold(): place for place, each in enumerate(self.finished.candidates)}
        if name.casefold() not in known:
            raise HistoryError(
                f"there is no category {name!r}: choose among {', '.join(self.finished.candidates)}"
            )
        return known[name.casefold()], True

    def _needs_items(self, what: str) -> None:
        if self.finished.plan.task == "next-category":
            raise HistoryError(f"{what} is of items, but the model predicts categories: ask for the top")

    def _unseen(self, scores: Tensor, events: Sequence[ReadEvent]) -> Tensor:
        if self.finished.plan.task == "next-category":
            return scores
        scores = scores.clone()
        scores[[event.row for event in events]] = float("-inf")
        return scores

    def _listed(
        self, scores: Tensor, events: Sequence[ReadEvent], count: int, because: int
    ) -> list[Recommendation]:
        best = scores.topk(min(count, int(scores.isfinite().sum())))
        reasons = (
            self._because(events, best.indices, because) if because and events and len(best.indices) else None
        )
        finished = self.finished
        names = finished.candidates if finished.plan.task == "next-category" else finished.catalog.ids
        return [
            Recommendation(
                place + 1,
                names[row],
                finished.candidates[row],
                float(score),
                tuple(reasons[place].tolist()) if reasons is not None else (),
            )
            for place, (score, row) in enumerate(
                zip(best.values.tolist(), best.indices.tolist(), strict=True)
            )
        ]

    def _because(self, events: Sequence[ReadEvent], rows: Tensor, count: int) -> Tensor:
        """[rows, count] places of the events without which each candidate's score would fall most."""
        whole = list(events)
        without = [whole[:place] + whole[place + 1 :] for place in range(len(whole))]
        at_once = max(1, _SCORES_AT_ONCE // len(self.finished.candidates))
        parts = [without[start : start + at_once] for start in range(0, len(without), at_once)]
        left = torch.cat([self.scores(part)[:, rows] for part in parts])  # [events, rows]
        fall = self.scores([whole])[:, rows] - left
        return fall.topk(min(count, len(whole)), dim=0).indices.T


def load_recommender(folder: Path | str, *, offline: bool = False) -> Recommender:
    """The recommender of a run's folder.

    Raises:
        FinishedError: the folder holds no run whose training ended.
    """
    return Recommender(load_finished(Path(folder), offline=offline))
