"""What a person sees of a simulation: site table, progress, a table a round, and one table of results."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from common.config import Plan
from common.events.cleaning import CleaningReport
from server.summary import PROTECTION
from simulations.bars import Lines
from simulations.follower import Watcher
from simulations.outcome import Outcome
from simulations.quality import Quality
from simulations.report import (
    cost_rows,
    open_form,
    quality_header,
    quality_rows,
    researcher_side,
    results_title,
    verdicts,
)
from simulations.sites import SimulatedSite

SHOWN_COLUMNS = 5
"""What fits a terminal of eighty columns: the model's name and four metrics."""


class ConsoleWatcher(Watcher):
    """Shows a run on a terminal; on something else it prints the tables, and a line now and then in place of bars."""

    def __init__(self, console: Console, rounds: int) -> None:
        super().__init__()
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._rounds = self._progress.add_task("rounds", total=rounds, visible=False)
        self._steps = self._progress.add_task("steps", total=None, visible=False)
        self._phase = self._progress.add_task("", total=None)
        self._lines = Lines(lambda line: console.print(line, style="dim", highlight=False))
        self._name = ""
        self.on_progress = self._show_progress
        self.on_sites = self._show_sites
        self.on_step = self._show_step
        self.on_round = self._show_round
        self.on_phase = self._show_phase

    @contextlib.contextmanager
    def showing(self) -> Iterator[None]:
        """Bars are shown inside."""
        with self._progress:
            yield

    def _show_phase(self, phase: str) -> None:
        training = phase == "training"
        self._progress.update(self._rounds, visible=training)
        self._progress.update(self._steps, visible=training)
        self._progress.reset(self._phase, total=None, description=phase, visible=not training)
        self._name = phase

    def _show_progress(self, done: int, of: int | None) -> None:
        self._progress.update(self._phase, completed=done, total=of)
        if not self._console.is_terminal:
            self._lines.tell(self._name, done, of)

    def _show_sites(self, sites: list[SimulatedSite], report: CleaningReport, plan: Plan) -> None:
        self._console.print(report.table())
        for sentence in report.sentences():
            self._console.print(f"Note: {sentence}.", style="yellow", highlight=False)
        self._console.print(site_table(sites, plan))

    def _show_step(self, number: int, done: int, of: int) -> None:
        self._progress.update(self._steps, completed=done, total=of, description=f"steps of round {number}")
        if not self._console.is_terminal:
            self._lines.tell(f"steps of round {number}", done, of)

    def _show_round(self, record: dict[str, Any], quality: Quality, epsilon: float) -> None:
        self._progress.update(self._rounds, completed=record["round"])
        self._console.print(round_table(record, quality, epsilon))


class QuietWatcher(ConsoleWatcher):
    """Bars alone, for a command that runs many simulations."""

    def __init__(self, console: Console, title: str) -> None:
        super().__init__(console, 0)
        self._title = title
        self._progress.update(self._rounds, total=None)
        self.on_sites = lambda sites, report, plan: self._progress.update(
            self._rounds, total=len(plan.schedule())
        )
        self.on_round = lambda record, quality, epsilon: self._progress.update(
            self._rounds, completed=record["round"]
        )

    def _show_phase(self, phase: str) -> None:
        super()._show_phase(phase)
        self._name = f"{self._title}: {phase}"
        self._progress.update(self._phase, description=self._name)


def site_table(sites: list[SimulatedSite], plan: Plan) -> Table:
    """The simulated sites; counts are the researcher's, no server sees them."""
    table = Table(title="sites (simulated: these counts stay with the researcher)")
    table.add_column("site", overflow="fold")
    table.add_column("users", justify="right")
    table.add_column("training events", justify="right")
    table.add_column("users a step, expected", justify="right")
    for site in sites:
        expected = site.users * plan.privacy.sampling_rate
        table.add_row(site.name, f"{site.users:,}", f"{site.events:,}", f"{expected:.1f}")
    total = sum(site.users for site in sites)
    table.add_row("all", f"{total:,}", f"{sum(site.events for site in sites):,}", "", style="bold")
    return table


def round_table(record: dict[str, Any], quality: Quality, epsilon: float) -> Table:
    """One round: who took part, what it cost, what it brought."""
    headline = quality.metrics[quality.headline]
    cells = {
        "#": (3, str(record["round"])),
        "phase": (11, record["phase"]),
        "sites": (5, str(len(record["admitted"]))),
        "left out": (18, _left_out(record["left_out"])),
        "kB up": (7, f"{record['bytes_up'] / 1000:,.0f}"),
        "s": (6, f"{record['seconds']:.1f}"),
        "epsilon": (7, f"{epsilon:.3f}"),
        f"{quality.headline} val.": (13, f"{headline.value:.4f} ±{headline.standard_error:.3f}"),
    }
    # Widths that fit in 80 columns together, so that no figure is cut: what is longer goes on below.
    table = Table(title=None, show_header=record["round"] == 1, box=None, padding=(0, 1, 0, 0))
    for name, (width, _) in cells.items():
        justify: Any = "left" if name in ("phase", "left out") else "right"
        table.add_column(name, width=width, justify=justify, overflow="fold")
    table.add_row(*(cell for _, cell in cells.values()))
    return table


_MOST_NAMED = 3


def _left_out(verdicts: list[dict[str, Any]]) -> str:
    """Which sites are left out of a round and why; only how many for each reason where they are many."""
    if len(verdicts) > _MOST_NAMED:
        reasons = Counter(str(each["reason"]) for each in verdicts)
        return ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
    return ", ".join(f"{each.get('site') or 'a site'}: {each['reason']}" for each in verdicts) or "0"


def print_outcome(console: Console, outcome: Outcome) -> None:
    """The table of results, the verdicts, the costs, and where everything is."""
    header, *rows = quality_header(outcome), *quality_rows(outcome)
    table = Table(title=results_title(outcome))
    for place, name in enumerate(header[:SHOWN_COLUMNS]):
        table.add_column(name, justify="left" if place == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row[:SHOWN_COLUMNS], style="bold" if row[0] == "Fedtide" else None)
    if len(header) > SHOWN_COLUMNS:
        table.caption = f"{', '.join(header[SHOWN_COLUMNS:])}: in summary.md"
    console.print(table)
    for line in verdicts(outcome):
        console.print(line, highlight=False)
    if words := open_form(outcome):
        console.print(words, highlight=False)
    cost = Table(title="what it cost", show_header=False)
    for _ in range(2):
        cost.add_column(overflow="fold")
    for name, value in cost_rows(outcome):
        cost.add_row(name, value)
    console.print(cost)
    console.print(PROTECTION, highlight=False)
    console.print(researcher_side(outcome).replace("**", ""), highlight=False)
    for note in outcome.notes:
        console.print(f"Note: {note}", highlight=False)
    console.print(f"[bold]Everything is in {outcome.run.path}[/bold]", highlight=False, soft_wrap=True)
