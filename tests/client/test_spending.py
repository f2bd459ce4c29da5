"""What a ledger's charges come to in epsilon: all of them, over all runs, by accountants called here directly."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from opacus.accountants import PRVAccountant, RDPAccountant

import common.privacy.spending
from client.ledger import Ledger
from client.ledger_reading import LedgerStatus
from common.privacy.accountants import ContradictionError
from common.privacy.anchors import Countersignature
from common.privacy.mechanisms import Event, GaussianSum, PoissonSubsampledGaussian
from common.privacy.renyi import NANO, charge_at
from common.privacy.spending import Spending, spending, up_to
from server.registry import Registry
from tests.common.privacy.direct_accounting import by_dp_accounting, by_opacus

STEPS = PoissonSubsampledGaussian(0.05, 1.5, 10)
OTHER_STEPS = PoissonSubsampledGaussian(0.02, 2.0, 25)
SUM = GaussianSum(6.0)
CHARGES: tuple[tuple[str, Event, str], ...] = (
    ("run-a", SUM, "released"),
    ("run-a", STEPS, "released"),
    ("run-a", STEPS, "burnt"),
    ("run-b", OTHER_STEPS, "released"),
    ("run-b", SUM, "burnt"),
    ("run-b", STEPS, "open"),
)
SERVERS = tuple(Ed25519PrivateKey.from_private_bytes(each * 32) for each in (b"v", b"w"))


def charge(ledger: Ledger, number: int, run: str, event: Event, outcome: str) -> None:
    reservation = ledger.reserve(
        run=run, round=number, attempt=0, event=event, plan_hash="a" * 64, model_hash="b" * 64,
        nonce=f"{number:032x}", clip_norm=1.0, normaliser=50.0, learning_rate=0.1,
    )  # fmt: skip
    if outcome == "burnt":
        ledger.burn(reservation)
    elif outcome == "released":
        ledger.release(reservation, b"noise")


def countersigned(ledger: Ledger, server: Ed25519PrivateKey) -> None:
    found = ledger.status()
    ledger.anchor(Countersignature.sign(server, site_key_id=ledger.key_id, seq=found.seq, head=found.head))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterable[Ledger]:
    """Two runs of two servers, charges released, burnt and open."""
    with Ledger.create(tmp_path / "ledger", epsilon=8, delta=1e-6, typical_plan=[STEPS] * 20) as made:
        for number, (run, event, outcome) in enumerate(CHARGES):
            charge(made, number, run, event, outcome)
            if outcome == "released":
                countersigned(made, SERVERS[run == "run-b"])
        made.verify()
        yield made


EVERY = [event for _, event, _ in CHARGES]


@pytest.fixture(scope="module")
def truth() -> tuple[float, float, float]:
    """Of all charges: dp-accounting's PLD, Opacus' PRV and RDP."""
    return (
        by_dp_accounting(EVERY, 1e-6),
        by_opacus(PRVAccountant, EVERY, 1e-6),
        by_opacus(RDPAccountant, EVERY, 1e-6),
    )


def test_what_was_spent_is_every_charge_of_every_run(
    ledger: Ledger, truth: tuple[float, float, float]
) -> None:
    found = ledger.status().spending()
    pld, prv, rdp = truth
    assert found.epsilon == pytest.approx(pld, abs=2e-3)
    assert found.epsilon is not None
    assert found.epsilon <= prv <= found.epsilon + 0.03
    assert found.epsilon <= rdp
    assert (found.runs, found.charges, found.note) == (2, len(CHARGES), "")
    assert (found.cap, found.delta) == (8.0, 1e-6)


def test_the_filters_bound_is_the_conversion_of_what_was_charged_at_the_one_order(ledger: Ledger) -> None:
    """By dp-accounting's own conversion of a Renyi divergence."""
    from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon

    found, status = ledger.status().spending(), ledger.status()
    order = status.genesis.order
    charged = sum(charge_at(event, order, status.cap) for event in EVERY)
    epsilon, _ = compute_epsilon([order], [charged / NANO], 1e-6)
    assert found.by_filter == pytest.approx(epsilon, rel=1e-9)
    assert found.share == charged / status.cap
    assert found.epsilon is not None
    assert found.epsilon < found.by_filter < found.cap


def test_nothing_charged_is_nothing_spent(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "ledger", epsilon=8, delta=1e-6, typical_plan=[STEPS]) as made:
        found = made.status().spending()
    assert (found.epsilon, found.by_filter, found.share, found.runs, found.right) == (0.0, 0.0, 0.0, 0, 0.5)
    assert "0 of 8" in found.sentences()[0]


def one_run(status: LedgerStatus) -> LedgerStatus:
    return dataclasses.replace(
        status, charges=tuple(each for each in status.charges if each.reserve.run == "run-b")
    )


