"""What a private model is held against: popularity, content alone, and the same model without privacy.

All of this runs on the researcher's side of a simulation, on pooled public data, and is no part of a
federation. Plain training lives here, so that a site's code has no switch that turns privacy off.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from common.models.batches import HistoryBatch
from common.models.interface import InterestModel
from simulations.evaluation import HeldOut, Scorer, evaluate, model_scorer


def popularity_scorer(held_out: HeldOut, items: int) -> Scorer:
    """Items by their exact count in the training events, the same for every user."""
    training, _ = held_out.split("validation")
    counts = torch.from_numpy(np.bincount(training.items, minlength=items).astype(np.float32))

    def score(batch: HistoryBatch) -> Tensor:
        return counts.expand(len(batch), -1)

    return score


def train_without_privacy(
    start: InterestModel,
    held_out: HeldOut,
    items: int,
    *,
    epochs: int,
    learning_rate: float = 3e-3,
    batch_size: int = 64,
    seed: int = 0,
    on_epoch: Callable[[int], None] = lambda _: None,
) -> InterestModel:
    """The same model, on all users' pooled training events, with AdamW; the best epoch on validation is kept.

    Args:
        start: at its seeded start; left as it is.
        items: size of the catalog.
    """
    model = copy.deepcopy(start)
    training, _ = held_out.split("validation")
    device = next(iter(model.buffers())).device
    padded, times = training.padded(range(len(training)), held_out.max_events)
    batch = model.prepare(HistoryBatch.of(padded, times, device))
    optimiser = torch.optim.AdamW(model.trainable().values(), lr=learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    best, best_state = -1.0, model.trainable_state()
    for epoch in range(epochs):
        model.train()
        for rows in torch.randperm(len(batch), generator=generator).split(batch_size):
            optimiser.zero_grad()
            model.per_user_loss(batch.rows(rows.to(device))).mean().backward()
            optimiser.step()
        quality = float(evaluate(model_scorer(model), held_out, "validation", items).ndcg.mean())
        if quality > best:
            best, best_state = quality, model.trainable_state()
        on_epoch(epoch + 1)
    model.load_trainable(best_state)
    return model
