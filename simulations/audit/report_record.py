"""What a run's folder says of itself, recomputed: each site's ledger, each round, epsilon as it grew, digests.

Everything here comes from verified chains and the plan. Nothing of it is about a user: no counts of users but the
plan's public ones, no times but days, no quality but what was released with noise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

from common.config import Plan
from common.phases import Exchange
from common.privacy.accountants import epsilon_pld
from common.privacy.chain import Chain
from common.privacy.entries import Burnt, Release, Reserve
from common.privacy.faults import ReceiptError
from common.privacy.mechanisms import Event, PoissonSubsampledGaussian
from common.privacy.renyi import NANO, renyi_to_epsilon
from common.privacy.spending import Spending
from server.registry import RegistryReader
from server.runs import RunFolder

_MOST_ROUNDS = 40  # at how many rounds epsilon is recomputed: each is a composition of its own
_FILES = (
    "plan.json",
    "receipts.jsonl",
    "rounds.jsonl",
    "privacy.json",
    "catalog.jsonl",
    "released.safetensors",
    "model.safetensors",
)


@dataclass(frozen=True, slots=True)
class Charge:
    """One reservation in a ledger, of whichever run; `spent` is the share of the Renyi budget from there on."""

    number: int
    here: bool
    round: int
    attempt: int
    outcome: str
    spent: float


@dataclass(frozen=True, slots=True)
class AfterRound:
    """After a round: what a site's charges of this run had come to by the PLD, and all its charges by its filter."""

    round: int
    pld: float
    filter: float


