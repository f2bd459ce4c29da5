"""What a round needs before it begins: sites that can answer, and budgets that last; else the run ends in time.

A run that ends here can go on: nothing of the round was asked or recorded.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from flwr.serverapp import Grid

from common.config import Plan
from common.phases import Exchange
from server.aggregation import fewest_updates
from server.asking import known_sites
from server.budgets import enough_can_pay, site_budgets
from server.registry import Registry
from server.replies import connected
from server.runs import RunError, RunFolder

_log = logging.getLogger("fedtide.server")

ROUNDS_IN_VAIN = 3
"""So many rounds in a row that could not be aggregated end a run: each of them cost the sites that answered."""

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0


def wait_for_sites(
    grid: Grid,
    plan: Plan,
    run: RunFolder,
    registry: Registry,
    number: int,
    needed: int,
    names: Callable[[], Mapping[int, str]],
    held: Collection[str] = (),
    asked: Collection[str] = (),
) -> list[int]:
    """The nodes to ask in a round, once there are enough; none of a site that is removed or barred.

    Args:
        number: of the round.
        needed: how many sites are waited for, or all that take part where these are fewer; never less than the plan's
            aggregation takes.
        names: node -> its site, as enrolled.
        held: key ids of sites whose releases of this round are held already, wherever they are now.
        asked: key ids of sites that were asked in this round before the server was restarted, and may have been charged
            for it: once there are enough, they are waited for as long as the plan's grace.

    Raises:
        RunError: there were too few until the plan's patience was over.
    """
    fewest = fewest_updates(plan.server)
    end, pause, said = time.monotonic() + plan.server.patience, _SHORTEST_PAUSE, -1
    enough = 0.0
    try:
        while True:
            known = known_sites(registry, names())
            sites = registry.sites()
            out = {site.key_id for site in sites if site.shut_out}
            wanted = max(fewest, min(needed, len(sites) - len(out)))
            nodes = [node for node in connected(grid) if known.get(node) not in out]
            ready = {known[node] for node in nodes if node in known} | set(held)
            there = len(ready)
            if there >= wanted:
                enough = enough or time.monotonic()
                late = set(asked) - ready - out
                if late and time.monotonic() < enough + plan.server.grace:
                    time.sleep(_SHORTEST_PAUSE)
                    continue
                return nodes or [node for node, key_id in known.items() if key_id in ready]
            if there != said:
                said = there
                away = [site.name for site in sites if site.key_id not in ready | out]
                run.save_waiting(number, wanted - there)
                _log.warning(
                    "round %d: waiting for %d more sites, of %d that it needs%s",
                    number,
                    wanted - there,
                    wanted,
                    f"; not connected: {', '.join(away)}" if 0 < len(away) <= _MOST_NAMED else "",
                )
            if time.monotonic() >= end:
                raise RunError(
                    f"of the {wanted} that round {number} needs, {there} sites came in {plan.server.patience:g} s: "
                    "start more sites, and then this run again, which goes on; or begin one with a lower "
                    "server.minimum_sites"
                )
            time.sleep(max(0.0, min(pause, end - time.monotonic())))
            pause = min(2 * pause, _LONGEST_PAUSE)
    finally:
        run.waiting_file.unlink(missing_ok=True)


_MOST_NAMED = 12


def check_budgets(plan: Plan, run: RunFolder, registry: Registry, remaining: Sequence[Exchange]) -> None:
    """Whether the rounds that remain fit the budgets of enough sites; asked before each of them.

    Raises:
        RunError: they do not, so that whatever is charged from now on would be for nothing.
    """
    needed = fewest_updates(plan.server)
    taking_part = sum(not site.shut_out for site in registry.sites())
    if taking_part < needed or enough_can_pay(registry, remaining, needed, run.name):
        return  # sites that are too few are waited for
    paying = [each.site for each in site_budgets(registry, remaining, run.name) if each.fits]
    raise RunError(
        f"the {len(remaining)} rounds that remain fit the budgets of {len(paying)} sites, and each needs {needed}: "
        f"it ends before round {remaining[0].round}, so that nobody is charged for what cannot be finished; `fedtide "
        "server fits` says what would fit"
    )


def check_not_in_vain(rounds: int, last: int) -> None:
    """Raises `RunError` where so many rounds in a row, of which `last` was the latest, could not be aggregated."""
    if rounds >= ROUNDS_IN_VAIN:
        raise RunError(
            f"{rounds} rounds in a row were not aggregated, the last of them round {last}: it ends here, so that no "
            "site is charged for more; server.log and rounds.jsonl say for each site why"
        )
