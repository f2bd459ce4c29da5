"""Epsilons, derived from events alone, by accountants that check one another.

The published figure is the privacy-loss distribution (PLD) of dp-accounting under add-or-remove-one-user,
discretised pessimistically by connect-the-dots; Opacus' RDP and PRV accountants and, without sampling, the
closed form must agree with it, or no figure is published. The noise for a target is found in
`calibration.py`.
All of it holds for events fixed in advance; what decides whether a site may go on is the filter (`renyi.py`),
not these figures. The CLT ("GDP") accountant has no place here: it is no bound. Each accountant's library is
imported when it is first asked.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from common.privacy.mechanisms import (
    Event,
    GaussianSum,
    PoissonSubsampledGaussian,
    UnknownMechanismError,
)

DISCRETISATION = 1e-3
"""The PLD's interval of privacy loss, in nats, unless the steps are too slight for it (`_interval`)."""

FINE_DISCRETISATION = 1e-4
"""The PLD's interval where the PRV accountant cannot check it."""

_FINEST_DISCRETISATION = 1e-6

_MOST_POINTS = 1e6
"""Of one step's distribution: with more, as of rare users and little noise, a figure takes many seconds."""

LARGEST_EPSILON = 500.0
"""The largest target that is taken; from about twice this on, `epsilon_pld` says inf."""

_LARGEST_PRV_WORK = 2e4  # epsilon sqrt(steps): beyond it the PRV accountant's arrays outgrow a small machine

_MOST_PRV_MECHANISMS = 32
"""Different mechanisms up to which the PRV accountant is asked: its time grows with their number, to minutes."""

Group = tuple[float, float, int]
"""(sampling rate, noise multiplier, steps)"""


class ContradictionError(ArithmeticError):
    """Two accountants contradict one another, so that no epsilon can be published."""


@dataclass(frozen=True, slots=True)
class PublishedEpsilon:
    """An epsilon that the other accountants have confirmed.

    Attributes:
        epsilon: the PLD figure.
        delta: the delta that it holds for.
        rdp: Opacus' RDP figure, looser.
        prv: Opacus' PRV figure, or None where that accountant is not reliable.
        closed_form: the exact figure, or None where users are sampled.
        discretisation: the interval of the PLD figure.
    """

    epsilon: float
    delta: float
    rdp: float
    prv: float | None
    closed_form: float | None
    discretisation: float = DISCRETISATION


def _groups(events: Sequence[Event]) -> tuple[Group, ...]:
    """Equal mechanisms put together, in an order that does not depend on the order of the events."""
    steps: Counter[tuple[float, float]] = Counter()
    for event in events:
        match event:
            case PoissonSubsampledGaussian():
                steps[event.sampling_rate, event.noise_multiplier] += event.steps
            case GaussianSum():
                steps[1.0, event.noise_multiplier] += 1
            case _:
                raise UnknownMechanismError(
                    f"{type(event).__name__} is no mechanism that is accounted for here"
                )
    return tuple((float(rate), float(noise), count) for (rate, noise), count in sorted(steps.items()))


def accounting_work(events: Sequence[Event]) -> int:
    """How many different mechanisms must be composed: sums without sampling are one, and equal ones are one."""
    groups = _groups(events)
    return sum(rate < 1 for rate, _, _ in groups) + any(rate == 1 for rate, _, _ in groups)


SMALLEST_EPSILON, SMALLEST_DELTA = 1e-3, 1e-12
"""The smallest promise that is made: below it the accountants' own steps, and floating point, weigh more than noise."""


def check_promise(epsilon: float, delta: float) -> None:
    """Refuses a promise that the accountants cannot vouch for.

    Raises:
        ValueError: says which number, its bound, and what to choose.
    """
    if epsilon < SMALLEST_EPSILON:
        raise ValueError(
            f"epsilon is {epsilon:g}, but the accountants vouch for no less than {SMALLEST_EPSILON:g}: promise more, "
            "such as 1"
        )
    if delta < SMALLEST_DELTA:
        raise ValueError(
            f"delta is {delta:g}, but the accountants vouch for no less than {SMALLEST_DELTA:g}: choose one below "
            "1 / users, such as 1e-6"
        )


def check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(
            f"delta is {delta}, but must lie in (0, 1): choose one far below 1 / users, such as 1e-6"
        )


# The accountants


