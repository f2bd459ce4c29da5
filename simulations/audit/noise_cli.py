"""`fedtide audit noise`: the noise level of every release of a run, from the releases alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from simulations.audit.evidence import Evidence

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

    found = audit_noise(run.resolve())
    file = found.write(run)
    if found.series:
        draw(run / FOLDER / CHART, found.series["sites"])
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        _show(found, run, file)
    if not found.holds:
        raise typer.Exit(1)


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
    table.add_column("question", no_wrap=True)
    table.add_column("of", overflow="fold")
    table.add_column("found", justify="right", no_wrap=True)
    table.add_column("bound", overflow="fold")
    table.add_column("", no_wrap=True)
    for check in found.checks:
        measured = "" if check.measured is None else f"{check.measured:.4g}"
        held = "holds" if check.holds else "DOES NOT HOLD"
        table.add_row(check.name, escape(check.subject), measured, check.bound, held)
    console.print(table)
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
