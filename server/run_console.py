"""What a person sees of a run at the server: what was begun, a row a round, and how it ended."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

from common.config import Plan
from server.fitting import Fit
from server.launch import PRIVACY, Watcher
from server.runs import RunFolder
from server.status import counted

_NAMES = 16
"""What fits a terminal of eighty columns."""


class ConsoleWatcher(Watcher):
    """Prints as the run goes on."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._told: set[int] = set()
        self.on_phase = self._phase
        self.on_fit = self._fit
        self.on_waiting = self._waiting
        self.on_begin = self._begin
        self.on_round = self._round

    def _phase(self, phase: str) -> None:
        self._console.print(f"{phase} …", style="dim")

    def _fit(self, fit: Fit) -> None:
        print_fit(self._console, fit)

    def _waiting(self, round: int, more: int) -> None:
        self._console.print(
            f"round {round}: waiting for {more} more {'site' if more == 1 else 'sites'} …", style="dim"
        )

    def _begin(self, run: RunFolder, plan: Plan, again: bool) -> None:
        self._console.print(
            f"[bold]{run.name}[/bold]: {'goes on' if again else 'begins'}; {len(plan.schedule())} rounds, "
            f"(epsilon {plan.privacy.epsilon:g}, delta {plan.privacy.delta:g}) at each site",
            highlight=False,
        )

    def _round(self, record: dict[str, Any]) -> None:
        if record["round"] not in self._told:
            self._console.print(round_row(record, header=not self._told))
            self._told.add(record["round"])


def print_fit(console: Console, fit: Fit) -> None:
    """What the rounds cost each site and what it has left, in shares of its own budget."""
    table = Table(title="what it costs, of each site's budget, as far as receipts tell")
    for column in ("site", "costs", "left", "rounds that fit", ""):
        words = column in ("site", "")
        table.add_column(column, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    shown = sorted(fit.budgets, key=lambda each: (each.fits, each.site))[:_MOST_SITES]
    for each in shown:
        state = "withdrawn" if each.withdrawn else "" if each.fits else "does not fit"
        table.add_row(
            each.site,
            f"{each.cost / each.cap:.1%}",
            f"{each.left / each.cap:.1%}",
            f"{each.affords} of {fit.rounds}",
            state,
        )
    console.print(table)
    if len(fit.budgets) > len(shown):
        console.print(f"and {len(fit.budgets) - len(shown)} more sites; {fit.paying} can be asked all rounds")


_MOST_SITES = 40


def round_row(record: dict[str, Any], *, header: bool) -> Table:
    """One round as a table of one row."""
    reasons = counted(Counter(each["reason"] for each in record["left_out"]))
    names = ", ".join(sorted(record["admitted"])) or "none"
    cells = {
        "#": (3, str(record["round"])),
        "phase": (11, record["phase"]),
        "admitted": (_NAMES, names if len(names) <= _NAMES else f"{len(record['admitted'])} sites"),
        "left out": (14, reasons),
        "missing": (7, str(record["missing"])),
        "kB down": (7, f"{record['bytes_down'] / 1000:,.0f}"),
        "kB up": (6, f"{record['bytes_up'] / 1000:,.0f}"),
        "s": (6, f"{record['seconds']:.1f}"),
    }
    table = Table(show_header=header, box=None, padding=(0, 1, 0, 0))
    for name, (width, _) in cells.items():
        words = name in ("phase", "admitted", "left out")
        table.add_column(name, width=width, justify="left" if words else "right", overflow="fold")
    table.add_row(*(cell for _, cell in cells.values()))
    return table


def run_summary(run: RunFolder) -> dict[str, Any]:
    """A whole run in a few figures, for a script."""
    records = list(run.records())
    privacy = json.loads((run.path / PRIVACY).read_bytes())
    return {
        "run": str(run.path),
        "status": "completed",
        "epsilon": privacy["epsilon"],
        "rounds": len(records),
        "aggregated": sum(record["aggregated"] for record in records),
        "admitted": sum(len(record["admitted"]) for record in records),
        "left_out": dict(Counter(each["reason"] for record in records for each in record["left_out"])),
        "missing": sum(record["missing"] for record in records),
        "bytes_down": sum(record["bytes_down"] for record in records),
        "bytes_up": sum(record["bytes_up"] for record in records),
        "seconds": sum(record["seconds"] for record in records),
    }