def no_burnt(status: LedgerStatus) -> LedgerStatus:
    return dataclasses.replace(
        status, charges=tuple(each for each in status.charges if each.outcome == "released")
    )


@pytest.mark.parametrize("view", [one_run, no_burnt])
def test_a_view_that_forgets_charges_gets_no_figure(
    ledger: Ledger, view: Callable[[LedgerStatus], LedgerStatus]
) -> None:
    with pytest.raises(ContradictionError, match="no epsilon is computed from a part of a ledger"):
        view(ledger.status()).spending()


@pytest.mark.parametrize("view", [one_run, no_burnt])
def test_a_view_that_forgets_charges_and_their_cost_is_noticed(
    ledger: Ledger, truth: tuple[float, float, float], view: Callable[[LedgerStatus], LedgerStatus]
) -> None:
    """The fault of the whole: what the check above misses, the figure shows."""
    kept = view(ledger.status())
    reserves = [each.reserve for each in kept.charges]
    found = spending(kept.genesis, reserves, sum(each.charge for each in reserves))
    assert found.epsilon is not None
    assert found.epsilon < truth[0] - 0.05


def test_the_server_says_the_same_of_what_receipts_told_it(ledger: Ledger, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    entries = ledger.entries()
    registry.enroll("north", entries[0])
    assert registry.chain(ledger.key_id).spending().epsilon == 0.0
    registry.accept(registry.chain(ledger.key_id).extended(entries))
    assert registry.chain(ledger.key_id).spending() == ledger.status().spending()
    charge(ledger, 99, "run-c", STEPS, "burnt")  # no receipt tells of it yet
    seen, whole = registry.chain(ledger.key_id).spending().epsilon, ledger.status().spending().epsilon
    assert seen is not None
    assert whole is not None
    assert seen < whole


def test_equal_charges_cost_no_more_time_than_one(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = common.privacy.spending.published_epsilon

    def counted(events: Sequence[Event], delta: float) -> object:
        asked.append(len(events))
        return original(events, delta)

    monkeypatch.setattr(common.privacy.spending, "published_epsilon", counted)
    common.privacy.spending._by_pld.cache_clear()
    first = ledger.status().spending()
    assert [ledger.status().spending() for _ in range(3)] == [first] * 3
    assert asked == [len(CHARGES)]  # `budget --watch` asks once for a head, and not at each look


def different(status: LedgerStatus, mechanisms: int) -> Spending:
    """Of so many different mechanisms, charged in place of the ledger's own."""
    draw = random.Random(mechanisms)
    reserves = [
        dataclasses.replace(
            status.charges[0].reserve,
            event=PoissonSubsampledGaussian(draw.uniform(0.001, 0.05), draw.uniform(20, 60), 5),
            charge=status.cap // 1000,
        )
        for _ in range(mechanisms)
    ]
    return spending(status.genesis, reserves, mechanisms * (status.cap // 1000))


def test_many_different_mechanisms_get_a_figure_that_says_who_did_not_confirm_it(ledger: Ledger) -> None:
    found = different(ledger.status(), 40)
    assert found.epsilon is not None
    assert found.rdp is not None
    assert found.epsilon <= found.rdp
    assert found.prv is None
    assert "confirmed by RDP alone" in found.note
    assert any("confirmed by RDP alone" in line for line in found.sentences())


def test_where_the_pld_would_take_minutes_the_filters_bound_stands_alone_and_says_so(ledger: Ledger) -> None:
    found = different(ledger.status(), 301)
    assert (found.epsilon, found.odds, found.rdp) == (None, None, None)
    assert 0 < found.by_filter < found.cap
    assert "301 different mechanisms" in found.note
    assert "no figure by the PLD" in found.sentences()[0]
    assert found.right == pytest.approx(
        (1 + 1e-6 * 2.718281828**-found.by_filter) / (1 + 2.718281828**-found.by_filter)
    )
    assert json.loads(json.dumps(found.as_json()))["epsilon_pld"] is None


def test_accountants_that_contradict_one_another_leave_the_filters_bound(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    common.privacy.spending._by_pld.cache_clear()
    monkeypatch.setattr("common.privacy.accountants.epsilon_prv", lambda *_: 0.01)
    found = ledger.status().spending()
    common.privacy.spending._by_pld.cache_clear()
    assert found.epsilon is None
    assert found.by_filter > 0
    assert "PLD <= PRV fails" in found.note


def test_a_bound_is_rounded_up_where_it_is_shown() -> None:
    assert [up_to(each) for each in (0.0, 1.2341, 1.234, 7.9999)] == ["0.000", "1.235", "1.234", "8.000"]
