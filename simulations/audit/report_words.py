"""The report's plain sentences: verdict, promise, who is not protected, what nobody checked. No statistics here."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

from common.privacy import words
from common.privacy.odds import percent
from simulations.audit.report_tools import BLIND, COMMANDS, FAILED, HELD

if TYPE_CHECKING:
    from simulations.audit.report import Report


class Verdict(StrEnum):
    """The report in one word or three."""

    HELD = "held"
    BROKEN = "did not hold"
    OPEN = "not fully checked"


def sentences(report: Report) -> dict[str, str]:
    """What is promised, to whom, and whether it held: one plain paragraph each."""
    return {
        "promised": _promised(report),
        "over all runs": _over_all_runs(report),
        "to whom": _to_whom(report),
        "held": _held(report),
    }


def _promised(report: Report) -> str:
    privacy = report.plan.privacy
    size = f"epsilon at most {privacy.epsilon:g}, delta {words.small(privacy.delta)}"
    if report.odds is None:
        return (
            "That what leaves a site depends only so much on whether one person's whole history is in its log or "
            f"not: {size}."
        )
    return (
        "A limit to how well anyone can tell, from this run, whether one person's history was in a site's log: "
        f"by the charges recorded, the best guess is right at most {percent(report.odds.right)} of the time, "
        f"where a coin is right 50 % ({size})."
    )


def _over_all_runs(report: Report) -> str:
    charged = [ledger for ledger in report.ledgers if ledger.spending.charges]
    if not charged:
        return "No run was charged to any site's ledger so far, as the receipts show that the server holds."
    worst = max(charged, key=lambda each: each.spending.right)
    site, spent = worst.site, worst.spending
    runs = "this run alone" if all(c.here for c in worst.charges) else _counted(spent.runs, "run")
    least = "" if spent.odds is not None else ", by the filter's figure, as there is none by the PLD"
    others = "" if len(report.ledgers) == 1 else " Each site's own figures are in item 2."
    return (
        "From all runs that a site ever took part in, as far as the receipts show that the server holds, the best "
        f"guess is right at most {percent(spent.right)} of the time{least}: at {site}, whose ledger holds {runs}, "
        f"epsilon so far is {spent.figures} at delta {words.small(spent.delta)}.{others}"
    )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _to_whom(report: Report) -> str:
    names = [site.site for site in report.findings.sites if site.charges]
    sites = {0: "no site", 1: "the one site"}.get(len(names), f"any of the {len(names)} sites")
    return (
        f"To each user of {sites} in this run, with all of that person's events, against everyone outside that "
        "site: other sites, readers of the model, and the coordinating server, even a malicious one."
    )


def _held(report: Report) -> str:
    findings, charges = report.findings, sum(site.charges for site in report.findings.sites)
    record = f"the signed record, {charges} charges of {len(findings.sites)} sites, was recomputed"
    if findings.lies:
        first = findings.lies[0]
        more = f", and {len(findings.lies) - 1} more" if len(findings.lies) > 1 else ""
        said = f"{record} and does not hold: {first.explanation} ({first.reason} in {first.place}){more}."
    elif findings.epsilon is None:
        said = f"{record}; nothing was charged, so there is nothing to confirm."
    else:
        said = f"{record} and agrees: epsilon {findings.epsilon:.3f} in this run."
    opening = {"held": "Yes", "did not hold": "No"}.get(str(report.verdict), "As far as it was checked")
    return f"{opening}: {said} {_tools(report)}"


def _tools(report: Report) -> str:
    failed = [tool.name for tool in report.tools if tool.state == FAILED]
    if failed:
        return f"The audit tried to refute the claim, and succeeded ({_and(failed)})."
    blind = [tool.name for tool in report.tools if tool.state == BLIND]
    if blind:
        return (
            f"The audit could not be relied upon: {_and(blind)} missed a fault that was planted on purpose."
        )
    held = [tool.name for tool in report.tools if tool.state == HELD]
    missing = [tool.name for tool in report.tools if tool.state != HELD]
    if not held:
        return (
            "Nobody has tried to refute the claim yet: none of the audit's four tools was run on this record."
        )
    said = f"The audit tried to refute the claim and could not ({_and(held)})."
    return said + (f" Still to be run: {_and(missing)}." if missing else "")


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def not_protected(report: Report) -> list[str]:
    """Who or what the promise does not cover."""
    return words.not_protected(report.plan.privacy.epsilon)


def unverified(report: Report) -> list[str]:
    """What this page does not know."""
    said = [
        "That a site ran the code that it names. Receipts give non-repudiation, not truth; conformance runs the "
        "code that is installed where the audit is made.",
        "That a site's log holds each person once, and that its catalog is public.",
        "That the random numbers of a site's operating system are random.",
        "That the tools looked as hard as they can: their settings stand beside what they found, in item 11.",
        "That nobody chose the plan after looking at private results: the record cannot show it.",
        "When a reply arrived: the server sees it, and a larger sample takes longer.",
        "That the evidence of the tools is genuine: it is read from files in the run's folder. Whoever doubts it "
        "runs the commands below, which need nothing else.",
    ]
    if report.simulated:
        said.append(
            "Organisations: the sites of this run were folders on one machine, so keys and anchors show that the "
            "record is whole, and not that separate parties kept it."
        )
    else:
        said.append(
            "That the server kept every anchor: anchors are read from the registry, which the server holds. A site "
            "that keeps its own copy of them can tell."
        )
    said += [f"{tool.name}: {tool.says}." for tool in report.tools if tool.state != HELD]
    return said


def commands() -> list[tuple[str, str]]:
    """What to type to repeat it, from the run's folder alone, and what for."""
    return [
        ("fedtide audit receipts RUN", "recompute the record: chains, signatures, digests, sums, epsilons"),
        *((command, f"make the evidence of {tool} again") for tool, command in COMMANDS.items()),
        ("fedtide audit report RUN -o report.html", "make this page again"),
        ("fedtide audit full RUN -o report.html", "all of the above"),
    ]
