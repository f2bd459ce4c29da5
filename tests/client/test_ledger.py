"""The ledger alone: what it grants, refuses, keeps and repeats. Damage, and processes that die, are next door."""
# ruff: noqa: F401, F811 (fixtures of another file)

from __future__ import annotations

import dataclasses
import os
import sqlite3
import stat
from pathlib import Path

import pytest

import client.ledger
import client.ledger_reading
from client.ledger import Ledger
from client.ledger_errors import (
    BudgetRefusedError,
    ForeignProcessError,
    LedgerBusyError,
    LedgerError,
    LedgerExistsError,
    LedgerMissingError,
)
from client.ledger_reading import LedgerReader
from common.privacy.anchors import Countersignature
from common.privacy.certificates import ClosingCertificate
from common.privacy.chain import Chain
from common.privacy.entries import Genesis
from common.privacy.faults import ReceiptError
from common.privacy.mechanisms import GaussianSum
from common.privacy.receipts import Request, check_receipt, check_receipt_alone
from common.privacy.renyi import cap_of, charge_of, least_charge
from tests.client.ledger_cases import (
    MODEL,
    OTHER_SERVER,
    PLAN,
    SERVER,
    TRAINING,
    anchor,
    folder,
    ledger,
    nonce_of,
    reserve,
)


def test_a_new_ledger_promises_what_was_asked(ledger: Ledger, folder: Path) -> None:
    genesis = ledger.genesis
    assert (genesis.epsilon, genesis.delta, genesis.order, genesis.mode) == (8.0, 1e-5, 3, "site")
    assert genesis.cap == cap_of(8, 1e-5, 3)
    assert ledger.verify().spent == 0
    for path in [folder, *folder.iterdir()]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path.name
    assert b"PRIVATE" not in (folder / "ledger.sqlite").read_bytes()


def test_the_cap_admits_the_rounds_of_the_lab_and_not_one_more(ledger: Ledger) -> None:
    for round_ in range(44):
        assert ledger.fits(TRAINING)
        reserve(ledger, round_)
    before = ledger.status()
    assert not ledger.fits(TRAINING)
    with pytest.raises(BudgetRefusedError, match="left") as caught:
        reserve(ledger, 44)
    assert caught.value.reason == "budget_refused"
    assert ledger.status() == before  # a refusal writes nothing
    assert ledger.verify().spent == 44 * charge_of(TRAINING, 3)
    assert 0.97 < before.share <= 1
    reserve(ledger, 44, event=GaussianSum(1000.0))  # something smaller still fits


def test_one_budget_for_all_runs_and_openings(ledger: Ledger, folder: Path) -> None:
    for round_ in range(22):
        reserve(ledger, round_, run="model-one")
    ledger.disconnect()
    with Ledger.open(folder) as again:
        for round_ in range(22):
            reserve(again, round_, run="model-two")
        with pytest.raises(BudgetRefusedError):
            reserve(again, 0, run="model-three")


def test_a_receipt_satisfies_a_server_that_holds_the_genesis(ledger: Ledger) -> None:
    chain = Chain.begin(ledger.entries()[0], key_id=ledger.key_id)
    for round_ in range(3):
        update = os.urandom(3000)
        receipt = ledger.release(reserve(ledger, round_), update)
        request = Request("run-a", round_, nonce_of("run-a", round_), PLAN, MODEL)
        chain = check_receipt(receipt, update, request, chain)
        head = chain.head
        ledger.anchor(Countersignature.sign(SERVER, site_key_id=chain.key_id, seq=head.seq, head=head.hash))
        assert check_receipt_alone(receipt, update).charge == charge_of(TRAINING, 3)
        assert len(receipt.entries) <= 3  # begins after the anchored head, not at the beginning
    assert chain.report().released == 3


def test_receipts_serve_every_server_that_anchored(ledger: Ledger) -> None:
    ledger.anchor(anchor(ledger, OTHER_SERVER))  # holds entry 0, and nothing since
    ledger.release(reserve(ledger, 0), b"x")
    ledger.anchor(anchor(ledger))
    assert ledger.release(reserve(ledger, 1), b"y").entries[0].seq == 1
    assert ledger.release(reserve(ledger, 2), b"y", anchored_seq=3).entries[0].seq == 4
    late = reserve(ledger, 3)
    assert ledger.release(late, b"y", anchored_seq=10**6).entries[0] == late.entry


