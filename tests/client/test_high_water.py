"""A ledger that lost its end is refused, whatever lost it; one that lost its mark, until somebody answers for it."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from client import high_water
from client.high_water import HighWater
from client.ledger import Ledger
from client.ledger_errors import (
    BudgetRefusedError,
    LedgerBehindError,
    LedgerDiskError,
    LedgerExistsError,
    MarkLostError,
)
from client.ledger_reading import LedgerReader
from common.privacy.mechanisms import GaussianSum
from tests.client.ledger_cases import TRAINING, reserve

DATABASE, JOURNAL, MARK = "ledger.sqlite", "ledger.sqlite-wal", "high-water"
_FORK = multiprocessing.get_context("fork")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A ledger that released round 1, left in order."""
    with Ledger.create(tmp_path / "ledger", epsilon=8, delta=1e-5, typical_plan=[TRAINING]) as ledger:
        ledger.release(reserve(ledger, 1), b"x")
    return tmp_path / "ledger"


def killed_while(folder: Path, doing: Callable[[Ledger], object]) -> None:
    """A process opens the ledger, does something and is killed: its journal stays beside the database."""

    def work() -> None:
        with Ledger.open(folder) as ledger:
            doing(ledger)
            os.kill(os.getpid(), signal.SIGKILL)

    worker = _FORK.Process(target=work)
    worker.start()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL


def round_two(ledger: Ledger) -> None:
    ledger.release(reserve(ledger, 2), b"y")


def spent(folder: Path) -> int:
    with Ledger.open(folder) as ledger:
        ledger.verify()
        return ledger.status().spent


def lose_journal(folder: Path) -> None:
    assert (folder / JOURNAL).stat().st_size > 0
    (folder / JOURNAL).unlink()
    (folder / "ledger.sqlite-shm").unlink(missing_ok=True)


def marked(folder: Path) -> int:
    """The sequence number that the file says, read without Fedtide's code."""
    data = (folder / MARK).read_bytes()
    return max(int(json.loads(place)["seq"]) for place in data.split(b"\0") if place)


# --- lost or old


def test_a_kill_alone_loses_nothing(folder: Path) -> None:
    before = spent(folder)
    killed_while(folder, round_two)
    assert spent(folder) == 2 * before


def test_a_lost_journal_is_refused_in_one_sentence_that_says_the_way_out(folder: Path) -> None:
    killed_while(folder, round_two)
    lose_journal(folder)
    with pytest.raises(LedgerBehindError) as caught:
        Ledger.open(folder)
    said = str(caught.value)
    assert said.startswith("the ledger ends at entry 2, but its high-water mark says that it held entry 4")
    assert "journal was lost" in said
    assert "put the newest whole copy of the ledger's folder back" in said
    assert "\n" not in said


def test_a_database_file_restored_alone_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copy2(folder / DATABASE, tmp_path / "backup")
    with Ledger.open(folder) as ledger:
        round_two(ledger)
    shutil.copy2(tmp_path / "backup", folder / DATABASE)
    with pytest.raises(LedgerBehindError, match="ends at entry 2"):
        Ledger.open(folder)


def test_one_that_went_on_from_an_old_copy_is_refused(folder: Path, tmp_path: Path) -> None:
    """The mark is that of the newer one: a longer ledger is not the same as one that holds the marked entry."""
    shutil.copytree(folder, tmp_path / "backup")
    with Ledger.open(folder) as ledger:
        round_two(ledger)
    with Ledger.open(tmp_path / "backup") as old:
        for round_ in (3, 4, 5):
            old.release(reserve(old, round_), b"z")
    shutil.copy2(folder / MARK, tmp_path / "backup" / MARK)
    with pytest.raises(LedgerBehindError, match="holds another entry 4"):
        Ledger.open(tmp_path / "backup")


