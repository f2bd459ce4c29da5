"""What one tool of `fedtide audit` found, as one JSON file in the run's folder: `audit/<tool>.json`.

Every tool writes the same shape, so that the report, a script and a later reader need to know one.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = "audit"
TOOLS = ("conformance", "noise", "canary", "attack")
"""Tools that leave a file; other files in the folder are theirs, and no evidence."""

_RECORD = ("plan.json", "receipts.jsonl")
_PACKAGES = ("fedtide", "torch", "opacus", "dp-accounting", "numpy", "scipy", "flwr")


class EvidenceError(ValueError):
    """A file of evidence cannot be read; the message names it and what to do."""


def own_versions() -> dict[str, str]:
    """Of Python and of the packages that a figure may depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def record_digest(run: Path) -> str:
    """sha256 over a run's plan and receipts: evidence that names another one is about something else."""
    digest = hashlib.sha256(b"fedtide/evidence/1\n")
    for name in _RECORD:
        data = (run / name).read_bytes() if (run / name).is_file() else b""
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Check:
    """One question and its answer.

    Attributes:
        name: of the question, such as `sensitivity`; the same wherever it is asked.
        subject: of what: a family and mode, a site and round.
        measured: the figure, or None where the answer is no number.
        bound: what it is held against, in words: `at most 1.001`.
        holds: whether the privacy claim survives; of a positive control, whether the planted fault was caught.
        says: one line, for a reader who knows no statistics.
        control: whether something was broken on purpose, to show that the check can fail.
    """

    name: str
    subject: str
    measured: float | None
    bound: str
    holds: bool
    says: str
    control: bool = False


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that one tool found.

    Attributes:
        tool: `conformance`, `noise`, `canary`, `attack`.
        command: that repeats it.
        parameters: registered before the first measurement.
        series: figures for charts; the tool's module says of what shape.
        limits: what this tool cannot show, one sentence each.
        seconds: wall time.
        record: `record_digest` of the run that it was written for; `write` fills it in.
    """

    tool: str
    command: str
    checks: Sequence[Check]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    series: Mapping[str, Any] = field(default_factory=dict)
    limits: Sequence[str] = ()
    seconds: float = 0.0
    made: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    versions: Mapping[str, str] = field(default_factory=own_versions)
    record: str = field(default="", compare=False)

    @property
    def holds(self) -> bool:
        """Whether every check holds, controls included, and there is at least one."""
        return bool(self.checks) and all(check.holds for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """For scripts and for the file."""
        return {"holds": self.holds, **asdict(self)}

    def write(self, run: Path) -> Path:
        """Writes `audit/<tool>.json` in a run's folder, whole or not at all; an earlier one is replaced."""
        from server.runs import write_whole

        file = run / FOLDER / f"{self.tool}.json"
        file.parent.mkdir(exist_ok=True)
        found = replace(self, record=record_digest(run))
        write_whole(file, json.dumps(found.as_json(), indent=2).encode())
        return file


def read_evidence(file: Path) -> Evidence:
    """One file that `Evidence.write` wrote.

    Raises:
        EvidenceError: it is not there or not of that shape.
    """
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        said.pop("holds")
        checks = [Check(**check) for check in said.pop("checks")]
        return Evidence(checks=checks, **said)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise EvidenceError(
            f"{file} is no evidence of an audit ({type(error).__name__}): run the tool again"
        ) from error


def evidence_of(run: Path) -> dict[str, Evidence]:
    """Tool -> what it found, of the tools that were run on this run's folder."""
    files = {tool: run / FOLDER / f"{tool}.json" for tool in TOOLS}
    return {tool: read_evidence(file) for tool, file in files.items() if file.is_file()}
