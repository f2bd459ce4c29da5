"""`fedtide audit report` and `fedtide audit full`: their options, and what they say on the terminal."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simulations.bars import progress

if TYPE_CHECKING:
    from rich.console import Console

    from simulations.audit.report import Report

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where the page goes.")]
RegistryFolder = Annotated[
    Path | None,
    typer.Option(help="The server's registry, or a copy, where it is not in the run's folder."),
]
_RECORD = "recomputing the record: receipts"
Json = Annotated[Path | None, typer.Option("--json", help="Write the same as JSON, to this file.")]


def report(
    run: Run, output: Output = Path("report.html"), registry: RegistryFolder = None, json: Json = None
) -> None:
    """Make one page that says what was promised, to whom, and whether it held.

    Everything about the record is recomputed from the run's folder alone. What the other tools found is read from
    the folder's `audit/`; one that was not run is named as such. Exit code 1 if anything does not hold.
    """  # fmt: skip
    from rich.console import Console

    from simulations.audit.report import build_report

    console = Console()
    _quiet()
    with progress(_RECORD) as on_receipts:
        found = build_report(run, registry, on_receipts)
        write(found, output, json)
    finish(found, output, console)


def full(
    run: Run, output: Output = Path("report.html"), registry: RegistryFolder = None, json: Json = None
) -> None:
    """Run every tool of the audit on a run, then make the report.

    Each tool's evidence is kept in the run's folder as soon as it is there. Exit code 1 if anything does not hold,
    or a tool could not be run to its end.
    """  # fmt: skip
    from rich.console import Console

    from simulations.audit.full import run_tools
    from simulations.audit.report import build_report

    console = Console()
    _quiet()
    with progress(_RECORD) as on_receipts:
        build_report(run, registry, on_receipts)  # what is no run is refused before anything takes its time
    stopped = run_tools(run, console)
    with progress(_RECORD) as on_receipts:
        found = build_report(run, registry, on_receipts)
        write(found, output, json)
    finish(found, output, console)
    if stopped:
        raise typer.Exit(1)


def write(found: Report, output: Path, as_json: Path | None) -> None:
    """Page and JSON, each whole or not at all."""
    from server.runs import write_whole
    from simulations.audit.page import page

    html = page(found)
    for path in (output, as_json):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, html.encode())
    if as_json is not None:
        write_whole(as_json, (json.dumps(found.as_json(), indent=2, allow_nan=False) + "\n").encode())


def finish(found: Report, output: Path, console: Console) -> None:
    """One table, the verdict, and the exit code."""
    from rich.markup import escape
    from rich.table import Table

    from common.pages import printable
    from simulations.audit.report import grouped, holds

    table = Table(
        title=escape(f"audit of {found.findings.run}"), box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for column in ("tool", "result", "checks that held", "planted faults caught"):
        table.add_column(column)
    table.add_row("receipts", "did not hold" if found.findings.lies else "held", "", "")
    for tool in found.tools:
        said = tool.as_json()
        counts = (
            ("", "")
            if tool.evidence is None
            else (f"{said['held']} of {said['checks']}", f"{said['controls_caught']} of {said['controls']}")
        )
        table.add_row(tool.name, tool.state, *counts)
    console.print(table)
    for lie in grouped(found.findings.lies)[:20]:
        places = ", ".join(lie["places"]) + (", ..." if lie["times"] > len(lie["places"]) else "")
        line = f"{lie['reason']} in {places}: {lie['explanation']}"
        console.print(printable(line), markup=False, highlight=False)
    console.print(f"{found.verdict}: {output}", markup=False, highlight=False)
    if not holds(found):
        raise typer.Exit(1)


def _quiet() -> None:
    # Google's accountant warns of orders below 2 that it leaves out, which only loosens its figure.
    logging.getLogger("absl").setLevel(logging.ERROR)
