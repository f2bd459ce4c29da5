"""The ledger alone: what it grants, refuses, keeps and repeats. Processes that die or race are next door."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import client.ledger
import client.ledger_reading
from client.ledger import Ledger
from client.ledger_errors import (
    BudgetRefusedError,
    ForeignProcessError,
    LedgerBusyError,
    LedgerDamagedError,
    LedgerDiskError,
    LedgerError,
    LedgerExistsError,
    LedgerMissingError,
)
from client.ledger_reading import LedgerReader, Reservation
from client.private_files import LoosePermissionsError
from common.privacy.anchors import Countersignature
from common.privacy.certificates import ClosingCertificate
from common.privacy.chain import Chain
from common.privacy.entries import Genesis
from common.privacy.faults import ReceiptError
from common.privacy.mechanisms import Event, GaussianSum, PoissonSubsampledGaussian
from common.privacy.receipts import Receipt, Request, check_receipt, check_receipt_alone
from common.privacy.renyi import cap_of, charge_of, least_charge

TRAINING = PoissonSubsampledGaussian(0.05, 1.0, 10)
PLAN, MODEL = "a" * 64, "b" * 64
SERVER = Ed25519PrivateKey.from_private_bytes(b"v" * 32)
OTHER_SERVER = Ed25519PrivateKey.from_private_bytes(b"w" * 32)


def nonce_of(run: str, round_: int) -> str:
    return hashlib.sha256(f"{run}/{round_}".encode()).hexdigest()


def reserve(
    ledger: Ledger, round_: int, attempt: int = 0, *, run: str = "run-a", event: Event = TRAINING
) -> Reservation:
    return ledger.reserve(
        run=run,
        round=round_,
        attempt=attempt,
        event=event,
        plan_hash=PLAN,
        model_hash=MODEL,
        nonce=nonce_of(run, round_),
        clip_norm=1.0,
        normaliser=50.0,
        learning_rate=0.1,
    )


def anchor(ledger: Ledger, server: Ed25519PrivateKey = SERVER) -> Countersignature:
    """What a server would send after having verified the head."""
    status = ledger.status()
    return Countersignature.sign(server, site_key_id=ledger.key_id, seq=status.seq, head=status.head)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "site" / "ledger"


@pytest.fixture
def ledger(folder: Path) -> Iterator[Ledger]:
    with Ledger.create(folder, epsilon=8, delta=1e-5, typical_plan=[TRAINING]) as made:
        yield made


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


@pytest.mark.parametrize("name", ["", "ledger.sqlite", "signing-key.pem", "high-water"])
def test_files_that_others_may_read_are_refused(ledger: Ledger, folder: Path, name: str) -> None:
    ledger.disconnect()
    path = folder / name
    path.chmod(path.stat().st_mode | 0o040)
    with pytest.raises(LoosePermissionsError, match="chmod"):
        Ledger.open(folder)


def test_a_foreign_key_is_refused(ledger: Ledger, folder: Path, tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "other", epsilon=8, delta=1e-5, typical_plan=[TRAINING]):
        pass
    (folder / "signing-key.pem").write_bytes((tmp_path / "other" / "signing-key.pem").read_bytes())
    with pytest.raises(ReceiptError) as caught:
        Ledger.open(folder)
    assert caught.value.reason == "unknown_key"


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET entry = x'00' WHERE seq = 1",
        "DELETE FROM entries WHERE seq = 1",
        "UPDATE reservations SET round = 9",
        "DELETE FROM outcomes",
        "UPDATE outbox SET \"update\" = x'00'",
        "DELETE FROM anchors",
    ],
)
def test_entries_are_only_ever_added(ledger: Ledger, folder: Path, statement: str) -> None:
    ledger.release(reserve(ledger, 1), b"x")
    ledger.anchor(anchor(ledger))
    with (
        sqlite3.connect(folder / "ledger.sqlite") as database,
        pytest.raises(sqlite3.IntegrityError, match="added"),
    ):
        database.execute(statement)


def _tampered(folder: Path, statement: str) -> Ledger:
    """The ledger after an administrator dropped the triggers and edited the database."""
    with sqlite3.connect(folder / "ledger.sqlite") as database:
        for (trigger,) in database.execute(
            "SELECT name FROM sqlite_master WHERE type = 'trigger'"
        ).fetchall():
            database.execute(f"DROP TRIGGER {trigger}")
        database.executescript(f"PRAGMA foreign_keys = OFF; {statement}")
    database.close()
    return Ledger.open(folder)


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        (
            "UPDATE entries SET entry = CAST(replace(entry, '0.05', '0.01') AS BLOB)",
            "bad_signature",
        ),
        (
            "DELETE FROM entries WHERE seq = 1; UPDATE entries SET seq = seq - 1 WHERE seq > 1",
            "ledger_damaged",
        ),
        ("DELETE FROM entries WHERE seq = 2", "ledger_damaged"),
        ("UPDATE reservations SET attempt = attempt + 7", "ledger_damaged"),
        ("DELETE FROM outcomes", "ledger_damaged"),
        ("DELETE FROM anchors", "ledger_damaged"),
        ("UPDATE outbox SET \"update\" = x'00'", "wrong_digest"),
        ("UPDATE outbox SET receipt = (SELECT receipt FROM outbox LIMIT 1)", "ledger_damaged"),
        ("PRAGMA user_version = 99", "ledger_version"),
        ("DROP TABLE outcomes; DROP TABLE entries", "ledger_damaged"),
    ],
)
def test_an_edited_database_is_found_out(ledger: Ledger, folder: Path, statement: str, reason: str) -> None:
    for round_ in range(3):
        ledger.release(reserve(ledger, round_), b"x" * (round_ + 1))
    ledger.anchor(anchor(ledger))
    reserve(ledger, 3)
    ledger.verify()
    ledger.disconnect()
    with (
        pytest.raises((ReceiptError, LedgerError)) as caught,
        _tampered(folder, statement) as it,
    ):
        it.verify()
    assert isinstance(caught.value, ReceiptError | LedgerError)
    assert caught.value.reason == reason


def test_a_file_that_is_no_database_is_refused(ledger: Ledger, folder: Path) -> None:
    ledger.disconnect()
    (folder / "ledger.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(LedgerDamagedError, match="restore"):
        Ledger.open(folder)


def test_a_writer_that_waits_too_long_is_told_so(ledger: Ledger, folder: Path) -> None:
    with Ledger.open(folder) as other:
        other._db.execute("PRAGMA busy_timeout = 50")
        ledger._db.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerBusyError):
            reserve(other, 1)
        ledger._db.rollback()
        reserve(other, 1)


def test_a_full_disk_is_said_and_neither_spends_nor_gives_back(ledger: Ledger) -> None:
    open_, before = reserve(ledger, 1), ledger.status()
    (pages,) = ledger._db.execute("PRAGMA page_count").fetchone()
    ledger._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(LedgerDiskError, match="disk is full or fails: free space"):
        ledger.release(open_, b"x" * 100_000)
    for round_ in range(2, 200):
        try:
            reserve(ledger, round_)
        except LedgerDiskError:
            break
    else:
        pytest.fail("the disk never was full")
    ledger._db.execute("PRAGMA max_page_count = 100000")
    found = ledger.status()
    assert found.charges[0] == before.charges[0]
    assert found.spent == sum(charge.reserve.charge for charge in found.charges)
    ledger.release(open_, b"x" * 100_000)
    ledger.verify()


def test_a_commit_that_fails_leaves_nothing_behind(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    reservation = reserve(ledger, 1)
    before = ledger.status()
    with monkeypatch.context() as patch:
        patch.setattr(Receipt, "to_bytes", _out_of_disk)  # late in the transaction
        with pytest.raises(OSError, match="disk"):
            ledger.release(reservation, b"x")
    assert ledger.status() == before
    assert ledger.outbox("run-a", 1) is None
    ledger.release(reservation, b"x")
    ledger.verify()


def _out_of_disk(_: Receipt) -> bytes:
    raise OSError("no space left on the disk")


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


def test_a_restored_backup_is_found_out_by_the_anchor(ledger: Ledger, folder: Path) -> None:
    ledger.release(reserve(ledger, 1), b"x")
    backup, mark = ledger._db.serialize(), (folder / "high-water").read_bytes()
    ledger.release(reserve(ledger, 2), b"y")
    head = anchor(ledger)
    ledger.disconnect()
    for leftover in folder.glob("ledger.sqlite-*"):
        leftover.unlink()
    (folder / "ledger.sqlite").write_bytes(backup)
    (folder / "high-water").write_bytes(mark)  # else that refuses it: see test_high_water
    with Ledger.open(folder) as restored:
        restored.verify()  # by itself it looks well: this is what anchors are for
        with pytest.raises(ReceiptError) as caught:
            restored.verify(anchored_heads={head.seq: head.head})
        assert caught.value.reason == "truncated"
        reserve(restored, 2)
        restored.burn(reserve(restored, 3))
        with pytest.raises(ReceiptError) as caught:
            restored.verify(anchored_heads={head.seq: head.head})
        assert caught.value.reason == "fork"


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
