"""The brake: the Renyi cost of an event at one integer order, the cap it runs against, and the filter.

Here is what decides whether a reservation fits. What is *published* about a run (PLD, and the cross-checks
by Opacus' RDP and PRV) lives in `accountants.py`. All arithmetic is decimal with 80 digits and ends in whole
nano-units of Renyi divergence, so that a site, its server and an auditor on other machines, with other
mathematics libraries, arrive at the same integers: charges are rounded up, caps down, sums are exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import MAX_EMAX, MIN_EMIN, ROUND_CEILING, ROUND_FLOOR, Context, Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from math import comb

from common.privacy.mechanisms import Event, GaussianSum, PoissonSubsampledGaussian

NANO = 1_000_000_000
"""Nano-units in one unit (nat) of Renyi divergence."""

SMALLEST_ORDER = 2
LARGEST_ORDER = 256
_ORDERS_TO_TRY = range(SMALLEST_ORDER, 129)
_CONTEXT = Context(prec=80, Emax=MAX_EMAX, Emin=MIN_EMIN)


def _check_order(order: int) -> None:
    whole = isinstance(order, int) and not isinstance(order, bool)
    if not whole or not SMALLEST_ORDER <= order <= LARGEST_ORDER:
        raise ValueError(
            f"order is {order}, but must be a whole number in [{SMALLEST_ORDER}, {LARGEST_ORDER}]: "
            "choose it with best_order"
        )


def _check_goal(epsilon: float, delta: float) -> None:
    if not 0 < epsilon <= 1000:
        raise ValueError(f"epsilon is {epsilon}, but must lie in (0, 1000]: choose a finite budget")
    if not 0 < delta <= 0.01:
        raise ValueError(f"delta is {delta}, but must lie in (0, 0.01]: choose far less than 1 / users")


@lru_cache(maxsize=4096)
def _cost_of_one(sampling_rate: float, noise_multiplier: float, order: int) -> Decimal:
    """Renyi divergence of one Poisson-subsampled Gaussian sum at an integer order >= 2, in nats.

    Mironov, Talwar and Zhang 2019 (arXiv 1908.10530), section 3.3, with sum_k binomial = 1 taken out, so
    that small rates lose no digits:
    ln(1 + sum_{k=2}^a C(a, k) (1 - q)^(a - k) q^k (exp((k^2 - k) / (2 sigma^2)) - 1)) / (a - 1).
    """
    with localcontext(_CONTEXT):
        rate, twice_variance = Decimal(sampling_rate), 2 * Decimal(noise_multiplier) ** 2
        if rate == 1:
            return order / twice_variance
        excess = Decimal(0)
        for k in range(2, order + 1):
            weight = comb(order, k) * (1 - rate) ** (order - k) * rate**k
            excess += weight * ((k * k - k) / twice_variance).exp() - weight
        return (1 + excess).ln() / (order - 1)


def _cost(event: Event, order: int) -> Decimal:
    _check_order(order)
    match event:
        case GaussianSum():
            return _cost_of_one(1.0, event.noise_multiplier, order)
        case PoissonSubsampledGaussian():
            with localcontext(_CONTEXT):
                return event.steps * _cost_of_one(event.sampling_rate, event.noise_multiplier, order)


def renyi_cost(event: Event, order: int) -> float:
    """Renyi divergence (nats) of an event at an integer order, add-or-remove-one adjacency.

    DP-SGD: `steps` times the closed form of Mironov, Talwar and Zhang 2019 (arXiv 1908.10530, section 3.3),
    which bounds both directions. Gaussian sum: order / (2 sigma^2) (Mironov 2017, arXiv 1702.07476).

    Raises:
        ValueError: the order is no whole number in [2, 256].
    """
    return float(_cost(event, order))


def charge_of(event: Event, order: int) -> int:
    """What the event costs at this order, rounded up to whole nano-units, never 0."""
    with localcontext(_CONTEXT):
        return max(1, int((_cost(event, order) * NANO).to_integral_value(rounding=ROUND_CEILING)))


LEAST_SHARE = 1000
"""Each request is charged at least the cap divided by this, so that nobody asks ten thousand nearly free questions."""


def least_charge(cap: int) -> int:
    """The smallest charge, in nano-units, of a ledger with this cap: a thousandth of it, rounded up, never 0."""
    return max(1, -(-cap // LEAST_SHARE))


def charge_at(event: Event, order: int, cap: int) -> int:
    """What a ledger of this order and cap charges for the event, in nano-units: its cost, or the least charge.

    More than the event costs is sound: the filter then admits less. A release says nothing about a user beyond its
    event, but that a site answered, or failed, may.
    """
    return max(charge_of(event, order), least_charge(cap))


def _cap(epsilon: float, delta: float, order: int) -> Decimal:
    _check_order(order)
    _check_goal(epsilon, delta)
    with localcontext(_CONTEXT):
        share = 1 - 1 / Decimal(order)
        return Decimal(epsilon) - share.ln() + (Decimal(delta) * order).ln() / (order - 1)


def renyi_cap(epsilon: float, delta: float, order: int) -> float:
    """The largest Renyi divergence (nats) at this order that still implies (epsilon, delta).

    The inverse of `renyi_to_epsilon`: epsilon - ln(1 - 1/a) + ln(delta a) / (a - 1). It may be negative:
    then no mechanism reaches (epsilon, delta) by way of this order.

    Raises:
        ValueError: order, epsilon or delta out of bounds.
    """
    return float(_cap(epsilon, delta, order))


@lru_cache(1024)
def cap_of(epsilon: float, delta: float, order: int) -> int:
    """`renyi_cap` rounded down to whole nano-units, and 0 where it is negative."""
    with localcontext(_CONTEXT):
        return max(0, int((_cap(epsilon, delta, order) * NANO).to_integral_value(rounding=ROUND_FLOOR)))


def renyi_to_epsilon(divergence: float, delta: float, order: int) -> float:
    """The epsilon that a Renyi divergence (nats) at this order implies at delta; 0 where it is negative.

    Canonne, Kamath and Steinke 2020 (arXiv 2004.00010), Proposition 12; also Balle et al. 2020
    (arXiv 1905.09982): divergence + ln(1 - 1/a) - ln(delta a) / (a - 1). A valid upper bound, not tight
    over all mechanisms of that divergence.

    Raises:
        ValueError: order or delta out of bounds, or a divergence that is negative or not finite.
    """
    _check_order(order)
    _check_goal(1.0, delta)
    with localcontext(_CONTEXT):
        nats = Decimal(divergence)
        if not nats.is_finite() or nats < 0:
            raise ValueError(f"divergence is {divergence}, but must be finite and not negative")
        epsilon = nats + (1 - 1 / Decimal(order)).ln() - (Decimal(delta) * order).ln() / (order - 1)
        return max(0.0, float(epsilon))


def best_order(plan: Sequence[Event], epsilon: float, delta: float) -> int:
    """The integer order in [2, 128] at which (epsilon, delta) admits the most repetitions of a plan.

    Each event counts with what a ledger would charge for it, at least a thousandth of the cap. Ties go to the order
    at which the events themselves cost less, then to the smaller one. To be called once, before any data is seen,
    with what a typical run will charge: a filter bound to a wrong order is valid but may admit a small fraction of
    the rounds.

    Raises:
        ValueError: the plan is empty, or (epsilon, delta) leaves no budget at any order.
    """
    if not plan:
        raise ValueError(
            "the typical plan is empty: declare the events of one run, so an order can be chosen"
        )
    times = Counter(plan)
    best, most = 0, (Fraction(0), Fraction(0))
    for order in _ORDERS_TO_TRY:
        cap = cap_of(epsilon, delta, order)
        exact = [(count, charge_of(event, order)) for event, count in times.items()]
        # The least charge unrounded: else rounding, and not the events, would choose among orders.
        least = Fraction(cap, LEAST_SHARE)
        charged = sum((count * max(least, Fraction(charge)) for count, charge in exact), Fraction(0))
        runs = cap / charged, Fraction(cap, sum(count * charge for count, charge in exact))
        if runs > most:
            best, most = order, runs
    if not best:
        raise ValueError(f"(epsilon, delta) = ({epsilon}, {delta}) leaves no budget: choose a larger one")
    return best


@dataclass(frozen=True, slots=True)
class RenyiFilter:
    """A privacy filter: the sum of charges at one order, fixed in advance, stays at most a fixed cap.

    Feldman and Zrnic 2021 (arXiv 2008.11193) show that Renyi divergence at a *fixed* order
    composes by addition also where each mechanism (its rate, noise, steps, and whether there is another one
    at all) is chosen after seeing the outputs of those before it, as long as the sum never exceeds the cap.
    That is what makes it a brake. Two things that look better are none:
    stopping when the composed PLD (or PRV) epsilon crosses the target, since its composition theorem holds
    for mechanisms fixed in advance only (Tran et al. 2026, arXiv 2602.06756); and going on while *any* of
    several orders is below its cap, which the theorem for one fixed order does not cover.

    Attributes:
        order: the order, fixed when the ledger was made.
        cap: nano-units of Renyi divergence that may ever be charged.
        spent: nano-units charged so far.
    """

    order: int
    cap: int
    spent: int = 0

    def __post_init__(self) -> None:
        _check_order(self.order)
        if not 0 <= self.spent <= self.cap:
            raise ValueError(f"spent is {self.spent}, but must lie in [0, cap = {self.cap}] nano-units")

    def fits(self, charge: int) -> bool:
        """Whether a charge of so many nano-units (at least 1) may still be made."""
        if charge < 1:
            raise ValueError(f"charge is {charge}, but no release is free: it must be at least 1 nano-unit")
        return self.spent + charge <= self.cap

    def charged(self, charge: int) -> RenyiFilter:
        """The filter after a charge.

        Raises:
            ValueError: the charge does not fit.
        """
        if not self.fits(charge):
            raise ValueError(
                f"a charge of {charge} nano-units does not fit: {self.cap - self.spent} are left"
            )
        return replace(self, spent=self.spent + charge)
