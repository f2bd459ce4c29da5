"""What became of a run after a fault: read from ledgers, receipts, rounds and parameters, never from what was said."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from client.ledger import Ledger
from common.phases import Phase
from server.aggregation import aggregation
from server.runs import RunFolder
from simulations.faults.place import VICTIM, Place

LOST, UNCHARGED, TWICE, OTHERS_WENT_ON, MESSAGE = (
    "nothing lost",
    "nothing uncharged",
    "no round applied twice",
    "the others go on",
    "the message",
)


@dataclass
class Mark:
    """What stood on the disk when the fault was injected.

    Attributes:
        lines: of the run's receipts.jsonl and rounds.jsonl.
        entries: site -> hashes of its ledger's entries.
        touched: (site, round) whose data was being looked at.
    """

    lines: dict[str, list[str]]
    entries: dict[str, list[str]]
    touched: list[tuple[str, int]] = field(default_factory=list)


def charges(ledger: Path, run: str) -> list[tuple[int, str]]:
    """Round and outcome ("released", "burnt", "open") of each charge of a run."""
    with Ledger.open(ledger) as opened:
        found = opened.status().charges
    return [(each.reserve.round, each.outcome) for each in found if each.reserve.run == run]


def mark(place: Place, name: str, sites: Sequence[str], touched: Sequence[tuple[str, int]] = ()) -> Mark:
    """To be called just after the fault, so that what it broke is on the disk already."""
    entries = {}
    for site in sites:
        with Ledger.open(place.folder / site / "ledger") as ledger:
            entries[site] = [entry.hash for entry in ledger.entries()]
    lines = {file: place.lines(name, file) for file in ("receipts.jsonl", "rounds.jsonl")}
    return Mark(lines, entries, list(touched))


def lost(run: RunFolder, ledgers: dict[str, Path], before: Mark) -> list[str]:
    """What stood on the disk at the fault and does not stand there now; what is missing of a whole run."""
    faults = []
    for file, lines in before.lines.items():
        if (run.path / file).read_text().splitlines()[: len(lines)] != lines:
            faults.append(f"{file} does not begin with the {len(lines)} lines that it had")
    for site, hashes in before.entries.items():
        with Ledger.open(ledgers[site]) as ledger:
            now = [entry.hash for entry in ledger.entries()]
        if now[: len(hashes)] != hashes:
            faults.append(f"the ledger of {site} does not begin with the {len(hashes)} entries that it had")
    planned = [each.round for each in run.plan().schedule()]
    done = [record["round"] for record in run.records()]
    if done != planned:
        faults.append(f"rounds {done} are there of {planned}")
    if run.path.name.endswith(".incomplete") or not (run.path / "model.safetensors").is_file():
        faults.append("the run is not whole")
    for number in planned:
        for line in run.receipts(number):
            if not run.update_file(number, str(line["key_id"])).is_file():
                faults.append(f"round {number}: the update of {line['site']} is missing")
    return faults


def uncharged(run: RunFolder, ledgers: dict[str, Path], before: Mark) -> list[str]:
    """Updates that were admitted, and looks at data, without a charge; releases more than one of a round."""
    faults = []
    found = {site: charges(ledger, run.name) for site, ledger in ledgers.items()}
    for number in (record["round"] for record in run.records()):
        for line in run.receipts(number):
            if (number, "released") not in found.get(str(line["site"]), []):
                faults.append(f"round {number}: {line['site']} was admitted, and its ledger has no release")
    for site, number in before.touched:
        if number not in [each for each, _ in found[site]]:
            faults.append(f"round {number}: {site} had looked at its data, and was not charged")
    for site, ledger in ledgers.items():
        with Ledger.open(ledger) as opened:
            status, report = opened.status(), opened.verify()
        if report.spent != sum(each.reserve.charge for each in status.charges):
            faults.append(f"{site}: what is spent is not the sum of its charges")
    return faults


def applied_twice(run: RunFolder, ledgers: dict[str, Path]) -> list[str]:
    """Rounds, receipts or releases that are there twice, and parameters that the kept updates do not add up to."""
    faults = []
    records = list(run.records())
    for number, often in Counter(record["round"] for record in records).items():
        if often > 1:
            faults.append(f"round {number} is there {often} times")
        sites = Counter(str(line["site"]) for line in run.receipts(number))
        faults += [
            f"round {number}: {often} receipts of {site}" for site, often in sites.items() if often > 1
        ]
    for site, ledger in ledgers.items():
        released = Counter(number for number, outcome in charges(ledger, run.name) if outcome == "released")
        faults += [f"{site}: {often} releases of round {n}" for n, often in released.items() if often > 1]
    plan = run.plan()
    momentum, rate = plan.training.server_momentum, plan.training.server_learning_rate
    state = run.round_state(0)
    velocity = {name: torch.zeros_like(value) for name, value in state.items()}
    for record in records:
        number = int(record["round"])
        if record["aggregated"] and record["phase"] == Phase.UPDATE:
            state = run.sent_state(number - 1) if run.has_pretrained(number - 1) else state
            lines = sorted(run.receipts(number), key=lambda line: str(line["site"]))
            mean = aggregation(plan.server)([run.update(number, str(line["key_id"])) for line in lines])
            velocity = {name: momentum * velocity[name] + value for name, value in mean.items()}
            state = {name: value + rate * velocity[name] for name, value in state.items()}
        kept = run.round_state(number)
        if any(not torch.equal(kept[name], value) for name, value in state.items()):
            faults.append(f"round {number}: the parameters are not those that its updates make, applied once")
            break
    return faults


def left_behind(run: RunFolder, others: Sequence[str], before: Mark) -> list[str]:
    """Rounds after the fault that another site than the victim is not in, and rounds that were not aggregated."""
    faults = []
    for record in list(run.records())[len(before.lines["rounds.jsonl"]) :]:
        absent = sorted(set(others) - set(record["admitted"]))
        if absent or not record["aggregated"]:
            faults.append(f"round {record['round']} is without {', '.join(absent) or 'an aggregate'}")
    return faults


def commands_agree(place: Place, run: RunFolder) -> list[str]:
    """What `fedtide audit receipts` finds, and `fedtide site verify` at the victim."""
    faults = []
    done = place.fedtide("audit", "receipts", run.path, "--registry", place.server / "registry")
    if done.returncode:
        faults.append(f"the audit of the receipts: {(done.stdout + done.stderr).strip()[-300:]}")
    done = place.fedtide("site", "verify", place.folder / VICTIM, "--json")
    if done.returncode:
        faults.append(f"`fedtide site verify`: {(done.stdout + done.stderr).strip()[-300:]}")
    return faults


def judge(
    place: Place, name: str, before: Mark, others: Sequence[str], sites: Sequence[str]
) -> dict[str, list[str]]:
    """Check -> what does not hold, of a run that is over."""
    folder = place.run_folder(name)
    if folder is None:
        return {LOST: [f"there is no run {name}"]}
    run, ledgers = RunFolder(folder), {site: place.folder / site / "ledger" for site in sites}
    return {
        OTHERS_WENT_ON: left_behind(run, others, before),
        LOST: lost(run, ledgers, before),
        UNCHARGED: uncharged(run, ledgers, before) + commands_agree(place, run),
        TWICE: applied_twice(run, ledgers),
    }


def account(place: Place, name: str, sites: Sequence[str]) -> str:
    """What the run came to, for the table: rounds with how many sites each, and charges that brought no release."""
    folder = place.run_folder(name)
    if folder is None:
        return "no run"
    run = RunFolder(folder)
    records: list[dict[str, Any]] = list(run.records())
    rounds = ", ".join(str(len(record["admitted"])) for record in records)
    wasted = {
        site: sum(outcome != "released" for _, outcome in charges(place.folder / site / "ledger", run.name))
        for site in sites
    }
    burnt = ", ".join(f"{site} {count}" for site, count in wasted.items() if count)
    return f"sites admitted by round: {rounds}; charged without a release: {burnt or 'none'}"


def as_json(text: str) -> list[dict[str, Any]]:
    """The JSON lines of a log, whatever else stands in it left out."""
    found = []
    for line in text.splitlines():
        try:
            fields = json.loads(line)
        except ValueError:
            continue
        if isinstance(fields, dict) and "message" in fields:
            found.append(fields)
    return found
