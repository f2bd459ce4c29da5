"""Recommends with a finished run's model: from titles that a person types to a ranked list.

A title of the catalog is found by its words; any other text is read by the language model and placed in the
space of item vectors, so a history may hold what the catalog does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import normalize

from common.assets import home, language_model
from common.events.catalog import Catalog
from common.models.batches import HistoryBatch
from common.models.build import BuiltModel, build_model, item_texts
from common.models.priors import make_priors
from server.runs import RunFolder


class HistoryError(ValueError):
    """The history given cannot be read; the message says why and what to do."""


@dataclass(frozen=True)
class Recommendation:
    """One item of the list."""

    rank: int
    item: str
    text: str
    score: float


@dataclass(frozen=True)
class ReadEvent:
    """How one title of the history was understood.

    Attributes:
        given: as typed.
        row: of the catalog; the nearest item by text where the catalog lacks the title.
        exact: whether the catalog has it.
    """

    given: str
    row: int
    exact: bool


@dataclass(frozen=True)
class Recommender:
    """A run's model and its public catalog."""

    catalog: Catalog
    built: BuiltModel
    max_events: int

    @classmethod
    def load(cls, run: RunFolder, *, offline: bool = False) -> Recommender:
        """The final model of a finished run."""
        plan, catalog = run.plan(), run.catalog()
        built = build_model(
            plan.model,
            item_texts(catalog.texts, catalog.categories),
            language_model(plan.model.encoder, offline=offline),
            cache=home() / "item-vectors",
        )
        built.model.load_trainable(run.model_state())
        built.model.set_released(make_priors(run.released_state(), plan.statistics, len(catalog)))
        built.model.eval()
        return cls(catalog, built, plan.model.max_events)

    def read(self, titles: Sequence[str]) -> list[ReadEvent]:
        """Finds each title: whole, then without its year, then as a part of one title only, then by meaning.

        Raises:
            HistoryError: no title is left.
        """
        titles = [title.strip() for title in titles if title.strip()]
        if not titles:
            raise HistoryError("the history is empty: give titles, oldest first, separated by semicolons")
        plain = [text.casefold() for text in self.catalog.texts]
        events = []
        for title in titles[-self.max_events :]:
            wanted = title.casefold()
            rows = [r for r, text in enumerate(plain) if text == wanted]
            rows = rows or [r for r, text in enumerate(plain) if text.rpartition(" (")[0] == wanted]
            if not rows:
                parts = [r for r, text in enumerate(plain) if wanted in text]
                rows = parts if len(parts) == 1 else []
            events.append(
                ReadEvent(title, rows[0], True) if rows else ReadEvent(title, self._nearest(title), False)
            )
        return events

    def _nearest(self, title: str) -> int:
        from common.models.language_model import embed_texts

        vector = self.built.projection(embed_texts(self.built.language_model, [title]))[0]
        return int((normalize(self.built.vectors, dim=-1) @ vector).argmax())

    def top(self, events: Sequence[ReadEvent], count: int = 10) -> list[Recommendation]:
        """The best items that the history does not hold."""
        items = torch.tensor([[event.row for event in events]])
        scores = self.built.model.scores(HistoryBatch(items=items, times=torch.zeros_like(items)))[0]
        scores[items[0]] = float("-inf")
        count = min(count, int(scores.isfinite().sum()))
        best = scores.topk(count)
        return [
            Recommendation(place + 1, self.catalog.ids[row], self.catalog.texts[row], float(score))
            for place, (score, row) in enumerate(
                zip(best.values.tolist(), best.indices.tolist(), strict=True)
            )
        ]


def load_recommender(folder: Path, *, offline: bool = False) -> Recommender:
    """The recommender of a finished run's folder."""
    return Recommender.load(RunFolder.finished(folder), offline=offline)
