"""What a private model is held against: popularity, content alone, and the same model without privacy.

All of this runs on the researcher's side of a simulation, on pooled public data, and is no part of a
federation. Plain training lives here, so that a site's code has no switch that turns privacy off.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from common.memory import memory_kept
from common.models.interface import InterestModel
from simulations.evaluation import HeldOut, Scorer, evaluate, model_scorer
from simulations.quality import Quality


def popularity_scorer(held_out: HeldOut, items: int) -> Scorer:
    """What is usual in the training events, the same for every user.

    Items by their exact count; for `interest` the item's smoothed rate of likes; for `next-category` categories by
    their count.
    """
    training = held_out.training()
    if held_out.labels is not None:
        labels = held_out.labels.labels(training)
        known = ~np.isnan(labels)
        liked = np.bincount(training.items[known], weights=labels[known], minlength=items)
        shown = np.bincount(training.items[known], minlength=items)
        overall = float(labels[known].mean()) if known.any() else 0.5
        rates = torch.from_numpy((liked + 2 * overall) / (shown + 2))
        return lambda batch, asked: rates[asked]
    counts = np.bincount(training.items, minlength=items).astype(np.float64)
    if held_out.membership is not None:
        counts = counts @ held_out.membership
    usual = torch.from_numpy(counts.astype(np.float32))
    return lambda batch, asked: usual.expand(len(batch), -1)


@dataclass(frozen=True)
class Epoch:
    """How far training without privacy has come: the mean loss on training events, and validation quality."""

    loss: float
    validation: Quality


@memory_kept()
def train_without_privacy(
    start: InterestModel,
    held_out: HeldOut,
    items: int,
    *,
    epochs: int,
    learning_rate: float = 3e-3,
    batch_size: int = 64,
    seed: int = 0,
    on_epoch: Callable[[Epoch], None] = lambda _: None,
) -> InterestModel:
    """The same model, on all users' pooled training events, with AdamW; the best epoch on validation is kept.

    Args:
        start: at its seeded start; left as it is.
        items: size of the catalog.
    """
    model = copy.deepcopy(start)
    training = held_out.training()
    device = next(iter(model.buffers())).device
    batch = model.prepare(held_out.batch(training, np.arange(len(training))).to(device))
    optimiser = torch.optim.AdamW(model.trainable().values(), lr=learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    best, best_state = -float("inf"), model.trainable_state()
    for _ in range(epochs):
        model.train()
        losses = []
        for rows in torch.randperm(len(batch), generator=generator).split(batch_size):
            optimiser.zero_grad()
            loss = model.per_user_loss(batch.rows(rows.to(device))).mean()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        found = evaluate(model_scorer(model, held_out.task), held_out, "validation", items)
        quality = float(found.per_user.mean())
        if quality > best:
            best, best_state = quality, model.trainable_state()
        on_epoch(Epoch(float(np.mean(losses)), found))
    model.load_trainable(best_state)
    return model
