"""A ledger that stays open between rounds is the same ledger: replaced, loosened or shared, it is looked at anew."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import client.together
import simulations.answering
from client import kept_ledgers
from client.kept_ledgers import close_all, keep_open, leave, opened
from client.ledger import Ledger
from client.ledger_errors import LedgerBehindError, LedgerDamagedError, MarkLostError
from client.private_files import LoosePermissionsError
from common.privacy.faults import ReceiptError
from simulations.audit.receipts import audit_receipts
from tests.client.ledger_cases import TRAINING, reserve
from tests.tiny import SITES, tiny_run


@pytest.fixture(autouse=True)
def keeping(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a worker."""
    monkeypatch.setattr(kept_ledgers, "_most", 0)
    keep_open(2)
    yield
    close_all()


def made(folder: Path) -> Path:
    with Ledger.create(folder, epsilon=8, delta=1e-5, typical_plan=[TRAINING]) as ledger:
        release(ledger, 1)
    return folder


def release(ledger: Ledger, round_: int) -> None:
    ledger.release(reserve(ledger, round_), b"update")


def outcomes(folder: Path) -> list[str]:
    with Ledger.open(folder) as ledger:
        ledger.verify()
        return [charge.outcome for charge in ledger.status().charges]


def files_open() -> set[str]:
    """Of ledgers, by this process."""
    names = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.exists()]
    return {name for name in names if "ledger" in name}


def test_it_is_the_same_object_and_goes_on(tmp_path: Path) -> None:
    folder = made(tmp_path / "ledger")
    first = opened(folder)
    release(first, 2)
    leave(folder, first)
    again = opened(folder)
    assert again is first
    release(again, 3)
    leave(folder, again)
    assert outcomes(folder) == ["released"] * 3


def test_only_the_last_ones_stay_open_and_none_when_they_are_closed(tmp_path: Path) -> None:
    folders = [made(tmp_path / f"ledger-{number}") for number in range(4)]
    before = files_open()
    for folder in folders:
        leave(folder, opened(folder))
    held = files_open() - before
    assert {Path(name).parent for name in held} == set(folders[2:])
    close_all()
    assert files_open() == before


def test_where_nobody_asked_for_it_none_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_ledgers, "_most", 0)
    folder = made(tmp_path / "ledger")
    before = files_open()
    leave(folder, opened(folder))
    assert files_open() == before


def test_a_ledger_that_was_put_back_from_a_backup_is_opened_anew(tmp_path: Path) -> None:
    """Else it would be charged in a file that no name leads to any more."""
    folder, backup = made(tmp_path / "ledger"), tmp_path / "backup"
    shutil.copytree(folder, backup)
    kept = opened(folder)
    release(kept, 2)
    leave(folder, kept)
    shutil.rmtree(folder)
    backup.rename(folder)
    ledger = opened(folder)
    assert ledger is not kept
    assert len(ledger.status().charges) == 1
    release(ledger, 2)
    ledger.disconnect()
    assert outcomes(folder) == ["released"] * 2


def test_one_whose_database_was_written_over_in_its_place_is_refused(tmp_path: Path) -> None:
    folder = made(tmp_path / "ledger")
    leave(folder, opened(folder))
    with sqlite3.connect(folder / "ledger.sqlite") as other:
        for trigger in ("entries_no_update", "entries_no_delete"):
            other.execute(f"DROP TRIGGER {trigger}")
        other.execute("UPDATE entries SET entry = (SELECT entry FROM entries WHERE seq = 1) WHERE seq = 2")
    other.close()
    with pytest.raises((LedgerDamagedError, ReceiptError)):
        opened(folder)


def test_one_that_others_may_read_is_refused(tmp_path: Path) -> None:
    folder = made(tmp_path / "ledger")
    leave(folder, opened(folder))
    folder.chmod(0o755)
    with pytest.raises(LoosePermissionsError):
        opened(folder)


def test_one_whose_mark_is_lost_is_refused(tmp_path: Path) -> None:
    folder = made(tmp_path / "ledger")
    leave(folder, opened(folder))
    (folder / "high-water").unlink()
    with pytest.raises(MarkLostError):
        opened(folder)


def test_one_that_is_behind_its_mark_is_refused(tmp_path: Path) -> None:
    folder, newer = made(tmp_path / "ledger"), tmp_path / "newer"
    shutil.copytree(folder, newer)
    with Ledger.open(newer) as ledger:
        release(ledger, 2)
    leave(folder, opened(folder))
    (folder / "high-water").write_bytes((newer / "high-water").read_bytes())  # the same file, by its inode
    with pytest.raises(LedgerBehindError):
        opened(folder)


_CHARGE = """
import sys
from pathlib import Path
from client.ledger import Ledger
from client.ledger_errors import LedgerDamagedError
from tests.client.test_kept_ledgers import release
with Ledger.open(Path(sys.argv[1])) as ledger:
    release(ledger, int(sys.argv[2]))
"""


def test_what_another_process_charged_meanwhile_is_counted(tmp_path: Path) -> None:
    folder = made(tmp_path / "ledger")
    for round_ in (2, 4, 6):
        ledger = opened(folder)
        release(ledger, round_)
        leave(folder, ledger)
        arguments = [sys.executable, "-c", _CHARGE, str(folder), str(round_ + 1)]
        subprocess.run(arguments, cwd=Path(__file__).parents[2], check=True, timeout=120)
    assert outcomes(folder) == ["released"] * 7


def test_ledgers_stay_open_over_a_run_and_a_site_that_failed_is_not_among_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_open(SITES)
    connected: list[Path] = []
    right, connect = client.together.training_batch, Ledger.open

    def damaged(charged):  # type: ignore[no-untyped-def]
        if charged.site.name == "site-1" and charged.request.round == 2:
            raise OSError("the disk is gone for a moment")
        return right(charged)

    def noted(folder: Path, **named: Any) -> Ledger:
        connected.append(folder)
        return connect(folder, **named)

    monkeypatch.setattr(simulations.answering, "TOGETHER_FROM", 2)
    monkeypatch.setattr(client.together, "training_batch", damaged)
    monkeypatch.setattr(Ledger, "open", noted)
    plan = {
        "privacy": {"noise_multiplier": 8.0, "sampling_rate": 1.0},
        "training": {"rounds": 4, "steps_per_round": 1},
    }
    outcome = tiny_run(tmp_path, plan=plan)
    monkeypatch.setattr(Ledger, "open", connect)
    opened_by = [
        sum(folder.parent.name == site.folder.name for folder in connected) for site in outcome.sites
    ]
    assert opened_by[1] == min(opened_by) + 1  # once more than the others
    ways = [outcomes(site.folder / "ledger") for site in outcome.sites]
    assert ways[1] == ["released", "burnt", "released", "released"]
    assert ways[:1] + ways[2:] == [["released"] * 4] * (SITES - 1)
    assert not audit_receipts(outcome.run.path).lies
