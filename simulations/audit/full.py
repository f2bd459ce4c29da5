"""Every tool of the audit on one run, one after the other, in this process; each keeps its own evidence."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from simulations.audit.attack_cli import attack
from simulations.audit.canary_cli import canary
from simulations.audit.conformance.cli import conformance
from simulations.audit.noise_cli import noise

if TYPE_CHECKING:
    from rich.console import Console


def run_tools(run: Path, console: Console) -> list[str]:
    """Runs every tool on a run; each shows its table and writes its evidence when it is done.

    Returns:
        The tools that could not be run to their end. One that finds something is not among them: that is for the
        report to tell.
    """
    stopped = []
    for name, tool in tools().items():
        console.rule(name, align="left")
        start = time.monotonic()
        try:
            tool(run)
        except typer.Exit:
            pass  # it found something, and has written so
        except Exception as error:  # the other tools still have something to say
            stopped.append(name)
            line = f"{name} stopped ({type(error).__name__}): {error}"
            console.print(" ".join(line.split()), markup=False, highlight=False)
        console.print(f"{time.monotonic() - start:.0f} s", highlight=False)
    return stopped


def tools() -> dict[str, Callable[[Path], None]]:
    """Tool -> what runs it on a run and writes its evidence there."""
    from simulations.audit.canary_plan import REGISTERED
    from simulations.audit.evidence import FOLDER

    return {
        "conformance": lambda run: conformance(run=run),
        "noise": noise,
        "canary": lambda run: canary(run, again=(run / FOLDER / REGISTERED).is_file()),
        "attack": attack,
    }
