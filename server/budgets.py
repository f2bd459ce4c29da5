"""What rounds cost each site, and what its ledger has left, at the ledger's own order: from the registry's chains.

The registry knows what receipts told; a site may have charged more since, never less. So what does not fit here does
not fit at the site.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from common.config import Plan
from common.phases import Exchange, Phase
from common.privacy.chain import Chain
from common.privacy.entries import Reserve
from common.privacy.renyi import charge_at
from server.registry import RegistryReader


@dataclass(frozen=True)
class SiteBudget:
    """One site's budget against some rounds, in nano-units of its filter's Renyi divergence.

    Attributes:
        cost: of the rounds, those left out that it was charged for already; each at least a thousandth of the cap.
        left: of the cap; 0 for a site that has withdrawn.
        affords: how many of the rounds, in their order.
    """

    site: str
    cost: int
    left: int
    cap: int
    affords: int
    withdrawn: bool = False

    @property
    def fits(self) -> bool:
        """Whether the site can be asked all of the rounds."""
        return self.cost <= self.left and not self.withdrawn

    def as_json(self) -> dict[str, Any]:
        """Shares of the cap, for scripts."""
        return {
            "site": self.site,
            "cost": self.cost / self.cap,
            "left": self.left / self.cap,
            "fits": self.fits,
            "rounds_that_fit": self.affords,
            "withdrawn": self.withdrawn,
        }


def site_budget(site: str, chain: Chain, exchanges: Iterable[Exchange], run: str = "") -> SiteBudget:
    """A site's budget against these rounds.

    Args:
        run: the name of the run that they are of, where it has begun: what was reserved for it is not paid again.
    """
    genesis = chain.genesis
    paid = {
        entry.body.round
        for entry in chain.reservations.values()
        if isinstance(entry.body, Reserve) and entry.body.run == run
    }
    left = 0 if chain.closed else chain.filter.cap - chain.filter.spent
    cost, affords = 0, 0
    for exchange in exchanges:
        if exchange.round not in paid:
            cost += charge_at(exchange.event, genesis.order, genesis.cap)
        affords += cost <= left and not chain.closed
    return SiteBudget(site, cost, left, genesis.cap, affords, chain.closed)


def site_budgets(registry: RegistryReader, exchanges: Sequence[Exchange], run: str = "") -> list[SiteBudget]:
    """Of every site that takes part, by name."""
    return [
        site_budget(site.name, registry.chain(site.key_id), exchanges, run)
        for site in registry.sites()
        if not site.shut_out
    ]


def enough_can_pay(
    registry: RegistryReader, exchanges: Sequence[Exchange], needed: int, run: str = ""
) -> bool:
    """Whether these rounds fit the budgets of so many sites, as far as the registry knows."""
    found = 0
    for site in registry.sites():
        if found >= needed:
            break
        if not site.shut_out:
            found += site_budget(site.name, registry.chain(site.key_id), exchanges, run).fits
    return found >= needed


def rounds_that_fit(plan: Plan, registry: RegistryReader, needed: int) -> int | None:
    """The most rounds of fine-tuning, at a calibrated plan's own noise, that enough sites can pay for beside the rest.

    Returns:
        None where not even the plan without them fits, or is none.
    """
    schedule = plan.schedule()
    low, high = -1, plan.training.rounds
    while low < high:
        middle = -(-(low + high) // 2)
        if enough_can_pay(registry, _with_rounds(schedule, middle), needed):
            low = middle
        else:
            high = middle - 1
    least = 0 if plan.statistics.popularity_share else 1
    return low if low >= least else None


def _with_rounds(schedule: Sequence[Exchange], rounds: int) -> list[Exchange]:
    """The schedule with so many rounds of fine-tuning."""
    taken = Counter[Phase]()
    kept = []
    for exchange in schedule:
        taken[exchange.phase] += 1
        if exchange.phase is not Phase.UPDATE or taken[exchange.phase] <= rounds:
            kept.append(exchange)
    return kept


def epsilon_that_fits(plan: Plan, registry: RegistryReader, needed: int) -> float | None:
    """The largest promise, to a fiftieth of the plan's own, at which enough sites can pay for all of its rounds.

    Each try is calibrated anew, which takes about a second.

    Args:
        plan: as it was written, before it was calibrated.

    Returns:
        None where there is none: the plan states its own noise, or its rounds are too many for any.
    """
    stated = (
        plan.privacy.noise_multiplier,
        plan.statistics.popularity_noise_multiplier,
        plan.statistics.transition_noise_multiplier,
        plan.metrics.noise_multiplier,
    )
    if any(noise is not None for noise in stated):
        return None
    found, low, high = None, 0, 50
    while high - low > 1:
        middle = (low + high) // 2
        promise = float(f"{plan.privacy.epsilon * middle / 50:.3g}")
        privacy = plan.privacy.model_copy(update={"epsilon": promise})
        try:
            schedule = plan.model_copy(update={"privacy": privacy}).calibrated().schedule()
            fits = enough_can_pay(registry, schedule, needed)
        except ValueError:  # no noise is enough for so small a promise
            low = middle
            continue
        if fits:
            found, low = promise, middle
        else:
            high = middle
    return found