def test_the_outbox_repeats_the_same_bytes(ledger: Ledger, folder: Path) -> None:
    update = os.urandom(5000)
    receipt = ledger.release(reserve(ledger, 7), update)
    assert ledger.outbox("run-a", 7) == (update, receipt)
    assert ledger.outbox("run-a", 7, nonce=nonce_of("run-a", 7)) == (update, receipt)
    assert ledger.outbox("run-a", 7, nonce="0" * 64) is None
    assert ledger.outbox("run-a", 8) is None
    assert ledger.outbox("run-b", 7) is None
    with Ledger.open(folder) as again:
        sent = again.outbox("run-a", 7)
        assert sent is not None
        assert sent[0] == update
        assert sent[1].to_bytes() == receipt.to_bytes()
        assert again.forget("run-b") == 0
        assert again.forget("run-a") == 1
    assert ledger.outbox("run-a", 7) is None
    assert ledger.verify().released == 1


def test_a_round_is_reserved_once_an_attempt(ledger: Ledger) -> None:
    first = reserve(ledger, 1)
    with pytest.raises(ReceiptError) as caught:
        reserve(ledger, 1)
    assert caught.value.reason == "second_reservation"
    assert ledger.next_attempt("run-a", 1) == 1
    assert ledger.next_attempt("run-a", 2) == 0
    ledger.burn(first)
    reserve(ledger, 1, attempt=1)
    assert ledger.status().spent == 2 * charge_of(TRAINING, 3)  # the burnt one stays charged


@pytest.mark.parametrize(
    ("before", "then", "reason"),
    [
        ("release", "release", "second_release"),
        ("burn", "release", "burnt_reservation"),
        ("burn", "burn", "burnt_reservation"),
        ("release", "burn", "released_reservation"),
    ],
)
def test_a_reservation_is_used_once(ledger: Ledger, before: str, then: str, reason: str) -> None:
    reservation = reserve(ledger, 1)

    def use(how: str) -> None:
        if how == "release":
            ledger.release(reservation, os.urandom(10))
        else:
            ledger.burn(reservation)

    use(before)
    status = ledger.status()
    with pytest.raises(ReceiptError) as caught:
        use(then)
    assert caught.value.reason == reason
    assert ledger.status() == status
    ledger.verify()


def test_releases_need_a_reservation_of_this_ledger_that_covers_them(ledger: Ledger, tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "other", epsilon=8, delta=1e-5, typical_plan=[TRAINING]) as other:
        stranger = reserve(other, 1)
    with pytest.raises(ReceiptError) as caught:
        ledger.release(stranger, b"x")
    assert caught.value.reason == "missing_reservation"
    with pytest.raises(ReceiptError) as caught:
        ledger.release(reserve(ledger, 1), b"x", content="statistics")
    assert caught.value.reason == "wrong_content"
    metrics = reserve(ledger, 2, event=GaussianSum(20.0))
    assert ledger.release(metrics, b"x", content="metrics").release.content == "metrics"


def test_a_certificate_begins_where_every_server_has_seen_the_ledger(ledger: Ledger) -> None:
    """So that each can join it to its copy, though it never saw what burnt since; and it stays the same for ever."""
    ledger.release(reserve(ledger, 1), b"x")
    ledger.anchor(anchor(ledger, OTHER_SERVER))
    ledger.release(reserve(ledger, 2), b"x")
    late = anchor(ledger)
    ledger.anchor(late)
    reserve(ledger, 3)
    certificate = ledger.withdraw()
    assert [entry.seq for entry in certificate.entries] == [3, 4, 5, 6, 7, 8, 9]
    assert [entry.kind for entry in certificate.entries][-3:] == ["reserve", "burnt", "close"]
    held = Chain.begin(ledger.entries()[0]).extended(ledger.entries()[:3])
    assert held.extended(certificate.entries).closed
    ledger.anchor(anchor(ledger, OTHER_SERVER))
    ledger.anchor(anchor(ledger))
    assert ledger.withdraw() == certificate


def test_values_out_of_bounds_are_refused_before_anything_is_written(ledger: Ledger) -> None:
    with pytest.raises(ReceiptError) as caught:
        reserve(ledger, 1, run="no spaces")
    assert caught.value.reason == "bad_field"
    assert ledger.status().seq == 0


