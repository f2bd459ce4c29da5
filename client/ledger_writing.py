"""How a ledger's entries are written: signed onto the head, committed to disk all together or not at all, then marked.

What is written, and when it may be, is `ledger.py`'s business.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.high_water import HighWater, Mark
from client.ledger_errors import ForeignProcessError, LedgerBehindError, LedgerBusyError
from client.ledger_reading import LedgerReader
from client.ledger_store import UNMARKED, disk_error, is_disk_fault, set_version, version_of
from client.private_files import sync_file
from common.privacy.entries import Anchor, AnyBody, Entry
from common.privacy.faults import AfterCloseError
from common.privacy.receipts import Receipt

DATABASE, KEY, MARK = "ledger.sqlite", "signing-key.pem", "high-water"
PUT_BACK = (
    "nothing was spent: stop the site, put the newest whole copy of the ledger's folder back, and start it again "
    "(docs/site.md)"
)


class LedgerWriter(LedgerReader):
    """A ledger that can be written to, with its key and its high-water mark; a thread or process shares none.

    Attributes:
        FILES: names of the database, the key and the high-water mark in a ledger's folder.
    """

    FILES: ClassVar[tuple[str, ...]] = (DATABASE, KEY, MARK)

    def __init__(self, folder: Path, connection: sqlite3.Connection, key: Ed25519PrivateKey) -> None:
        """Of an open database, its folder and its key."""
        super().__init__(connection)
        self._folder, self._key = folder, key
        self._process = os.getpid()
        self._mark = HighWater(folder / MARK, key)
        self._appended = self._owed = False

    # --- the only way in

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """What is written within is committed to disk together, at the end, and marked; where it raises, nothing of it.

        Raises:
            LedgerBusyError, LedgerDiskError, ForeignProcessError: at its beginning or its end.
        """
        with self._exclusive():
            yield

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One writer at a time, over all processes; committed to disk at the end, or nothing at all.

        The high-water mark follows the commit and not the other way round: a crash between the two leaves a ledger
        ahead of its mark, of which nothing was told to anyone, and never one that is behind it.

        Within another one it is a part of that, which is undone by itself where it raises.
        """
        if self._process != os.getpid():
            raise ForeignProcessError("this ledger was opened before a fork: open it again in this process")
        if self._db.in_transaction:
            with self._part():
                yield
            return
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if is_disk_fault(error):
                raise disk_error(self._folder) from error
            raise LedgerBusyError("another process has held the ledger for a minute: end it") from error
        try:
            yield
            self._db.commit()
        except BaseException as error:  # whatever it was, nothing half done may stay
            self._db.rollback()
            self._appended = self._owed = False
            if isinstance(error, sqlite3.Error) and is_disk_fault(error):
                raise disk_error(self._folder) from error
            raise
        if self._appended or self._owed:
            self.check_mark(surely=True)

    @contextmanager
    def _part(self) -> Iterator[None]:
        before = self._appended
        self._db.execute("SAVEPOINT part")
        try:
            yield
        except BaseException as error:
            if self._db.in_transaction:  # a full disk may have ended the whole of it
                self._db.execute("ROLLBACK TO part")
                self._db.execute("RELEASE part")
            self._appended = before
            if isinstance(error, sqlite3.Error) and is_disk_fault(error):
                raise disk_error(self._folder) from error
            raise
        self._db.execute("RELEASE part")

    def _append(self, body: AnyBody) -> Entry:
        head = self._head()
        if self._closed() and not isinstance(body, Anchor):
            raise AfterCloseError("the site has withdrawn: nothing more may be reserved or released")
        entry = Entry.sign(self._key, seq=head.seq + 1, prev=head.hash, body=body)
        self._db.execute(
            "INSERT INTO entries (seq, hash, kind, entry) VALUES (?, ?, ?, ?)",
            (entry.seq, entry.hash, entry.kind, entry.to_bytes()),
        )
        self._appended = True
        return entry

    # --- the high-water mark

    def check_mark(self, *, surely: bool = False) -> None:
        """Whether this ledger still holds all that it ever committed; the mark catches up with it where it does.

        Args:
            surely: something may leave hereafter: the mark is on the disk when this returns (`HighWater.follow`).

        Raises:
            LedgerBehindError: entries are missing, or others stand in their place.
            MarkLostError: nobody can tell.
            LedgerDiskError: the mark cannot be written.
        """
        try:
            self._mark.follow(self._newest_since, surely=surely)
        except OSError as error:
            raise disk_error(self._folder) from error
        if surely:
            self._appended = self._owed = False

    def _make_mark(self) -> None:
        try:
            self._sync_journal()
            self._mark.create(self._head())
        except OSError as error:
            raise disk_error(self._folder) from error

    def _newest_since(self, mark: Mark) -> Entry:
        held = self._db.execute("SELECT hash FROM entries WHERE seq = ?", (mark.seq,)).fetchone()
        newest = self._head()
        if held is None:
            raise LedgerBehindError(
                f"the ledger ends at entry {newest.seq}, but its high-water mark says that it held entry {mark.seq}: "
                f"its journal was lost, or an old copy of its database was put back; {PUT_BACK}"
            )
        if held[0] != mark.head:
            raise LedgerBehindError(
                f"the ledger holds another entry {mark.seq} than its high-water mark says: an old copy of its "
                f"database was put back, and went on; {PUT_BACK}"
            )
        if newest.seq > mark.seq and not self._appended:
            self._sync_journal()
        return newest

    def _sync_journal(self) -> None:
        """Others' commits are on the disk before the mark is: who was killed at a commit may not have synced it."""
        with suppress(FileNotFoundError):  # SQLite holds no lock on it, so that closing it here drops none
            sync_file(self._folder / f"{DATABASE}-wal")

    def _meet_mark(self) -> None:
        """At opening. A ledger from before there were marks gets its own, once; from then on it must have one."""
        if version_of(self._db) == UNMARKED:
            with self._exclusive():
                if version_of(self._db) == UNMARKED:
                    if not self._mark.path.exists():  # else a crash came between the mark and the version
                        self._make_mark()
                    self.check_mark()
                    set_version(self._db)
            self._db.execute(
                "PRAGMA wal_checkpoint(TRUNCATE)"
            )  # a lost journal must not take the version back
        self.check_mark()

    def outbox(self, run: str, round: int, *, nonce: str | None = None) -> tuple[bytes, Receipt] | None:
        """As `LedgerReader.outbox`; what it gives is under the high-water mark, whichever process committed it."""
        found = super().outbox(run, round, nonce=nonce)
        if found is not None:
            if self._db.in_transaction:  # own entries may still be undone: the mark waits for the commit
                self._owed = True
            else:
                self.check_mark(surely=True)
        return found
