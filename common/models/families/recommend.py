"""Family `recommend`: a user's state in the space of item vectors, scored against every item.

score(u_t, v_i) = u_t . v_i + prior_i, with u_t = content_t + P_u(core state, mean of events, last event). P_u
and the trained part of the prior start at zero, so the model before any private step is the content-based
recommender. A linear item map P_v would be absorbed by P_u (u . P_v v = P_v' u . v) and would share trainable
computation between users, so item vectors stay frozen and public.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.models.batches import HistoryBatch
from common.models.content import content_states
from common.models.heads import next_item_loss, zero_linear
from common.models.history_encoder import HistoryEncoder
from common.models.interface import InterestModel
from common.models.names import CORES, named

PRIOR_SCALE = 4.0
"""Public factor of the trained prior: how much of a user's clipped gradient it may take."""


class Recommend(InterestModel):
    """See the module.

    Args:
        vectors: [items, width] float32 unit vectors of the catalog's items.
        core: name of the temporal core.
        hidden_width: width of the core's state.
        item_prior: whether a prior for each item is trained too (as many coordinates as the catalog has items).
        negatives: [n] int64 public candidates for the loss, or None for the whole catalog.
        encoder: reads a history as one token sequence; None to take frozen item vectors as event vectors.
    """

    vectors: Tensor
    priors: Tensor
    negatives: Tensor | None

    def __init__(
        self,
        vectors: Tensor,
        *,
        core: str = "lstm",
        hidden_width: int = 16,
        item_prior: bool = True,
        negatives: Tensor | None = None,
        encoder: HistoryEncoder | None = None,
    ) -> None:
        super().__init__()
        width = vectors.shape[1]
        self.register_buffer("vectors", vectors, persistent=False)
        self.register_buffer("priors", vectors.new_zeros(len(vectors)), persistent=False)
        self.register_buffer("negatives", negatives, persistent=False)
        self.encoder = encoder
        self.core = named(CORES, core)(width, hidden_width)
        self.residual = zero_linear(self.core.output_width + 2 * width, width)
        # Each user's row sees the prior through a Linear call of its own, so its gradient has one row a user.
        self.item_prior = zero_linear(1, len(vectors), bias=False) if item_prior else None

    def prepare(self, batch: HistoryBatch) -> HistoryBatch:
        return batch if self.encoder is None else self.encoder.lower(batch)

    def states(self, batch: HistoryBatch) -> Tensor:
        """[users, events, width]: the user's state after each event."""
        present = batch.mask.unsqueeze(-1).to(self.vectors.dtype)
        x: Tensor = self.vectors[batch.items.clamp(min=0)] if self.encoder is None else self.encoder(batch)
        x = x * present  # [users, events, width]
        h = self.core(x)  # [users, events, hidden]
        # Masked-mean pooling of the events so far.
        mean = x.cumsum(dim=1) / present.cumsum(dim=1).clamp(min=1)
        residual: Tensor = self.residual(torch.cat([h, mean, x], dim=-1))
        return content_states(self.vectors, batch.items) + residual

    def priors_of(self, users: int) -> Tensor:
        """[users, items]: public or released priors plus the trained one."""
        if self.item_prior is None:
            return self.priors.expand(users, -1)
        ones = self.priors.new_ones(users, 1)
        trained: Tensor = self.item_prior(ones)
        return self.priors + PRIOR_SCALE * trained

    def per_user_loss(self, batch: HistoryBatch) -> Tensor:
        return next_item_loss(
            self.states(batch),
            batch.items,
            self.vectors,
            self.priors_of(len(batch)),
            self.negatives,
            self.released,
        )

    @torch.no_grad()
    def scores(self, batch: HistoryBatch) -> Tensor:
        states = self.states(self.prepare(batch))
        lengths = batch.lengths
        users = torch.arange(len(batch), device=states.device)
        last = states[users, (lengths - 1).clamp(min=0)]  # [users, width]
        scores = (last * (lengths > 0).unsqueeze(-1)) @ self.vectors.T + self.priors_of(len(batch))
        return scores if self.released is None else scores + self.released.after_last(batch.items)
