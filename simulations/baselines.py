"""What a private model is held against: popularity, content alone, and the same recipe without privacy.

All of this runs on the researcher's side of a simulation, on pooled events, and is no part of a federation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from common.config import Plan
from common.models.interface import InterestModel
from common.models.priors import Priors
from simulations.evaluation import HeldOut, Scorer, evaluate, model_scorer
from simulations.quality import Quality
from simulations.without_privacy import OpenTraining, best_exact_priors, train_without_privacy

_JUDGES = 2000
"""Weights of exact statistics are chosen by so many users at most."""


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


@dataclass(frozen=True)
class OpenForm:
    """The recipe without privacy, in the best form that was found.

    Attributes:
        model: with its exact statistics.
        epochs: of its training, for a plot.
        tried: how many settings of the statistics were looked at, on validation data.
    """

    model: InterestModel
    epochs: tuple[Epoch, ...]
    tried: int


def without_privacy(
    start: InterestModel,
    plan: Plan,
    held_out: HeldOut,
    items: int,
    *,
    epochs: int,
    on_look: Callable[[], None] = lambda: None,
) -> OpenForm:
    """The same recipe on all users' pooled training events: exact statistics, then AdamW; both chosen on validation.

    Args:
        start: at its seeded start; left as it is.
        items: size of the catalog.
        epochs: of training at most.
        on_look: called after each look at validation data.
    """
    training, task = held_out.training(), held_out.task
    few = held_out.some(_JUDGES)
    tried, priors = 0, None
    if plan.statistics.popularity_share:
        trial = copy.deepcopy(start)

        def worth(found: Priors) -> float:
            trial.set_released(found)
            quality = evaluate(model_scorer(trial, task), few, "validation", items)
            on_look()
            return float(quality.per_user.mean())

        best = best_exact_priors(training, items, plan.statistics, worth)
        tried, priors = best.tried, best.priors
    seen: list[Epoch] = []

    def score(model: InterestModel, loss: float) -> float:
        quality = evaluate(model_scorer(model, task), held_out, "validation", items)
        on_look()
        if not math.isnan(loss):
            seen.append(Epoch(loss, quality))
        return float(quality.per_user.mean())

    batch = held_out.batch(training, np.arange(len(training)))
    settings = OpenTraining(epochs=epochs, patience=epochs)
    model = train_without_privacy(start, batch, priors, settings, score, seed=0)
    return OpenForm(model, tuple(seen), tried)
