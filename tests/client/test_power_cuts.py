"""A ledger whose power is cut between every two writes: it opens, and gives nothing back; one that lost more refuses.

The process at work is `python -m tests.client.test_power_cuts`, under ptrace (`power_cuts.py`).
"""

from __future__ import annotations

import os
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from client import high_water
from client.high_water import HighWater
from client.ledger import Ledger
from client.ledger_errors import LedgerBehindError, LedgerError
from client.ledger_reading import Reservation
from common.privacy.entries import Entry
from common.privacy.faults import ReceiptError
from tests.client.ledger_cases import TRAINING, reserve
from tests.client.power_cuts import Cut, State, TracingForbiddenError, be_traced, cuts

DATABASE, JOURNAL, MARK = "ledger.sqlite", "ledger.sqlite-wal", "high-water"
_MEMORY = Path(
    "/dev/shm"
)  # much is opened; what survives is decided in power_cuts.py, not by the disk under it


# --- the process at work


def work(folder: Path) -> None:
    """Rounds as a site answers them, each with its ledger opened anew, and two within one opening."""
    for first in (1, 3):
        with Ledger.open(folder) as ledger:
            for round_ in (first, first + 1):
                with ledger.at_once():
                    ledger.recover()
                    reservation = reserve(ledger, round_)
                ledger.release(reservation, b"update %d" % round_, anchored_seq=reservation.entry.seq - 1)
                send(ledger, reservation)
            ledger.burn(reserve(ledger, first, attempt=1))


def send_again(folder: Path) -> None:
    """As for a server that asks again for what it may have missed."""
    with Ledger.open(folder) as ledger:
        for charge in ledger.status().charges:
            if ledger.outbox("run-a", charge.reserve.round) is not None:
                os.write(1, b"%d\n" % charge.reserve.spent)


def send(ledger: Ledger, reservation: Reservation) -> None:
    """The update leaves: from here on what it cost must never be given back."""
    assert ledger.outbox("run-a", reservation.body.round) is not None
    os.write(1, b"%d\n" % reservation.body.spent)


def fault(name: str) -> None:
    """Breaks the order of writes on purpose, so that the tests show that they would see it."""
    if name == "sends before it marks":
        Ledger.check_mark = lambda self, surely=False: None  # type: ignore[method-assign]
    if name == "does not sync its mark":
        high_water._sync = lambda file: None
    if name == "trusts what a killed process wrote":
        Ledger._sync_journal = lambda self: None  # type: ignore[method-assign]
    if name == "marks before it commits":
        right = Ledger._append

        def early(self: Ledger, body: Any) -> Entry:
            entry = right(self, body)
            self._mark.follow(self._newest_since)
            return entry

        Ledger._append = early  # type: ignore[method-assign]


# --- what a cut leaves of it


@contextmanager
def somewhere() -> Iterator[Path]:
    """The place for a ledger's folder."""
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as name:
        yield Path(name) / "ledger"


def put(state: State, folder: Path) -> None:
    (folder / "presences").mkdir(parents=True)
    folder.chmod(0o700)
    for file, data in state.items():
        (folder / file).write_bytes(data)
        (folder / file).chmod(0o600)


def traced(folder: Path, what: str, planted: str, synced: State | None = None) -> tuple[Cut, ...]:
    command = ["-m", "tests.client.test_power_cuts", what, str(folder), planted]
    try:
        return tuple(cuts(folder, command, synced))
    except TracingForbiddenError as error:
        pytest.skip(f"this machine lets nobody trace a process: {error}")


@cache
def recorded(start: str, planted: str = "") -> tuple[Cut, ...]:
    with somewhere() as folder:
        Ledger.create(folder, epsilon=8, delta=1e-5, typical_plan=[TRAINING]).disconnect()
        if start == "from before there was a mark":
            (folder / MARK).unlink()
            with sqlite3.connect(folder / DATABASE) as database:
                database.execute("PRAGMA user_version = 1")
            database.close()
        return traced(folder, "work", planted)


def spent_in(state: State) -> int:
    """What a ledger says was spent when it is opened after the cut, and that it goes on from there.

    Raises:
        LedgerError, ReceiptError: it refuses.
    """
    with somewhere() as folder:
        put(state, folder)
        with Ledger.open(folder) as ledger:
            spent = ledger.status().spent
            ledger.recover()
            ledger.release(reserve(ledger, 99), b"x")
        with Ledger.open(folder) as ledger:
            assert ledger.status().spent > spent
        return spent