def epsilon_pld(events: Sequence[Event], delta: float, *, discretisation: float | None = None) -> float:
    """Epsilon of all events together by dp-accounting's PLD: add-or-remove-one, pessimistic.

    Always from above: a coarser discretisation gives a larger figure. Sums without sampling compose exactly
    to one Gaussian. The result does not depend on the order of the events.

    Args:
        events: all of them, by the same users.
        delta: in (0, 1).
        discretisation: the interval of privacy loss in nats; by default 1e-3, and finer by tens where a
            typical step loses less than that (very many steps with much noise).

    Returns:
        Epsilon; 0 without events; inf where `delta` is too small for floating point (about 1e-15), or where
        epsilon is beyond 2 * LARGEST_EPSILON and the distribution would fill the memory.

    Raises:
        ValueError: `delta` outside (0, 1).
    """
    check_delta(delta)
    groups = _groups(events)
    return _epsilon_pld(groups, delta, _interval(groups) if discretisation is None else discretisation)


def privacy_profile(events: Sequence[Event], epsilons: Sequence[float]) -> list[float]:
    """Delta at each epsilon, by the PLD: the whole curve of which `epsilon_pld` is one point, from above.

    Delta at epsilon 0 is the total variation: nobody who sees what was released and guesses, at even odds,
    whether one user was there is right more often than (1 + delta(0)) / 2.
    """
    groups = _groups(events)
    if not groups:
        return [0.0] * len(epsilons)
    composed = _composed_pld(groups, _interval(groups))
    return [min(1.0, float(composed.get_delta_for_epsilon(epsilon))) for epsilon in epsilons]


def _interval(groups: tuple[Group, ...]) -> float:
    """The interval for these events: DISCRETISATION, or finer by tens until below a typical step's loss.

    Discretising at h adds about h^2 / 10 to the variance of a step's privacy loss (measured), so what counts
    is the root mean square of that loss over all sampled steps, q sqrt(exp(1 / sigma^2) - 1) each. It falls
    with noise, so epsilon still does.
    """
    sampled = [group for group in groups if group[0] < 1]
    variance = math.fsum(
        steps * rate**2 * math.expm1(min(1 / noise**2, 50.0)) for rate, noise, steps in sampled
    )
    typical = math.sqrt(variance / sum(steps for _, _, steps in sampled)) if sampled else 1.0
    widest = max((_widest_loss(rate, noise) for rate, noise, _ in sampled), default=0.0)
    interval = DISCRETISATION
    while (
        interval > typical
        and interval > 1.01 * _FINEST_DISCRETISATION
        and widest / _finer(interval) < _MOST_POINTS
    ):
        interval = _finer(interval)
    return interval


def _widest_loss(rate: float, noise: float) -> float:
    """About the largest privacy loss of one step that its distribution counts: ten standard deviations out."""
    return math.log1p(rate * math.expm1(min(10 / noise + 0.5 / noise**2, 700.0)))


def _finer(interval: float) -> float:
    return float(f"{interval / 10:.0e}")


@lru_cache(maxsize=1024)
def _epsilon_pld(groups: tuple[Group, ...], delta: float, discretisation: float) -> float:
    if not groups:
        return 0.0
    if _beyond_use(groups, delta):
        return math.inf
    return max(0.0, float(_composed_pld(groups, discretisation).get_epsilon_for_delta(delta)))


@lru_cache(maxsize=4)
def _composed_pld(groups: tuple[Group, ...], discretisation: float) -> Any:
    composed = None
    without_sampling = _single_gaussian(groups)
    parts = [group for group in groups if group[0] < 1]
    if without_sampling is not None:
        parts.append((1.0, without_sampling, 1))
    for rate, noise, steps in parts:
        part = _step_pld(rate, noise, discretisation)
        part = part.self_compose(steps) if steps > 1 else part
        composed = part if composed is None else composed.compose(part)
    return composed


