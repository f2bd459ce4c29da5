"""What each tool of the audit has to say in the report: its evidence, or that it was not run and how to run it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from simulations.audit.evidence import FOLDER, TOOLS, Evidence, EvidenceError, read_evidence, record_digest

HELD, FAILED, BLIND, NOT_RUN, STALE, DAMAGED = (
    "held",
    "failed",
    "blind",
    "not run",
    "out of date",
    "unreadable",
)
UNTRIED = "no fault planted"
WITH_CONTROLS = ("conformance", "canary", "attack")
"""Tools that break something on purpose, unless they are told not to: without that, silence proves nothing."""

QUESTIONS = {
    "conformance": "Does the code that sites run do what the record says, on made-up users?",
    "noise": "Does every released update carry as much noise as its receipt says?",
    "canary": "Can made-up users, planted to be found, be told apart better than the claim allows?",
    "attack": "What could an attacker actually learn from an update, or from the model?",
}
COMMANDS = {
    "conformance": "fedtide audit conformance --run RUN",
    "noise": "fedtide audit noise RUN",
    "canary": "fedtide audit canary RUN",
    "attack": "fedtide audit attack RUN",
}
_SAYS = {
    HELD: "every check held",
    FAILED: "at least one check did not hold",
    BLIND: "it missed a fault that was planted on purpose, so what it says counts for nothing",
    UNTRIED: "nothing was broken on purpose, so nothing shows that it would have seen it: run it again in full",
    NOT_RUN: "not run",
    STALE: "it was run on another record than the one in this folder: run it again",
    DAMAGED: "its file cannot be read: run it again",
}


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool, its state (one of the names above), and what it found."""

    name: str
    state: str
    evidence: Evidence | None = None

    @property
    def says(self) -> str:
        """The state as a line."""
        caught = any(check.control for check in self.evidence.checks) if self.evidence is not None else False
        more = ", and every fault planted on purpose was caught" if caught and self.state == HELD else ""
        return _SAYS[self.state] + more

    def as_json(self) -> dict[str, Any]:
        """For the report."""
        checks = self.evidence.checks if self.evidence is not None else ()
        return {
            "tool": self.name,
            "state": self.state,
            "says": self.says,
            "question": QUESTIONS[self.name],
            "command": COMMANDS[self.name],
            "held": sum(check.holds for check in checks if not check.control),
            "checks": sum(not check.control for check in checks),
            "controls_caught": sum(check.holds for check in checks if check.control),
            "controls": sum(check.control for check in checks),
            "evidence": None if self.evidence is None else asdict(self.evidence),
        }


def tools_of(run: Path) -> list[Tool]:
    """Every tool, whether it was run or not; raises nothing."""
    return [_tool(run, name) for name in TOOLS]


def _tool(run: Path, name: str) -> Tool:
    file = run / FOLDER / f"{name}.json"
    if not file.is_file():
        return Tool(name, NOT_RUN)
    try:
        found = read_evidence(file)
    except EvidenceError:
        return Tool(name, DAMAGED)
    return Tool(name, _state(found, record_digest(run)), found)


def _state(found: Evidence, record: str) -> str:
    if any(not check.holds for check in found.checks if not check.control):
        return FAILED  # whatever record it is about: something did not hold
    if found.record != record:
        return STALE
    if any(not check.holds for check in found.checks if check.control):
        return BLIND
    if not any(not check.control for check in found.checks):
        return DAMAGED
    planted = any(check.control for check in found.checks)
    return HELD if planted or found.tool not in WITH_CONTROLS else UNTRIED
