"""The same recipe without privacy, in its best form: what the price of privacy is told by.

Exact statistics over all users' pooled events in place of noisy sums, with weights of their own, as exact counts want
others than noisy ones; then the model's trainable part by AdamW. Both are chosen on validation data. All of this runs
on the researcher's side of a simulation, and is no part of a federation: a site's code has no switch that turns privacy
off.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from client.statistics import popularity_sum, transition_sum
from common.events.histories import Histories
from common.memory import memory_kept
from common.models.batches import HistoryBatch
from common.models.interface import InterestModel
from common.models.priors import Priors, make_priors
from common.phases import StatisticsPlan
from common.sums import POPULARITY, SITES, TRANSITIONS, top_items

MOST_ITEMS = 8192
"""Pairs are counted among so many most popular items at most: their table takes 4 bytes a pair."""
_MOST_USERS = 20_000
"""With more users pairs are counted once, at the plan's own gaps: each count reads every history."""
_CHOICES: tuple[tuple[str, Sequence[float]], ...] = (
    ("gaps", (5, 20, 1)),
    ("lift_weight", (0.5, 0.8, 1.0, 1.25)),
    ("lift_decay", (0.7, 0.8, 0.95, 0.98)),
    ("pseudo_count", (10.0, 100.0, 300.0)),
    ("popularity_weight", (0.5, 1.5, 2.0, 3.0)),
    ("lift_weight", (0.65, 0.8, 1.0, 1.25, 1.5)),
    ("lift_decay", (0.7, 0.8, 0.95, 0.98)),
)
"""What is tried beside the plan's own values, one field after the other."""


@dataclass(frozen=True)
class OpenTraining:
    """Settings of training without privacy.

    Attributes:
        epochs: at most; the best one by its score is kept, the start included.
        patience: epochs without a better one before the end.
    """

    epochs: int = 30
    learning_rate: float = 3e-3
    batch_size: int = 64
    patience: int = 4


def exact_statistics(training: Histories, items: int, plan: StatisticsPlan) -> dict[str, Tensor]:
    """The sums without noise, over all users: no privacy at all.

    Args:
        items: size of the catalog.
        plan: pairs are counted among its `top_items` most popular.
    """
    popularity = popularity_sum(training, items, plan.max_events).float()
    one = torch.ones(1)
    found = {POPULARITY: popularity, POPULARITY + SITES: one}
    if plan.most_items(items):
        top = top_items(popularity, plan.most_items(items))
        pairs = transition_sum(
            training, top, items, plan.max_events, symmetric=plan.symmetric, gaps=plan.gaps
        )
        found |= {TRANSITIONS: pairs.float(), TRANSITIONS + SITES: one}
    return found


def without_noise(plan: StatisticsPlan, items: int) -> StatisticsPlan:
    """The same statistics, stated without noise: over all items, or the most popular where these are too many."""
    return plan.model_copy(
        update={
            "popularity_noise_multiplier": None,
            "transition_noise_multiplier": None,
            "top_items": min(items, MOST_ITEMS) if plan.transition_share else 0,
        }
    )


@dataclass(frozen=True)
class ExactPriors:
    """Priors of exact statistics, the weights that they came to, and how many were tried."""

    priors: Priors
    statistics: StatisticsPlan
    tried: int


def best_exact_priors(
    training: Histories, items: int, plan: StatisticsPlan, score: Callable[[Priors], float]
) -> ExactPriors:
    """Exact statistics with the weights that score best, one field after the other.

    Args:
        items: size of the catalog.
        plan: with a popularity share; its own weights are the first that are tried.
        score: on validation data; higher is better.
    """
    best_plan = without_noise(plan, items)
    released = exact_statistics(training, items, best_plan)
    priors = make_priors(released, best_plan, items)
    best, tried = score(priors), 1
    for field, values in _CHOICES:
        if field != "popularity_weight" and not plan.transition_share:
            continue
        if field == "gaps" and len(training) > _MOST_USERS:
            continue
        for value in values:
            if value == getattr(best_plan, field):
                continue
            other = best_plan.model_copy(update={field: value})
            sums = exact_statistics(training, items, other) if field == "gaps" else released
            found = make_priors(sums, other, items)
            worth, tried = score(found), tried + 1
            if worth > best:
                best, best_plan, priors, released = worth, other, found, sums
    return ExactPriors(priors, best_plan, tried)


@memory_kept()
def train_without_privacy(
    start: InterestModel,
    batch: HistoryBatch,
    priors: Priors | None,
    settings: OpenTraining,
    score: Callable[[InterestModel, float], float],
    seed: int,
) -> InterestModel:
    """The same model on all users' pooled training events, by AdamW; the epoch with the best score is kept.

    Args:
        start: at its seeded start; left as it is.
        batch: of all users.
        priors: of exact statistics; None where the recipe has none.
        score: of a model, and the epoch's mean loss (NaN for the start); higher is better.
    """
    model = copy.deepcopy(start)
    model.set_released(priors)
    batch = batch.to(next(iter(model.buffers())).device)
    model.eval()
    best, best_state, waited = score(model, float("nan")), model.trainable_state(), 0
    known = None if priors is None else popularity_alone(priors)
    optimiser = torch.optim.AdamW(model.trainable().values(), lr=settings.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    prepared = model.prepare(batch) if settings.epochs else batch
    for _ in range(settings.epochs):
        model.train()
        model.set_released(known)
        losses = []
        for rows in torch.randperm(len(prepared), generator=generator).split(settings.batch_size):
            optimiser.zero_grad()
            loss = model.per_user_loss(prepared.rows(rows.to(prepared.items.device))).mean()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        model.eval()
        model.set_released(priors)
        found = score(model, sum(losses) / len(losses))
        waited = 0 if found > best else waited + 1
        if found > best:
            best, best_state = found, model.trainable_state()
        elif waited >= settings.patience:
            break
    model.load_trainable(best_state)
    return model


def popularity_alone(priors: Priors) -> Priors:
    """For training beside exact counts: a user's own pairs are in them, and would foretell what is trained on."""
    return replace(priors, lift=priors.lift[:0, :0], top=priors.top[:0])
