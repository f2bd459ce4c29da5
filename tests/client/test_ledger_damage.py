"""A ledger that was loosened, edited, replaced or restored, or whose disk fails: it is found out, or said."""
# ruff: noqa: F401, F811 (fixtures of another file)

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from client.ledger import Ledger
from client.ledger_errors import LedgerDamagedError, LedgerDiskError, LedgerError
from client.private_files import LoosePermissionsError
from common.privacy.faults import ReceiptError
from common.privacy.receipts import Receipt
from tests.client.ledger_cases import TRAINING, anchor, folder, ledger, reserve


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
    with pytest.raises(LedgerDamagedError, match="put the newest copy"):
        Ledger.open(folder)


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
