"""`fedtide audit pack`: an auditor gets all that the tools read, and nothing that is private to a site or a server."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from server.registry import Registry, RegistryReader
from server.runs import RunError
from simulations.audit.cli import app
from simulations.audit.pack import pack
from simulations.audit.receipts import audit_receipts
from tests.tiny import tiny_run


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("run"), baseline_epochs=0).run.path


def secrets_of(run: Path) -> Iterator[bytes]:
    """Every pseudonym of every site, and every private key's bytes, as they stand in files."""
    for users in sorted(run.glob("sites/*/histories/users.npy")):
        for user in np.load(users, mmap_mode="r"):
            yield str(user).encode()
            yield str(user).encode("utf-32-le")  # as numpy writes them
    for key in [*run.glob("sites/*/ledger/signing-key.pem"), *run.glob("registry/server.key")]:
        data = key.read_bytes()
        yield from data.splitlines()[1:-1] if data.startswith(b"-----") else [data]


def whole(folder: Path) -> bytes:
    return b"\n".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())


def test_what_is_packed_is_audited_alone_and_holds(honest: Path, tmp_path: Path) -> None:
    place = tmp_path / "for-the-auditor"
    result = CliRunner().invoke(app, ["pack", str(honest), "-o", str(place)])
    assert result.exit_code == 0, result.output
    assert str(place) in result.output
    found = audit_receipts(place)
    assert not found.lies, found.lies
    there = audit_receipts(honest)
    assert [site.figures for site in found.sites] == [site.figures for site in there.sites]
    assert sum(site.receipts for site in found.sites) == sum(site.receipts for site in there.sites) > 0
    changed = place / "receipts.jsonl"
    changed.write_text(changed.read_text().replace('"round": 1', '"round": 2', 1))
    assert audit_receipts(place).lies  # what was packed can be found wanting


def test_nothing_private_is_in_it(honest: Path, tmp_path: Path) -> None:
    place = tmp_path / "for-the-auditor"
    pack(honest, place)
    secrets = list(secrets_of(honest))
    assert len(secrets) > 100
    assert all(secret in whole(honest) for secret in secrets[1:20:2])  # else nothing is shown
    packed = whole(place)
    assert not [secret for secret in secrets if secret in packed]
    names = {file.name for file in place.rglob("*") if file.is_file()}
    assert not {name for name in names if name.endswith((".log", ".key", ".pem", ".npy", ".png", ".md"))}
    assert "metrics.jsonl" not in names  # exact quality of private users


def test_a_private_key_where_none_belongs_is_noticed_and_nothing_is_left(
    honest: Path, tmp_path: Path
) -> None:
    run, place = tmp_path / honest.name, tmp_path / "packed"
    shutil.copytree(honest, run)
    (run / "audit").mkdir(exist_ok=True)
    shutil.copy(run / "registry" / "server.key", run / "audit" / "notes.json")
    with pytest.raises(RunError, match=r"audit/notes\.json holds a private key"):
        pack(run, place)
    assert not place.exists()
    assert not list(tmp_path.glob(".packed*"))


def test_a_table_of_the_registry_that_is_not_known_to_be_public_stays_and_so_do_links(
    honest: Path, tmp_path: Path
) -> None:
    run, place = tmp_path / honest.name, tmp_path / "packed"
    shutil.copytree(honest, run)
    (run / "audit").mkdir(exist_ok=True)
    (run / "audit" / "noise.json").symlink_to(run / "sites" / "00000" / "histories" / "histories.json")
    pack(run, place)
    assert not (place / "audit").exists()
    with sqlite3.connect(run / "registry" / "registry.sqlite") as db:
        db.execute("CREATE TABLE passwords (word TEXT)")
    with pytest.raises(RunError, match="'passwords', which is not known to be public"):
        pack(run, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_whom_the_owner_took_out_and_why_is_not_in_it(honest: Path, tmp_path: Path) -> None:
    run, place = tmp_path / honest.name, tmp_path / "packed"
    shutil.copytree(honest, run)
    registry = Registry(run / "registry")
    first = registry.sites()[0]
    registry.shut_out(first.name, "barred", "a quarrel of ours")
    pack(run, place)
    packed = place / "registry" / "registry.sqlite"
    assert b"a quarrel of ours" not in packed.read_bytes()
    assert not any(site.shut_out for site in RegistryReader(packed.parent).sites())
    assert [site.shut_out for site in RegistryReader(run / "registry").sites()].count(True) == 1


def test_what_is_there_is_not_written_over_and_no_run_is_told(honest: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(RunError, match="is there already"):
        pack(honest, tmp_path / "there")
    with pytest.raises(RunError, match="there is no run"):
        pack(tmp_path, tmp_path / "elsewhere")


def test_a_simulated_runs_registry_lies_beside_its_sites(honest: Path) -> None:
    assert (honest / "registry" / "registry.sqlite").is_file()
    assert not (honest / "sites" / "registry").exists()
