"""From noisy sums of users, hits and NDCG to figures with a confidence interval: noise and sampling together."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

_Z95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class ReleasedFigure:
    """A mean over users with its 95 % interval; the interval is the whole [0, 1] where nothing can be said."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ReleasedMetrics:
    """What sites' released metrics say together.

    Attributes:
        users: noisy number of users who were ranked, all sites together.
        hit_rate, ndcg: means over them.
        sites: how many sites released.
    """

    users: float
    hit_rate: ReleasedFigure
    ndcg: ReleasedFigure
    sites: int

    def as_json(self, top: int) -> dict[str, object]:
        """For metrics.jsonl."""
        return {
            "users": self.users,
            "sites": self.sites,
            "metrics": {
                f"{name}@{top}": {"value": each.value, "low_95": each.low, "high_95": each.high}
                for name, each in (("HR", self.hit_rate), ("NDCG", self.ndcg))
            },
        }


def estimate(total: Tensor, noise_multiplier: float, sites: int) -> ReleasedMetrics:
    """Means with intervals from the sum over sites.

    A user adds (1, hit, NDCG) / sqrt(3), so each coordinate of sqrt(3) times the sum carries noise of standard
    deviation sqrt(3 sites) sigma. The mean is a ratio R = A / N; by the delta method its noise has variance
    (1 + R^2) sd^2 / N^2, and sampling adds at most R (1 - R) / N, as values lie in [0, 1].

    Args:
        total: [3], summed over sites.
        noise_multiplier: sigma of each site's release.
        sites: how many were added.
    """
    users, hits, gains = (float(value) * math.sqrt(3) for value in total.double())
    deviation = noise_multiplier * math.sqrt(3 * sites)
    return ReleasedMetrics(
        users=users,
        hit_rate=_ratio(hits, users, deviation),
        ndcg=_ratio(gains, users, deviation),
        sites=sites,
    )


def _ratio(above: float, users: float, deviation: float) -> ReleasedFigure:
    if users <= 2 * deviation:  # too few users to tell their number from noise: nothing can be said
        return ReleasedFigure(value=0.5, low=0.0, high=1.0)
    mean = min(1.0, max(0.0, above / users))
    # A mean at 0 or 1 would claim no sampling error at all: use the rule of succession there.
    smoothed = (mean * users + 1) / (users + 2)
    error = math.sqrt((1 + mean**2) * deviation**2 / users**2 + smoothed * (1 - smoothed) / users)
    return ReleasedFigure(mean, max(0.0, mean - _Z95 * error), min(1.0, mean + _Z95 * error))
