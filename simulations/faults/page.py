"""The page of faults: one table of what was broken, one of what an attacker tried, with how and where it ran."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from simulations.faults.judging import LOST, OTHERS_WENT_ON, TWICE, UNCHARGED

_CHECKS = (OTHERS_WENT_ON, LOST, UNCHARGED, TWICE)

_HOW = """Each row is a run of a real deployment on one machine, from the commands alone: one server, three sites (east,
north, west) with TLS, node keys and resident workers; west is the one that is hurt, has a network of its own (a network
namespace) and its ledger on a small file system of its own. A run is one round of statistics and one or more of
training, by a tiny language model on made-up users. What a row says is judged by code when the run is over
(`simulations/faults/judging.py`):

- *the others go on*: every round after the fault is aggregated, with every other site in it;
- *nothing lost*: receipts, rounds and ledgers begin with all that they held when the fault came, each round of the
  plan is there, the run is whole, and every admitted update is kept;
- *nothing uncharged*: every admitted update is a release in its site's ledger, every look at data that was interrupted
  is a charge there, what is spent is the sum of the charges; `fedtide site verify` and `fedtide audit receipts` hold;
- *no round applied twice*: each round, receipt and release once, and the parameters of every round are, bit for bit,
  those that the kept updates make when each is applied once.
"""

_HURT = """One run that goes on and on; west's processes are hurt one after another, each when the site is back from the
one before. A process that stands still is killed after 60 s without a sign of life (the worker: 120 s) and started
again; `site up`, where it is killed, is started again 5 s later, as a service manager does."""


def _cell(text: str, places: Sequence[str] = ()) -> str:
    for place in places:
        text = text.replace(place, "DIR")
    return " ".join(text.replace("|", "\\|").split())


def _row(found: dict[str, Any]) -> str:
    faults = found["faults"]
    ticks = [
        "not judged"
        if check not in faults
        else "yes"
        if not faults[check]
        else f"NO: {_cell(faults[check][0])}"
        for check in _CHECKS
    ]
    other = [f"{name}: {said[0]}" for name, said in faults.items() if said and name not in _CHECKS]
    result = "holds" if found["holds"] else _cell("; ".join(["DOES NOT HOLD", *other]))
    cells = [found["fault"], _cell(found["came_to"]), _cell(found["message"], _places(found)), *ticks, result]
    return f"| {' | '.join(cells)} |"


def _places(found: dict[str, Any]) -> list[str]:
    return [found["folder"]] if found.get("folder") else []


def _attacks(found: dict[str, Any], who: str, good: str = "kept out") -> list[str]:
    lines = [f"| tried | came to | {good} |", "|---|---|---|"]
    for each in found["tried"]:
        if each["who"] == who:
            said = _cell(each["said"], _places(found))
            lines.append(f"| {each['what']} | {said} | {'yes' if each['holds'] else 'NO'} |")
    return lines


def _comeback(found: dict[str, Any]) -> list[str]:
    """The table of a site's processes, with the seconds of each."""
    lines = ["## A site's processes, hurt one by one", "", _HURT, ""]
    lines += [
        "| process | how | when | admitted again after | rounds without the site |",
        "|---|---|---|---|---|",
    ]
    for each in found["hurts"]:
        seconds = "NOT AT ALL" if each["seconds"] is None else f"{each['seconds']:.0f} s"
        lines.append(
            f"| {each['process']} | {each['way']} | {each['phase']} | {seconds} | {each['rounds']} |"
        )
    said = (
        "; ".join(found["faults"]) or "every admitted update is a charged release, and no round applied twice"
    )
    return [*lines, "", f"Afterwards: {_cell(said, _places(found))}.", ""]


def write_page(results: Path, names: Sequence[str], output: Path) -> int:
    """Writes the page from what is kept of each scenario; how many rows it has."""
    kept = {
        name: json.loads(file.read_text())
        for name in (*names, "comeback", "attacker", "member")
        if (file := results / f"{name}.json").exists()
    }
    attacker, member, comeback = (kept.pop(name, None) for name in ("attacker", "member", "comeback"))
    head = ["fault", "what came of it", "the message that says what to do", *_CHECKS, "result"]
    lines = ["# Faults", "", _HOW, "## What broke, and what was left", ""]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *map(_row, kept.values()), ""]
    missing = [name for name in names if name not in kept]
    if missing:
        lines += [f"Not run: {', '.join(missing)}.", ""]
    if comeback is not None:
        lines += _comeback(comeback)
    if attacker is not None:
        from simulations.faults.attacker import ENROLLED, FROM_NETWORK, ON_MACHINE

        lines += ["## An attacker with ca.crt", ""]
        lines += [
            f"As {FROM_NETWORK}, while a run goes on, with public keys, node, run and object ids given:",
            "",
        ]
        lines += [*_attacks(attacker, FROM_NETWORK), *_attacks(attacker, "")[2:], ""]
        lines += [
            f"{ENROLLED.capitalize()} asks for the same with its own node key, at the same moment, while the update "
            "lies at the server: it is given what belongs to messages for itself, and is not told of anything else "
            "(`server/superlink.py`).",
            "",
            *_attacks(attacker, ENROLLED, "as it should be"),
            "",
        ]
        said = (
            "what it may, it may because Flower's control port asks nobody for a key (docs/threat-model.md)"
        )
        lines += [f"As {ON_MACHINE}, measured; {said}:", "", *_attacks(attacker, ON_MACHINE), ""]
    if member is not None:
        from simulations.faults.member import MEMBER

        lines += ["## A malicious site", ""]
        lines += [
            f"As {MEMBER}: a fourth one, with its own key and node, that calls the server by a program of its own and "
            "does another wrong in each round of a run, beside three honest ones:",
            "",
            *_attacks(member, MEMBER, "holds"),
            *_attacks(member, "")[2:],
            "",
        ]
    lines += [
        "## How it was run",
        "",
        f"`python -m simulations.faults`, {datetime.now(UTC):%Y-%m-%d}, on {os.cpu_count()} cores of a shared machine "
        f"({platform.system()} {platform.machine()}, Python {platform.python_version()}), as root: without root, the "
        "network, the disk and the attacker are not tried. Clocks are shifted by a library that is preloaded "
        "(`simulations/faults/clock.c`). "
        "`python -m simulations.faults NAME ...` runs some of the scenarios and keeps the others' rows; `--help` names "
        "them.",
        "",
    ]
    output.write_text("\n".join(lines), encoding="utf-8")
    return len(kept) + sum(len(each["tried"]) for each in (attacker, member) if each is not None)
