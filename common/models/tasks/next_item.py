"""Task `next-item`: which item of the catalog comes next."""

from __future__ import annotations

from torch import Tensor

from common.models.batches import HistoryBatch
from common.models.content import content_states
from common.models.heads import next_item_loss
from common.models.priors import Priors
from common.models.tasks.task import Task


class NextItem(Task):
    """Softmax over the catalog, or over a public set of negatives.

    Args:
        vectors: [items, width] unit item vectors.
        negatives: [n] int64 public rows of the catalog, or None for all.
    """

    negatives: Tensor | None

    def __init__(self, vectors: Tensor, *, negatives: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("candidates", vectors, persistent=False)
        self.register_buffer("negatives", negatives, persistent=False)

    def content(self, batch: HistoryBatch) -> Tensor:
        return content_states(self.candidates, batch.items)

    def loss(
        self,
        states: Tensor,
        priors: Tensor,
        batch: HistoryBatch,
        *,
        pairs: Tensor | None = None,
        released: Priors | None = None,
    ) -> Tensor:
        return next_item_loss(states, batch.items, self.candidates, priors, self.negatives, released)
