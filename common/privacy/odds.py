"""What an epsilon leaves to someone who guesses whether one user was there: the privacy curve, in words of odds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

from common.privacy.accountants import privacy_profile
from common.privacy.mechanisms import Event

_PROFILE = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 12.0, 16.0)


@dataclass(frozen=True, slots=True)
class Odds:
    """What the whole privacy curve leaves to the best possible attacker on one user, if it guesses in or out.

    Attributes:
        right: how often it is right at most, where in and out are equally likely.
        found: at most this share of users who were in are recognised, at false-alarm rates of 1 % and 0.1 %.
        profile: epsilon -> delta.
    """

    right: float
    found: dict[str, float]
    profile: dict[str, float]


def odds(events: Sequence[Event]) -> Odds:
    """The odds of these events together, by the PLD."""
    epsilons = [each / 10 for each in range(161)]
    deltas = privacy_profile(events, epsilons)
    curve = list(zip(epsilons, deltas, strict=True))
    return Odds(
        right=(1 + deltas[0]) / 2,
        found={f"{rate:g}": most_found(curve, rate) for rate in (0.01, 0.001)},
        profile={f"{epsilon:g}": delta for epsilon, delta in curve if epsilon in _PROFILE},
    )


def most_found(curve: Sequence[tuple[float, float]], rate: float) -> float:
    """The largest true-positive rate at a false-positive rate that a privacy curve of (epsilon, delta) allows."""
    bounds = [min(exp(e) * rate + d, 1 - exp(-e) * (1 - d - rate)) for e, d in curve]
    return max(rate, min(1.0, *bounds))


def right_at_most(epsilon: float, delta: float) -> float:
    """How often a guess at even odds can be right where nothing but (epsilon, delta) is known: from 0.5 to 1.

    (exp(epsilon) + delta) / (exp(epsilon) + 1), by Kairouz, Oh and Viswanath 2015 (arXiv 1311.0776).
    """
    return (1 + delta * exp(-epsilon)) / (1 + exp(-epsilon))


def percent(share: float) -> str:
    """A bound in per cent, rounded up."""
    digits = 0 if share < 0.99 else 1 if share < 0.999 else 2
    scale = 100 * 10**digits
    return f"{min(100.0, -(-share * scale // 1) / 10**digits):g} %"
