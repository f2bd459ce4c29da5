"""From public numbers to a plan: the split of the budget, M, sampling rate, noise, steps and the filter's order.

Nothing here has seen a user: the inputs are what a federation says of itself in public (a lower bound of users
at each site, how many sites, the promise), and the expectations are formulae over assumptions that are stated
with them. They say what the noise would leave of a signal, before anyone trains; they promise no quality.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from common.config import Plan, PlanError, make_plan
from common.privacy.mechanisms import Event


@dataclass(frozen=True, slots=True)
class Federation:
    """What is known in public.

    Attributes:
        users_per_site: a lower bound, for every site.
        sites: how many.
        epsilon, delta: the promise for the whole run.
        rounds: of private fine-tuning; 0 for statistics alone; None to let the planner say.
        items: size of the catalog.
        events_per_user: assumed length of a history; only expectations go by it, never a mechanism.
        coordinates: assumed number of trainable coordinates; likewise.
        metrics: whether sites shall release quality too.
    """

    users_per_site: int
    sites: int
    epsilon: float = 8.0
    delta: float = 1e-5
    rounds: int | None = None
    items: int = 2000
    events_per_user: int = 50
    coordinates: int = 20_000
    metrics: bool = False

    def __post_init__(self) -> None:
        for name in ("users_per_site", "sites", "items", "events_per_user", "coordinates"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} is {getattr(self, name)}, but must be at least 1")
        from common.privacy.accountants import check_promise

        try:
            check_promise(self.epsilon, self.delta)
        except ValueError as error:
            raise PlanError(str(error)) from error
        if self.rounds is not None and self.rounds < 0:
            raise PlanError(f"rounds is {self.rounds}, but must be at least 0")


@dataclass(frozen=True, slots=True)
class Expectation:
    """What one phase is expected to buy.

    Attributes:
        phase: its name.
        noise: noise multiplier of each site's release.
        signal_to_noise: the phase's own ratio, explained by `says`.
        says: one sentence.
    """

    phase: str
    noise: float
    signal_to_noise: float
    says: str


@dataclass(frozen=True, slots=True)
class Proposal:
    """A calibrated plan, the ledger that it needs, and what to expect.

    Attributes:
        epsilon: PLD epsilon of the whole plan, at most the promise.
        budget: the smallest epsilon, rounded up to a tenth, of a ledger that admits the whole plan.
        order: that ledger's Renyi order (alpha*).
    """

    plan: Plan
    epsilon: float
    budget: float
    order: int
    expectations: tuple[Expectation, ...]


def smallest_budget(events: Sequence[Event], delta: float) -> tuple[float, int]:
    """The smallest epsilon, rounded up to a tenth, whose Renyi filter admits these events, and its order.

    It lies above the events' own PLD epsilon, because the filter's guarantee holds whatever is run next, and because
    each request is charged at least a thousandth of the cap.

    Raises:
        PlanError: no ledger admits them, whatever its epsilon.
    """
    from common.privacy.renyi import LEAST_SHARE, best_order, cap_of, charge_at

    times = Counter(events)

    def admits(epsilon: float) -> bool:
        try:
            order = best_order(events, epsilon, delta)
        except ValueError:  # no budget at all at this epsilon
            return False
        cap = cap_of(epsilon, delta, order)
        return sum(count * charge_at(event, order, cap) for event, count in times.items()) <= cap

    low, high = 0, 10_000  # in tenths
    if not admits(high / 10):
        raise PlanError(
            f"the plan asks a site {len(events)} times, which no ledger up to epsilon {high // 10} admits: each "
            f"request is charged at least 1/{LEAST_SHARE} of the budget, so at most {LEAST_SHARE} fit. Take fewer "
            "rounds, each of more steps, or more noise"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if admits(middle / 10) else (middle, high)
    return high / 10, best_order(events, high / 10, delta)


def propose(federation: Federation) -> Proposal:
    """The plan for a federation, by the rules that validation on public data sets led to (docs/statistics.md).

    Raises:
        PlanError: the numbers allow no plan.
    """
    from common.privacy.accountants import epsilon_pld

    plan = _plan(federation).calibrated()
    budget, order = smallest_budget(plan.events(), federation.delta)
    expectations = [
        *_of_statistics(federation, plan),
        *_of_updates(federation, plan),
        *_of_metrics(federation, plan),
    ]
    return Proposal(plan, epsilon_pld(plan.events(), federation.delta), budget, order, tuple(expectations))


def _plan(federation: Federation) -> Plan:
    from common.phases import noise_of_promise

    # What the noise of a whole promise on the sum over sites is against all users: small is little privacy cost.
    deviation = noise_of_promise(federation.epsilon, federation.delta) * math.sqrt(federation.sites)
    rounds = federation.rounds
    metrics = 0.05 if federation.metrics else 0.0
    popularity = POPULARITY_SHARE if deviation <= MUCH_NOISE else POPULARITY_SHARE_UNDER_MUCH_NOISE
    tuning = FINE_TUNING_SHARE if rounds is None or rounds > 0 else 0.0
    if rounds is None and not tuning:
        rounds = 0
    # Rounded down, so that the shares never add up to more than one.
    transitions = math.floor((1 - popularity - metrics - tuning) * 1000 + 1e-6) / 1000
    training = {"learning_rate": LEARNING_RATE} | ({} if rounds is None else {"rounds": rounds})
    return make_plan(
        {
            "privacy": {
                "epsilon": federation.epsilon,
                "delta": federation.delta,
                "users_per_site": federation.users_per_site,
            },
            "statistics": {"popularity_share": popularity, "transition_share": transitions},
            "metrics": {"share": metrics},
            "training": training,
            "server": {"expected_sites": federation.sites},
        }
    )


POPULARITY_SHARE, POPULARITY_SHARE_UNDER_MUCH_NOISE, MUCH_NOISE = 0.2, 0.3, 4.0
FINE_TUNING_SHARE = 0.1
LEARNING_RATE = 0.3
"""Chosen on validation data of MovieLens-100K and Online Retail, over ten sites, at epsilon 8 and 2. With released
statistics fine-tuning bought no more there than noise takes: so it gets little, and takes small steps."""

DEFAULT_SECTIONS = {
    "statistics": {"popularity_share": POPULARITY_SHARE, "transition_share": 0.7},
    "training": {"learning_rate": LEARNING_RATE},
}
"""What `fedtide simulate` runs without a plan of one's own, for the task next-item: those values and shares."""


