"""What released statistics add to every model's scores: a log-popularity prior, and the lift of transitions.

Post-processing of what sites released, and nothing else: a deterministic function of the released sums and the
plan, so it costs no privacy, and every site and the server compute the same.
score(user, j) += log P_j + weight * sum over the user's events h of decay^age * lift[h, j].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.models.batches import over_time
from common.sums import POPULARITY, SITES, TRANSITIONS, PairLayout, top_items

if TYPE_CHECKING:
    from common.phases import StatisticsPlan

POPULARITY_FLOOR = 0.5
"""An item's popularity counts as at least this many standard deviations of its noise."""


@dataclass(frozen=True)
class Priors:
    """Public tensors of one run.

    Attributes:
        log_popularity: [items] float32; zeros where popularity was not released.
        lift: [top, top] float32, (from, to); [0, 0] where transitions were not released.
        top: [top] int64, the rows of the catalog that `lift` is about, ascending.
        decay: weight of an event against the next later one.
    """

    log_popularity: Tensor
    lift: Tensor
    top: Tensor
    decay: float

    @classmethod
    def none(cls, items: int) -> Priors:
        """No statistics: nothing is added to any score."""
        return cls(torch.zeros(items), torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64), 0.7)

    def to(self, device: torch.device) -> Priors:
        """The same on a device."""
        return Priors(self.log_popularity.to(device), self.lift.to(device), self.top.to(device), self.decay)

    def _places(self, items: Tensor) -> Tensor:
        """Place among `top` of each row of the catalog, the length of `top` for -1 and for other items."""
        index = torch.full((len(self.log_popularity) + 1,), len(self.top), device=items.device)
        index[self.top] = torch.arange(len(self.top), device=items.device)
        return index[torch.where(items >= 0, items, len(self.log_popularity))]

    def lift_after_each(self, items: Tensor) -> Tensor:
        """What a history so far says of the items of `top`, after each event.

        Args:
            items: [users, events] int64 rows of the catalog, -1 where there is no event.

        Returns:
            [users, events, top + 1]; the last column, of all other items, is zero.
        """
        events = items.shape[1]
        age = torch.arange(events, device=items.device)
        age = age.unsqueeze(1) - age.unsqueeze(0)  # [events (now), events (then)]
        kernel = torch.where(age >= 0, self.decay ** age.clamp(min=0).to(self.lift.dtype), 0.0)
        padded = torch.nn.functional.pad(self.lift, (0, 1, 0, 1))  # [top + 1, top + 1]
        return over_time(kernel, padded[self._places(items)])

    def of_candidates(self, lift: Tensor, candidates: Tensor) -> Tensor:
        """[users, events, candidates] added to the scores of `candidates` [candidates], the same for all.

        Args:
            lift: from `lift_after_each`, [users, events, top + 1].
        """
        return self.log_popularity[candidates] + lift[:, :, self._places(candidates)]

    def of_targets(self, lift: Tensor, targets: Tensor) -> Tensor:
        """[users, events] added to the score of one item after each event, `targets` [users, events]."""
        places = self._places(targets).unsqueeze(-1)
        return self.log_popularity[targets] + lift.gather(2, places).squeeze(-1)

    def after_last(self, items: Tensor) -> Tensor:
        """[users, items]: what is added to every item's score after the whole history, items [users, events]."""
        users, events = items.shape
        if not len(self.top):
            return self.log_popularity.expand(users, -1)
        lengths = (items >= 0).sum(dim=1, keepdim=True)  # [users, 1]
        age = (lengths - 1 - torch.arange(events, device=items.device)).clamp(min=0)
        weights = torch.where(items >= 0, self.decay ** age.to(self.lift.dtype), 0.0)  # [users, events]
        by_item = weights.new_zeros(users, len(self.top) + 1).scatter_add(1, self._places(items), weights)
        added = self.log_popularity.repeat(users, 1)
        added[:, self.top] += by_item[:, :-1] @ self.lift
        return added


def make_priors(released: Mapping[str, Tensor], plan: StatisticsPlan, items: int) -> Priors:
    """The priors of what was released so far.

    Args:
        released: by the names of `common.sums`, float32, sums over sites; possibly none of them.
        plan: calibrated.
        items: size of the catalog.

    Raises:
        ValueError: a released vector does not have the length that plan and catalog imply.
    """
    if POPULARITY not in released:
        return Priors.none(items)
    popularity = released[POPULARITY].double()
    if popularity.shape != (items,):
        raise ValueError(f"popularity has shape {tuple(popularity.shape)}, but the catalog has {items} items")
    noise = (plan.popularity_noise_multiplier or 0.0) * math.sqrt(float(released[POPULARITY + SITES]))
    floor = max(POPULARITY_FLOOR * noise, 1e-9)
    log_popularity = torch.log_softmax(popularity.clamp(min=floor).log(), dim=0)
    priors = Priors.none(items)
    lift, top = priors.lift, priors.top
    if TRANSITIONS in released:
        top = top_items(released[POPULARITY], plan.most_items(items))
        counts = PairLayout(len(top), plan.symmetric).matrix(released[TRANSITIONS].double())
        noise = (plan.transition_noise_multiplier or 0.0) * math.sqrt(float(released[TRANSITIONS + SITES]))
        kept = torch.where(counts >= plan.threshold * noise, counts, 0.0)
        expected = plan.pseudo_count * log_popularity.exp()[top]  # [top]
        lift = (plan.lift_weight * torch.log1p(kept.clamp(min=0) / expected)).float()
    return Priors((plan.popularity_weight * log_popularity).float(), lift, top, plan.lift_decay)
