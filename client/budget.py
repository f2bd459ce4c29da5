"""`fedtide site budget`: what is left of a site's budget, now or as it burns down."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from client.ledger import Ledger

if TYPE_CHECKING:
    from rich.console import RenderableType

    from client.ledger_reading import LedgerStatus
    from client.site_folder import Site

_BAR, _LINES = 40, 12


def facts(site: Site) -> dict[str, Any]:
    """The budget in numbers."""
    return _facts(site.name, _status(site))


def _status(site: Site) -> LedgerStatus:
    with Ledger.open(site.ledger_folder) as ledger:
        return ledger.status()


def _facts(name: str, found: LedgerStatus) -> dict[str, Any]:
    last = found.charges[-1].reserve if found.charges else None
    left = found.cap - found.spent
    return {
        "site": name,
        "epsilon": found.genesis.epsilon,
        "delta": found.genesis.delta,
        "share_left": left / found.cap,
        "spent": found.spending().as_json(),
        "charges": len(found.charges),
        "burnt": found.burnt,
        "withdrawn": found.closed,
        "last_run": last.run if last else None,
        "last_round": last.round if last else None,
        "more_like_the_last": found.more_like_the_last,
    }


def _burn_down(site: Site) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    found = _status(site)
    said = _facts(site.name, found)
    lines = [Text(_line(said)), *map(Text, found.spending().sentences())]
    if said["withdrawn"]:
        lines.append(Text("The site has withdrawn: nothing more may be reserved or released."))
    if not found.charges:
        return Group(*lines)
    table = Table(box=None)
    for column in ("run", "round", "outcome", "left"):
        words = column in ("run", "outcome")
        table.add_column(
            column, justify="left" if words else "right", no_wrap=column != "run", overflow="fold"
        )
    table.add_column("", no_wrap=True)
    for charge in found.charges[-_LINES:]:
        left = 1 - charge.reserve.spent / found.cap
        full = round(_BAR * left)
        bar = "█" * full + "░" * (_BAR - full)
        table.add_row(charge.reserve.run, str(charge.reserve.round), charge.outcome, f"{left:.1%}", bar)
    return Group(*lines, table)


def _line(said: dict[str, Any]) -> str:
    if said["withdrawn"]:
        return f"Site {said['site']} has withdrawn, after {said['charges']} charges ({said['burnt']} burnt)."
    more = said["more_like_the_last"]
    room = "" if more is None else f" {more} more rounds like the last one fit."
    return (
        f"Site {said['site']}: {said['share_left']:.1%} of the filter's budget is left, "
        f"after {said['charges']} charges ({said['burnt']} burnt).{room}"
    )


def show(site: Site) -> None:
    """Prints the budget, and the last charges as a burn-down."""
    from rich.console import Console

    Console().print(_burn_down(site))


def watch_budget(site: Site, every: float) -> None:
    """Shows the budget live, until it is interrupted."""
    from rich.live import Live

    with contextlib.suppress(KeyboardInterrupt), Live(_burn_down(site), auto_refresh=False) as live:
        while True:
            time.sleep(every)
            live.update(_burn_down(site), refresh=True)
