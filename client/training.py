"""User-level DP-SGD on one site: a plain function of (model, histories, settings, generators).

The sum of users' clipped gradients comes from the site's engine: one backward pass (`bookkeeping.py`), or Opacus' hooks
(`opacus_gradients.py`). It gets noise from the cryptographic generator on a fixed grid and is divided by a public
constant. Before the first step a model shows on made-up users that its rows are users, each by itself (`self_test.py`);
every step asserts that each trainable parameter has exactly one row a user. There is no switch that turns clipping or
noise off. Budgets are not kept here: whoever calls has reserved the cost first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from client.policy import Performance
from client.self_test import Engine, rows_of_units, sums_by
from common.config import Plan
from common.memory import memory_kept
from common.models.batches import HistoryBatch, concatenate
from common.models.interface import InterestModel
from common.privacy.noise import GaussianNoise, UserSampler, private_sum

TILE = 24
"""Rows that are a multiple of this stand in whole tiles of all kernels that we know, with 1, 2 or 4 threads."""


@dataclass(frozen=True)
class StepSettings:
    """Public constants of a round's steps.

    Attributes:
        sampling_rate: q.
        noise_multiplier: sigma.
        clip_norm: C.
        normaliser: divides each noised sum.
        steps: number of steps.
        learning_rate: of plain gradient descent.
        micro_batch: rows of a unit, in which users go through the model: every unit has as many, whoever was drawn.
        engine: how a step's clipped sum is made; both give the same to rounding.
    """

    sampling_rate: float
    noise_multiplier: float
    clip_norm: float
    normaliser: float
    steps: int
    learning_rate: float
    micro_batch: int = 48
    engine: Engine = "fast"

    @classmethod
    def of(cls, plan: Plan, performance: Performance | None = None) -> StepSettings:
        """The settings of one round of a calibrated plan, at a site that computes like this; None: as by default."""
        performance = performance or Performance()
        event = plan.round_event()
        return cls(
            sampling_rate=event.sampling_rate,
            noise_multiplier=event.noise_multiplier,
            clip_norm=plan.privacy.clip_norm,
            normaliser=plan.privacy.normaliser,
            steps=event.steps,
            learning_rate=plan.training.learning_rate,
            micro_batch=unit_rows(event.sampling_rate * plan.privacy.users_per_site, performance.micro_batch),
            engine=performance.engine,
        )


def unit_rows(expected: float, most: int) -> int:
    """The rows of a unit that hold a typical step's users without much room: a multiple of TILE, but at most `most`.

    Args:
        expected: users of a step, from public constants alone.
        most: rows of the largest unit.
    """
    typical = max(1.0, expected + 2 * math.sqrt(expected))
    units = math.ceil(typical / most)
    return min(most, TILE * math.ceil(typical / units / TILE))


@memory_kept()
def train_round(
    model: InterestModel,
    histories: HistoryBatch,
    settings: StepSettings,
    *,
    sampler: UserSampler,
    noise: GaussianNoise,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """One round of user-level DP-SGD from the model's present parameters.

    The released value is a function of `settings.steps` Gaussian sums over Poisson samples of users, each with
    sensitivity C to adding or removing one user; everything after the sums is post-processing.

    Args:
        model: with the round's broadcast parameters loaded; its parameters are moved.
        histories: every user of the site, one row each; prepared before (`prepare_histories`) or not.
        on_step: called after each step with the number of steps done; it learns nothing of the data.

    Returns:
        The update: parameters after minus before, by name, float32 on the CPU.

    Raises:
        UnvouchedLayerError: the model's rows are not users; said before any history is looked at.
        RowsAreNotUsersError: a step's rows were not users.
    """
    rows = rows_of_units(model, settings.micro_batch, histories.items.shape[1], settings.engine)
    before = model.trainable_state()
    parameters = list(model.trainable().values())
    device = parameters[0].device
    prepared = histories
    if histories.token_states is None:
        prepared = prepare_histories(model, histories, rows)
    with sums_by(settings.engine, model, rows) as clipped:
        for step in range(settings.steps):
            taken = torch.as_tensor(np.flatnonzero(sampler.sample(len(histories), settings.sampling_rate)))
            total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64, device=device)
            for unit in taken.to(device).split(rows):  # one at least, be it of nobody
                total += clipped(prepared.rows(unit), settings.clip_norm)
            noised = private_sum(
                total, clip_norm=settings.clip_norm, noise_multiplier=settings.noise_multiplier, noise=noise
            )
            _descend(parameters, noised / settings.normaliser, settings.learning_rate)
            if on_step is not None:
                on_step(step + 1)
    after = model.trainable_state()
    return {name: after[name] - before[name] for name in before}


def prepare_histories(model: InterestModel, histories: HistoryBatch, rows: int) -> HistoryBatch:
    """The histories with what frozen parts compute for each of them once; good for every later round.

    Args:
        rows: of a unit: frozen parts see as many at once, always.
    """
    if len(histories) == 0:
        return model.prepare(histories.with_even_events())
    index = torch.arange(len(histories), device=histories.items.device)
    units = [model.prepare(histories.rows(chunk).unit(rows)).first(len(chunk)) for chunk in index.split(rows)]
    return concatenate(units)


@torch.no_grad()
def _descend(parameters: list[nn.Parameter], direction: Tensor, learning_rate: float) -> None:
    start = 0
    for parameter in parameters:
        stop = start + parameter.numel()
        parameter.sub_(learning_rate * direction[start:stop].view_as(parameter))
        start = stop
