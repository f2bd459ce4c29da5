"""Task `interest`: whether a user likes an item (rates it high, buys it, clicks it), from what came before.

logit_t = state_{t-1} . v_t + prior_t + logit of the user's own rate so far + a trained correction. Labels that are
unknown are left out of loss and rate alike; a class that is rare is weighed by a public constant, or within the
user's own row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from common.models.batches import HistoryBatch, over_time
from common.models.heads import zero_linear
from common.models.priors import Priors
from common.models.tasks.task import Task

RATE_STRENGTH = 2.0
"""Events' worth of a rate of one half, added to each user's own."""
LIKING_DECAY = 0.97
LIKING_SCALE = 1.5
"""Of the frozen part: how fast likings fade by event, and how much they weigh."""


class Interest(Task):
    """See the module.

    Args:
        vectors: [items, width] unit item vectors.
        like_weight: public weight of liked events in the loss.
        balance: whether both classes weigh the same within each user's row.
    """

    features = 1

    def __init__(self, vectors: Tensor, *, like_weight: float = 1.0, balance: bool = False) -> None:
        super().__init__()
        self.register_buffer("candidates", vectors, persistent=False)
        self.like_weight, self.balance = like_weight, balance
        self.correction = zero_linear(2, 1)

    def event_vectors(self, x: Tensor, batch: HistoryBatch) -> Tensor:
        """Liked events as they are, disliked ones turned round, unknown ones at half weight."""
        sign = torch.nan_to_num(2 * batch.known_labels - 1, nan=0.5)
        return x * sign.unsqueeze(-1)

    def event_features(self, batch: HistoryBatch) -> Tensor:
        return torch.nan_to_num(2 * batch.known_labels - 1, nan=0.0).unsqueeze(-1)

    def rates(self, batch: HistoryBatch) -> Tensor:
        """[users, events]: the user's own smoothed rate of likes, after each event."""
        known = ~batch.known_labels.isnan()
        liked = torch.nan_to_num(batch.known_labels, nan=0.0).cumsum(dim=1)
        return (liked + RATE_STRENGTH / 2) / (known.cumsum(dim=1) + RATE_STRENGTH)

    def content(self, batch: HistoryBatch) -> Tensor:
        """What was liked more than the user's rate, less what was liked less, fading: [users, events, width]."""
        labels = batch.known_labels
        known = (~labels.isnan()).unsqueeze(-1).to(self.candidates.dtype)
        x = self.candidates[batch.items.clamp(min=0)] * known  # [users, events, width]
        age = torch.arange(batch.items.shape[1], device=x.device)
        age = age.unsqueeze(1) - age.unsqueeze(0)
        kernel = torch.where(age >= 0, LIKING_DECAY ** age.clamp(min=0).to(x.dtype), 0.0)
        liked = over_time(kernel, x * torch.nan_to_num(labels, nan=0.0).unsqueeze(-1))
        all_known = over_time(kernel, x)
        weight = over_time(kernel, known)  # [users, events, 1]
        surplus = liked - self.rates(batch).unsqueeze(-1) * all_known
        return LIKING_SCALE * surplus / (1 + weight).sqrt()

    def logits(self, states: Tensor, priors: Tensor, batch: HistoryBatch, pairs: Tensor | None) -> Tensor:
        """[users, events]: of each event's being liked, from the events before it alone."""
        before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], dim=1)
        items = batch.items.clamp(min=0)
        score = (before * self.candidates[items]).sum(dim=-1)
        score = score + priors.gather(1, items)
        rate = torch.logit(self.rates(batch))
        rate = torch.cat([torch.zeros_like(rate[:, :1]), rate[:, :-1]], dim=1)
        return score + self._of_rate(rate) + (0.0 if pairs is None else pairs)

    def _of_rate(self, rate: Tensor) -> Tensor:
        corrected: Tensor = self.correction(torch.stack([rate, torch.tanh(rate)], dim=-1)).squeeze(-1)
        return rate + corrected

    def base(self, batch: HistoryBatch) -> Tensor:
        return self._of_rate(torch.logit(self.rates(batch))).unsqueeze(-1)

    def loss(
        self,
        states: Tensor,
        priors: Tensor,
        batch: HistoryBatch,
        *,
        pairs: Tensor | None = None,
        released: Priors | None = None,
    ) -> Tensor:
        labels = batch.known_labels
        known = ~labels.isnan() & batch.mask
        truth = torch.nan_to_num(labels, nan=0.0)
        weights = torch.where(truth > 0, self.like_weight, 1.0) * known
        if self.balance:
            liked, other = (
                (weights * truth).sum(1, keepdim=True),
                (weights * (1 - truth)).sum(1, keepdim=True),
            )
            weights = weights * torch.where(truth > 0, 0.5 / liked.clamp(min=1), 0.5 / other.clamp(min=1))
        losses = binary_cross_entropy_with_logits(
            self.logits(states, priors, batch, pairs), truth, reduction="none"
        )
        return (losses * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-6)