def test_without_the_marks_check_a_lost_journal_goes_unnoticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: what the tests above refuse was accepted before, and its budget given back."""
    before = spent(folder)
    killed_while(folder, round_two)
    lose_journal(folder)
    with monkeypatch.context() as patch:
        patch.setattr(HighWater, "follow", lambda self, newest, surely: None)
        assert spent(folder) == before
        with Ledger.open(folder) as ledger:
            ledger.burn(reserve(ledger, 2))  # the same round, reserved a second time


def test_a_whole_folder_put_back_opens_and_is_the_servers_to_refuse(folder: Path, tmp_path: Path) -> None:
    """What no file in the folder can show (docs/threat-model.md)."""
    before = spent(folder)
    shutil.copytree(folder, tmp_path / "backup")
    with Ledger.open(folder) as ledger:
        round_two(ledger)
    shutil.rmtree(folder)
    (tmp_path / "backup").rename(folder)
    assert spent(folder) == before


# --- the mark itself


def _torn(folder: Path) -> None:
    (folder / MARK).write_bytes(
        bytes(4096) + b'{"format":"fedtide/high-water/1","head":"00'.ljust(4096, b"\0")
    )


def _lost(folder: Path) -> None:
    (folder / MARK).unlink()


def _lost_with_journal(folder: Path) -> None:
    killed_while(folder, round_two)
    lose_journal(folder)
    _lost(folder)


def _of_another(folder: Path) -> None:
    with Ledger.create(folder.parent / "other", epsilon=8, delta=1e-5, typical_plan=[TRAINING]):
        pass
    shutil.copy2(folder.parent / "other" / MARK, folder / MARK)


def _signed_by_nobody(folder: Path) -> None:
    """An editor lowers the mark."""
    data = (folder / MARK).read_bytes()
    (folder / MARK).write_bytes(data.replace(b'"seq":"2"', b'"seq":"0"').replace(b'"seq":"1"', b'"seq":"0"'))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_lost, "high-water mark is lost"),
        (_lost_with_journal, "high-water mark is lost"),
        (_torn, "cannot be read"),
        (_signed_by_nobody, "cannot be read"),
        (_of_another, "another ledger's"),
    ],
)
def test_a_mark_that_is_none_is_refused(folder: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(folder)
    with pytest.raises(MarkLostError, match=says) as caught:
        Ledger.open(folder)
    assert "put high-water back from any copy" in str(caught.value)
    assert "renew-mark" in str(caught.value)


@pytest.mark.parametrize("place", [0, 1])
def test_one_place_that_a_power_cut_left_torn_is_written_anew(folder: Path, place: int) -> None:
    before = spent(folder)
    data = bytearray((folder / MARK).read_bytes())
    data[place * 4096 + 100] ^= 1
    (folder / MARK).write_bytes(bytes(data))
    assert spent(folder) == before
    assert marked(folder) == 2
    with Ledger.open(folder) as ledger:
        round_two(ledger)
    assert marked(folder) == 4


def test_a_mark_put_back_from_an_old_copy_catches_up(folder: Path, tmp_path: Path) -> None:
    shutil.copy2(folder / MARK, tmp_path / "old")
    with Ledger.open(folder) as ledger:
        round_two(ledger)
    assert marked(folder) == 4
    shutil.copy2(tmp_path / "old", folder / MARK)
    assert marked(folder) == 2
    Ledger.open(folder).disconnect()
    assert marked(folder) == 4


def test_a_lost_mark_is_made_anew_only_on_somebodys_word(folder: Path) -> None:
    before = spent(folder)
    with pytest.raises(LedgerExistsError, match="move the file ledger/high-water away"):
        Ledger.renew_mark(folder)
    (folder / MARK).unlink()
    assert Ledger.renew_mark(folder).seq == 2
    assert stat.S_IMODE((folder / MARK).stat().st_mode) == 0o600
    assert spent(folder) == before
    (folder / MARK).unlink()
    with pytest.raises(MarkLostError):
        Ledger.open(folder)


def test_a_mark_lost_under_an_open_ledger_lets_nothing_leave(folder: Path) -> None:
    with Ledger.open(folder) as ledger:
        reservation = reserve(ledger, 2)
        (folder / MARK).unlink()
        with pytest.raises(MarkLostError):
            ledger.release(reservation, b"y")
        with pytest.raises(MarkLostError):
            ledger.outbox("run-a", 2)
    assert not (folder / MARK).exists()


# --- when it is written


def test_what_another_process_committed_and_could_not_mark_is_marked_before_it_is_sent(folder: Path) -> None:
    with Ledger.open(folder) as reader:

        def dies_unmarked(ledger: Ledger) -> None:
            reservation = reserve(ledger, 2)
            ledger.check_mark = lambda **_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
            ledger.release(reservation, b"y")

        killed_while(folder, dies_unmarked)
        assert marked(folder) == 3
        assert LedgerReader.outbox(reader, "run-a", 2) is not None  # committed it is
        assert marked(folder) == 3
        assert reader.outbox("run-a", 2) is not None
        assert marked(folder) == 4


@pytest.mark.parametrize("writes", [False, True])
def test_a_mark_whose_writer_died_before_it_was_on_the_disk_is_written_again_before_anything_leaves(
    folder: Path, monkeypatch: pytest.MonkeyPatch, writes: bool
) -> None:
    def dies_unsynced(ledger: Ledger) -> None:
        reservation = reserve(ledger, 2)
        high_water._sync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
        ledger.release(reservation, b"y")

    killed_while(folder, dies_unsynced)
    assert marked(folder) == 4
    synced: list[int] = []
    monkeypatch.setattr(high_water, "_sync", synced.append)
    with Ledger.open(folder) as ledger:
        assert not synced  # nothing left yet
        if writes:
            ledger.burn(reserve(ledger, 3))
        else:
            assert ledger.outbox("run-a", 2) is not None
    assert synced


def test_writes_made_at_once_are_marked_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    monkeypatch.setattr(
        high_water, "_sync", lambda file: written.append(os.fdatasync(file) or marked(folder))
    )
    with Ledger.open(folder) as ledger:
        with ledger.at_once():
            for round_ in (2, 3):
                ledger.burn(reserve(ledger, round_))
            assert written == []
        assert written == [6]
        ledger.forget("run-a")
        assert written == [6]  # no entry, nothing to mark


def _two_of_which_one_is_too_dear(ledger: Ledger) -> None:
    with ledger.at_once():
        reserve(ledger, 2)
        reserve(ledger, 3, event=GaussianSum(0.2))


def _part_of_which_is_undone(ledger: Ledger) -> None:
    with ledger.at_once(), suppress(BudgetRefusedError):
        _two_of_which_one_is_too_dear(ledger)


def test_what_is_undone_is_not_marked(folder: Path) -> None:
    with Ledger.open(folder) as ledger:
        with pytest.raises(BudgetRefusedError):
            _two_of_which_one_is_too_dear(ledger)
        ledger.outbox("run-a", 1)
    assert marked(folder) == 2
    assert spent(folder) > 0


def _syncs_before_the_mark(
    folder: Path, patch: pytest.MonkeyPatch, undone: Callable[[Ledger], object]
) -> int:
    """How often the journal is synced for an answer from the outbox, after another wrote and did not mark it."""
    with Ledger.open(folder) as ledger, Ledger.open(folder) as other:
        with suppress(BudgetRefusedError):
            undone(ledger)
        with patch.context() as dying:
            dying.setattr(Ledger, "check_mark", lambda *_, **__: None)
            reserve(other, 2)
        synced = 0

        def sync() -> None:
            nonlocal synced
            synced += 1

        patch.setattr(ledger, "_sync_journal", sync)
        assert ledger.outbox("run-a", 1) is not None
    return synced


@pytest.mark.parametrize(
    "undone",
    [
        _two_of_which_one_is_too_dear,
        lambda ledger: reserve(ledger, 3, event=GaussianSum(0.2)),
        _part_of_which_is_undone,
        lambda ledger: None,
    ],
)
def test_anothers_commit_is_synced_before_the_mark_says_that_it_stands(
    folder: Path, monkeypatch: pytest.MonkeyPatch, undone: Callable[[Ledger], object]
) -> None:
    assert _syncs_before_the_mark(folder, monkeypatch, undone) == 1
    assert marked(folder) == 3


def test_a_mark_of_a_form_that_nobody_knows_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as later, Ledger.open(folder) as ledger:
        later.setattr(high_water, "FORMAT", "fedtide/high-water/9")
        HighWater(folder / MARK, ledger._key).create(ledger._head())
    with pytest.raises(MarkLostError, match="does not know"), Ledger.open(folder):
        pass


def test_a_mark_that_is_written_in_part_lets_nothing_leave(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ledger.open(folder) as ledger:
        reservation = reserve(ledger, 2)
        with monkeypatch.context() as patch:
            patch.setattr(high_water.os, "pwrite", lambda *_: 100)
            with pytest.raises(LedgerDiskError, match="free space"):
                ledger.release(reservation, b"y")


def test_a_mark_that_cannot_be_written_lets_nothing_leave_and_a_retry_sends_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    with Ledger.open(folder) as ledger:
        reservation = reserve(ledger, 2)
        with monkeypatch.context() as patch:
            patch.setattr(high_water, "_sync", full)
            with pytest.raises(LedgerDiskError, match="free space"):
                ledger.release(reservation, b"y")
            with pytest.raises(LedgerDiskError):
                ledger.outbox("run-a", 2)
        found = ledger.outbox("run-a", 2)
        assert found is not None
        assert found[0] == b"y"
    assert marked(folder) == 4


def _charges(folder: Path, first: int) -> None:
    with Ledger.open(folder) as ledger:
        for number in range(first, first + 10):
            ledger.burn(reserve(ledger, number, event=GaussianSum(20.0)))


def test_among_processes_it_never_moves_down_and_never_is_ahead(folder: Path) -> None:
    workers = [_FORK.Process(target=_charges, args=(folder, first)) for first in (100, 200, 300, 400)]
    for worker in workers:
        worker.start()
    seen = [0]
    with Ledger.open(folder) as ledger, (folder / MARK).open("rb") as file:
        while any(worker.is_alive() for worker in workers):
            fcntl.flock(file, fcntl.LOCK_SH)
            seen.append(marked(folder))
            fcntl.flock(file, fcntl.LOCK_UN)
            assert ledger.status().seq >= seen[-1]
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert seen == sorted(seen)
    assert len(set(seen)) > 5, "it was not looked at while they worked"
    assert marked(folder) == 2 + 4 * 20


# --- ledgers from before there were marks


def _as_before(folder: Path, *, mark: bool = False) -> None:
    with sqlite3.connect(folder / DATABASE) as database:
        database.execute("PRAGMA user_version = 1")
    database.close()
    if not mark:
        (folder / MARK).unlink()


def test_a_ledger_from_before_there_were_marks_gets_one_once(folder: Path) -> None:
    before = spent(folder)
    _as_before(folder)
    assert spent(folder) == before
    assert marked(folder) == 2
    assert stat.S_IMODE((folder / MARK).stat().st_mode) == 0o600
    (folder / MARK).unlink()
    with pytest.raises(MarkLostError):
        Ledger.open(folder)


def test_one_that_was_killed_while_it_got_its_mark_goes_on(folder: Path) -> None:
    before = spent(folder)
    _as_before(folder, mark=True)
    assert spent(folder) == before
    with sqlite3.connect(folder / DATABASE) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (2,)
    database.close()


def test_an_old_copy_from_before_there_were_marks_is_refused_by_the_mark(
    folder: Path, tmp_path: Path
) -> None:
    _as_before(folder)
    shutil.copy2(folder / DATABASE, tmp_path / "backup")
    with Ledger.open(folder) as ledger:
        round_two(ledger)
    shutil.copy2(tmp_path / "backup", folder / DATABASE)
    with pytest.raises(LedgerBehindError):
        Ledger.open(folder)


def _open_and_charge(folder: Path, number: int) -> None:
    with Ledger.open(folder) as ledger:
        ledger.burn(reserve(ledger, number))


def test_several_processes_that_open_such_a_ledger_at_once_all_go_on(folder: Path) -> None:
    _as_before(folder)
    workers = [_FORK.Process(target=_open_and_charge, args=(folder, number)) for number in range(10, 16)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * len(workers)
    assert marked(folder) == 14
    spent(folder)
