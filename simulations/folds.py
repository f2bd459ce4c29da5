"""A plan judged by K-fold over users: as many federations as folds, each judged by users who were at no site.

For validation alone: the test split is not looked at. Each fold is a run of its own, with sites and ledgers of its
own, so epsilons hold for each fold's run by itself; on real users, K folds would cost each user K - 1 runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from rich.table import Table

from common.config import Plan
from simulations.datasets import Dataset
from simulations.federation import SimulationOptions, simulate
from simulations.follower import Watcher
from simulations.outcome import Outcome

Spread = dict[str, dict[str, tuple[float, float]]]
"""Recommender -> metric -> mean and standard deviation over folds."""


def simulate_folds(
    dataset: Dataset,
    plan: Plan,
    options: SimulationOptions,
    folds: int,
    watch: Callable[[int], Watcher] = lambda number: Watcher(),
    *,
    given: Mapping[str, Any] | None = None,
) -> list[Outcome]:
    """One federation for each fold.

    Args:
        watch: the watcher of each fold, by its number from 1.
        given: as for `simulate`.

    Raises:
        ValueError: fewer than two folds, or more than users; and as `simulate`.
    """
    if folds < 2:
        raise ValueError(f"folds is {folds}, but must be at least 2: leave --folds out to judge by all users")
    outcomes = []
    for number in range(1, folds + 1):
        options = replace(options, fold=(number, folds), test=False)
        outcomes.append(simulate(dataset, plan, options, watch(number), given=given))
    return outcomes


def spread(outcomes: list[Outcome]) -> Spread:
    """What the folds' validations come to; a metric that some fold lacks is left out."""
    found: Spread = {}
    for name, first in outcomes[0].final_validation.items():
        found[name] = {}
        qualities = [outcome.final_validation[name] for outcome in outcomes]
        for metric in first.metrics:
            if all(metric in quality.metrics for quality in qualities):
                values = [quality.metrics[metric].value for quality in qualities]
                found[name][metric] = float(np.mean(values)), float(np.std(values, ddof=1))
    return found


def folds_table(outcomes: list[Outcome], columns: int) -> Table:
    """Mean and standard deviation over folds, of as many metrics as fit."""
    table = Table(title=f"validation over {len(outcomes)} folds of users: mean ± standard deviation")
    table.add_column("model")
    found = spread(outcomes)
    metrics = list(next(iter(found.values())))[: columns - 1]
    for metric in metrics:
        table.add_column(metric, justify="right")
    for name, of in found.items():
        table.add_row(name, *(f"{of[metric][0]:.4f} ±{of[metric][1]:.4f}" for metric in metrics))
    return table
