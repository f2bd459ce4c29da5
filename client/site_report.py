"""What a site's own page says, from its ledger alone: promised, spent, released to whom, left, and left on disk.

It is verified as it is read. Nothing in it is about a user: a ledger holds nothing that is.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client.ledger import Ledger
from client.ledger_reading import LedgerStatus
from client.remains import Remain, deletion, elsewhere, remains
from common.privacy.entries import Anchor, Close, Entry, Release, Reserve
from common.privacy.odds import percent, right_at_most
from common.privacy.spending import SHARES, Spending
from common.privacy.words import not_protected, small

FORMAT = "fedtide/site-report/1"


@dataclass(frozen=True, slots=True)
class RunReleases:
    """What one run charged and got.

    Attributes:
        first_day, last_day: of its charges, UTC.
        updates, statistics, metrics: releases by kind.
        burnt, open: charges for which nothing was released.
        share: of the budget, that it took.
        left: of the budget, after its last charge.
        servers: public keys (hex) that countersigned a release of it, as far as the ledger keeps them.
    """

    run: str
    first_day: str
    last_day: str
    updates: int
    statistics: int
    metrics: int
    burnt: int
    open: int
    share: float
    left: float
    servers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ServerSeen:
    """A server, as the ledger knows it: by the key with which it countersigned.

    Attributes:
        key: its public key, hex.
        countersigned: how many of its countersignatures the ledger keeps.
        until: the last entry under one: it holds every entry up to there, and whatever it was sent since, whose
            countersignature comes with its next request.
        runs: of the releases that it countersigned.
    """

    key: str
    countersigned: int
    until: int
    runs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SiteReport:
    """Everything on the page.

    Attributes:
        made: when, to the second, UTC.
        name, folder: of the site.
        more_like_the_last: how many charges like the last one fit; None before the first and after a withdrawal.
        closed: the day of the withdrawal, or None.
    """

    made: str
    name: str
    folder: Path
    status: LedgerStatus
    spending: Spending
    runs: tuple[RunReleases, ...]
    servers: tuple[ServerSeen, ...]
    more_like_the_last: int | None
    closed: str | None
    remains: tuple[Remain, ...]

    def as_json(self) -> dict[str, Any]:
        """The page's content, for scripts."""
        genesis = self.status.genesis
        return {
            "format": FORMAT,
            "made": self.made,
            "site": self.name,
            "key_id": self.status.key_id,
            "head": {"seq": self.status.seq, "hash": self.status.head},
            "sentences": sentences(self),
            "promised": {
                "epsilon": genesis.epsilon,
                "delta": genesis.delta,
                "unit": genesis.unit,
                "adjacency": genesis.adjacency,
                "mode": genesis.mode,
                "renyi_order": genesis.order,
                "since": genesis.day,
                "best_guess_right": right_at_most(genesis.epsilon, genesis.delta),
            },
            "not_protected": not_protected(genesis.epsilon),
            "spent": self.spending.as_json(),
            "charges": {
                "burnt": self.status.burnt,
                "open": self.status.open,
                "all": len(self.status.charges),
            },
            "left": {"share": 1 - self.spending.share, "more_like_the_last": self.more_like_the_last},
            "runs": [asdict(run) for run in self.runs],
            "servers": [asdict(server) for server in self.servers],
            "withdrawn": self.closed,
            "on_disk": [asdict(each) for each in self.remains],
            "deletion": deletion(self.folder),
            "elsewhere": elsewhere(),
        }


def site_report(folder: Path) -> SiteReport:
    """Verifies a site's ledger as a whole, and says what it comes to.

    Args:
        folder: the site's; of it the ledger alone is read, and the name.

    Raises:
        LedgerError, ReceiptError: there is no ledger, or it does not verify.
        ContradictionError: its charges do not add up.
    """
    with Ledger.open(folder / "ledger") as ledger:
        ledger.verify()
        status, entries = ledger.status(), ledger.entries()
    closed = [entry.body.day for entry in entries if isinstance(entry.body, Close)]
    return SiteReport(
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        name=_name(folder),
        folder=folder,
        status=status,
        spending=status.spending(),
        runs=_runs(status, entries),
        servers=_servers(entries),
        more_like_the_last=status.more_like_the_last,
        closed=closed[0] if closed else None,
        remains=tuple(remains(folder)),
    )


