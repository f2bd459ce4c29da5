"""`fedtide site backup`: a copy that is right at its moment; what a plain copy may come to; old copies put back."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import stat
from collections.abc import Iterable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import client.backup
from client.agent import alone
from client.backup import back_up_site
from client.cli import app
from client.ledger import Ledger
from client.ledger_errors import LedgerBehindError
from client.lower_states import LOWER_STATES
from client.worker import SOCKET
from common.backup import BackupError
from tests.client.test_site_cli import charge, init
from tests.tiny import tiny_run

DATABASE, _, MARK = Ledger.FILES


@pytest.fixture(autouse=True)
def plugged(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here pulls the plug."""
    monkeypatch.setattr(os, "sync", lambda: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    assert init(folder / "north", folder / "data").exit_code == 0
    return folder / "north"


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Iterable[Path]:
    """A site that has been charged once, and is at work: its ledger is open elsewhere."""
    shutil.copytree(made, tmp_path / "north")
    with Ledger.open(tmp_path / "north" / "ledger"):
        charge(tmp_path / "north", 1)
        yield tmp_path / "north"


def entries(folder: Path) -> int:
    with Ledger.open(folder / "ledger") as ledger:
        return ledger.verify().seq


def test_a_copy_of_a_site_at_work_is_private_whole_and_verified(folder: Path, tmp_path: Path) -> None:
    (folder / LOWER_STATES).mkdir(mode=0o700)
    (folder / LOWER_STATES / "states").write_text("made again")
    (folder / SOCKET).parent.mkdir(mode=0o700)
    with alone(folder), socket.socket(socket.AF_UNIX) as listening:
        descriptor = os.open((folder / SOCKET).parent, os.O_RDONLY)
        listening.bind(f"/proc/self/fd/{descriptor}/{Path(SOCKET).name}")
        os.close(descriptor)
        done = CliRunner().invoke(app, ["backup", str(folder), str(tmp_path / "copy")])
    assert done.exit_code == 0, done.exception
    assert "verifies and ends at entry 2" in done.output
    copy = tmp_path / "copy"
    assert entries(copy) == entries(folder) == 2
    for path in [copy, *copy.rglob("*")]:
        source = folder / path.relative_to(copy)
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(source.stat().st_mode), path
    names = {each.name for each in copy.iterdir()}
    assert {each.name for each in folder.iterdir()} - names == {LOWER_STATES, "up.lock"}
    assert not list((copy / SOCKET).parent.iterdir())


def test_sockets_are_gone_when_a_site_is_down_so_that_pythons_copytree_takes_the_folder(
    folder: Path, tmp_path: Path
) -> None:
    (folder / SOCKET).parent.mkdir(mode=0o700)
    with alone(folder), socket.socket(socket.AF_UNIX) as listening:
        descriptor = os.open((folder / SOCKET).parent, os.O_RDONLY)
        listening.bind(f"/proc/self/fd/{descriptor}/socket")
        os.close(descriptor)
        assert (folder / SOCKET).is_socket()
        with pytest.raises(shutil.Error):
            shutil.copytree(folder, tmp_path / "up")
    shutil.copytree(folder, tmp_path / "down")


def test_what_is_charged_meanwhile_does_not_put_the_mark_ahead(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_database = client.backup.copy_database

    def meanwhile(source: Path, target: Path) -> None:
        charge(folder, 2)
        copy_database(source, target)
        charge(folder, 3)

    monkeypatch.setattr(client.backup, "copy_database", meanwhile)
    assert back_up_site(folder, tmp_path / "copy") == 4
    assert entries(tmp_path / "copy") == 4
    assert entries(folder) == 6


def test_the_order_that_a_plain_copy_may_take_is_refused(folder: Path, tmp_path: Path) -> None:
    """The database first, and the mark after a charge: a copy that can never be opened."""
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns(MARK))
    charge(folder, 2)
    shutil.copy2(folder / "ledger" / MARK, tmp_path / "copy" / "ledger" / MARK)
    with pytest.raises(
        LedgerBehindError, match="ends at entry 2, but its high-water mark says that it held entry 4"
    ):
        entries(tmp_path / "copy")


def test_a_plain_copy_of_a_ledger_without_its_journal_is_refused(folder: Path, tmp_path: Path) -> None:
    """What a copy of the names that docs/site.md lists would be while the site is up."""
    charge(folder, 2)
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*-wal", "*-shm"))
    with pytest.raises(LedgerBehindError):
        entries(tmp_path / "copy")


def test_a_target_that_is_there_or_within_is_refused_and_a_broken_ledger_gives_no_copy(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(BackupError, match="is there already"):
        back_up_site(folder, tmp_path / "there")
    with pytest.raises(BackupError, match="lies within"):
        back_up_site(folder, folder / "copy")
    before = sorted(each.name for each in tmp_path.iterdir())
    (folder / "ledger" / MARK).write_bytes(b"")
    done = CliRunner().invoke(app, ["backup", str(folder), str(tmp_path / "copy")])
    assert done.exit_code != 0
    assert sorted(each.name for each in tmp_path.iterdir()) == before


def test_a_copy_goes_on_where_nothing_left_since_and_an_older_one_is_refused_by_the_servers_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As docs/threat-model.md says: of a whole older copy only the server knows, and the site spends nothing."""
    sites = tmp_path / "sites"
    fast = {
        "training": {"rounds": 1, "steps_per_round": 1},
        "privacy": {"noise_multiplier": 60.0, "epsilon": 90.0},
    }

    def run() -> list[str]:
        done = tiny_run(tmp_path, plan=fast, sites=sites, site_budget=90.0)
        (record,) = done.run.records()
        return sorted(record["admitted"])

    def restore(copy: Path) -> None:
        shutil.rmtree(site)
        shutil.copytree(copy, site)

    assert len(run()) == 4
    site = sites / "00002"
    back_up_site(site, tmp_path / "first")
    restore(tmp_path / "first")
    assert len(run()) == 4  # nothing had left since: it is the site
    newest = entries(site)
    back_up_site(site, tmp_path / "second")
    restore(tmp_path / "first")
    old = entries(site)
    assert old < newest
    with caplog.at_level(logging.WARNING, "fedtide.site"):
        assert run() == ["site-0", "site-1", "site-3"]
    assert "restored from an old backup" in caplog.text
    assert entries(site) == old  # nothing was spent
    restore(tmp_path / "second")
    assert len(run()) == 4