def given_back(cut: Cut, states: Iterator[State], *, may_refuse: bool) -> bool:
    """Whether in any of the states something that had left is no longer counted.

    Raises:
        LedgerError, ReceiptError: a ledger refuses, and may not.
    """
    for state in states:
        try:
            if spent_in(state) < cut.left:
                return True
        except (LedgerError, ReceiptError):
            if not may_refuse:
                raise
    return False


def honest(cut: Cut) -> Iterator[State]:
    """The disk kept what was synced, and of the rest what it liked."""
    return cut.states()


def lossy(cut: Cut, first: Cut) -> Iterator[State]:
    """The journal is lost, or the database file is that of the beginning, or both."""
    lost: tuple[bytes | None, ...] = (None,)
    yield from cut.states(**{JOURNAL: lost})
    yield from cut.states(**{JOURNAL: lost, DATABASE: first.files[DATABASE][:1]})


STARTS = ["as it is made", "from before there was a mark"]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.timeout(300)
def test_a_cut_between_any_two_writes_gives_nothing_back_and_the_ledger_goes_on(start: str) -> None:
    seen = recorded(start)
    assert len(seen) > 100
    assert len({cut.left for cut in seen}) == 5, "some of the four updates never left"
    assert any(len(list(honest(cut))) > 2 for cut in seen), "no cut left the disk a choice"
    assert not any(given_back(cut, honest(cut), may_refuse=False) for cut in seen)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.timeout(300)
def test_a_journal_or_database_lost_at_any_moment_is_refused_or_costs_nothing(start: str) -> None:
    seen = recorded(start)
    assert not any(given_back(cut, lossy(cut, seen[0]), may_refuse=True) for cut in seen)


def after_a_kill(planted: str = "") -> Iterator[Cut]:
    """Power is cut while another process goes on from where one was killed before its commit was on the disk."""
    done: set[tuple[int, int]] = set()
    for cut in recorded(STARTS[0]):
        if cut.killed.get(JOURNAL) in (None, cut.synced.get(JOURNAL)):
            continue
        spent = spent_in(cut.killed), spent_in(cut.synced)
        if spent[0] > spent[1] and spent not in done:  # else much is looked at twice
            done.add(spent)
            with somewhere() as folder:
                put(cut.killed, folder)
                yield from traced(folder, "send again", planted, cut.synced)


@pytest.mark.timeout(300)
def test_a_cut_after_a_kill_gives_nothing_back_and_the_ledger_goes_on() -> None:
    seen = list(after_a_kill())
    assert len(seen) > 30
    assert any(cut.left for cut in seen)
    assert not any(given_back(cut, honest(cut), may_refuse=False) for cut in seen)


@pytest.mark.timeout(300)
def test_the_test_sees_a_mark_over_what_a_killed_process_had_not_synced() -> None:
    """The ledger would refuse itself for good after such a cut."""
    with pytest.raises(LedgerBehindError):
        any(
            given_back(cut, honest(cut), may_refuse=False)
            for cut in after_a_kill("trusts what a killed process wrote")
        )


@pytest.mark.parametrize("planted", ["sends before it marks", "does not sync its mark"])
@pytest.mark.timeout(300)
def test_the_test_sees_a_mark_that_comes_too_late(planted: str) -> None:
    seen = recorded(STARTS[0], planted)
    assert any(given_back(cut, lossy(cut, seen[0]), may_refuse=True) for cut in reversed(seen))


@pytest.mark.timeout(300)
def test_the_test_sees_a_mark_that_comes_too_early() -> None:
    """The ledger would refuse itself for good after such a cut."""
    seen = recorded(STARTS[0], "marks before it commits")
    with pytest.raises(LedgerBehindError):
        any(given_back(cut, honest(cut), may_refuse=False) for cut in seen)


@pytest.mark.timeout(300)
def test_without_the_mark_the_loss_goes_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: if this fails, the tests above prove nothing."""
    seen = recorded(STARTS[0])
    monkeypatch.setattr(HighWater, "follow", lambda self, newest, surely: None)
    assert any(given_back(cut, lossy(cut, seen[0]), may_refuse=True) for cut in reversed(seen))


if __name__ == "__main__":
    fault(sys.argv[3])
    be_traced()
    {"work": work, "send again": send_again}[sys.argv[1]](Path(sys.argv[2]))
