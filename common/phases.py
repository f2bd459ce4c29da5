"""The phases of a run, what each asks of a site, and the parts of a plan that say so.

A run is a sequence of exchanges (rounds), each of one phase: statistics (popularity, then transitions among the
most popular items), private fine-tuning, metrics. Each is charged to the ledgers as the event that it is. How
the promise of a plan is split among them is `split_promise`; the plan as a whole is in `config.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from common.privacy.mechanisms import SMALLEST_NOISE_MULTIPLIER, Event

FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

Share = Annotated[float, Field(ge=0, le=1)]
Noise = Annotated[float, Field(ge=SMALLEST_NOISE_MULTIPLIER, le=1e6)] | None


class Phase(StrEnum):
    """What one exchange asks of a site."""

    POPULARITY = "popularity"
    TRANSITIONS = "transitions"
    UPDATE = "update"
    METRICS = "metrics"

    @property
    def content(self) -> str:
        """What the release entry of a ledger calls it."""
        return {"update": "update", "metrics": "metrics"}.get(self.value, "statistics")


@dataclass(frozen=True, slots=True)
class Exchange:
    """One round of a run: its number from 1, its phase, and what it costs a site."""

    round: int
    phase: Phase
    event: Event


@dataclass(frozen=True, slots=True)
class Stated:
    """Public constants of a mechanism that a reservation states beside its event (`entries.Reserve`)."""

    clip_norm: float
    normaliser: float
    learning_rate: float | None


class StatisticsPlan(BaseModel):
    """Popularity and item transitions as Gaussian sums, and what is made of them (post-processing).

    Attributes:
        popularity_share, transition_share: of the promise, in units of 1 / noise^2; 0 leaves the phase out.
        popularity_noise_multiplier, transition_noise_multiplier: found from the promise where left out.
        top_items: transitions are asked for among so many most popular items; found from the noise where left
            out.
        symmetric: whether (i, j) and (j, i) are counted as one.
        gaps: how many events apart two items may be.
        max_events: what one user may contribute: the most recent so many events.
        popularity_weight, lift_weight, lift_decay, threshold, pseudo_count: see `common/models/priors.py`.
    """

    model_config = FROZEN

    popularity_share: Share = 0.0
    transition_share: Share = 0.0
    popularity_noise_multiplier: Noise = None
    transition_noise_multiplier: Noise = None
    top_items: Annotated[int, Field(ge=2)] | None = None
    symmetric: bool = True
    gaps: Annotated[int, Field(ge=1, le=1000)] = 10
    max_events: Annotated[int, Field(ge=2, le=100_000)] = 1000
    popularity_weight: Annotated[float, Field(ge=0)] = 1.0
    lift_weight: Annotated[float, Field(ge=0)] = 0.35
    lift_decay: Annotated[float, Field(ge=0, le=1)] = 0.9
    threshold: Annotated[float, Field(ge=0)] = Field(
        default=2.5, description="counts below so many standard deviations of their noise are taken for none"
    )
    pseudo_count: Annotated[float, Field(gt=0)] = 30.0

    @model_validator(mode="after")
    def _in_order(self) -> StatisticsPlan:
        if self.transition_share and not self.popularity_share:
            raise ValueError(
                "transition_share needs a popularity_share above 0: the items whose transitions are asked for are "
                "the most popular ones as released"
            )
        return self

    def most_items(self, catalog: int) -> int:
        """Among how many items of a catalog transitions are asked for, in a calibrated plan."""
        return min(self.top_items or 0, catalog)


class PretrainingPlan(BaseModel):
    """Public pre-training at the server, on synthetic histories: post-processing, free of privacy cost."""

    model_config = FROZEN

    histories: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        default=0, description="synthetic histories to train on; 0 leaves the phase out"
    )
    events: Annotated[int, Field(ge=2, le=2000)] = Field(default=20, description="length of a history")
    epochs: Annotated[int, Field(ge=1, le=1000)] = 5
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    batch_size: Annotated[int, Field(ge=1)] = 64


class MetricsPlan(BaseModel):
    """Quality as a release: hits and NDCG on each user's last event, held out from everything else."""

    model_config = FROZEN

    share: Share = Field(default=0.0, description="of the promise; 0 leaves the phase out")
    noise_multiplier: Noise = None
    top: Annotated[int, Field(ge=1, le=1000)] = 10


def noise_of_share(whole: float, share: float) -> float:
    """The noise multiplier of a sum with this share of 1 / noise^2, rounded up to a thousandth."""
    return max(SMALLEST_NOISE_MULTIPLIER, math.ceil(whole / math.sqrt(share) * 1000 - 1e-9) / 1000)


def noise_of_promise(epsilon: float, delta: float) -> float:
    """The noise multiplier of one Gaussian sum that takes the whole promise, by the published accountant."""
    from common.privacy.calibration import calibrate_sum

    return calibrate_sum(epsilon, delta)


def items_for_noise(users: int, deviation: float, *, symmetric: bool, witness_places: int = 0) -> int:
    """Among how many items transitions are worth asking for, from public numbers alone.

    The pairs of M items share the users' weight (a unit vector each), so the mean weight of a pair falls as
    users / M^2, against noise of this standard deviation on the sum over sites: M = FACTOR sqrt(users /
    deviation). The factor was chosen on validation data of public data sets (docs/statistics.md).
    """
    from common.sums import most_items  # not at the top: plans are read on machines that never load torch

    count = math.floor(ITEMS_FACTOR * math.sqrt(users / deviation))
    return max(2, min(count, most_items(symmetric, witness_places)))


ITEMS_FACTOR = 8.0
