"""A ledger that is lost, emptied or another's is to be restored; nobody is sent to begin a new budget."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.ledger import Ledger
from client.ledger_errors import LedgerError
from common.cli import app
from common.privacy.faults import ReceiptError
from common.privacy.mechanisms import GaussianSum


def _empty_database(folder: Path) -> None:
    (folder / "ledger.sqlite").unlink()
    with sqlite3.connect(folder / "ledger.sqlite") as made:
        made.execute("CREATE TABLE other (x)")
    made.close()
    (folder / "ledger.sqlite").chmod(0o600)


def _others_key(folder: Path) -> None:
    other = folder.with_name("other")
    Ledger.create(other, epsilon=1.0, delta=1e-6, typical_plan=[GaussianSum(8.0)]).disconnect()
    (folder / Ledger.FILES[1]).unlink()
    shutil.copy2(other / Ledger.FILES[1], folder / Ledger.FILES[1])


LOST: dict[str, tuple[Callable[[Path], object], str]] = {
    "the folder": (shutil.rmtree, "it is not there"),
    "the database": (lambda folder: (folder / "ledger.sqlite").unlink(), "ledger.sqlite is not there"),
    "the key": (lambda folder: (folder / Ledger.FILES[1]).unlink(), f"{Ledger.FILES[1]} is not there"),
    "all of its files": (
        lambda folder: [file.unlink() for file in list(folder.iterdir()) if file.is_file()],
        "ledger.sqlite is not there",
    ),
    "its content": (lambda folder: (folder / "ledger.sqlite").write_bytes(b""), "is empty, and was not"),
    "its key's content": (
        lambda folder: (folder / Ledger.FILES[1]).write_bytes(b""),
        "is empty, and was not",
    ),
    "its tables": (_empty_database, "is a database without a ledger"),
    "its form": (lambda folder: (folder / "ledger.sqlite").write_bytes(b"x" * 5000), "is no database"),
    "its first page": (
        lambda folder: (folder / "ledger.sqlite").open("r+b").write(b"\0" * 4096),
        "is no database",
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "ledger"
    Ledger.create(made, epsilon=1.0, delta=1e-6, typical_plan=[GaussianSum(8.0)]).disconnect()
    return made


@pytest.mark.parametrize("what", LOST)
def test_what_is_lost_is_named_and_is_to_be_restored(folder: Path, what: str) -> None:
    lose, said = LOST[what]
    lose(folder)
    with pytest.raises((LedgerError, ReceiptError)) as refused:
        Ledger.open(folder)
    words = str(refused.value)
    assert said in words
    assert "put the newest copy of the site's folder back" in words
    assert "site init" not in words


def test_another_ledgers_key_is_not_taken(folder: Path) -> None:
    _others_key(folder)
    with pytest.raises(ReceiptError, match="not the key that this ledger began with"):
        Ledger.open(folder)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda folder: None, "is not there: give the folder of a site"),
        (lambda folder: folder.mkdir(), "holds nothing: give the folder of a site"),
        (
            lambda folder: (folder / "ledger").mkdir(parents=True),
            "site.json is lost: put the newest",
        ),
        (
            lambda folder: (folder.mkdir(), (folder / "site.json").write_text("{")),
            "site.json is damaged: put the newest",
        ),
        (lambda folder: folder.write_text("x"), "is a file: give the folder of a site"),
        (
            lambda folder: (folder.mkdir(), (folder / "notes.txt").write_text("x")),
            "is no site's folder: give one that `fedtide site init` made",
        ),
    ],
)
def test_a_folder_without_a_site_says_which_of_these_it_is(
    tmp_path: Path, made: Callable[[Path], object], said: str
) -> None:
    made(tmp_path / "S")
    done = CliRunner().invoke(app, ["site", "status", str(tmp_path / "S")])
    assert said in str(done.exception)


def test_no_command_of_a_site_that_lost_its_ledger_sends_anybody_to_begin_another(
    tmp_path: Path, folder: Path
) -> None:
    """Each command that opens the ledger; the site is real but for its log."""
    from client.site_folder import Site

    site = tmp_path / "S"
    site.mkdir(mode=0o700)
    Site(site, "S", site / "catalog.jsonl", 5).save()
    shutil.copytree(folder, site / "ledger")
    (site / "ledger").chmod(0o700)
    opened = [["status"], ["verify"], ["budget"], ["withdraw", "--yes"], ["backup", str(tmp_path / "copy")]]
    for arguments in opened:
        (site / "ledger" / "ledger.sqlite").unlink(missing_ok=True)
        done = CliRunner().invoke(app, ["site", arguments[0], str(site), *arguments[1:]])
        words = f"{done.output} {done.exception}"
        assert done.exit_code != 0, words
        assert "ledger.sqlite is not there" in words
        assert "put the newest copy of the site's folder back" in words
        assert "site init" not in words


def test_a_copy_of_a_site_without_its_mark_is_not_made(tmp_path: Path, folder: Path) -> None:
    from client.site_folder import Site

    site = tmp_path / "S"
    site.mkdir(mode=0o700)
    Site(site, "S", site / "catalog.jsonl", 5).save()
    shutil.move(folder, site / "ledger")
    (site / "ledger" / "high-water").unlink()
    done = CliRunner().invoke(app, ["site", "backup", str(site), str(tmp_path / "copy")])
    assert "high-water is not there" in str(done.exception)
    assert "free space" not in str(done.exception)
    assert not (tmp_path / "copy").exists()
