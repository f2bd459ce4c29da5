"""The ledger among real processes: they are killed at random instants, and they race for the last grants.

FEDTIDE_KILLS (default 40) sets the number of kills, FEDTIDE_RACES (default 2) the number of races.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from client.ledger import Ledger
from client.ledger_errors import BudgetRefusedError
from client.ledger_reading import Reservation
from common.privacy.entries import Release, Reserve
from common.privacy.faults import ReceiptError
from common.privacy.mechanisms import GaussianSum
from common.privacy.receipts import check_receipt_alone, check_update
from common.privacy.renyi import cap_of, charge_at

KILLS = int(os.environ.get("FEDTIDE_KILLS", "40"))
RACES = int(os.environ.get("FEDTIDE_RACES", "2"))
CHEAP = GaussianSum(40.0)
DEAR = GaussianSum(6.0)
_FORK = multiprocessing.get_context("fork")  # quick to start; no ledger is open when it forks


def _reserve(ledger: Ledger, run: str, round_: int, attempt: int, event: GaussianSum) -> Reservation:
    return ledger.reserve(
        run=run,
        round=round_,
        attempt=attempt,
        event=event,
        plan_hash="a" * 64,
        model_hash="b" * 64,
        nonce=hashlib.sha256(f"{run}/{round_}/{attempt}".encode()).hexdigest(),
        clip_norm=1.0,
        normaliser=1.0,
    )


def _work_until_killed(folder: Path, sent: Path, seed: int) -> None:
    """A site as it runs: recover, and for each round send what is in the outbox, or train anew.

    What was sent stands under `sent`, one file a message: the server's view of this site.
    """
    chance = random.Random(seed)
    with Ledger.open(folder) as ledger:
        ledger.recover()
        done = [int(path.name.split(".")[0]) for path in sent.iterdir()]
        for round_ in range(
            max(done, default=0), 10**6
        ):  # the last round again: the server may have missed it
            found = ledger.outbox("run", round_)
            if found is None:
                with ledger.at_once():
                    ledger.recover()
                    reservation = _reserve(ledger, "run", round_, ledger.next_attempt("run", round_), CHEAP)
                time.sleep(chance.random() * 0.004)  # trains; fresh noise, so never the same bytes twice
                update = os.urandom(2000)
                found = update, ledger.release(reservation, update, anchored_seq=reservation.entry.seq - 1)
            update, receipt = found
            message = len(receipt.to_bytes()).to_bytes(4, "big") + receipt.to_bytes() + update
            (sent / f"{round_}.{os.getpid()}").write_bytes(message)


A_LEDGER = 20
"""Kills on one ledger: it admits fewer than a thousand reservations, as each is charged a thousandth of the cap."""


@dataclass
class Seen:
    """What became of all reservations of all ledgers."""

    reserved: int = 0
    burnt: int = 0
    resent: int = 0


def test_kills_at_random_instants_leave_no_update_uncharged(tmp_path: Path) -> None:
    chance, seen = random.Random(7), Seen()
    for first in range(0, KILLS, A_LEDGER):
        (tmp_path / str(first)).mkdir()
        _kill_and_check(tmp_path / str(first), range(first, min(KILLS, first + A_LEDGER)), chance, seen)
    assert seen.burnt > 0, "no kill hit a reservation: the test has lost its bite"
    assert seen.resent > 0, "no message was sent twice: the test has lost its bite"
    print(f"{KILLS} kills: {seen.reserved} reserved, {seen.burnt} burnt, {seen.resent} re-sent")


def _kill_and_check(tmp_path: Path, kills: range, chance: random.Random, seen: Seen) -> None:
    folder, sent = tmp_path / "ledger", tmp_path / "sent"
    sent.mkdir()
    Ledger.create(folder, epsilon=500, delta=1e-5, typical_plan=[CHEAP]).disconnect()
    burnt, died_at_work = 0, 0
    for kill in kills:
        worker = _FORK.Process(target=_work_until_killed, args=(folder, sent, kill))
        worker.start()
        time.sleep(0.02 + chance.random() * 0.12)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        died_at_work += worker.exitcode == -signal.SIGKILL
        with Ledger.open(folder) as ledger:
            burnt += len(ledger.recover())
            if kill % 10 == 9:
                assert ledger.verify().open == 0
    assert died_at_work == len(kills)  # none had ended by itself, by an error say
    with Ledger.open(folder) as ledger:
        report = ledger.verify()
        entries = ledger.entries()
        messages = _check_sent(ledger, sent)
        charge = charge_at(CHEAP, ledger.genesis.order, ledger.genesis.cap)
        assert report.spent == charge * report.reserved  # burnt ones included, none refunded
        assert report.reserved == report.released + report.burnt
        assert report.burnt >= burnt
        (kept,) = ledger._db.execute("SELECT COUNT(*) FROM outbox").fetchone()
        assert kept == report.released == sum(isinstance(entry.body, Release) for entry in entries)
        seen.reserved += report.reserved
        seen.burnt += burnt
        seen.resent += messages - len({path.name.split(".")[0] for path in sent.iterdir()})


def _check_sent(ledger: Ledger, sent: Path) -> int:
    """Every message that left is charged, signed, and the same each time; returns how many left whole."""
    chain = {entry.hash: entry for entry in ledger.entries()}
    seen: dict[str, bytes] = {}
    whole = 0
    for path in sent.iterdir():
        message = path.read_bytes()
        length = int.from_bytes(message[:4], "big")
        if len(message) != 4 + length + 2000:
            continue  # killed while writing
        whole += 1
        round_ = path.name.split(".")[0]
        assert seen.setdefault(round_, message) == message, "a retry sent other bytes"
        found = ledger.outbox("run", int(round_))
        assert found is not None
        update, receipt = found
        assert message[4:] == receipt.to_bytes() + update
        genesis = ledger.genesis
        assert check_receipt_alone(receipt, update).charge == charge_at(CHEAP, genesis.order, genesis.cap)
        check_update(receipt.release, update)
        assert receipt.entries[-1].hash in chain
        assert isinstance(chain[receipt.release.reservation].body, Reserve)
    return whole


class SlowLedger(Ledger):
    """Thinks for a while between reading what is spent and writing: where a race would happen."""

    def _spent(self) -> int:
        spent = super()._spent()
        time.sleep(0.004)
        return spent


class UnlockedLedger(SlowLedger):
    """The same without the write lock, as the control that the race is real."""

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        yield


def _race(kind: type[Ledger], folder: Path, name: str, event: GaussianSum, barrier: Barrier) -> None:
    granted = 0
    with kind.open(folder) as ledger:
        barrier.wait()
        while True:
            try:
                _reserve(ledger, name, granted, 0, event)
            except BudgetRefusedError:
                break
            except sqlite3.IntegrityError:  # without the lock: another took this sequence number
                continue
            granted += 1
            time.sleep(0.001)  # SQLite's lock is not fair: lets the others in
    (folder.parent / name).write_text(str(granted))


def _granted(kind: type[Ledger], tmp_path: Path, event: GaussianSum, epsilon: float) -> tuple[int, int, Path]:
    """(granted by four processes, admitted by the cap, the ledger)."""
    folder = tmp_path / "ledger"
    with Ledger.create(folder, epsilon=epsilon, delta=1e-5, typical_plan=[event]) as ledger:
        order, cap = ledger.genesis.order, ledger.genesis.cap
    barrier = _FORK.Barrier(4)
    racers = [
        _FORK.Process(target=_race, args=(kind, folder, f"racer-{i}", event, barrier)) for i in range(4)
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
        assert racer.exitcode == 0
    granted = [int((tmp_path / f"racer-{i}").read_text()) for i in range(4)]
    assert cap == cap_of(epsilon, 1e-5, order)
    admitted = cap // charge_at(event, order, cap)
    print(f"{kind.__name__}: granted {granted} of {admitted}")
    return sum(granted), admitted, folder


@pytest.mark.parametrize("race", range(RACES))
def test_four_processes_are_granted_exactly_what_the_cap_admits(tmp_path: Path, race: int) -> None:
    granted, admitted, folder = _granted(Ledger, tmp_path, GaussianSum(12.0 + race % 5), 8)
    assert granted == admitted > 200
    with Ledger.open(folder) as ledger:
        assert ledger.verify().reserved == admitted


def test_slow_processes_are_granted_exactly_what_the_cap_admits(tmp_path: Path) -> None:
    granted, admitted, folder = _granted(SlowLedger, tmp_path, DEAR, 8)
    assert granted == admitted > 50
    with Ledger.open(folder) as ledger:
        assert ledger.verify().spent == granted * charge_at(DEAR, ledger.genesis.order, ledger.genesis.cap)


def test_without_the_lock_they_overspend(tmp_path: Path) -> None:
    """The control: if this fails, the tests above prove nothing."""
    granted, admitted, folder = _granted(UnlockedLedger, tmp_path, DEAR, 8)
    assert granted > admitted
    with Ledger.open(folder) as ledger, pytest.raises(ReceiptError) as caught:
        ledger.verify()
    assert caught.value.reason in {"wrong_total", "over_cap"}


def _crash_while(folder: Path, doing: Callable[[Ledger], object]) -> None:
    with Ledger.open(folder) as ledger:
        doing(ledger)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_site_that_dies_after_reserving_pays_and_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    Ledger.create(folder, epsilon=8, delta=1e-5, typical_plan=[DEAR]).disconnect()
    worker = _FORK.Process(target=_crash_while, args=(folder, lambda it: _reserve(it, "run", 3, 0, DEAR)))
    worker.start()
    worker.join()
    with Ledger.open(folder) as ledger:
        assert ledger.status().open == 1
        (abandoned,) = ledger.recover()
        assert abandoned.body.round == 3
        assert ledger.outbox("run", 3) is None
        assert ledger.next_attempt("run", 3) == 1
        ledger.release(_reserve(ledger, "run", 3, 1, DEAR), b"x")
        report = ledger.verify()
        assert (report.reserved, report.burnt, report.released) == (2, 1, 1)
        assert report.spent == 2 * charge_at(DEAR, ledger.genesis.order, ledger.genesis.cap)