@lru_cache(maxsize=8)
def _step_pld(rate: float, noise: float, discretisation: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution
    from dp_accounting.privacy_accountant import NeighboringRelation

    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=noise,
        pessimistic_estimate=True,
        value_discretization_interval=discretisation,
        sampling_prob=rate,
        use_connect_dots=True,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


def _single_gaussian(groups: tuple[Group, ...]) -> float | None:
    """The noise multiplier of the one Gaussian that all sums without sampling amount to, if there are any."""
    precision = math.fsum(steps / noise**2 for rate, noise, steps in groups if rate == 1)
    return 1 / math.sqrt(precision) if precision else None


def _rdp(groups: tuple[Group, ...], orders: Sequence[float]) -> Any:
    from opacus.accountants.analysis.rdp import compute_rdp

    return sum(
        compute_rdp(q=rate, noise_multiplier=noise, steps=steps, orders=orders)
        for rate, noise, steps in groups
    )


def _rdp_epsilon(groups: tuple[Group, ...], orders: Sequence[float], delta: float) -> tuple[float, float]:
    """The smallest epsilon that any of the orders gives, and that order."""
    from opacus.accountants.analysis.rdp import get_privacy_spent

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the")
        epsilon, order = get_privacy_spent(orders=orders, rdp=_rdp(groups, orders), delta=delta)
    return max(0.0, float(epsilon)), float(order)


def _quick_bound(groups: tuple[Group, ...], delta: float) -> float:
    """An upper bound on epsilon in a few milliseconds: RDP at a few whole orders."""
    return _rdp_epsilon(groups, (2, 3, 4, 8, 16, 32, 64, 128, 256), delta)[0]


def quick_bound(events: Sequence[Event], delta: float) -> float:
    """A cheap upper bound of epsilon, to begin a search with; never a figure to publish."""
    return _quick_bound(_groups(events), delta)


def _beyond_use(groups: tuple[Group, ...], delta: float) -> bool:
    """Whether epsilon is so large that its distribution might fill the memory."""
    limit = 2 * LARGEST_EPSILON
    return (
        _quick_bound(groups, delta) > limit and _rdp_epsilon(groups, (1.1, 1.2, 1.4, 1.7), delta)[0] > limit
    )


def epsilon_rdp(events: Sequence[Event], delta: float) -> float:
    """Epsilon by Renyi DP with the analysis of Opacus' RDPAccountant (its orders, and some beyond 63).

    Opacus stops at order 63, which puts a floor of about ln(1 / delta) / 62 under every figure; the further
    orders lower that floor. The conversion is Balle et al. 2020 (arXiv 1905.09982, theorem 21).

    Returns:
        Epsilon; 0 without events (Opacus itself would report the floor).

    Raises:
        ValueError: `delta` outside (0, 1).
    """
    from opacus.accountants import RDPAccountant

    check_delta(delta)
    groups = _groups(events)
    if not groups:
        return 0.0
    whole = [*range(2, 64), 80, 128, 256, 512, 1024]
    epsilon, order = _rdp_epsilon(groups, whole, delta)
    if order <= 12:  # only then can an order between whole ones, which costs far more time, be better
        fractional = [order for order in RDPAccountant.DEFAULT_ALPHAS if order not in whole]
        epsilon = min(epsilon, _rdp_epsilon(groups, fractional, delta)[0])
    return epsilon


def epsilon_prv(events: Sequence[Event], delta: float) -> float:
    """Epsilon by Opacus' PRVAccountant (Gopi et al. 2021): an upper bound, about 0.01 above the estimate.

    Only reliable where `published_epsilon` asks it; elsewhere it raises, takes minutes or fills the memory.

    Returns:
        Epsilon; 0 without events (Opacus itself would raise).

    Raises:
        ValueError: `delta` outside (0, 1); and whatever Opacus raises.
    """
    import numpy as np
    from opacus.accountants import PRVAccountant

    check_delta(delta)
    groups = _groups(events)
    if not groups:
        return 0.0
    accountant = PRVAccountant()
    accountant.history = [(noise, rate, steps) for rate, noise, steps in groups]
    with warnings.catch_warnings(), np.errstate(divide="ignore"):  # log(1 - q) at q = 1, taken and not used
        warnings.filterwarnings("ignore", message="Optimal order is the")
        return float(accountant.get_epsilon(delta))


def epsilon_rdp_google(events: Sequence[Event], delta: float) -> float:
    """Epsilon by dp-accounting's RdpAccountant, for an audit's table alone.

    It drops fractional orders below 2 that fail to converge with no more than a log line, and then its figure
    is up to twice the right one: valid, and of little use.

    Raises:
        ValueError: `delta` outside (0, 1).
    """
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    check_delta(delta)
    groups = _groups(events)
    if not groups:
        return 0.0
    accountant = RdpAccountant()
    for rate, noise, steps in groups:
        gaussian = GaussianDpEvent(noise)
        accountant.compose(gaussian if rate == 1 else PoissonSampledDpEvent(rate, gaussian), steps)
    return float(accountant.get_epsilon(delta))


def epsilon_gaussian(events: Sequence[Event], delta: float) -> float:
    """Epsilon in closed form, for events without sampling (Balle & Wang 2018, theorem 8).

    Gaussian sums with noise multipliers s_i compose exactly to one with 1 / s^2 = sum 1 / s_i^2.

    Returns:
        Epsilon to about 1e-9; 0 without events.

    Raises:
        ValueError: `delta` outside (0, 1), or an event that samples users.
    """
    from scipy.optimize import brentq

    check_delta(delta)
    groups = _groups(events)
    if any(rate < 1 for rate, _, _ in groups):
        raise ValueError(
            "the closed form is only known without sampling, but an event has a sampling rate below 1"
        )
    noise = _single_gaussian(groups)
    if noise is None or gaussian_delta(noise, 0.0) <= delta:
        return 0.0
    upper = 1.0
    while gaussian_delta(noise, upper) > delta:
        upper *= 2
    return float(brentq(lambda epsilon: gaussian_delta(noise, epsilon) - delta, 0.0, upper, xtol=1e-10))


def gaussian_delta(noise: float, epsilon: float) -> float:
    """Delta of the Gaussian mechanism of sensitivity 1 at `epsilon` (Balle & Wang 2018, theorem 8)."""
    from scipy.special import log_ndtr

    above = float(log_ndtr(1 / (2 * noise) - epsilon * noise))
    below = epsilon + float(log_ndtr(-1 / (2 * noise) - epsilon * noise))
    return math.exp(above) * -math.expm1(min(0.0, below - above))


# What is published


def published_epsilon(events: Sequence[Event], delta: float) -> PublishedEpsilon:
    """The epsilon of events fixed in advance, confirmed by the other accountants.

    Within sigma >= 0.3, 1e-12 <= delta <= 1e-3 and at most 1e5 steps the PLD is compared with RDP and PRV;
    outside, the PLD's interval is 1e-4 or finer, and PRV, unreliable there, is not asked; nor is it for more than
    32 different mechanisms, which would take it minutes. Over very many
    steps the interval can put the PLD above the others; then the figure is that of an interval ten times
    finer, a tighter bound in its own right, which must pass the same comparison. Without sampling the closed form
    is compared too.

    Raises:
        ContradictionError: an accountant contradicts the PLD, or gives no figure; the message says which.
        ValueError: `delta` outside (0, 1).
    """
    check_delta(delta)
    groups = _groups(events)
    if not groups:
        return PublishedEpsilon(epsilon=0.0, delta=delta, rdp=0.0, prv=0.0, closed_form=0.0)
    steps = sum(steps for _, _, steps in groups)
    within = all(noise >= 0.3 for _, noise, _ in groups) and 1e-12 <= delta <= 1e-3 and steps <= 100_000
    interval = _interval(groups) if within else min(_interval(groups), FINE_DISCRETISATION)
    epsilon = epsilon_pld(events, delta, discretisation=interval)
    if not math.isfinite(epsilon):
        raise ContradictionError(
            f"the PLD gives no finite epsilon for these events at delta {delta}: either delta is below about "
            f"1e-15, or epsilon is far beyond {LARGEST_EPSILON:g}"
        )
    rdp = epsilon_rdp(events, delta)
    closed_form = epsilon_gaussian(events, delta) if all(rate == 1 for rate, _, _ in groups) else None
    prv = None
    few = len(groups) <= _MOST_PRV_MECHANISMS
    if within and few and epsilon * math.sqrt(steps) <= _LARGEST_PRV_WORK:
        try:
            prv = epsilon_prv(events, delta)
        except (ArithmeticError, ValueError, RuntimeError) as error:
            raise ContradictionError(f"PRV gives no figure beside PLD {epsilon:.6g}") from error
    lowest = min(figure for figure in (rdp, prv) if figure is not None)
    if epsilon > lowest:
        interval = _finer(interval)
        epsilon = epsilon_pld(events, delta, discretisation=interval)
    cross_check(pld=epsilon, rdp=rdp, prv=prv, closed_form=closed_form)
    return PublishedEpsilon(epsilon, delta, rdp, prv, closed_form, interval)


def cross_check(*, pld: float, rdp: float, prv: float | None, closed_form: float | None) -> None:
    """Refuses figures that contradict one another.

    Required: pld <= prv <= pld + 0.02 + 0.001 pld; pld <= rdp; closed_form <= pld <= closed_form + 1e-3 (to
    1e-6, for rounding). A figure of None is not compared; one that is not finite and at least 0 is refused.

    Raises:
        ContradictionError: says which of these fails, with the figures.
    """
    named = {"PLD": pld, "RDP": rdp, "PRV": prv, "closed form": closed_form}
    for name, value in named.items():
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ContradictionError(f"{name} is {value}, which is no epsilon")
    if prv is not None and not pld <= prv:
        raise ContradictionError(f"PLD <= PRV fails: PLD is {pld:.6g}, PRV {prv:.6g}")
    if prv is not None and not prv <= pld + 0.02 + 0.001 * pld:
        raise ContradictionError(f"PRV <= PLD + 0.02 + 0.001 PLD fails: PLD is {pld:.6g}, PRV {prv:.6g}")
    if not pld <= rdp:
        raise ContradictionError(f"PLD <= RDP fails: PLD is {pld:.6g}, RDP {rdp:.6g}")
    if closed_form is not None and not closed_form - 1e-6 <= pld <= closed_form + 1e-3:
        raise ContradictionError(
            f"closed form <= PLD <= closed form + 0.001 fails: PLD is {pld:.6g}, "
            f"closed form {closed_form:.6g}"
        )