def _of_statistics(federation: Federation, plan: Plan) -> list[Expectation]:
    """Zipf's law for popularity, and evenly spread transitions: stated, so that they can be doubted."""
    found, statistics = [], plan.statistics
    users = federation.users_per_site * federation.sites
    length = min(federation.events_per_user, federation.items)
    if statistics.popularity_noise_multiplier is not None:
        deviation = statistics.popularity_noise_multiplier * math.sqrt(federation.sites)
        harmonic = sum(1 / rank for rank in range(1, federation.items + 1))
        # Of `length` distinct items each adds 1 / sqrt(length); the item of rank r is among them with this chance.
        counts = [
            users * min(1.0, length / (rank * harmonic)) / math.sqrt(length)
            for rank in range(1, federation.items + 1)
        ]
        visible = sum(count > 2 * deviation for count in counts)
        found.append(
            Expectation(
                "popularity",
                statistics.popularity_noise_multiplier,
                counts[min(len(counts), 100) - 1] / deviation,
                f"about {visible} of {federation.items} items stand two deviations above the noise "
                f"(assumed: Zipf's law, {length} items a user); the ratio is that of the 100th item",
            )
        )
    if statistics.transition_noise_multiplier is not None:
        deviation = statistics.transition_noise_multiplier * math.sqrt(federation.sites)
        items = statistics.most_items(federation.items)
        pairs = max(1, items * (items - 1) // (2 if statistics.symmetric else 1))
        inside = min(length, items)
        distinct = min(pairs, max(1, inside * min(statistics.gaps, inside)))
        mean = users * math.sqrt(distinct) / pairs
        needed = statistics.threshold * deviation / mean
        found.append(
            Expectation(
                "transitions",
                statistics.transition_noise_multiplier,
                mean / deviation,
                f"among {items} items, pairs at least {needed:.1f} times as frequent as the mean pair are seen through "
                f"the noise (assumed: {inside} of a user's items among them)",
            )
        )
    return found


def _of_updates(federation: Federation, plan: Plan) -> list[Expectation]:
    noise = plan.privacy.noise_multiplier
    if not plan.training.rounds or noise is None:
        return []
    taken = plan.privacy.sampling_rate * federation.users_per_site * federation.sites
    per_step = taken / (noise * math.sqrt(federation.sites * federation.coordinates))
    ratio = per_step * math.sqrt(plan.steps)
    return [
        Expectation(
            "update",
            noise,
            ratio,
            f"if all users' gradients agreed, {plan.steps} steps would point along them with {ratio:.2g} times the "
            f"noise's length over {federation.coordinates} coordinates, one step with {per_step:.2g}; gradients agree "
            "far less than that",
        )
    ]


def _of_metrics(federation: Federation, plan: Plan) -> list[Expectation]:
    noise = plan.metrics.noise_multiplier
    if not plan.metrics.share or noise is None:
        return []
    users, rate = federation.users_per_site * federation.sites, 0.1
    error = math.sqrt(3 * federation.sites * (1 + rate**2)) * noise / users
    half = 1.96 * math.sqrt(error**2 + rate * (1 - rate) / users)
    return [
        Expectation(
            "metrics",
            noise,
            rate / error,
            f"a hit rate of {rate:g} would be told to within {half:.3f} (95 %)",
        )
    ]


def plan_toml(plan: Plan) -> str:
    """The plan as TOML that `read_plan` reads back; what is None is left out."""
    values = plan.model_dump(mode="json", exclude_none=True)
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items() if not isinstance(value, dict)]
    for section, fields in values.items():
        if isinstance(fields, dict):
            lines += ["", f"[{section}]"]
            lines += [f"{name} = {json.dumps(value)}" for name, value in fields.items()]
    return "\n".join(lines) + "\n"
