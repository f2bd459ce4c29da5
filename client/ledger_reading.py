"""Reading a ledger: its entries, what was charged, the outbox, and the full verification. Writes nothing.

An auditor with a copy of the database and no key reads it with this; the site's own `Ledger` adds writing.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from client.ledger_errors import LedgerDamagedError
from common.privacy.chain import Chain, ChainReport, verified_chain
from common.privacy.entries import Anchor, Burnt, Close, Entry, Genesis, Release, Reserve
from common.privacy.faults import MissingReservationError, WrongPreviousHashError
from common.privacy.fields import LARGEST_COUNT
from common.privacy.mechanisms import Event
from common.privacy.receipts import Receipt, check_update
from common.privacy.renyi import RenyiFilter, charge_at, least_charge
from common.privacy.rules import check_genesis
from common.privacy.spending import Spending, spending


@dataclass(frozen=True, slots=True)
class Reservation:
    """A durable charge: the signed RESERVE entry, and its hash, by which a release refers to it."""

    entry: Entry
    body: Reserve

    @property
    def hash(self) -> str:
        """Hash of the RESERVE entry."""
        return self.entry.hash


@dataclass(frozen=True, slots=True)
class Charge:
    """One reservation (its `charge` and running total `spent` in nano-units) and what became of it.

    `outcome` is "released", "burnt" or "open".
    """

    reserve: Reserve
    outcome: str


@dataclass(frozen=True, slots=True)
class LedgerStatus:
    """What `fedtide site status` shows. Amounts in nano-units of Renyi divergence at the genesis' order.

    The guarantee is (genesis.epsilon, genesis.delta), whatever happens next; `share` of its budget is spent.
    """

    genesis: Genesis
    key_id: str
    seq: int
    head: str
    cap: int
    spent: int
    charges: tuple[Charge, ...]
    closed: bool

    @property
    def share(self) -> float:
        """Spent share of the Renyi budget, in [0, 1]."""
        return self.spent / self.cap

    @property
    def more_like_the_last(self) -> int | None:
        """How many requests like the last one fit yet; None before the first, and after a withdrawal."""
        if self.closed or not self.charges:
            return None
        return (self.cap - self.spent) // max(self.charges[-1].reserve.charge, least_charge(self.cap))

    @property
    def events(self) -> tuple[Event, ...]:
        """Every event charged, in order: what accountants recompute epsilons from."""
        return tuple(charge.reserve.event for charge in self.charges)

    def spending(self) -> Spending:
        """What all charges come to in epsilon, over all runs.

        Raises:
            ContradictionError: the charges do not add up to what is spent.
        """
        return spending(self.genesis, [charge.reserve for charge in self.charges], self.spent)

    @property
    def burnt(self) -> int:
        """Reservations that were charged and never released."""
        return sum(charge.outcome == "burnt" for charge in self.charges)

    @property
    def open(self) -> int:
        """Reservations neither released nor burnt."""
        return sum(charge.outcome == "open" for charge in self.charges)


def _reservation(data: bytes) -> Reservation:
    entry = Entry.from_bytes(data)
    if not isinstance(entry.body, Reserve):
        raise LedgerDamagedError(f"entry {entry.seq} is listed as a reservation, but is none")
    return Reservation(entry, entry.body)


class LedgerReader:
    """Reads of one open database; each is consistent in itself."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        """Takes a connection from `ledger_store.connect`.

        Raises:
            LedgerDamagedError, ReceiptError: the genesis is missing or does not verify.
        """
        self._db = connection
        self._genesis = self._entry(0)
        self.genesis = check_genesis(self._genesis)

    @property
    def public_key(self) -> str:
        """The signing key's public half, in hex: what a server enrols."""
        return self.genesis.public_key

    @property
    def key_id(self) -> str:
        """SHA-256 of the public key, in hex."""
        return self._genesis.key_id

    def entries(self, first: int = 0) -> list[Entry]:
        """The entries from a sequence number on."""
        rows = self._db.execute("SELECT entry FROM entries WHERE seq >= ? ORDER BY seq", (first,))
        return [Entry.from_bytes(data) for (data,) in rows]

    def outbox(self, run: str, round: int, *, nonce: str | None = None) -> tuple[bytes, Receipt] | None:
        """What was released for a round, for sending or sending again: always the same bytes.

        Args:
            run, round: of the reservation.
            nonce: only what answers this request of the server; None: the latest attempt.
        """
        row = self._db.execute(
            'SELECT outbox."update", receipt FROM outbox JOIN reservations AS r ON r.hash = reservation '
            "WHERE r.run = ? AND r.round = ? AND r.nonce = coalesce(?, r.nonce) "
            "ORDER BY r.attempt DESC LIMIT 1",
            (run, round, nonce),
        ).fetchone()
        return None if row is None else (row[0], Receipt.from_bytes(row[1]))

    def next_attempt(self, run: str, round: int) -> int:
        """The smallest attempt above all that this round has reserved."""
        (last,) = self._db.execute(
            "SELECT MAX(attempt) FROM reservations WHERE run = ? AND round = ?", (run, round)
        ).fetchone()
        return 0 if last is None else last + 1

    def fits(self, event: Event) -> bool:
        """Whether a reservation of this event would be granted now; another process may be faster."""
        filter_ = RenyiFilter(self.genesis.order, self.genesis.cap, self._spent())
        return not self._closed() and filter_.fits(charge_at(event, filter_.order, filter_.cap))

    def status(self) -> LedgerStatus:
        """What was charged, and what is left."""
        with self._snapshot():
            rows = self._db.execute(
                "SELECT entries.entry, outcomes.kind FROM reservations JOIN entries USING (hash)"
                " LEFT JOIN outcomes ON outcomes.reservation = reservations.hash ORDER BY reservations.seq"
            ).fetchall()
            head, closed = self._head(), self._closed()
        words = {Release.kind: "released", Burnt.kind: "burnt", None: "open"}
        charges = tuple(Charge(_reservation(data).body, words[outcome]) for data, outcome in rows)
        return LedgerStatus(
            genesis=self.genesis,
            key_id=self.key_id,
            seq=head.seq,
            head=head.hash,
            cap=self.genesis.cap,
            spent=charges[-1].reserve.spent if charges else 0,
            charges=charges,
            closed=closed,
        )

    def check_head(self) -> None:
        """A quick look: the last entry is signed and follows the one before it.

        Raises:
            LedgerDamagedError, BadSignatureError, WrongPreviousHashError.
        """
        (count,) = self._db.execute("SELECT COUNT(*) FROM entries").fetchone()
        head = self._head()
        if head.seq != count - 1:
            raise LedgerDamagedError(f"the ledger ends at entry {head.seq}, but holds {count}")
        head.check_signature(self.public_key)
        if head.seq and head.prev != self._entry(head.seq - 1).hash:
            raise WrongPreviousHashError("the last entry does not follow the one before it")

    def verify(self, *, anchored_heads: Mapping[int, str] | None = None) -> ChainReport:
        """The whole: every entry, signature, charge and anchor, and the tables beside them.

        Args:
            anchored_heads: sequence number -> hash, as a server or an auditor holds them.

        Raises:
            ReceiptError: its subclass names the first fault in the chain.
            LedgerDamagedError: a table contradicts the chain.
        """
        with self._snapshot():
            chain = verified_chain(self.entries(), anchored_heads=anchored_heads)
            self._check_tables(chain)
        return chain.report()

    def _check_tables(self, chain: Chain) -> None:
        listed = self._db.execute("SELECT hash, seq, run, round, attempt, nonce FROM reservations")
        wanted = {
            (entry.hash, entry.seq, body.run, body.round, body.attempt, body.nonce)
            for entry in chain.reservations.values()
            if isinstance(body := entry.body, Reserve)
        }
        if set(listed) != wanted:
            raise LedgerDamagedError("the table of reservations contradicts the entries")
        outcomes = set(self._db.execute("SELECT reservation, kind, entry FROM outcomes"))
        if outcomes != {(key, entry.kind, entry.hash) for key, entry in chain.outcomes.items()}:
            raise LedgerDamagedError("the table of outcomes contradicts the entries")
        anchors = set(self._db.execute("SELECT server_key, seq, entry FROM anchors"))
        if anchors != {
            (body.server_key, body.seq, entry.seq)
            for entry in chain.entries
            if isinstance(body := entry.body, Anchor)
        }:
            raise LedgerDamagedError("the table of anchors contradicts the entries")
        for reservation, update, receipt in self._db.execute(
            'SELECT reservation, "update", receipt FROM outbox'
        ):
            outcome = chain.outcomes.get(reservation)
            if outcome is None or Receipt.from_bytes(receipt).entries[-1] != outcome:
                raise LedgerDamagedError("an update in the outbox has no receipt in the chain")
            if isinstance(outcome.body, Release):
                check_update(outcome.body, update)

    # --- single facts

    @contextmanager
    def _snapshot(self) -> Iterator[None]:
        """All reads within see one state of the ledger."""
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            self._db.rollback()

    def _entry(self, seq: int) -> Entry:
        row = self._db.execute("SELECT entry FROM entries WHERE seq = ?", (seq,)).fetchone()
        if row is None:
            raise LedgerDamagedError(f"entry {seq} is missing")
        return Entry.from_bytes(row[0])

    def _head(self) -> Entry:
        (data,) = self._db.execute("SELECT entry FROM entries ORDER BY seq DESC LIMIT 1").fetchone()
        return Entry.from_bytes(data)

    def _last_of_kind(self, kind: str) -> Entry | None:
        row = self._db.execute(
            "SELECT entry FROM entries WHERE kind = ? ORDER BY seq DESC LIMIT 1", (kind,)
        ).fetchone()
        return None if row is None else Entry.from_bytes(row[0])

    def _spent(self) -> int:
        last = self._last_of_kind(Reserve.kind)
        return last.body.spent if last is not None and isinstance(last.body, Reserve) else 0

    def _closed(self) -> bool:
        return self._last_of_kind(Close.kind) is not None

    def _last_anchored(self, before: int = LARGEST_COUNT) -> int:
        """A head that every server which anchored here holds, by the anchors before an entry; -1: none."""
        lasts = self._db.execute(
            "SELECT MAX(seq) FROM anchors WHERE entry < ? GROUP BY server_key", (before,)
        ).fetchall()
        return min((seq for (seq,) in lasts), default=-1)

    def _outcome(self, reservation: Reservation) -> str | None:
        row = self._db.execute(
            "SELECT outcomes.kind FROM reservations LEFT JOIN outcomes ON reservation = hash WHERE hash = ?",
            (reservation.hash,),
        ).fetchone()
        if row is None:
            raise MissingReservationError("this ledger holds no such reservation")
        kind: str | None = row[0]
        return kind

    def _open(self) -> list[tuple[Reservation, str]]:
        """Open reservations, each with the presence it was made under."""
        rows = self._db.execute(
            "SELECT entries.entry, presence FROM reservations JOIN entries USING (hash)"
            " WHERE hash NOT IN (SELECT reservation FROM outcomes) ORDER BY reservations.seq"
        )
        return [(_reservation(data), presence) for data, presence in rows]
