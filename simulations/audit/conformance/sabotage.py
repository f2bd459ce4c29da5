"""Puts every sabotage through the whole of `fedtide audit conformance`, and prints which checks refused it.

    python -m simulations.audit.conformance.sabotage [--only WORDS] [--write docs/audit.md]

One family and mode, without controls; each sabotage is patched in this process alone, and taken out again.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from client.training import train_round
from simulations.audit.conformance.checking import ANSWER
from simulations.audit.conformance.code import Code
from simulations.audit.conformance.sabotages import SABOTAGES, Sabotage
from simulations.audit.conformance.suite import Options, Workshop, conformance
from simulations.audit.evidence import Check

BEGIN = "<!-- sabotages: made by python -m simulations.audit.conformance.sabotage -->"
END = "<!-- sabotages end -->"
NAMED = 4
"""Checks that a cell names; the rest are counted."""


def refused_by(sabotage: Sabotage, workshop: Workshop) -> list[str]:
    """The checks that refuse a site's code with this wrong in it, those that do so most often first."""
    options = Options(families=("recommend",), modes=(sabotage.mode,), devices=("cpu",), with_controls=False)
    with sabotage.at_work():
        found = conformance(options, Code(trainer=sabotage.trainer or train_round), workshop=workshop)
    refused = Counter(check.name for check in found.checks if _seen(check))
    return [name for name, _ in refused.most_common()]


def _seen(check: Check) -> bool:
    """Code that breaks off was not measured, so it was not seen either."""
    return not check.holds and check.bound != ANSWER


def table(refused: Mapping[str, Sequence[str]]) -> str:
    """A row for each sabotage: what it does, and what caught it."""
    rows = ["| sabotage | what it does | caught by |", "|---|---|---|"]
    for name, checks in refused.items():
        more = f" and {len(checks) - NAMED} more" if len(checks) > NAMED else ""
        caught = f"**{', '.join(checks[:NAMED])}**{more}" if checks else "nothing"
        rows.append(f"| {name} | {SABOTAGES[name].does} | {caught} |")
    return "\n".join(rows)


def write_table(page: Path, said: str) -> None:
    """Replaces what stands between the two marks of a page."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{said}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main(given: Sequence[str] | None = None) -> int:
    """0 where every sabotage was caught."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", help="sabotages whose names hold these words")
    parser.add_argument("--write", type=Path, help="the page whose table is replaced")
    asked = parser.parse_args(given)
    torch.set_num_threads(1)
    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        for name, sabotage in SABOTAGES.items():
            if (asked.only or "") in name:
                found[name] = refused_by(sabotage, workshop)
                print(f"{name}: {', '.join(found[name]) or 'passes'}", flush=True)
    print(f"\n{table(found)}")
    if asked.write is not None:
        write_table(asked.write, table(found))
    return int(not all(found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
