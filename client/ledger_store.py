"""The ledger's database: its tables, and how SQLite must be opened so that a commit is on the disk.

Entries, reservations, outcomes and anchors are only ever added: triggers refuse to change or delete a row.
Those triggers guard against our own mistakes; against the site itself stand signatures and anchors.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from client.ledger_errors import RESTORE, LedgerDamagedError, LedgerDiskError, LedgerVersionError
from client.private_files import write_private
from common.privacy.entries import Entry

VERSION, UNMARKED = 2, 1
"""Of the database: that of today, and that of ledgers from before there was a high-water mark."""

_PATIENCE_SECONDS = 60

_TABLES = """
CREATE TABLE entries (
    seq INTEGER PRIMARY KEY, hash TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, entry BLOB NOT NULL
) STRICT;
CREATE INDEX entries_by_kind ON entries (kind, seq);
CREATE TABLE reservations (
    hash TEXT PRIMARY KEY REFERENCES entries (hash), seq INTEGER NOT NULL,
    run TEXT NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL, nonce TEXT NOT NULL,
    presence TEXT NOT NULL, UNIQUE (run, round, attempt)
) STRICT;
CREATE TABLE outcomes (
    reservation TEXT PRIMARY KEY REFERENCES reservations (hash), kind TEXT NOT NULL,
    entry TEXT NOT NULL UNIQUE REFERENCES entries (hash)
) STRICT;
CREATE TABLE anchors (
    server_key TEXT NOT NULL, seq INTEGER NOT NULL, entry INTEGER NOT NULL UNIQUE REFERENCES entries (seq),
    PRIMARY KEY (server_key, seq)
) STRICT;
CREATE TABLE outbox (
    reservation TEXT PRIMARY KEY REFERENCES outcomes (reservation),
    "update" BLOB NOT NULL, receipt BLOB NOT NULL
) STRICT;
"""


def _only_added(table: str, *forbidden: str) -> str:
    return "".join(
        f"CREATE TRIGGER {table}_no_{what.lower()} BEFORE {what} ON {table} "
        f"BEGIN SELECT RAISE(ABORT, '{table} are only ever added'); END;\n"
        for what in forbidden
    )


_TRIGGERS = (
    _only_added("entries", "UPDATE", "DELETE")
    + _only_added("reservations", "UPDATE", "DELETE")
    + _only_added("outcomes", "UPDATE", "DELETE")
    + _only_added("anchors", "UPDATE", "DELETE")
    + _only_added("outbox", "UPDATE")
)


def _connect(database: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(database, timeout=_PATIENCE_SECONDS, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA fullfsync = ON")
        connection.execute("PRAGMA foreign_keys = ON")
    except sqlite3.DatabaseError as error:
        connection.close()
        if is_disk_fault(error):
            raise disk_error(database.parent) from error
        raise LedgerDamagedError(f"{database} is no database: {RESTORE}") from error
    return connection


_DISK_FAULTS = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}


def is_disk_fault(error: sqlite3.Error) -> bool:
    """Whether SQLite could not write, as on a full disk; what it had written before is in order."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in _DISK_FAULTS


def disk_error(folder: Path) -> LedgerDiskError:
    """For the person who can free the disk."""
    return LedgerDiskError(
        f"the ledger in {folder} cannot be written, because its disk is full or fails: free space there. What was "
        "charged stays charged, and nothing is released meanwhile; the site goes on by itself at its next round"
    )


def connect(database: Path) -> sqlite3.Connection:
    """A connection whose commits survive a loss of power; transactions are begun by hand.

    There is no checkpoint after each commit: the journal is durable, SQLite moves it into the database when the last
    connection closes (a site's does after each request), and a checkpoint doubles what a commit costs.

    Raises:
        LedgerVersionError: the database is of another version.
        LedgerDamagedError: it is no database.
    """
    connection = _connect(database)
    try:
        version = version_of(connection)
    except sqlite3.Error as error:
        connection.close()
        if is_disk_fault(error):
            raise disk_error(database.parent) from error
        raise
    if version not in (VERSION, UNMARKED):
        connection.close()
        if not version:
            raise LedgerDamagedError(f"{database} is a database without a ledger: {RESTORE}")
        raise LedgerVersionError(f"the ledger is of version {version}; this program knows {VERSION} only")
    return connection


def version_of(connection: sqlite3.Connection) -> int:
    """The version that the database says it has."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)


def set_version(connection: sqlite3.Connection) -> None:
    """Makes it a database of today's version; part of the transaction that is open."""
    connection.execute(f"PRAGMA user_version = {VERSION}")


def initialise(database: Path, genesis: Entry) -> None:
    """A new database, readable by its owner only, that holds the genesis."""
    write_private(database, b"")
    connection = _connect(database)
    try:
        connection.executescript(f"BEGIN;{_TABLES}{_TRIGGERS}PRAGMA user_version = {VERSION};COMMIT;")
        connection.execute(
            "INSERT INTO entries (seq, hash, kind, entry) VALUES (0, ?, ?, ?)",
            (genesis.hash, genesis.kind, genesis.to_bytes()),
        )
    finally:
        connection.close()
