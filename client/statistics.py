"""Gaussian sums over a site's users: popularity, transitions between items, and metrics.

Plain functions of (histories, public settings, generator). Each user contributes one vector, scaled to L2 norm
at most 1 *as a whole*, however many events there are, so adding or removing a user moves a sum by at most 1;
contributions are added in float64 and noised once (`private_sum`). Nothing of a sum without noise is returned
but by the functions that begin with an underscore or end in `_sum`, which a site calls only to noise it at
once. Budgets are not kept here: whoever calls has reserved the cost first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from client.self_test import rows_of_scores
from common.config import Plan
from common.events.histories import Histories
from common.metrics import ndcg, ranks
from common.models.batches import HistoryBatch
from common.models.interface import InterestModel
from common.phases import Phase, StatisticsPlan
from common.privacy.noise import GaussianNoise, private_sum
from common.sums import CONTRIBUTION_NORM, METRICS, POPULARITY, TRANSITIONS, PairLayout, top_items
from common.wire import Request
from common.witness import witness_name

Contribution = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]
"""One user's part of a sum: (places, values), no place twice, of L2 norm at most 1."""


def unit(places: npt.NDArray[np.int64], weights: npt.NDArray[np.float64]) -> Contribution:
    """Adds up weights at equal places, and scales all of them together to norm 1 (nothing stays nothing)."""
    found, where = np.unique(places, return_inverse=True)
    values: npt.NDArray[np.float64] = np.zeros(len(found))
    np.add.at(values, where, weights)
    norm = float(np.linalg.norm(values))
    if not math.isfinite(norm) or norm == 0.0:
        return found[:0], values[:0]
    return found, values * (CONTRIBUTION_NORM / norm)


def user_popularity(items: npt.NDArray[np.int64]) -> Contribution:
    """One user's items, each once, scaled to norm 1.

    Args:
        items: [events] rows of the catalog.
    """
    distinct = np.unique(items)
    return unit(distinct, np.ones(len(distinct)))


