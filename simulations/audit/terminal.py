"""What the audit's commands share on the terminal: the run they are given, lines, the exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from common.config import Plan
    from simulations.audit.evidence import Evidence


def plan_of(run: Path | None) -> Plan:
    """The plan of the run in a folder, or where no run is named the plan by default.

    Raises:
        RunError: there is no run in the folder.
    """
    from common.config import make_plan, read_recorded_plan
    from server.runs import RunError

    if run is None:
        return make_plan({})
    if not (run / "plan.json").is_file():
        raise RunError(f"there is no run in {run}: give a run's folder, such as those under runs/")
    return read_recorded_plan(run / "plan.json")


def say(console: Console, line: str) -> None:
    """One line as it is, however long."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def conclude(found: Evidence, *, as_json: bool, show: Callable[[], None]) -> None:
    """Prints what was found, as JSON or by `show`, and leaves with exit code 1 if anything does not hold."""
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        show()
    if not found.holds:
        raise typer.Exit(1)
