"""The auditor's report: what a run promised, to whom, and whether it held, as data, as JSON and as one page.

`build_report` gathers everything from the run's folder; `page` (template and charts) and `as_json` show the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.bundle import installed_code
from common.config import Plan
from common.privacy.accountants import DISCRETISATION
from common.privacy.odds import Odds, odds
from server.registry import RegistryReader
from server.runs import RunFolder
from simulations.audit.evidence import own_versions
from simulations.audit.findings import Findings, Lie
from simulations.audit.pack import is_simulated
from simulations.audit.receipts import audit_receipts, registry_of
from simulations.audit.report_record import (
    Ledger,
    digests,
    events_of,
    ledgers,
    phases_of,
    released_metrics,
    rounds_of,
)
from simulations.audit.report_tools import BLIND, FAILED, HELD, Tool, tools_of
from simulations.audit.report_words import Verdict, commands, not_protected, sentences, unverified

FORMAT = "fedtide/report/1"


@dataclass(frozen=True, slots=True)
class Report:
    """Everything on the page.

    Attributes:
        made: when, to the second, UTC.
        verdict: held, did not hold, or not fully checked.
        findings: of `audit_receipts`.
        odds: what this run leaves to an attacker, by the privacy curve of the site with the largest epsilon in it; None
            where nothing was charged, or nothing verifies. What all runs of a site leave is in its ledger's spending.
        simulated: whether the sites were folders on one machine.
    """

    made: str
    verdict: Verdict
    plan: Plan
    findings: Findings
    ledgers: list[Ledger]
    rounds: list[dict[str, Any]]
    tools: list[Tool]
    odds: Odds | None
    whole: bool
    simulated: bool
    metrics: list[dict[str, Any]]
    digests: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """The page's content, for scripts. Figures that are not finite are null."""
        found = asdict(self.findings)
        said: dict[str, Any] = {
            "format": FORMAT,
            "made": self.made,
            "run": self.findings.run,
            "verdict": str(self.verdict),
            "sentences": sentences(self),
            "not_protected": not_protected(self),
            "unverified": unverified(self),
            "whole": self.whole,
            "simulated": self.simulated,
            "promise": {
                "epsilon": self.plan.privacy.epsilon,
                "delta": self.plan.privacy.delta,
                "users_per_site_at_least": self.plan.privacy.users_per_site,
            },
            "epsilon": self.findings.epsilon,
            "odds": None if self.odds is None else asdict(self.odds),
            "plan": self.plan.model_dump(mode="json"),
            "plan_digest": self.plan.digest(),
            "phases": phases_of(self.plan),
            "rounds": self.rounds,
            "sites": found["sites"],
            "server_key": found["server_key"],
            "lies": found["lies"],
            "notes": found["notes"],
            "ledgers": [ledger.as_json() for ledger in self.ledgers],
            "released_metrics": self.metrics,
            "tools": [tool.as_json() for tool in self.tools],
            "discretisation": DISCRETISATION,
            "digests": self.digests,
            "code": installed_code(),
            "versions": own_versions(),
            "commands": commands(),
        }
        clean = _finite(said)
        assert isinstance(clean, dict)
        return clean


def build_report(
    path: Path,
    registry: Path | None = None,
    on_receipts: Callable[[int, int], None] = lambda done, of: None,
) -> Report:
    """Recomputes a run's record and gathers the evidence that lies in its folder.

    Args:
        path: of the run.
        registry: folder of the server's registry, or of a copy; else looked for in the run's folder.
        on_receipts: as for `audit_receipts`.

    Raises:
        RunError, PlanError, RegistryError: as `audit_receipts` does.
    """
    findings = audit_receipts(path, registry, on_receipts)
    run = RunFolder(path.resolve())
    plan = run.plan()
    reader = RegistryReader(registry or registry_of(run))
    found = ledgers(reader, findings.run)
    tools = tools_of(run.path)
    whole = run.is_whole
    return Report(
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        verdict=_verdict(findings, found, tools, whole),
        plan=plan,
        findings=findings,
        ledgers=found,
        rounds=rounds_of(run, plan),
        tools=tools,
        odds=_odds(findings, reader),
        whole=whole,
        simulated=is_simulated(run.path) and registry is None,
        metrics=released_metrics(run),
        digests=digests(run),
    )


def _verdict(findings: Findings, found: list[Ledger], tools: list[Tool], whole: bool) -> Verdict:
    if findings.lies or any(tool.state == FAILED for tool in tools):
        return Verdict.BROKEN
    charged = findings.epsilon is not None and len(found) == len(findings.sites)
    if whole and charged and all(tool.state == HELD for tool in tools):
        return Verdict.HELD
    return Verdict.OPEN


def _odds(findings: Findings, reader: RegistryReader) -> Odds | None:
    worst = max(
        (site for site in findings.sites if site.figures is not None),
        key=lambda site: site.figures.pld if site.figures is not None else 0.0,
        default=None,
    )
    return None if worst is None else odds(events_of(reader, worst.key_id, findings.run))


def grouped(lies: list[Lie]) -> list[dict[str, Any]]:
    """Lies of one reason and explanation together, with their first places and their number."""
    times = Counter((lie.reason, lie.explanation) for lie in lies)
    return [
        {
            "reason": reason,
            "explanation": explanation,
            "times": count,
            "places": [lie.place for lie in lies if (lie.reason, lie.explanation) == (reason, explanation)][
                :4
            ],
        }
        for (reason, explanation), count in times.items()
    ]


def holds(report: Report) -> bool:
    """Whether nothing was found that does not hold; a tool that was not run is no finding."""
    return report.verdict is not Verdict.BROKEN and all(tool.state != BLIND for tool in report.tools)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
