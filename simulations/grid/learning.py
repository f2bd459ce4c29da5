"""A federation's learning without its network: the same phases, releases and steps, site after site, in one process.

What a site releases is computed by the functions that sites run (`client.statistics`, `client.training`) and summed
as the server sums it; ledger, receipts and messages are left out, as they do not change a release. A test holds this
against a whole federation. Without privacy, the sums are exact and training is AdamW on the pooled events.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from client.statistics import release_statistics
from client.training import StepSettings, train_round
from common.config import Plan
from common.events.histories import Histories
from common.models.batches import HistoryBatch
from common.models.build import BuiltModel
from common.models.interface import InterestModel
from common.models.priors import make_priors
from common.phases import Phase
from common.precision import broadcast, decoded, encoded
from common.privacy.noise import GaussianNoise, SecureGaussian, SecurePoissonSampler, UserSampler
from common.sums import POPULARITY, SITES, TRANSITIONS
from common.wire import Request, State
from server.aggregation import mean
from server.pretraining import pretrain
from server.progress import average_of_rounds, stepped
from simulations.without_privacy import (
    OpenTraining,
    exact_statistics,
    popularity_alone,
    train_without_privacy,
)

Watch = Callable[[str, InterestModel], None]
"""Called with the name of a phase and the model after it."""


def batch_of(histories: Histories, max_events: int) -> HistoryBatch:
    """All of them, as a model reads them."""
    items, times = histories.padded(np.arange(len(histories)), max_events)
    return HistoryBatch.of(items, times)


def learn(
    built: BuiltModel,
    sites: Sequence[Histories],
    plan: Plan,
    *,
    noise: GaussianNoise | None = None,
    sampler: UserSampler | None = None,
    open: bool = False,
    watch: Watch = lambda phase, model: None,
) -> InterestModel:
    """A calibrated plan's run over the sites' histories: the final model.

    Args:
        built: at its seeded start; left as it is.
        noise, sampler: seeded ones in tests alone.
        open: no noise in anything and exact sums over all items, for the rows without privacy; users are
            sampled and clipped all the same.
    """
    noise, sampler = noise or SecureGaussian(), sampler or SecurePoissonSampler()
    model, items = copy.deepcopy(built.model), len(built.vectors)
    model.set_witness(plan.privacy.witness_places)
    if open:
        plan, noise = _without_noise(plan, items), NoNoise()
        released = _exact(sites, plan, items)
    else:
        released = _released(sites, plan, items, noise)
    priors = make_priors(released, plan.statistics, items)
    if released:
        model.set_released(priors)
        watch("statistics", model)
    if plan.pretraining.histories:
        events = min(plan.pretraining.events, plan.model.max_events)
        model.load_trainable(
            pretrain(model, built.vectors, priors, plan.pretraining, events, plan.model.seed)
        )
        watch("pre-training", model)
    if not plan.training.rounds:
        return model
    if open and released:
        model.set_released(popularity_alone(priors))
    settings, batches = StepSettings.of(plan), [batch_of(site, plan.model.max_events) for site in sites]
    state = model.trainable_state()
    history: list[State] = []
    velocity = {name: torch.zeros_like(value) for name, value in state.items()}
    for number in range(plan.training.rounds):
        updates = []
        for batch in batches:
            model.hold_adapters(False)
            model.load_trainable(broadcast(state, plan.wire.parameters))
            model.hold_adapters(number < plan.training.head_rounds)
            update = train_round(model, batch, settings, sampler=sampler, noise=noise)
            updates.append(decoded(encoded(update, plan.precision(Phase.UPDATE))))
        state, velocity = stepped(state, velocity, mean(updates), plan.training)
        history.append(state)
    model.hold_adapters(False)
    model.load_trainable(average_of_rounds(history, plan))
    if released:
        model.set_released(priors)
    watch("fine-tuning", model)
    return model


class NoNoise:
    """Zeros where noise would be: for rows without privacy, on public data, on the researcher's side alone."""

    def normal(self, size: int) -> npt.NDArray[np.float64]:
        return np.zeros(size)


def _without_noise(plan: Plan, items: int) -> Plan:
    statistics = plan.statistics.model_copy(
        update={
            "popularity_noise_multiplier": None,
            "transition_noise_multiplier": None,
            "top_items": items,
        }
    )
    privacy = plan.privacy.model_copy(update={"noise_multiplier": 1.0})  # stated, and multiplied by zeros
    return plan.model_copy(update={"statistics": statistics, "privacy": privacy})


def _exact(sites: Sequence[Histories], plan: Plan, items: int) -> dict[str, Tensor]:
    if not plan.statistics.popularity_share:
        return {}
    parts = [exact_statistics(site, items, plan.statistics) for site in sites]
    return {name: sum((part[name] for part in parts), torch.zeros(())) for name in parts[0]}


def _released(sites: Sequence[Histories], plan: Plan, items: int, noise: GaussianNoise) -> dict[str, Tensor]:
    released: dict[str, Tensor] = {}
    for share, phase, name in (
        (plan.statistics.popularity_share, Phase.POPULARITY, POPULARITY),
        (plan.statistics.transition_share, Phase.TRANSITIONS, TRANSITIONS),
    ):
        if share:
            asked = Request("grid", 1, 1, "0", "", {}, phase=phase, released=released)
            places = plan.privacy.witness_places
            total: Tensor = sum(  # type: ignore[assignment]
                release_statistics(site, items, plan.statistics, asked, noise, places)[name] for site in sites
            )
            released = released | {name: total, name + SITES: torch.tensor([float(len(sites))])}
    return released


def learn_without_privacy(
    built: BuiltModel,
    training: Histories,
    plan: Plan,
    settings: OpenTraining,
    score: Callable[[InterestModel], float],
    seed: int,
) -> InterestModel:
    """The same model with exact statistics, trained by AdamW; the epoch with the best `score` is kept."""
    items = len(built.vectors)
    priors = None
    if plan.statistics.popularity_share:
        statistics = plan.statistics.model_copy(
            update={
                "popularity_noise_multiplier": None,
                "transition_noise_multiplier": None,
                "top_items": items,
            }
        )
        priors = make_priors(exact_statistics(training, items, statistics), statistics, items)
    batch = batch_of(training, plan.model.max_events)
    return train_without_privacy(built.model, batch, priors, settings, lambda model, _: score(model), seed)