def user_transitions(
    items: npt.NDArray[np.int64], index: npt.NDArray[np.int64], layout: PairLayout, gaps: int
) -> Contribution:
    """One user's pairs of items, 1 / gap for events `gap` <= `gaps` apart, scaled to norm 1 over all pairs.

    Args:
        items: [events] rows of the catalog, oldest first.
        index: [catalog] int64, each item's place among the layout's items, -1 for an item that has none.
    """
    places, weights = [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
    inside = index[items]
    for gap in range(1, min(gaps, len(inside) - 1) + 1):
        first, second = inside[:-gap], inside[gap:]
        real = (first >= 0) & (second >= 0) & (first != second)
        places.append(layout.place(first[real], second[real]))
        weights.append(np.full(int(real.sum()), 1.0 / gap))
    return unit(np.concatenate(places), np.concatenate(weights))


def user_metrics(hit: float, ndcg: float) -> Contribution:
    """One user's (1, hit, NDCG) / sqrt(3): of norm at most 1 as both lie in [0, 1]; clamped to that."""
    values = np.array([1.0, *np.clip(np.nan_to_num([hit, ndcg]), 0.0, 1.0)]) / math.sqrt(3)
    return np.arange(3), values * CONTRIBUTION_NORM


def sum_of(contributions: Iterator[Contribution], places: int) -> Tensor:
    """[places] float64: the sum of users' contributions, without noise."""
    total = np.zeros(places, dtype=np.float64)
    for where, values in contributions:
        total[where] += values  # no place twice, so nothing is lost
    return torch.from_numpy(total)


def popularity_sum(histories: Histories, catalog: int, max_events: int) -> Tensor:
    """[catalog] float64, without noise: over each user's `max_events` most recent events."""
    recent = histories.bounded(max_events)
    return sum_of((user_popularity(recent.history(r).astype(np.int64)) for r in range(len(recent))), catalog)


def transition_sum(
    histories: Histories, top: Tensor, catalog: int, max_events: int, *, symmetric: bool, gaps: int
) -> Tensor:
    """[pairs of `top`] float64, without noise: over each user's `max_events` most recent events.

    Args:
        top: [size] int64, rows of the catalog whose pairs are counted.
    """
    layout = PairLayout(len(top), symmetric)
    index = np.full(catalog, -1, dtype=np.int64)
    index[top.numpy()] = np.arange(len(top))
    recent = histories.bounded(max_events)
    users = (recent.history(r).astype(np.int64) for r in range(len(recent)))
    return sum_of((user_transitions(items, index, layout, gaps) for items in users), layout.places)


def metric_sum(hits: npt.NDArray[np.float64], ndcg: npt.NDArray[np.float64]) -> Tensor:
    """[3] float64, without noise: users, hits and NDCG over users, each divided by sqrt(3)."""
    return sum_of((user_metrics(float(h), float(n)) for h, n in zip(hits, ndcg, strict=True)), 3)


def noised(total: Tensor, noise_multiplier: float, noise: GaussianNoise) -> Tensor:
    """The Gaussian mechanism on a sum whose users contribute norm 1 each: float32, to be released."""
    return private_sum(total, clip_norm=CONTRIBUTION_NORM, noise_multiplier=noise_multiplier, noise=noise)


def with_witness(
    name: str, total: Tensor, noise_multiplier: float, noise: GaussianNoise, places: int
) -> dict[str, Tensor]:
    """A noisy sum by its name, and its witness: places beyond its end, which no contribution reaches.

    One mechanism over both, with one draw of noise: what the witness shows is the noise of the sum.
    """
    found = noised(torch.nn.functional.pad(total, (0, places)), noise_multiplier, noise)
    state = {name: found[: len(total)].clone()}
    return state | {witness_name(name): found[len(total) :].clone()} if places else state


def release_statistics(
    histories: Histories,
    catalog: int,
    plan: StatisticsPlan,
    request: Request,
    noise: GaussianNoise,
    witness_places: int = 0,
) -> dict[str, Tensor]:
    """The noisy sum that a request of phase popularity or transitions asks for, by its name, and its witness.

    Args:
        catalog: number of items.
        request: names the phase; transitions are counted among the top items of what it says was released.
        witness_places: of the plan's privacy section.

    Raises:
        ValueError: the plan is not calibrated, the catalog too large or too small, or another phase.
    """
    if request.phase is Phase.POPULARITY and plan.popularity_noise_multiplier is not None:
        total = popularity_sum(histories, catalog, plan.max_events)
        return with_witness(POPULARITY, total, plan.popularity_noise_multiplier, noise, witness_places)
    if request.phase is Phase.TRANSITIONS and plan.transition_noise_multiplier is not None:
        top = top_items(request.released[POPULARITY], plan.most_items(catalog))
        total = transition_sum(
            histories, top, catalog, plan.max_events, symmetric=plan.symmetric, gaps=plan.gaps
        )
        return with_witness(TRANSITIONS, total, plan.transition_noise_multiplier, noise, witness_places)
    raise ValueError(f"{request.phase} is no statistic of this plan")


def release_metrics(
    model: InterestModel,
    histories: Histories,
    held_out: npt.NDArray[np.int64],
    plan: Plan,
    noise: GaussianNoise,
    *,
    unit_rows: int = 64,
) -> dict[str, Tensor]:
    """The noisy sums of users, hits and NDCG (see `metric_sum`), each user ranking the own held-out item.

    Args:
        model: with parameters and priors set.
        histories: without the held-out events.
        held_out: [users] rows of the catalog, -1 for a user who holds none out, and contributes nothing.
        unit_rows: how many users are ranked at once, always: no rank may turn on how many there are.
    """
    if plan.metrics.noise_multiplier is None:
        raise ValueError("the plan has no noise multiplier for metrics")
    model.eval()
    device = next(iter(model.buffers())).device
    at_once = rows_of_scores(model, unit_rows, plan.model.max_events)
    rows = np.flatnonzero(held_out >= 0)
    hits, gains = [np.zeros(0)], [np.zeros(0)]
    for start in range(0, max(1, len(rows)), at_once):  # one unit at least, be it of nobody
        chosen = rows[start : start + at_once]
        items, times = histories.padded(chosen, plan.model.max_events)
        with torch.no_grad():
            batch = HistoryBatch.of(items, times, device).unit(at_once)
            scores = model.scores(batch)[: len(chosen)].cpu().numpy().astype(np.float64)
        if not len(chosen):
            continue
        # A failure would tell of the user whose scores overflow; the worst rank is a contribution like another.
        scores = np.nan_to_num(scores, nan=-1e30, posinf=1e30, neginf=-1e30)
        seen = np.zeros(scores.shape, dtype=bool)
        for place, row in enumerate(chosen):
            seen[place, histories.history(int(row))] = True
        # An item that the user had before would be masked; a repeated one counts as any other.
        seen[np.arange(len(chosen)), held_out[chosen]] = False
        found = ranks(scores, held_out[chosen], seen)
        hits.append((found <= plan.metrics.top).astype(np.float64))
        gains.append(ndcg(found, plan.metrics.top))
    total = metric_sum(np.concatenate(hits), np.concatenate(gains))
    return with_witness(METRICS, total, plan.metrics.noise_multiplier, noise, plan.privacy.witness_places)
