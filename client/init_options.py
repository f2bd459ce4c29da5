"""What `fedtide site init` makes of its options: the typical run of a budget, and language models' folders."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from client.policy import POLICY

if TYPE_CHECKING:
    from client.site_folder import Site
    from common.privacy.mechanisms import Event


def model_folders(given: list[str] | None) -> dict[str, str]:
    """Name -> folder, of `NAME=FOLDER` each.

    Raises:
        UserError: one reads otherwise.
        AssetError: there is no such folder.
    """
    from common.assets import language_model
    from common.cli import UserError

    found = {}
    for each in given or ():
        name, equals, folder = each.rpartition("=")
        if not equals or not name or not folder:
            raise UserError(f"--language-model {each!r} must read NAME=FOLDER, as a plan's encoder names it")
        found[name] = str(language_model(Path(folder).expanduser().resolve(), offline=True))
    return found


def typical_events(plan_file: Path | None, epsilon: float, delta: float, users: int) -> list[Event]:
    """The events of the run that a budget is to serve best: of a plan's file, or of the default plan.

    Raises:
        SiteError, ValueError: no ledger can hold that budget.
        UserError: the plan counts on more users than the site promises.
        PlanError: the file is no plan.
    """
    from client.making import check_budget
    from common.cli import UserError
    from common.config import make_plan, read_recorded_plan

    check_budget(epsilon, delta, users)

    if plan_file is not None:
        plan = read_recorded_plan(plan_file)  # its events alone count: an older plan has them, too
        if plan.privacy.users_per_site > users:
            raise UserError(
                f"the typical plan counts on {plan.privacy.users_per_site} users, but --users-at-least is "
                f"{users}: such a run would be refused"
            )
    else:
        privacy = {"epsilon": min(epsilon, 100.0), "delta": delta, "users_per_site": users}
        plan = make_plan({"privacy": privacy})
    return list(plan.calibrated().events())


@dataclass(frozen=True)
class Admitted:
    """How much of a typical run a new site admits.

    Attributes:
        runs: how often its events fit in the ledger's budget.
        whole: whether they fit once.
        delta: of the site's policy, and of its ledger.
        epsilon: of the run at that delta.
        most: the policy's bound of that epsilon; a run above it is refused before its first round.
    """

    runs: float
    whole: bool
    delta: float
    epsilon: float
    most: float

    def sentence(self) -> str:
        """What a person is told of it."""
        if self.epsilon > self.most:
            return (
                f"Note: no round of the typical run is admitted: its epsilon is {self.epsilon:.3f} at delta "
                f"{self.delta:g}, and {POLICY} allows {self.most:g}. Give runs that delta (`fedtide plan --delta "
                f"{self.delta:g}`)."
            )
        if self.whole:
            return f"The budget admits about {self.runs:.1f} typical runs."
        return (
            f"Note: the budget admits {self.runs:.0%} of one typical run, and the rest would be refused: the brake "
            "costs more than the plan's own epsilon, as it holds whatever is run next."
        )


def admitted(site: Site, events: list[Event]) -> Admitted:
    """What the policy and the ledger of a new site admit of a typical run."""
    from client.ledger import Ledger
    from common.privacy.accountants import epsilon_pld
    from common.privacy.renyi import charge_at

    with Ledger.open(site.ledger_folder) as ledger:
        genesis = ledger.genesis
    cost = sum(charge_at(event, genesis.order, genesis.cap) for event in events)
    delta = genesis.delta if site.limits.delta is None else site.limits.delta
    most = math.inf if site.limits.epsilon is None else site.limits.epsilon
    spent = epsilon_pld(events, delta)
    fits = spent <= most
    return Admitted(genesis.cap / cost if fits else 0.0, fits and cost <= genesis.cap, delta, spent, most)
