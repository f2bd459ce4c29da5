"""Family `dual`: what the whole history says beside what the present session says.

P(y_t) = sigmoid(W [h_t ; v_t]): h_t is the mean of all events so far, v_t of those of the present session; both from
frozen vectors, or from the language model with adapters. W maps them to a state that is scored against a candidate,
so one W serves every candidate. Training for `next-item` takes the softmax over candidates in place of each one's
sigmoid; the order is the same. W alone is adapted online, at the site (`client.feedback`).
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from common.models.batches import HistoryBatch
from common.models.heads import mean_so_far, zero_linear
from common.models.sequence import Ingredients, Reading, SequenceModel


class Dual(SequenceModel):
    """See the module.

    Args:
        session_gap: seconds without an event that end a session.
    """

    def __init__(self, ingredients: Ingredients) -> None:
        plan = ingredients.plan
        super().__init__(
            ingredients.vectors,
            task=ingredients.task,
            item_prior=plan.item_prior,
            encoder=ingredients.encoder,
            with_times=plan.time_features,
        )
        self.session_gap = plan.session_gap
        extras = self.input_width - self.width
        self.residual = zero_linear(2 * self.width + extras, self.width)

    @classmethod
    def of(cls, ingredients: Ingredients) -> Self:
        return cls(ingredients)

    def read(self, vectors: Tensor, batch: HistoryBatch) -> Reading:
        x = self.task.event_vectors(vectors, batch)  # [users, events, width]
        extras = self.event_inputs(x, batch)[..., self.width :]  # [users, events, features]
        history = mean_so_far(x, batch.mask)
        session = session_means(x, batch, self.session_gap)
        return Reading(self.residual(torch.cat([history, session, extras], dim=-1)))


def session_means(x: Tensor, batch: HistoryBatch, gap: int) -> Tensor:
    """[users, events, width]: the mean of the present session's events so far.

    Args:
        x: [users, events, width], zeros where there is no event.
        gap: seconds without an event that end a session.
    """
    apart = (batch.times[:, 1:] - batch.times[:, :-1]) > gap
    number = torch.cat([torch.zeros_like(batch.times[:, :1]), apart], dim=1).cumsum(dim=1)  # [users, events]
    together = (number.unsqueeze(2) == number.unsqueeze(1)) & batch.mask.unsqueeze(1)
    kernel = together.tril().to(x.dtype)  # [users, events (now), events (then)]
    return kernel @ x / kernel.sum(dim=-1, keepdim=True).clamp(min=1)
