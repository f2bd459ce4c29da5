"""Family `classifier`: the history as text, read by the language model: will the user buy, click, like?

P(y) = sigmoid(w h + b). With adapters (mode lora) h is the model's state at the candidate's own tokens, which have
attended to every event before: history and candidate are one text, and one pass a user reads each event as the
candidate of the history before it (task `interest`). Ranking a catalog that way would cost a pass for each item,
so scores of all candidates come from the state after the last event, against the candidates' frozen vectors. With
frozen item vectors the same formula is a logistic regression on what the frozen model said of each text.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from common.models.batches import HistoryBatch
from common.models.heads import mean_so_far, zero_linear
from common.models.sequence import Ingredients, Reading, SequenceModel
from common.models.tasks.interest import Interest


class Classifier(SequenceModel):
    """See the module."""

    def __init__(self, ingredients: Ingredients) -> None:
        plan = ingredients.plan
        super().__init__(
            ingredients.vectors,
            task=ingredients.task,
            item_prior=plan.item_prior,
            encoder=ingredients.encoder,
            with_times=plan.time_features,
        )
        extras = self.input_width - self.width
        self.residual = zero_linear(2 * self.width + extras, self.width)
        self.pair = zero_linear(2 * self.width, 1) if isinstance(self.task, Interest) else None

    @classmethod
    def of(cls, ingredients: Ingredients) -> Self:
        return cls(ingredients)

    def read(self, vectors: Tensor, batch: HistoryBatch) -> Reading:
        x = self.task.event_vectors(vectors, batch)  # [users, events, width]
        extras = self.event_inputs(x, batch)[..., self.width :]
        history = mean_so_far(x, batch.mask)
        residual = self.residual(torch.cat([history, x, extras], dim=-1))
        if self.pair is None:
            return Reading(residual)
        before = torch.cat([torch.zeros_like(history[:, :1]), history[:, :-1]], dim=1)
        # The candidate as read after its history, and how it agrees with what was liked; no label of its own.
        pairs = self.pair(torch.cat([vectors, vectors * before], dim=-1)).squeeze(-1)  # [users, events]
        return Reading(residual, pairs=pairs)
