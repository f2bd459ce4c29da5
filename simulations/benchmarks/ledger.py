"""What the ledger costs: `python -m simulations.benchmarks.ledger` prints a table and adds it to docs/benchmarks.md.

Reserving and releasing on this disk, the ledger's whole share of a round like the demo's (94 users, 1,682 items,
ten steps, random item vectors), admission at the server, and the verification of a long chain.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.ledger import Ledger, utc_day
from client.training import StepSettings, train_round
from common.config import Plan, make_plan
from common.models.batches import HistoryBatch
from common.models.families.recommend import Recommend
from common.privacy.anchors import Countersignature
from common.privacy.chain import verify_chain
from common.privacy.entries import NO_PREVIOUS, Entry, Genesis, Release, Reserve, public_key_of
from common.privacy.mechanisms import PoissonSubsampledGaussian
from common.privacy.noise import SecureGaussian, SecurePoissonSampler
from common.privacy.receipts import Receipt, Request
from common.privacy.renyi import cap_of, charge_of
from common.wire import Update, answer_to_records, state_to_bytes
from server.admission import Admitted, Expectation, admit
from server.registry import Registry
from simulations.benchmarks.table import DOCUMENT, Row, add_to_document, as_table, machine

USERS, ITEMS = 94, 1682
CHEAP = PoissonSubsampledGaussian(0.5, 60.0, 10)
_HASH, _NONCE = "a" * 64, "b" * 32


def demo_plan() -> Plan:
    """The default plan, with noise given so that nothing is calibrated."""
    return make_plan({"privacy": {"noise_multiplier": CHEAP.noise_multiplier, "epsilon": 8.0}})


def demo_model(plan: Plan) -> Recommend:
    """The default model over random item vectors of the demo's size."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(ITEMS, plan.model.width, generator=generator), dim=-1)
    return Recommend(
        vectors,
        core=plan.model.core,
        hidden_width=plan.model.hidden_width,
        with_times=plan.model.time_features,
    )


def training_seconds(model: Recommend, plan: Plan, rounds: int) -> float:
    """Median time of a round of private fine-tuning at one site, after one that warms up."""
    generator = torch.Generator().manual_seed(1)
    items = torch.randint(0, ITEMS, (USERS, plan.model.max_events), generator=generator)
    batch = HistoryBatch(items=items, times=torch.zeros_like(items))
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        train_round(
            model,
            batch,
            StepSettings.of(plan),
            sampler=SecurePoissonSampler(),
            noise=SecureGaussian(),
        )
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


@dataclass(frozen=True)
class LedgerTimes:
    """Medians in seconds: reserve and release together; all that a round asks of the ledger; admission."""

    reserve_release: float
    whole: float
    admission: float


def ledger_seconds(folder: Path, state: dict[str, torch.Tensor], rounds: int) -> LedgerTimes:
    """As a site and a server use it: open, recover, anchor, reserve, release, close; admit, countersign."""
    Ledger.create(folder / "ledger", epsilon=500, delta=1e-5, typical_plan=[CHEAP]).disconnect()
    update = state_to_bytes(state)
    registry = Registry(folder / "registry")
    with Ledger.open(folder / "ledger") as ledger:
        registry.enroll("bench", ledger.entries()[0])
    anchor: Countersignature | None = None
    pairs, wholes, admissions = [], [], []
    for number in range(rounds):
        began = time.perf_counter()
        with Ledger.open(folder / "ledger") as ledger:
            ledger.recover()
            if anchor is not None:
                ledger.anchor(anchor)
            ledger.outbox("bench", number, nonce=_NONCE)
            reserving = time.perf_counter()
            reservation = ledger.reserve(
                run="bench",
                round=number,
                attempt=1,
                event=CHEAP,
                plan_hash=_HASH,
                model_hash=_HASH,
                nonce=_NONCE,
                clip_norm=1.0,
                normaliser=1.0,
                learning_rate=1.0,
            )
            receipt = ledger.release(reservation, update)
            pairs.append(time.perf_counter() - reserving)
        wholes.append(time.perf_counter() - began)
        began = time.perf_counter()
        anchor = _admitted(registry, receipt, state, number)
        admissions.append(time.perf_counter() - began)
    return LedgerTimes(*(statistics.median(each) for each in (pairs, wholes, admissions)))


