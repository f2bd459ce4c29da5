"""Family `ensemble`: the mean of up to ten families' scores, with learned weights.

score = sum of w_k score_k, w = softmax of k trained numbers, equal at the start. All members score states against
the same candidates, so the mean of scores is the score of the mean state; priors and encoder are the ensemble's.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from common.models.batches import HistoryBatch
from common.models.heads import zero_linear
from common.models.names import FAMILIES, named
from common.models.sequence import Ingredients, Reading, SequenceModel


class Ensemble(SequenceModel):
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
        # Members read events as the task does, but what it trains stays the ensemble's: a layer has one place.
        shared = {id(tensor): tensor for tensor in ingredients.task.buffers()}
        task = copy.deepcopy(ingredients.task, shared).requires_grad_(False)
        plan = plan.model_copy(update={"item_prior": False})
        of_member = replace(ingredients, task=task, encoder=None, plan=plan)
        self.members = nn.ModuleDict({name: named(FAMILIES, name).of(of_member) for name in plan.members})
        self.weights = zero_linear(1, len(self.members), bias=False)

    @classmethod
    def of(cls, ingredients: Ingredients) -> Self:
        return cls(ingredients)

    def read(self, vectors: Tensor, batch: HistoryBatch) -> Reading:
        readings: list[Reading] = [member.read(vectors, batch) for member in self.members.values()]  # type: ignore[operator]
        weights = torch.softmax(self.weights(vectors.new_ones(len(vectors), 1)), dim=-1)  # [users, members]

        def mixed(parts: list[Tensor | None], by: Tensor) -> Tensor | None:
            found = [by[:, k].view(-1, *[1] * (p.ndim - 1)) * p for k, p in enumerate(parts) if p is not None]
            return torch.stack(found).sum(dim=0) if found else None

        residual = mixed([reading.residual for reading in readings], weights)
        assert residual is not None
        return Reading(
            residual,
            mixed([reading.auxiliary for reading in readings], torch.full_like(weights, 1 / len(readings))),
            mixed([reading.pairs for reading in readings], weights),
        )
