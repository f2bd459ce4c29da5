"""Whether a plan can be finished: what it costs each site against what is left, and what would fit where it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.config import Plan
from common.phases import Exchange
from server.aggregation import fewest_updates
from server.budgets import SiteBudget, epsilon_that_fits, rounds_that_fit, site_budgets
from server.registry import RegistryReader


@dataclass(frozen=True)
class Fit:
    """A plan, or what remains of a run, against the budgets of the sites that take part.

    Attributes:
        rounds: how many are to be asked, of every phase.
        needed: sites that each of them takes.
        most_rounds: of fine-tuning, that would fit at the plan's own noise; None where it fits, or none do.
        noise: the plan's noise multiplier of fine-tuning, at which these fit; None where it has none.
        epsilon: a promise at which all rounds would fit; None where it fits, or there is none.
    """

    budgets: tuple[SiteBudget, ...]
    rounds: int
    needed: int
    most_rounds: int | None = None
    noise: float | None = None
    epsilon: float | None = None
    states_noise: bool = False

    @property
    def paying(self) -> int:
        """How many sites can be asked all rounds."""
        return sum(each.fits for each in self.budgets)

    @property
    def fits(self) -> bool:
        return self.paying >= self.needed

    def why_not(self) -> str:
        """One sentence, and what would fit."""
        said = (
            f"{self.rounds} rounds fit the budgets of {self.paying} of {len(self.budgets)} sites, and each round needs "
            f"{self.needed}"
        )
        ways = []
        if self.epsilon is not None:
            own = ", the plan's own noise multipliers left out" if self.states_noise else ""
            ways.append(f"privacy.epsilon = {self.epsilon:g}, with all rounds and more noise{own}")
        if self.most_rounds is not None:
            noise = (
                ""
                if self.noise is None
                else f" with privacy.noise_multiplier = {self.noise:g}, this plan's own"
            )
            ways.append(f"training.rounds = {self.most_rounds}{noise}")
        return said + (
            f"; what would fit: {'; or '.join(ways)}" if ways else "; no smaller plan of its kind fits"
        )

    def as_json(self) -> dict[str, Any]:
        """For scripts; costs and what is left are shares of each site's own budget."""
        return {
            "fits": self.fits,
            "rounds": self.rounds,
            "sites_needed": self.needed,
            "sites_that_can_pay": self.paying,
            "sites": [each.as_json() for each in self.budgets],
            "would_fit": {
                "epsilon": self.epsilon,
                "training_rounds": self.most_rounds,
                "noise_multiplier": self.noise if self.most_rounds is not None else None,
            },
        }


def fit_of_plan(plan: Plan, written: Plan, registry: RegistryReader) -> Fit:
    """How a plan that has not begun fits.

    Args:
        plan: calibrated.
        written: the same before that.
    """
    exchanges, needed = plan.schedule(), fewest_updates(plan.server)
    found = Fit(tuple(site_budgets(registry, exchanges)), len(exchanges), needed)
    if found.fits:
        return found
    return Fit(
        found.budgets,
        found.rounds,
        needed,
        most_rounds=rounds_that_fit(plan, registry, needed),
        noise=plan.privacy.noise_multiplier,
        epsilon=epsilon_that_fits(bare := _without_noise(written), registry, needed),
        states_noise=bare != written,
    )


def _without_noise(plan: Plan) -> Plan:
    """The plan with its noise left to be calibrated."""
    sums = {"popularity_noise_multiplier": None, "transition_noise_multiplier": None}
    return plan.model_copy(
        update={
            "privacy": plan.privacy.model_copy(update={"noise_multiplier": None}),
            "statistics": plan.statistics.model_copy(update=sums),
            "metrics": plan.metrics.model_copy(update={"noise_multiplier": None}),
        }
    )


def fit_of_rest(plan: Plan, rest: Sequence[Exchange], run: str, registry: RegistryReader) -> Fit:
    """How the rounds that remain of a run fit; what sites were charged for already is not counted again."""
    return Fit(tuple(site_budgets(registry, rest, run)), len(rest), fewest_updates(plan.server))
