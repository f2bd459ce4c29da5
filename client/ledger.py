"""A site's privacy ledger: every charge, durably recorded before the data is touched, never refunded.

One ledger serves all runs, all models and all federations on a site's data. It is an SQLite database of
signed, hash-chained entries (their meaning: `common/privacy/entries.py` and `chain.py`), to which entries are
only ever added, and an outbox in which each update's bytes stand with its receipt; beside it stands the mark of
its newest entry (`high_water.py`), so that one which lost its end is refused. Training is not known
here, nor the network. It must lie on a local disk: SQLite's write-ahead log does not work over a network.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.high_water import HighWater
from client.ledger_errors import (
    RESTORE,
    BudgetRefusedError,
    LedgerDamagedError,
    LedgerExistsError,
    LedgerMissingError,
)
from client.ledger_reading import Reservation
from client.ledger_store import (
    connect,
    disk_error,
    initialise,
    is_disk_fault,
)
from client.ledger_writing import DATABASE, KEY, MARK, PUT_BACK, LedgerWriter
from client.private_files import (
    FOLDER_MODE,
    Presence,
    check_private,
    create_key,
    load_key,
    sync_folder,
)
from common.privacy.anchors import Countersignature
from common.privacy.certificates import ClosingCertificate
from common.privacy.entries import (
    NO_PREVIOUS,
    Anchor,
    Burnt,
    Close,
    Entry,
    Genesis,
    Release,
    Reserve,
    public_key_of,
)
from common.privacy.faults import (
    AfterCloseError,
    BadAnchorError,
    BurntReservationError,
    ClockBackwardsError,
    ForkError,
    ReleasedReservationError,
    SecondReleaseError,
    SecondReservationError,
    TruncatedError,
    UnknownKeyError,
)
from common.privacy.mechanisms import Event, GaussianSum
from common.privacy.receipts import Receipt
from common.privacy.renyi import NANO, RenyiFilter, best_order, cap_of, charge_at, least_charge
from common.privacy.rules import check_content

_PRESENCES = "presences"


def utc_day() -> str:
    """Today in UTC, the finest time that an entry tells."""
    return datetime.now(UTC).date().isoformat()


class Ledger(LedgerWriter):
    """An open ledger. Several processes may each have the same one open; a thread or process shares none."""

    def __init__(
        self, folder: Path, connection: sqlite3.Connection, key: Ed25519PrivateKey, today: Callable[[], str]
    ) -> None:
        """For `create` and `open` only."""
        super().__init__(folder, connection, key)
        self._today = today
        self._presence: Presence | None = None

    # --- making and opening

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        epsilon: float,
        delta: float,
        typical_plan: Sequence[Event],
        dataset_commitment: str | None = None,
        mode: str = "site",
        today: Callable[[], str] = utc_day,
    ) -> Self:
        """A new ledger with a new signing key, in a folder that does not exist yet or is empty.

        Args:
            folder: on a local disk; made with mode 700.
            epsilon, delta: the guarantee for all that will ever be released from this data.
            typical_plan: events of one typical run; the filter's order is the one that admits most of them.
            dataset_commitment: salted (SHA-256, hex), to be opened on the site only. Never a bare digest.
            mode: trust mode, "site" or "secagg".
            today: the clock; for tests.

        Raises:
            LedgerExistsError: the folder holds something.
            ValueError: the goal leaves no budget, or a value is out of bounds.
        """
        order = best_order(typical_plan, epsilon, delta)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise LedgerExistsError(f"{folder} is not empty: budgets do not reset")
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.{os.urandom(4).hex()}")
        partial.mkdir(mode=FOLDER_MODE)
        (partial / _PRESENCES).mkdir(mode=FOLDER_MODE)
        key = create_key(partial / KEY)
        genesis = Genesis(
            unit="user",
            adjacency="add_or_remove_one",
            mode=mode,
            epsilon=float(epsilon),
            delta=float(delta),
            order=order,
            cap=cap_of(epsilon, delta, order),
            public_key=public_key_of(key),
            dataset_commitment=dataset_commitment,
            day=today(),
        )
        first = Entry.sign(key, seq=0, prev=NO_PREVIOUS, body=genesis)
        initialise(partial / DATABASE, first)
        HighWater(partial / MARK, key).create(first)
        try:
            partial.rename(folder)  # whole or not at all
        except OSError as error:
            shutil.rmtree(partial)
            raise LedgerExistsError(f"{folder} came into being meanwhile: budgets do not reset") from error
        sync_folder(folder.parent)
        return cls.open(folder, today=today)

    @classmethod
    def open(cls, folder: Path, *, today: Callable[[], str] = utc_day) -> Self:
        """The ledger in a folder; its genesis, head and high-water mark are verified, the whole by `verify`.

        Raises:
            LedgerMissingError: there is none.
            LoosePermissionsError: others may read or write the folder, the database, the key or the mark.
            UnknownKeyError: the key file is not the ledger's key.
            LedgerBehindError: the database lacks entries that it held before.
            MarkLostError: the high-water mark is lost.
            LedgerDamagedError, ReceiptError: genesis or head do not verify.
            LedgerVersionError: it was made by a version that this program does not know.
            LedgerDiskError: the disk is full or fails.
        """
        return cls._opened(folder, today, cls._meet_mark)

    @classmethod
    def renew_mark(cls, folder: Path) -> Entry:
        """Makes the mark of a ledger that lost it, on its administrator's word that this is the newest copy.

        Returns:
            The entry that is marked.

        Raises:
            LedgerExistsError: there is a mark; if it is not this ledger's, it must be moved away first.
            LedgerDamagedError, ReceiptError: the ledger does not verify.
            LedgerError: what `open` raises.
        """

        def renewed(ledger: Ledger) -> None:
            ledger.verify()
            with ledger._exclusive():
                if ledger._mark.path.exists():
                    raise LedgerExistsError(
                        "the ledger has a high-water mark, which is not made anew: if it is not this ledger's, or "
                        "cannot be read, move the file ledger/high-water away first"
                    )
                ledger._make_mark()

        with cls._opened(folder, utc_day, renewed) as ledger:
            return ledger._head()

    @classmethod
    def check_files(cls, folder: Path) -> None:
        """Refuses a folder that lacks what a ledger is made of, but for its mark, without opening anything.

        Raises:
            LedgerMissingError, LedgerDamagedError: names the file that is not there, or is empty.
            LoosePermissionsError: others may read one.
        """
        for path in (folder, *(folder / name for name in cls.FILES)):
            if path.exists():
                check_private(path)
            elif path.name != MARK:
                what = "it is not there" if path == folder else f"{path.name} is not there"
                raise LedgerMissingError(f"there is no ledger in {folder}: {what}: {RESTORE}")
            if path.name in cls.FILES and path.name != MARK and not path.stat().st_size:
                raise LedgerDamagedError(f"{path} is empty, and was not: {RESTORE}")

    @classmethod
    def _opened(cls, folder: Path, today: Callable[[], str], meet: Callable[[Self], None]) -> Self:
        cls.check_files(folder)
        key, connection = load_key(folder / KEY), connect(folder / DATABASE)
        try:
            ledger = cls(folder, connection, key, today)
            if ledger.public_key != public_key_of(key):
                raise UnknownKeyError("the key file is not the key that this ledger began with")
            ledger.check_head()
            meet(ledger)
        except BaseException as error:
            connection.close()
            if isinstance(error, sqlite3.Error):
                if is_disk_fault(error):
                    raise disk_error(folder) from error
                raise LedgerDamagedError(f"{folder / DATABASE} cannot be read: {RESTORE}") from error
            raise
        return ledger

    def disconnect(self) -> None:
        """Leaves the ledger. Reservations of this object that are open count as abandoned from here on."""
        self._db.close()
        if self._presence is not None and self._process == os.getpid():
            self._presence.leave()
            self._presence = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disconnect()

    # --- what is written

    def reserve(
        self,
        *,
        run: str,
        round: int,
        attempt: int,
        event: Event,
        plan_hash: str,
        model_hash: str,
        nonce: str,
        clip_norm: float,
        normaliser: float,
        learning_rate: float | None = None,
    ) -> Reservation:
        """Charges an event, durably, before the data is touched for it: at least a thousandth of the cap.

        See `entries.Reserve` for the fields.

        Raises:
            BudgetRefusedError: it does not fit; nothing is written.
            SecondReservationError: this run, round and attempt is reserved already; ask `outbox`, or take
                `next_attempt`.
            AfterCloseError: the site has withdrawn.
            ClockBackwardsError: today is before the last entry's day.
            BadFieldError: a value out of bounds.
        """
        with self._exclusive():
            if self._closed():
                raise AfterCloseError("the site has withdrawn: nothing more may be reserved or released")
            filter_ = RenyiFilter(self.genesis.order, self.genesis.cap, self._spent())
            charge = charge_at(event, filter_.order, filter_.cap)
            if not filter_.fits(charge):
                left = (filter_.cap - filter_.spent) / NANO
                least = ", the least that a request is charged" * (charge == least_charge(filter_.cap))
                raise BudgetRefusedError(
                    f"the release costs {charge / NANO:.4g} of Renyi divergence at order {filter_.order}{least}, "
                    f"but only {left:.4g} are left: lower its cost, or let other sites go on without this one"
                )
            taken = "SELECT 1 FROM reservations WHERE run = ? AND round = ? AND attempt = ?"
            if self._db.execute(taken, (run, round, attempt)).fetchone():
                raise SecondReservationError(f"run {run} round {round} attempt {attempt} is reserved already")
            body = Reserve(
                genesis=self._genesis.hash,
                run=run,
                round=round,
                attempt=attempt,
                event=event,
                charge=charge,
                spent=filter_.charged(charge).spent,
                plan_hash=plan_hash,
                model_hash=model_hash,
                nonce=nonce,
                clip_norm=clip_norm,
                normaliser=normaliser,
                learning_rate=learning_rate,
                day=self._day(),
            )
            entry = self._append(body)
            self._db.execute(
                "INSERT INTO reservations (hash, seq, run, round, attempt, nonce, presence)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (entry.hash, entry.seq, run, round, attempt, nonce, self._present()),
            )
        return Reservation(entry, body)

    def release(
        self,
        reservation: Reservation,
        update: bytes,
        *,
        content: str | None = None,
        anchored_seq: int | None = None,
    ) -> Receipt:
        """Commits an update's bytes and its receipt together; only what this returns, or `outbox`, is sent.

        Args:
            reservation: from `reserve`, of this ledger.
            update: the noisy bytes.
            content: "update", "statistics" or "metrics"; None: "update" for DP-SGD, else "statistics".
            anchored_seq: the head that the receiver says it holds, so that the receipt can begin after it;
                None: the oldest among the last anchors of all servers that anchored here.

        Raises:
            SecondReleaseError, BurntReservationError: the reservation is used up.
            MissingReservationError: it is not this ledger's.
            WrongContentError: the mechanism reserved does not cover the content.
        """
        if content is None:
            content = "statistics" if isinstance(reservation.body.event, GaussianSum) else "update"
        release = Release(reservation.hash, content, hashlib.sha256(update).hexdigest(), len(update))
        check_content(release, reservation.body)
        with self._exclusive():
            match self._outcome(reservation):
                case Release.kind:
                    raise SecondReleaseError("a second noising is a second release: reserve another attempt")
                case Burnt.kind:
                    raise BurntReservationError("this reservation was burnt: reserve another attempt")
            entry = self._append(release)
            held = self._last_anchored() if anchored_seq is None else anchored_seq
            first = min(reservation.entry.seq, max(0, held + 1))
            receipt = Receipt(self._genesis, tuple(self.entries(first)))
            self._settle(reservation, entry)
            self._db.execute(
                'INSERT INTO outbox (reservation, "update", receipt) VALUES (?, ?, ?)',
                (reservation.hash, update, receipt.to_bytes()),
            )
        return receipt

    def burn(self, reservation: Reservation) -> None:
        """Gives a reservation up: it stays charged, and nothing may be released on it.

        Raises:
            ReleasedReservationError, BurntReservationError, MissingReservationError.
        """
        with self._exclusive():
            match self._outcome(reservation):
                case Release.kind:
                    raise ReleasedReservationError("this reservation was released")
                case Burnt.kind:
                    raise BurntReservationError("this reservation was burnt before")
            self._settle(reservation, self._append(Burnt(reservation.hash)))

    def recover(self) -> list[Reservation]:
        """Burns the open reservations whose process is gone: to be called when a site starts.

        Reservations of processes that are alive, this one included, are left to them.
        """
        abandoned, presences = [], self._folder / _PRESENCES
        with self._exclusive():  # presences are entered under the same lock, so none is half made
            gone = {path.name for path in presences.iterdir() if not Presence.alive(presences, path.name)}
            for reservation, presence in self._open():
                if presence in gone or not Presence.alive(presences, presence):
                    self._settle(reservation, self._append(Burnt(reservation.hash)))
                    abandoned.append(reservation)
        return abandoned

    def anchor(self, countersignature: Countersignature) -> Entry:
        """Keeps a server's countersignature over an earlier head; the same one twice stands once.

        Raises:
            BadAnchorError: it does not verify, or is for another site.
            TruncatedError: it is over an entry after this ledger's last: an old copy was put back.
            ForkError: it is over another entry than this ledger holds: an old copy was put back, and used.
        """
        countersignature.check()
        if countersignature.site_key_id != self.key_id:
            raise BadAnchorError("the countersignature is for another site")
        body = Anchor.of(countersignature)
        with self._exclusive():
            held = self._db.execute("SELECT hash FROM entries WHERE seq = ?", (body.seq,)).fetchone()
            if held is None:
                raise TruncatedError(
                    f"the server countersigned entry {body.seq} of this ledger, but it ends at {self._head().seq}: it "
                    f"was restored from an old backup, and lacks what was charged since; {PUT_BACK}"
                )
            if held[0] != body.head:
                raise ForkError(
                    f"the server countersigned another entry {body.seq} than this ledger holds: an old copy of it was "
                    f"restored and went on; {PUT_BACK}"
                )
            kept = self._db.execute(
                "SELECT entry FROM anchors WHERE server_key = ? AND seq = ?", (body.server_key, body.seq)
            ).fetchone()
            if kept is not None:
                return self._entry(kept[0])
            entry = self._append(body)
            self._db.execute(
                "INSERT INTO anchors (server_key, seq, entry) VALUES (?, ?, ?)",
                (body.server_key, body.seq, entry.seq),
            )
            return entry

    def withdraw(self) -> ClosingCertificate:
        """Closes the ledger for ever: open reservations burn, nothing more may be reserved or released.

        Withdrawing again gives the same certificate.
        """
        with self._exclusive():
            if not self._closed():
                for reservation, _ in self._open():
                    self._settle(reservation, self._append(Burnt(reservation.hash)))
                self._append(Close(spent=self._spent(), day=self._day()))
            close = self._last_of_kind(Close.kind)
            if close is None:
                raise LedgerDamagedError("the closing entry is missing")
            first = max(1, self._last_anchored(before=close.seq) + 1)
            entries = self.entries(first)[: close.seq - first + 1]  # anchors may follow the close
        return ClosingCertificate(self._genesis, tuple(entries))

    def forget(self, run: str) -> int:
        """Drops a finished run's updates from the outbox (their entries stay); how many were dropped."""
        with self._exclusive():
            runs = "SELECT hash FROM reservations WHERE run = ?"
            return self._db.execute(f"DELETE FROM outbox WHERE reservation IN ({runs})", (run,)).rowcount

    # --- what the writers share

    def _present(self) -> str:
        if self._presence is None:
            self._presence = Presence(self._folder / _PRESENCES)
        return self._presence.name

    def _settle(self, reservation: Reservation, outcome: Entry) -> None:
        self._db.execute(
            "INSERT INTO outcomes (reservation, kind, entry) VALUES (?, ?, ?)",
            (reservation.hash, outcome.kind, outcome.hash),
        )

    def _day(self) -> str:
        today, last = self._today(), self.genesis.day
        for kind in (Reserve.kind, Close.kind):
            body = getattr(self._last_of_kind(kind), "body", None)
            if isinstance(body, Reserve | Close):
                last = max(last, body.day)
        if today < last:
            raise ClockBackwardsError(f"today is {today}, but the ledger saw {last}: set the clock right")
        return today
