"""What every task offers a family: candidates, the frozen part of a user's state, and the loss of one's own row."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from common.models.batches import HistoryBatch
from common.models.priors import Priors


class Task(nn.Module, ABC):
    """Candidates are public and frozen; a family's states are scored against them.

    Attributes:
        candidates: [candidates, width] unit vectors: items, or categories.
        features: how many numbers `event_features` adds to each event.
    """

    candidates: Tensor
    features: int = 0

    @abstractmethod
    def content(self, batch: HistoryBatch) -> Tensor:
        """[users, events, width]: the frozen part of the state after each event."""

    def event_vectors(self, x: Tensor, batch: HistoryBatch) -> Tensor:
        """Event vectors [users, events, width] as this task wants them read; what is known of an event included."""
        return x

    def event_features(self, batch: HistoryBatch) -> Tensor | None:
        """[users, events, features], or None where the task adds none."""
        return None

    def base(self, batch: HistoryBatch) -> Tensor | None:
        """[users, events, candidates]: frozen scores beside those of states, or None."""
        return None

    @abstractmethod
    def loss(
        self,
        states: Tensor,
        priors: Tensor,
        batch: HistoryBatch,
        *,
        pairs: Tensor | None = None,
        released: Priors | None = None,
    ) -> Tensor:
        """[users]: each user's loss, of that user's row alone.

        Args:
            states: [users, events, width] after each event.
            priors: [users, candidates] added to scores: the trained prior.
            pairs: [users, events] a family's own logits of (history before, this event), or None.
            released: priors of released statistics, for tasks whose candidates are the next items.
        """