def _name(folder: Path) -> str:
    try:
        return str(json.loads((folder / "site.json").read_text(encoding="utf-8"))["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return folder.name


def _runs(status: LedgerStatus, entries: Sequence[Entry]) -> tuple[RunReleases, ...]:
    kinds = _contents(entries)
    charges = defaultdict(list)
    for charge in status.charges:
        charges[charge.reserve.run].append(charge)
    servers = _countersigners(entries)
    found = []
    for run, own in charges.items():
        outcomes = Counter(charge.outcome for charge in own)
        days = [charge.reserve.day for charge in own]
        found.append(
            RunReleases(
                run=run,
                first_day=min(days),
                last_day=max(days),
                updates=kinds[run]["update"],
                statistics=kinds[run]["statistics"],
                metrics=kinds[run]["metrics"],
                burnt=outcomes["burnt"],
                open=outcomes["open"],
                share=sum(charge.reserve.charge for charge in own) / status.cap,
                left=1 - own[-1].reserve.spent / status.cap,
                servers=tuple(sorted(servers[run])),
            )
        )
    return tuple(found)


def _reserved(entries: Iterable[Entry]) -> dict[str, Reserve]:
    return {entry.hash: entry.body for entry in entries if isinstance(entry.body, Reserve)}


def _contents(entries: Sequence[Entry]) -> dict[str, Counter[str]]:
    """run -> what kind of content was released how often."""
    reserved = _reserved(entries)
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in entries:
        if isinstance(entry.body, Release):
            found[reserved[entry.body.reservation].run][entry.body.content] += 1
    return found


def _countersigners(entries: Sequence[Entry]) -> dict[str, set[str]]:
    """run -> keys of the servers that countersigned a release of it: to whom it was answered."""
    reserved = _reserved(entries)
    found: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        if isinstance(entry.body, Anchor) and isinstance(seen := entries[entry.body.seq].body, Release):
            found[reserved[seen.reservation].run].add(entry.body.server_key)
    return found


def _servers(entries: Sequence[Entry]) -> tuple[ServerSeen, ...]:
    anchors: dict[str, list[int]] = defaultdict(list)
    for entry in entries:
        if isinstance(entry.body, Anchor):
            anchors[entry.body.server_key].append(entry.body.seq)
    by_run = _countersigners(entries)
    return tuple(
        ServerSeen(key, len(seqs), max(seqs), tuple(run for run, keys in by_run.items() if key in keys))
        for key, seqs in anchors.items()
    )


def sentences(report: SiteReport) -> dict[str, str]:
    """What was promised, what was spent and what is left: one plain paragraph each."""
    return {"promised": _promised(report), "spent": _spent(report), "left": _left(report)}


def _promised(report: SiteReport) -> str:
    genesis = report.status.genesis
    return (
        "To each person in this site's log, with all that is recorded under one id there: a limit to how well anyone "
        "can tell, from all that ever leaves the site, over all runs, models and servers and for good, whether that "
        f"person was in the log. The measure is epsilon at most {genesis.epsilon:g} at delta {small(genesis.delta)} "
        "(add or remove one user). Were all of it spent, someone who knows everything else and guesses would be right "
        f"at most {percent(right_at_most(genesis.epsilon, genesis.delta))} of the time, where a coin is right 50 %."
    )


def _spent(report: SiteReport) -> str:
    spent = report.spending
    if not spent.charges:
        return "Nothing so far: no run was ever charged here, and nothing has left the site."
    runs = "1 run" if spent.runs == 1 else f"all {spent.runs} runs"
    why = "by the PLD, for charges fixed in advance" if spent.odds is not None else "by the filter's figure"
    return (
        f"Over {runs}, epsilon {spent.figures}: {100 * spent.share:.1f} % of the filter's budget. {SHARES} From "
        f"all that was released so far, the best guess whether one person is in the log is right at most "
        f"{percent(spent.right)} of the time "
        f"({why}). "
        f"Charges that released nothing count as well ({report.status.burnt} burnt, {report.status.open} open)."
    )


def _left(report: SiteReport) -> str:
    if report.closed is not None:
        return (
            f"Nothing: the site withdrew on {report.closed} (UTC). Its ledger is closed, and nothing more may be "
            "charged or released. What was released stays released."
        )
    left = f"{100 * (1 - report.spending.share):.1f} % of the filter's budget"
    more = report.more_like_the_last
    room = "" if more is None else f" {_counted(more, 'more request')} like the last one would fit."
    return f"{left}.{room} When nothing fits any more, requests are refused; a budget is never refilled."


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