def test_nothing_is_reserved_after_withdrawal(ledger: Ledger, folder: Path) -> None:
    ledger.release(reserve(ledger, 1), b"x")
    open_one = reserve(ledger, 2)
    certificate = ledger.withdraw()
    assert ClosingCertificate.from_bytes(certificate.to_bytes()).verify().spent == 2 * charge_of(TRAINING, 3)
    assert ledger.withdraw() == certificate
    for attempt in (lambda: reserve(ledger, 3), lambda: ledger.release(open_one, b"x")):
        with pytest.raises(ReceiptError) as caught:
            attempt()
        assert caught.value.reason in {"after_close", "burnt_reservation"}
    assert not ledger.fits(TRAINING)
    ledger.anchor(anchor(ledger))  # the server may still countersign the end
    ledger.disconnect()
    with Ledger.open(folder) as again:
        with pytest.raises(ReceiptError) as caught:
            reserve(again, 3)
        assert caught.value.reason == "after_close"
        report = again.verify()
        assert (report.closed, report.released, report.burnt, report.open) == (True, 1, 1, 0)


def test_anchors_are_kept_once_and_forged_ones_refused(ledger: Ledger) -> None:
    reserve(ledger, 1)
    good = anchor(ledger)
    assert ledger.anchor(good) == ledger.anchor(good)
    reserve(ledger, 2)
    for bad, reason in (
        (dataclasses.replace(good, head="0" * 64), "bad_anchor"),
        (Countersignature.sign(SERVER, site_key_id="0" * 64, seq=1, head=good.head), "bad_anchor"),
        (Countersignature.sign(SERVER, site_key_id=ledger.key_id, seq=1, head="0" * 64), "fork"),
        (Countersignature.sign(SERVER, site_key_id=ledger.key_id, seq=99, head=good.head), "truncated"),
    ):
        with pytest.raises(ReceiptError) as caught:
            ledger.anchor(bad)
        assert caught.value.reason == reason
    assert ledger.verify(anchored_heads={good.seq: good.head}).anchors == 1


def test_what_is_written_at_once_is_there_together_or_not_at_all(ledger: Ledger, folder: Path) -> None:
    reserve(ledger, 1)
    good, before = anchor(ledger), ledger.verify()
    with pytest.raises(KeyboardInterrupt), ledger.at_once():  # noqa: PT012
        ledger.anchor(good)
        reserve(ledger, 2)
        raise KeyboardInterrupt
    assert ledger.verify() == before
    with ledger.at_once():
        ledger.anchor(good)
        reserve(ledger, 2)
        with Ledger.open(folder) as other:
            assert other.verify() == before  # nobody sees half of it
    after = ledger.verify()
    assert (after.anchors, after.reserved) == (before.anchors + 1, 2)


def test_what_is_refused_within_leaves_the_rest_as_it_is(ledger: Ledger) -> None:
    reserve(ledger, 1)
    forged = dataclasses.replace(anchor(ledger), head="0" * 64)
    with ledger.at_once():
        reserve(ledger, 2)
        for attempt in (
            lambda: reserve(ledger, 2),
            lambda: reserve(ledger, 3, event=GaussianSum(0.5)),
            lambda: ledger.anchor(forged),
        ):
            with pytest.raises((ReceiptError, LedgerError)):
                attempt()
        ledger.release(reserve(ledger, 4), b"update")
    report = ledger.verify()
    assert (report.reserved, report.released, report.anchors) == (3, 1, 0)
    assert ledger.outbox("run-a", 4) is not None


def test_a_clock_that_goes_backwards_is_refused(folder: Path) -> None:
    days = ["2026-03-01"]
    with Ledger.create(
        folder, epsilon=8, delta=1e-5, typical_plan=[TRAINING], today=lambda: days[-1]
    ) as ledger:
        days.append("2026-03-05")
        reserve(ledger, 1)
        days.append("2026-03-04")
        with pytest.raises(ReceiptError) as caught:
            reserve(ledger, 2)
        assert caught.value.reason == "clock_backwards"
        days.append("2026-03-05")
        reserve(ledger, 2)
        ledger.verify()