def _admitted(
    registry: Registry, receipt: Receipt, state: dict[str, torch.Tensor], number: int
) -> Countersignature:
    expected = Expectation(
        request=Request("bench", number, _NONCE, _HASH, _HASH, 1),
        shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
        norm_bound=1e9,
        event=CHEAP,
        clip_norm=1.0,
        normaliser=1.0,
        learning_rate=1.0,
    )
    verdict = admit(answer_to_records(Update.of(state, receipt.to_bytes())), expected, registry, [])
    if not isinstance(verdict, Admitted):
        raise AssertionError(f"the benchmark's own update was left out: {verdict}")
    return registry.accept(verdict.chain)


def long_chain(entries: int) -> list[Entry]:
    """A genesis, then reservations and releases in turn, so many entries in all."""
    key, order, day = Ed25519PrivateKey.generate(), 2, utc_day()
    genesis = Genesis(
        unit="user",
        adjacency="add_or_remove_one",
        mode="site",
        epsilon=1000.0,
        delta=1e-5,
        order=order,
        cap=cap_of(1000.0, 1e-5, order),
        public_key=public_key_of(key),
        dataset_commitment=None,
        day=day,
    )
    chain = [Entry.sign(key, seq=0, prev=NO_PREVIOUS, body=genesis)]
    charge = charge_of(CHEAP, order)
    while len(chain) < entries:
        number = (len(chain) + 1) // 2
        if len(chain) % 2:
            body: Reserve | Release = Reserve(
                genesis=chain[0].hash,
                run="bench",
                round=number,
                attempt=1,
                event=CHEAP,
                charge=charge,
                spent=charge * number,
                plan_hash=_HASH,
                model_hash=_HASH,
                nonce=_NONCE,
                clip_norm=1.0,
                normaliser=1.0,
                learning_rate=1.0,
                day=day,
            )
        else:
            body = Release(chain[-1].hash, "update", _HASH, 1)
        chain.append(Entry.sign(key, seq=len(chain), prev=chain[-1].hash, body=body))
    return chain


def verifying_seconds(entries: int) -> float:
    """From the bytes of a chain, as they are stored, to its report."""
    stored = [entry.to_bytes() for entry in long_chain(entries)]
    began = time.perf_counter()
    verify_chain([Entry.from_bytes(data) for data in stored])
    return time.perf_counter() - began


def measure(folder: Path, *, rounds: int, entries: int) -> list[Row]:
    """All rows. The folder should lie on the disk that a ledger would."""
    plan = demo_plan()
    model = demo_model(plan)
    state = model.trainable_state()
    training = training_seconds(model, plan, 5)
    times = ledger_seconds(folder, state, rounds)
    verifying = verifying_seconds(entries)
    share = times.whole / (times.whole + training)
    kilobytes = len(state_to_bytes(state)) / 1000
    pair = 1000 * times.reserve_release
    return [
        Row(
            f"reserve + release, update of {kilobytes:.0f} kB, median", f"{pair:.1f} ms", "< 25 ms", pair < 25
        ),
        Row("all of a round's ledger (open, recover, anchor, both)", f"{1000 * times.whole:.1f} ms"),
        Row(f"ten steps of private training, {USERS} users, {ITEMS:,} items", f"{training:.2f} s"),
        Row("the ledger's share of a site's round", f"{share:.2%}", "< 2 %", share < 0.02),
        Row("admission and countersigning at the server, median", f"{1000 * times.admission:.1f} ms"),
        Row(f"verifying {entries:,} entries", f"{verifying:.2f} s", "< 10 s", verifying < 10),
    ]


def as_markdown(rows: list[Row], command: str) -> str:
    """A section for the page of benchmarks."""
    return "\n".join(["## The ledger", "", f"`{command}`, {machine()}.", "", *as_table(rows), ""])


def main() -> None:
    """Prints the table, and adds it to the page unless told not to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--entries", type=int, default=10_000)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where ledgers are made; else a temporary one"
    )
    parser.add_argument("--no-document", action="store_true", help=f"do not add it to {DOCUMENT}")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows = measure(Path(folder), rounds=arguments.rounds, entries=arguments.entries)
    section = as_markdown(rows, "python -m simulations.benchmarks.ledger")
    print(section)
    if not arguments.no_document:
        add_to_document(section)


if __name__ == "__main__":
    main()
