"""`fedtide audit noise`: the noise level of every release of a run, from the releases alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simulations.audit.terminal import conclude
from simulations.bars import progress

if TYPE_CHECKING:
    from simulations.audit.evidence import Check, Evidence

CHART = "noise.svg"
"""Name of the control chart, beside the evidence."""


def noise(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check the noise of every release from the places that no user can reach: its level, shape and repeats.

    Needs the run's folder alone, spends nothing. Writes audit/noise.json and a control chart there. An honest run
    alarms once in a thousand audits. Exit code 1 if anything does not hold.
    """
    from simulations.audit.evidence import FOLDER
    from simulations.audit.noise import audit_noise
    from simulations.audit.noise_chart import draw

    with progress("questions about the noise", hidden=as_json) as on_asked:
        found = audit_noise(run.resolve(), on_asked=on_asked)
    file = found.write(run)
    if found.series["sites"]:
        draw(run / FOLDER / CHART, found.series["sites"])
    conclude(found, as_json=as_json, show=lambda: _show(found, run, file))


def _show(found: Evidence, run: Path, file: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(
        title=f"noise of {escape(run.resolve().name)}: {found.parameters['releases']} releases, "
        f"{found.parameters['witness_places']} places each",
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in ("question", "of"):
        table.add_column(column, no_wrap=True)
    table.add_column("found", justify="right", no_wrap=True)
    table.add_column("bound", no_wrap=True)
    table.add_column("", no_wrap=True, min_width=5)
    for check in _shown(found.checks):
        measured = "" if check.measured is None else f"{check.measured:.4g}"
        bound = "" if check.name == "kept" else check.bound
        held = "holds" if check.holds else "FAILS"
        table.add_row(check.name, escape(check.subject), measured, bound, held)
    console.print(table)
    console.print(
        "level: noise over claimed noise, by release, site and all; drift: evidence that it changed; shape: distance "
        "to a Gaussian; outlier: standard deviations; tails: numbers so far out; repeat: correlation of any two "
        "releases; places: the same at any turn of their places; shared: what adds up over rounds or sites; sizes: "
        "distance to how chance spreads them; rest: what lies outside the witness, over one step's noise, which it "
        "cannot be below; grid: numbers of sums beside it.",
        highlight=False,
    )
    for check in found.checks:
        if not check.holds:
            console.print(f"{check.name}, {check.subject}: {check.says}.", markup=False, highlight=False)
    console.print(f"Written to {file}.", markup=False, highlight=False)
    if found.holds:
        console.print(
            "Everything holds: the noise is what the plan claims, in every release. This finds bugs, not fraud: "
            "a malicious site can noise the witness alone.",
            highlight=False,
        )


def _shown(checks: Sequence[Check]) -> list[Check]:
    """What does not hold, and of what holds one for each question: the one nearest to its bound, as told by size."""
    from dataclasses import replace

    shown = [check for check in checks if not check.holds]
    for name in dict.fromkeys(check.name for check in checks):
        held = [check for check in checks if check.name == name and check.holds]
        if held:
            middle = 1.0 if name in ("level", "level-by-site", "level-of-all", "shared", "rest") else 0.0
            furthest = max(held, key=lambda check: abs((check.measured or 0.0) - middle))
            if name == "rest":
                furthest = min(held, key=lambda check: check.measured or 0.0)
            others = len(held) - 1
            subject = f"{furthest.subject}, +{others}" if others else furthest.subject
            shown.append(replace(furthest, subject=subject))
    return shown
