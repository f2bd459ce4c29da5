"""`fedtide server status`, for a person: sites and runs in two tables."""

from __future__ import annotations

from datetime import UTC, datetime

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from server.overview import Overview, RunLine


def print_overview(console: Console, found: Overview) -> None:
    """Prints what `overview` found."""
    console.print("The server is [bold]up[/bold]." if found.up else "The server is [bold]down[/bold].")
    for warning in found.certificates.warnings:
        console.print(f"Certificates: {warning}.", highlight=False, markup=False, soft_wrap=True)
    sites = Table(title="sites", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("site", "key", "node", "last heartbeat", ""):
        sites.add_column(column, no_wrap=column not in ("site", ""), overflow="fold")
    for site in found.sites:
        sites.add_row(
            site.name,
            f"{site.key_id[:16]}…",
            site.node,
            _ago(site.heartbeat),
            "removed" if site.removed else "barred" if site.barred else "",
        )
    runs = Table(title="runs", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("run", "state", "rounds", "admitted", "left out", "kB down/up", "s"):
        words = column in ("run", "state", "left out")
        folds = column in ("run", "left out")  # so that figures stay whole at 80 columns
        runs.add_column(column, justify="left" if words else "right", no_wrap=not folds, overflow="fold")
    for run in found.runs:
        runs.add_row(
            run.name, run.state, f"{run.aggregated}/{run.rounds}", str(run.admitted),
            counted(run.refusals | ({"missing": run.missing} if run.missing else {})),
            f"{run.bytes_down / 1000:,.0f}/{run.bytes_up / 1000:,.0f}", f"{run.seconds:,.0f}",
        )  # fmt: skip
    console.print(sites)
    console.print(runs)
    for run in found.runs:
        if note := _note(run):
            console.print(note, highlight=False, markup=False, soft_wrap=True)


def counted(reasons: dict[str, int]) -> str:
    """Reasons and how often, in one cell."""
    return ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items())) or "0"


def _note(run: RunLine) -> str:
    if run.state == "failed":
        return f"{run.name}: {run.reason}; `fedtide server run` with the same plan goes on with it"
    if run.state == "interrupted":
        return f"{run.name}: it is not at work; `fedtide server run` with the same plan goes on with it"
    return f"{run.name}: {run.waiting}" if run.waiting else ""


def _ago(moment: str | None) -> str:
    if moment is None:
        return "never"
    seconds = (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"