def test_a_ledger_is_never_made_over_another(ledger: Ledger, folder: Path) -> None:
    with pytest.raises(LedgerExistsError):
        Ledger.create(folder, epsilon=80, delta=1e-5, typical_plan=[TRAINING])
    assert sorted(path.name for path in folder.parent.iterdir()) == ["ledger"]
    with pytest.raises(ValueError, match="no budget"):
        Ledger.create(folder.parent / "b", epsilon=0.001, delta=1e-9, typical_plan=[TRAINING])
    with pytest.raises(LedgerMissingError):
        Ledger.open(folder.parent / "b")


def test_a_writer_that_waits_too_long_is_told_so(ledger: Ledger, folder: Path) -> None:
    with Ledger.open(folder) as other:
        other._db.execute("PRAGMA busy_timeout = 50")
        ledger._db.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerBusyError):
            reserve(other, 1)
        ledger._db.rollback()
        reserve(other, 1)


NEARLY_FREE = GaussianSum(1e6)


def asked(ledger: Ledger, most: int) -> int:
    """How many nearly free questions are granted, of so many."""
    with ledger.at_once():
        for number in range(most):
            fits = ledger.fits(NEARLY_FREE)
            try:
                reservation = reserve(ledger, number, event=NEARLY_FREE)
            except BudgetRefusedError:
                return number if not fits else -1
            assert fits
            assert reservation.body.charge == least_charge(ledger.genesis.cap)
    return most


def test_a_thousand_nearly_free_questions_are_not_granted(ledger: Ledger) -> None:
    assert charge_of(NEARLY_FREE, ledger.genesis.order) < least_charge(ledger.genesis.cap) / 1e6
    assert asked(ledger, 1100) == 999
    assert ledger.verify().reserved == 999
    with pytest.raises(BudgetRefusedError, match="the least that a request is charged"):
        reserve(ledger, 999, event=NEARLY_FREE)


def test_without_the_least_charge_they_would_be(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the ledger as it was before. What it wrote still verifies, as it covers what was asked."""
    for module in (client.ledger, client.ledger_reading):
        monkeypatch.setattr(module, "charge_at", lambda event, order, cap: charge_of(event, order))
    monkeypatch.setattr("tests.client.test_ledger.least_charge", lambda cap: 1)
    assert asked(ledger, 1100) == 1100
    monkeypatch.undo()
    report = ledger.verify()
    assert report.spent == 1100
    assert reserve(ledger, 2000, event=NEARLY_FREE).body.charge == least_charge(report.cap)
    ledger.verify()


def test_an_auditor_reads_a_copy_without_the_key(ledger: Ledger) -> None:
    ledger.release(reserve(ledger, 1), b"x")
    copy = sqlite3.connect(":memory:")
    ledger._db.backup(copy)
    reader = LedgerReader(copy)
    assert reader.verify() == ledger.verify()
    assert reader.status().events == (TRAINING,)
    copy.close()


def test_recovery_leaves_the_living_alone(ledger: Ledger, folder: Path) -> None:
    living = reserve(ledger, 1)
    other = Ledger.open(folder)
    abandoned = reserve(other, 2)
    assert ledger.recover() == []
    other.disconnect()
    assert ledger.recover() == [abandoned]
    assert ledger.recover() == []
    ledger.release(living, b"x")
    status = ledger.status()
    assert [charge.outcome for charge in status.charges] == ["released", "burnt"]
    assert (status.burnt, status.open) == (1, 0)
    assert status.spent == 2 * charge_of(TRAINING, 3)
    assert len(list((folder / "presences").iterdir())) == 1


def test_a_ledger_does_not_pass_through_a_fork(ledger: Ledger) -> None:
    ledger._process += 1  # as it looks from a child
    with pytest.raises(ForeignProcessError):
        reserve(ledger, 1)
    ledger._process -= 1
    reserve(ledger, 1)


def test_a_dataset_commitment_and_the_trust_mode_stand_in_the_genesis(folder: Path) -> None:
    with Ledger.create(
        folder, epsilon=2, delta=1e-6, typical_plan=[TRAINING], dataset_commitment="c" * 64, mode="secagg"
    ) as ledger:
        body = ledger.entries()[0].body
        assert isinstance(body, Genesis)
        assert (body.dataset_commitment, body.mode) == ("c" * 64, "secagg")
