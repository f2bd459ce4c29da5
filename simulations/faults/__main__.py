"""`python -m simulations.faults`: breaks a real deployment on this machine, one way after another, and tells.

Root and `ip` give one site a network of its own, and its ledger a small file system of its own; a small library, made
by `cc` and preloaded, shifts clocks.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from simulations.faults import at_start, mid_run, rounds
from simulations.faults.place import FaultError, Place, deployed
from simulations.faults.rows import Row, judged

FAULTS = {fault.name: fault for fault in (*at_start.FAULTS, *mid_run.FAULTS, *rounds.FAULTS)}
ATTACKER, MEMBER, COMEBACK = "attacker", "member", "comeback"
SCENARIOS = (*FAULTS, COMEBACK, ATTACKER, MEMBER)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m simulations.faults", description=__doc__)
    parser.add_argument(
        "scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SCENARIOS)}; else all"
    )
    parser.add_argument("--output", type=Path, default=Path("docs/faults.md"))
    parser.add_argument("--results", type=Path, default=Path("runs/faults"), help="JSON by scenario, kept")
    parser.add_argument("--keep", type=Path, help="an empty folder for the deployment, which is then kept")
    given = parser.parse_args()
    unknown = [each for each in given.scenarios if each not in SCENARIOS]
    if unknown:
        parser.error(f"{unknown[0]!r} is no scenario: choose from {', '.join(SCENARIOS)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    chosen = given.scenarios or list(SCENARIOS)
    console = Console()
    with tempfile.TemporaryDirectory(prefix="fedtide-faults-") as aside:
        folder = given.keep or Path(aside)
        _run(folder.expanduser().resolve(), chosen, given.results, console)
    from simulations.faults.page import write_page

    rows = write_page(given.results, list(FAULTS), given.output)
    console.print(f"{given.output} is written: {rows} rows")
    failed = [
        name for name in chosen if not json.loads((given.results / f"{name}.json").read_text())["holds"]
    ]
    for name in failed:
        console.print(f"does not hold: {name}", style="red")
    return 1 if failed else 0


def _run(folder: Path, chosen: list[str], results: Path, console: Console) -> None:
    results.mkdir(parents=True, exist_ok=True)
    with deployed(folder) as place:
        for name in chosen:
            if name in (ATTACKER, MEMBER):
                from simulations.faults.attacker import ON_MACHINE, Tried, attack
                from simulations.faults.member import betray

                try:
                    tried = attack(place) if name == ATTACKER else betray(place)
                except FaultError as error:
                    tried = [Tried("", "the tries themselves", str(error), False)]
                kept = {
                    "holds": all(each.holds for each in tried if each.who != ON_MACHINE),
                    "tried": [asdict(each) for each in tried],
                }
                for each in tried:
                    console.print(
                        f"{'ok' if each.holds else 'NOT OK'}  {each.what}: {each.said}", highlight=False
                    )
            elif name == COMEBACK:
                kept = _comeback(place, console)
            else:
                row = judged(place, FAULTS[name])
                kept = {"holds": row.holds, **asdict(row)}
                _show(row, console)
            kept["folder"] = str(folder)
            (results / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")


def _comeback(place: Place, console: Console) -> dict[str, Any]:
    from simulations.faults.comeback import Hurt, cases, hurts

    found: list[Hurt] = []

    def told(each: Hurt) -> None:
        found.append(each)
        came = "NOT BACK" if each.seconds is None else f"back after {each.seconds:.0f} s"
        console.print(f"{each.process} {each.way} {each.phase}: {came}, {each.rounds} rounds without it")

    try:
        faults = hurts(place, told, list(cases()))
    except FaultError as error:
        faults = [str(error)]
    for fault in faults:
        console.print(fault, style="red", markup=False, highlight=False)
    holds = not faults and bool(found) and all(each.seconds is not None for each in found)
    return {"holds": holds, "hurts": [asdict(each) for each in found], "faults": faults}


def _show(row: Row, console: Console) -> None:
    console.rule(f"{'holds' if row.holds else 'DOES NOT HOLD'}: {row.fault} ({row.seconds:.0f} s)")
    console.print(row.came_to, row.message, sep="\n", markup=False, highlight=False)
    for check, faults in row.faults.items():
        for fault in faults:
            console.print(f"{check}: {fault}", style="red", markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
