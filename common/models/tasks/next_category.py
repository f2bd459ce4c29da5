"""Task `next-category`: which category the next item belongs to; an item may have several, or none."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from common.models.batches import HistoryBatch, over_time
from common.models.priors import Priors
from common.models.tasks.task import Task

HISTORY_DECAY = 0.93
"""Weight of an event in a user's own distribution of categories, against the next later one."""
SMOOTHING = 0.5
"""Events' worth of the catalog's own distribution, added to each user's."""


class NextCategory(Task):
    """Scores start as the logarithm of the user's own recency-weighted categories, which needs no training.

    Args:
        vectors: [items, width] unit item vectors.
        membership: [items, categories] bool.
    """

    membership: Tensor
    catalog: Tensor

    def __init__(self, vectors: Tensor, membership: Tensor) -> None:
        super().__init__()
        member = membership.to(vectors.dtype)
        shares = member / member.sum(dim=1, keepdim=True).clamp(min=1)  # an item's categories share one event
        self.register_buffer("membership", shares, persistent=False)
        self.register_buffer(
            "catalog", (shares.sum(dim=0) + 1) / (shares.sum() + shares.shape[1]), persistent=False
        )
        self.register_buffer("candidates", normalize(shares.T @ vectors, dim=-1), persistent=False)

    def content(self, batch: HistoryBatch) -> Tensor:
        return self.candidates.new_zeros(*batch.items.shape, self.candidates.shape[1])

    def base(self, batch: HistoryBatch) -> Tensor:
        shares = self._shares(batch.items)  # [users, events, categories]
        age = torch.arange(batch.items.shape[1], device=shares.device)
        age = age.unsqueeze(1) - age.unsqueeze(0)
        kernel = torch.where(age >= 0, HISTORY_DECAY ** age.clamp(min=0).to(shares.dtype), 0.0)
        own = over_time(kernel, shares) + SMOOTHING * self.catalog
        return torch.log(own / own.sum(dim=-1, keepdim=True))

    def _shares(self, items: Tensor) -> Tensor:
        return self.membership[items.clamp(min=0)] * (items >= 0).unsqueeze(-1)

    def loss(
        self,
        states: Tensor,
        priors: Tensor,
        batch: HistoryBatch,
        *,
        pairs: Tensor | None = None,
        released: Priors | None = None,
    ) -> Tensor:
        """-log of the probability given to the next item's categories together; items without one are left out."""
        scores = (states @ self.candidates.T + self.base(batch) + priors.unsqueeze(1))[:, :-1]
        following = self._shares(batch.items)[:, 1:] > 0  # [users, events - 1, categories]
        valid = following.any(dim=-1) & (batch.items[:, :-1] >= 0)
        right = scores.masked_fill(~following, -1e9).logsumexp(dim=-1)
        losses = (scores.logsumexp(dim=-1) - right) * valid
        return losses.sum(dim=1) / valid.sum(dim=1).clamp(min=1)
