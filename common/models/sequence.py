"""What all families share: event vectors, a task's frozen content and priors, and scores of candidates.

score = (content_t + residual_t) . candidate + base + priors. A family adds the residual, zero at its start, so every
model before any private step is the content-and-priors recommender of its task.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from common.model_plan import ModelPlan
from common.models.batches import HistoryBatch
from common.models.heads import zero_linear
from common.models.history_encoder import HistoryEncoder
from common.models.interface import InterestModel
from common.models.item_vectors import TextProjection
from common.models.language_model import LanguageModel
from common.models.tasks.next_item import NextItem
from common.models.tasks.task import Task
from common.models.time_features import TIME_FEATURES, time_features

PRIOR_SCALE = 4.0
"""Public factor of the trained prior: how much of a user's clipped gradient it may take."""


@dataclass(frozen=True)
class Ingredients:
    """What a family is built from; all of it public.

    Attributes:
        vectors: [items, width] float32 unit vectors of the catalog's items.
        task: over these vectors; a member of an ensemble gets one of its own.
        language_model: frozen, with `projection` from its pooled states to the space of vectors.
        encoder: reads a history as one token sequence; None to take frozen item vectors as event vectors.
        plan: for widths, weights and names.
    """

    vectors: Tensor
    task: Task
    language_model: LanguageModel
    projection: TextProjection
    encoder: HistoryEncoder | None
    plan: ModelPlan


@dataclass(frozen=True)
class Reading:
    """What a family makes of histories.

    Attributes:
        residual: [users, events, width], added to the task's content.
        auxiliary: [users] loss beside the task's, or None.
        pairs: [users, events] logits of (history before, this event), for the task `interest`, or None.
    """

    residual: Tensor
    auxiliary: Tensor | None = None
    pairs: Tensor | None = None


class SequenceModel(InterestModel):
    """See the module.

    Args:
        vectors: [items, width] float32 unit vectors of the catalog's items.
        task: None for `next-item` over `vectors`.
        item_prior: whether a prior for each candidate is trained too (as many coordinates as there are candidates).
        negatives: [n] int64 public candidates for the loss of `next-item`, or None for the whole catalog.
        encoder: reads a history as one token sequence; None to take frozen item vectors as event vectors.
        with_times: whether gaps and ages of events are features.
    """

    vectors: Tensor

    def __init__(
        self,
        vectors: Tensor,
        *,
        task: Task | None = None,
        item_prior: bool = True,
        negatives: Tensor | None = None,
        encoder: HistoryEncoder | None = None,
        with_times: bool = False,
    ) -> None:
        super().__init__()
        self.width = vectors.shape[1]
        self.register_buffer("vectors", vectors, persistent=False)
        self.task = task if task is not None else NextItem(vectors, negatives=negatives)
        self.with_times = with_times
        self.encoder = encoder
        # Each user's row sees the prior through a Linear call of its own, so its gradient has one row a user.
        self.item_prior = zero_linear(1, len(self.task.candidates), bias=False) if item_prior else None

    @classmethod
    @abstractmethod
    def of(cls, ingredients: Ingredients) -> Self:
        """The family at its start, from torch's present random state."""

    @property
    def input_width(self) -> int:
        """Width of `event_inputs`."""
        return self.width + self.task.features + (TIME_FEATURES if self.with_times else 0)

    def prepare(self, batch: HistoryBatch) -> HistoryBatch:
        if self.encoder is None or batch.token_states is not None:
            return batch
        return self.encoder.lower(batch)

    @abstractmethod
    def read(self, vectors: Tensor, batch: HistoryBatch) -> Reading:
        """The family's own part: the residual state after each event, and losses of its own.

        Args:
            vectors: [users, events, width] from `event_vectors`.
        """

    def event_vectors(self, batch: HistoryBatch) -> Tensor:
        """[users, events, width]: frozen item vectors, or what the encoder read; zeros where there is no event."""
        x: Tensor = self.vectors[batch.items.clamp(min=0)] if self.encoder is None else self.encoder(batch)
        return x * batch.mask.unsqueeze(-1)

    def event_inputs(self, x: Tensor, batch: HistoryBatch) -> Tensor:
        """Event vectors with features of time and label beside them: [users, events, input_width]."""
        parts = [x]
        features = self.task.event_features(batch)
        if features is not None:
            parts.append(features * batch.mask.unsqueeze(-1))
        if self.with_times:
            parts.append(time_features(batch.times, batch.mask).to(x.dtype))
        return torch.cat(parts, dim=-1)

    def states(self, batch: HistoryBatch) -> Tensor:
        """[users, events, width]: the user's state after each event."""
        return self.task.content(batch) + self.read(self.event_vectors(batch), batch).residual

    def priors_of(self, users: int) -> Tensor:
        """[users, candidates]."""
        if self.item_prior is None:
            return self.vectors.new_zeros(users, len(self.task.candidates))
        trained: Tensor = self.item_prior(self.vectors.new_ones(users, 1))
        return PRIOR_SCALE * trained

    def per_user_loss(self, batch: HistoryBatch) -> Tensor:
        reading = self.read(self.event_vectors(batch), batch)
        states = self.task.content(batch) + reading.residual
        priors = self.priors_of(len(batch))
        loss = self.task.loss(states, priors, batch, pairs=reading.pairs, released=self.released)
        return loss if reading.auxiliary is None else loss + reading.auxiliary

    @torch.no_grad()
    def last_states(self, batch: HistoryBatch) -> Tensor:
        if batch.items.shape[1] == 0:
            batch = batch.widened()
        users = torch.arange(len(batch), device=self.vectors.device)
        last = (batch.lengths - 1).clamp(min=0)
        return self.states(self.prepare(batch))[users, last] * (batch.lengths > 0).unsqueeze(-1)

    @torch.no_grad()
    def scores(self, batch: HistoryBatch) -> Tensor:
        if batch.items.shape[1] == 0:
            batch = batch.widened()
        scores = self.last_states(batch) @ self.task.candidates.T + self.priors_of(len(batch))
        base = self.task.base(batch)
        if base is not None:
            users = torch.arange(len(batch), device=scores.device)
            scores = scores + base[users, (batch.lengths - 1).clamp(min=0)]
        if self.released is not None and isinstance(self.task, NextItem):
            scores = scores + self.released.after_last(batch.items)
        return scores

    @torch.no_grad()
    def interest(self, batch: HistoryBatch, items: Tensor) -> Tensor:
        from common.models.tasks.interest import Interest

        if not isinstance(self.task, Interest):
            raise ValueError(
                "the model was not trained for the task interest: train one with model.task=interest"
            )
        batch = self.prepare(batch.followed_by(items))
        reading = self.read(self.event_vectors(batch), batch)
        priors = self.priors_of(len(batch))
        logits = self.task.logits(self.task.content(batch) + reading.residual, priors, batch, reading.pairs)
        users = torch.arange(len(batch), device=logits.device)
        return torch.sigmoid(logits[users, batch.lengths - 1])