@dataclass(slots=True)
class Ledger:
    """One site's ledger, as its verified chain tells it.

    Attributes:
        order, cap, spent: of the Renyi filter, in nats.
        residual: what is left under the cap, in nats.
        runs: how many runs were charged to it.
        spending: all charges of all runs, in epsilon.
        anchored: the highest sequence number that the server countersigned.
        unanchored: entries after that: the site could still rewrite them.
    """

    site: str
    key_id: str
    mode: str
    unit: str
    adjacency: str
    epsilon: float
    delta: float
    order: int
    cap: float
    spent: float
    residual: float
    entries: int
    head: str
    anchors: int
    anchored: int
    unanchored: int
    closed: bool
    first_day: str
    last_day: str
    runs: int
    burnt: int
    open: int
    spending: Spending
    charges: list[Charge] = field(default_factory=list)
    by_round: list[AfterRound] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For the report."""
        return {**asdict(self), "spending": self.spending.as_json()}


def ledgers(reader: RegistryReader, run: str) -> list[Ledger]:
    """Every site whose chain verifies; what does not verify is among the lies of `audit_receipts`."""
    found = []
    for site in reader.sites():
        try:
            chain = reader.chain(site.key_id)
            anchors = [anchor.seq for anchor in reader.anchors(site.key_id)]
        except ReceiptError:
            continue
        found.append(_ledger(site.name, chain, anchors, run))
    return found


def _ledger(name: str, chain: Chain, anchors: Sequence[int], run: str) -> Ledger:
    report, genesis = chain.report(), chain.genesis
    reserves = _reserves(chain)
    anchored = max(anchors, default=0)
    return Ledger(
        site=name,
        key_id=chain.key_id,
        mode=genesis.mode,
        unit=genesis.unit,
        adjacency=genesis.adjacency,
        epsilon=genesis.epsilon,
        delta=genesis.delta,
        order=genesis.order,
        cap=report.cap / NANO,
        spent=report.spent / NANO,
        residual=(report.cap - report.spent) / NANO,
        entries=report.seq + 1,
        head=report.head,
        anchors=len(anchors),
        anchored=anchored,
        unanchored=report.seq - anchored,
        closed=report.closed,
        first_day=genesis.day,
        last_day=max([genesis.day, *(reserve.day for reserve, _ in reserves)]),
        runs=len({reserve.run for reserve, _ in reserves}),
        burnt=report.burnt,
        open=report.open,
        spending=chain.spending(),
        charges=[
            Charge(
                number,
                reserve.run == run,
                reserve.round,
                reserve.attempt,
                outcome,
                reserve.spent / max(1, report.cap),
            )
            for number, (reserve, outcome) in enumerate(reserves, start=1)
        ],
        by_round=_by_round([reserve for reserve, _ in reserves if reserve.run == run], genesis.delta, chain),
    )


def _reserves(chain: Chain) -> list[tuple[Reserve, str]]:
    names: Mapping[type[object], str] = {Release: "released", Burnt: "burnt"}
    found = []
    for entry in chain.reservations.values():
        if isinstance(entry.body, Reserve):
            end = chain.outcomes.get(entry.hash)
            found.append((entry.body, "open" if end is None else names[type(end.body)]))
    return found


def _by_round(reserves: Sequence[Reserve], delta: float, chain: Chain) -> list[AfterRound]:
    rounds = sorted({reserve.round for reserve in reserves})
    step = max(1, -(-len(rounds) // _MOST_ROUNDS))
    found = []
    for number in sorted({*rounds[::step], *rounds[-1:]}):
        until = [reserve for reserve in reserves if reserve.round <= number]
        divergence = (
            max(reserve.spent for reserve in until) / NANO
        )  # other runs before it included: it is the brake
        found.append(
            AfterRound(
                round=number,
                pld=epsilon_pld([reserve.event for reserve in until], delta),
                filter=renyi_to_epsilon(divergence, delta, chain.genesis.order),
            )
        )
    return found


def rounds_of(run: RunFolder, plan: Plan) -> list[dict[str, Any]]:
    """Every round of the plan: its mechanism, and what became of it."""
    try:
        became = {int(record["round"]): _became(record) for record in run.records()}
    except (ValueError, KeyError, TypeError, AttributeError):  # told as a lie by `audit_receipts`
        became = {}
    unknown = {"done": False, "aggregated": False, "admitted": [], "left_out": [], "missing": 0}
    return [
        {**_mechanism(plan, exchange), **became.get(exchange.round, unknown)} for exchange in plan.schedule()
    ]


def _became(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "done": True,
        "aggregated": bool(record["aggregated"]),
        "admitted": sorted(str(name) for name in record["admitted"]),
        "left_out": sorted(str(each["reason"]) for each in record.get("left_out", [])),
        "missing": int(record.get("missing", 0)),
    }


def _mechanism(plan: Plan, exchange: Exchange) -> dict[str, Any]:
    event, stated = exchange.event, plan.stated(exchange.phase)
    sampled = isinstance(event, PoissonSubsampledGaussian)
    steps = event.steps if isinstance(event, PoissonSubsampledGaussian) else 1
    deviation = event.noise_multiplier * stated.clip_norm / stated.normaliser * sqrt(steps)
    return {
        "round": exchange.round,
        "phase": str(exchange.phase),
        "mechanism": event.kind,
        "noise_multiplier": event.noise_multiplier,
        "sampling": "Poisson" if sampled else "all users",
        "sampling_rate": event.sampling_rate if isinstance(event, PoissonSubsampledGaussian) else 1.0,
        "steps": steps,
        "clip_norm": stated.clip_norm,
        "normaliser": stated.normaliser,
        "learning_rate": stated.learning_rate,
        "deviation": deviation * (stated.learning_rate or 1.0),
        "epsilon_alone": epsilon_pld([event], plan.privacy.delta),
    }


def released_metrics(run: RunFolder) -> list[dict[str, Any]]:
    """Quality as it was released, with its noise and its charge; what a simulation knows besides stays out."""
    found = []
    lines = run.metrics_file.read_bytes().splitlines() if run.metrics_file.is_file() else []
    for line in lines:
        try:
            said = json.loads(line)
            if said.get("released") is True:
                figures = {
                    str(name): {str(key): float(value) for key, value in figure.items()}
                    for name, figure in said["metrics"].items()
                }
                found.append({"round": int(said["round"]), "figures": figures})
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def events_of(reader: RegistryReader, key_id: str, run: str) -> list[Event]:
    """A site's events of this run, from its verified chain."""
    return [reserve.event for reserve, _ in _reserves(reader.chain(key_id)) if reserve.run == run]


def digests(run: RunFolder) -> dict[str, str]:
    """sha256 of the run's files, and one over all kept updates by name."""
    found = {name: _sha256(run.path / name) for name in _FILES if (run.path / name).is_file()}
    whole = hashlib.sha256()
    for file in sorted((run.path / "updates").glob("*.safetensors")):
        whole.update(f"{file.name} {_sha256(file)}\n".encode())
    return {**found, "updates/": whole.hexdigest()}


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def phases_of(plan: Plan) -> list[str]:
    """The phases of a plan, in order, each once."""
    return [str(phase) for phase in dict.fromkeys(exchange.phase for exchange in plan.schedule())]
