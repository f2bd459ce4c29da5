"""Puts every liar, and the honest trainer many times, through the tools of `fedtide audit`; writes the table in docs.

    python -m tests.simulations.audit.catch_liars --into runs/liars.jsonl --honest 100 --write docs/audit.md

One line a trial is written as it ends, and a trial that is in the file is not made again, so it can be stopped at any
time. Seconds are of the processor's time, so that a busy machine does not change them.
"""

from __future__ import annotations

import argparse
import atexit
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from client.training import train_round
from common.model_plan import ModelPlan
from common.models.names import FAMILIES
from simulations.audit.canary_findings import audit_canaries
from simulations.audit.canary_plan import Registration, plan_canaries
from simulations.audit.conformance.checking import LEVEL
from simulations.audit.conformance.code import Code
from simulations.audit.conformance.subjects import MODES
from simulations.audit.conformance.suite import Options, Workshop, conformance
from simulations.audit.evidence import Evidence
from simulations.audit.noise import LEVEL as NOISE_LEVEL
from simulations.audit.noise import audit_noise
from tests.simulations.audit.liars import LIARS, Liar
from tests.simulations.audit.noise_cases import made_run

HONEST = Liar("honest", "the trainer, the releases and the reply as they are")
BEGIN, END = "<!-- liars: made by tests/simulations/audit/catch_liars.py -->", "<!-- liars end -->"
FIRST = (
    *("sensitivity", "own row", "update fields", "noise level", "every coordinate", "new noise", "sampling"),
    *("level", "repeat", "outlier"),
)
"""Checks that a cell names first, as they say most plainly what is wrong."""

ROUNDS, CANARIES, CANARY_LEVEL = 20, 400, 0.01


@cache
def _workshop() -> Workshop:
    folder = tempfile.TemporaryDirectory(prefix="fedtide-liars-")
    atexit.register(folder.cleanup)
    return Workshop(Path(folder.name))


def by_conformance(liar: Liar, trial: int) -> Evidence:
    """One family and mode, another one in each trial; all that does not depend on the family; no controls."""
    options = Options(
        families=(list(FAMILIES)[trial % len(FAMILIES)],),
        modes=(MODES[trial % len(MODES)],),
        devices=("cpu",),
        with_controls=False,
    )
    # Whole answers are left out: a liar stands in for the trainer alone.
    code = Code(trainer=liar.trainer, metrics=liar.metrics, reply=liar.reply, paths={})
    return conformance(options, code, workshop=_workshop())


def by_noise(liar: Liar, _: int) -> Evidence:
    """A run of two sites and twenty rounds."""
    with tempfile.TemporaryDirectory() as folder:
        return audit_noise(made_run(Path(folder) / "run", liar.trainer, sites=2, rounds=ROUNDS))


def by_canary(liar: Liar, _: int) -> Evidence:
    """One round of four hundred canaries at epsilon 2."""
    plan = plan_canaries(ModelPlan(), canaries=CANARIES, guesses=CANARIES // 10, rounds=1, level=CANARY_LEVEL)
    return audit_canaries(plan, Registration(plan.digest(), 1), trainer=liar.trainer)


TOOLS: dict[str, Callable[[Liar, int], Evidence]] = {
    "conformance": by_conformance,
    "noise": by_noise,
    "canary": by_canary,
}
LEVELS = {
    "conformance": f"{LEVEL:g} a check",
    "noise": f"{NOISE_LEVEL:g} a run",
    "canary": f"{CANARY_LEVEL:g} an audit",
}


def trials(tools: Sequence[str], honest: int) -> Iterator[tuple[str, Liar, int]]:
    """Every liar once for each tool that can see it, then the honest code, all tools in turn."""
    for tool in tools:
        for liar in LIARS.values():
            if tool == "conformance" or liar.trainer is not train_round:
                yield tool, liar, 0
    for trial in range(honest):
        for tool in tools:
            yield tool, HONEST, trial


def made(tool: str, liar: Liar, trial: int) -> dict[str, Any]:
    """One trial as it is written down. A tool that breaks off has refused."""
    began = time.process_time()
    try:
        found = TOOLS[tool](liar, trial)
        refused = sorted({check.name for check in found.checks if not check.holds and not check.control})
    except Exception as error:
        refused = [f"broke off: {type(error).__name__}"]
    return {
        "tool": tool,
        "liar": liar.name,
        "trial": trial,
        "refused": refused,
        "seconds": round(time.process_time() - began, 2),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["tool"], row["liar"]), []).append(row)
    tools = [tool for tool in TOOLS if any(row["tool"] == tool for row in rows)]
    lines = [
        "| liar | what it does |" + "".join(f" {tool} |" for tool in tools),
        "|---|---|" + "---|" * len(tools),
    ]
    for liar in LIARS.values():
        cells = "".join(f" {_cell(found.get((tool, liar.name), []))} |" for tool in tools)
        lines.append(f"| {liar.name} | {liar.does} |{cells}")
    honest = "".join(f" {_alarms(tool, found.get((tool, HONEST.name), []))} |" for tool in tools)
    lines.append(f"| **honest** | false alarms, at the stated level |{honest}")
    return "\n".join(lines)


def _cell(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "-"
    refused, seconds = rows[0]["refused"], f"{rows[0]['seconds']:.1f} s"
    names = sorted(refused, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    if not names:
        return f"passes ({seconds})"
    return f"**{', '.join(names[:2])}**{f' and {len(names) - 2} more' if names[2:] else ''} ({seconds})"


def _alarms(tool: str, rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "not run"
    alarms = sum(bool(row["refused"]) for row in rows)
    return f"{alarms} of {len(rows)} ({LEVELS[tool]})"


def write_table(file: Path, text: str) -> None:
    """Puts the table between its two marks."""
    said = file.read_text(encoding="utf-8")
    before, rest = said.split(BEGIN)
    file.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--into", type=Path, required=True, help="a file, one JSON line a trial")
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--honest", type=int, default=100, help="repetitions of the honest code")
    parser.add_argument("--minutes", type=float, default=600, help="after so many, no new trial is begun")
    parser.add_argument("--write", type=Path, help="the page whose table is replaced")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rows = [json.loads(line) for line in asked.into.read_text().splitlines()] if asked.into.exists() else []
    done = {(row["tool"], row["liar"], row["trial"]) for row in rows}
    end = time.monotonic() + 60 * asked.minutes
    with asked.into.open("a") as file:
        for tool, liar, trial in trials(asked.tools, asked.honest):
            if (tool, liar.name, trial) not in done and time.monotonic() < end:
                rows.append(made(tool, liar, trial))
                print(json.dumps(rows[-1]), file=file, flush=True)
    print(table(rows))
    if asked.write is not None:
        write_table(asked.write, table(rows))


if __name__ == "__main__":
    main()
