"""Every tool of the audit on one run, one after the other, in this process; each keeps its own evidence."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def run_tools(run: Path, console: Console) -> None:
    """Runs conformance, noise, canary and attack on a run; each writes its evidence when it is done."""
    for name, tool in tools().items():
        console.print(f"{name}: running", highlight=False)
        start = time.monotonic()
        tool(run)
        console.print(f"{name}: done in {time.monotonic() - start:.0f} s", highlight=False)


def tools() -> dict[str, Callable[[Path], object]]:
    """Tool -> what runs it on a run and writes its evidence there."""
    return {}
