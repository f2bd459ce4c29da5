"""The registry: who is enrolled, what is kept of them, and that nothing of it is ever taken back."""

from __future__ import annotations

import shutil
import sqlite3
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from common.privacy.anchors import Countersignature
from common.privacy.entries import Burnt
from common.privacy.equivocation import EquivocationProof
from common.privacy.faults import ForkError, NoEquivocationError, ReceiptError, TruncatedError
from server.registry import Extension, Registry, RegistryError, RegistryReader
from tests.common.privacy.honest_chain import STRANGER, Writer, honest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "registry"


@pytest.fixture
def registry(folder: Path) -> Registry:
    made = Registry(folder)
    made.enroll("north", honest().entries[0])
    return made


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_folder_key_and_file_are_their_owners_only(registry: Registry, folder: Path) -> None:
    assert mode(folder) == 0o700
    assert mode(folder / "server.key") == mode(folder / "registry.sqlite") == 0o600
    assert Registry(folder).server_key == registry.server_key


def test_a_key_that_others_can_read_is_refused(registry: Registry, folder: Path) -> None:
    (folder / "server.key").chmod(0o644)
    with pytest.raises(RegistryError, match="can be read by others: run chmod 600"):
        Registry(folder)
    (folder / "server.key").chmod(0o600)
    (folder / "server.key").write_bytes(b"short")
    with pytest.raises(RegistryError, match="restore it from a backup"):
        Registry(folder)


@pytest.mark.parametrize("name", ["", "-x", "a b", "../north", "n\x1b[2J", "x" * 65])
def test_a_name_that_is_none_is_refused(registry: Registry, name: str) -> None:
    with pytest.raises(RegistryError, match="a site cannot be named"):
        registry.enroll(name, Writer(STRANGER).entries[0])


def test_a_name_and_a_key_are_enrolled_once(registry: Registry) -> None:
    with pytest.raises(RegistryError, match="'north' or its key is enrolled already"):
        registry.enroll("north", Writer(STRANGER).entries[0])
    with pytest.raises(RegistryError, match="'south' or its key is enrolled already"):
        registry.enroll("south", Writer(epsilon=80.0).entries[0])  # the same key, a new budget
    registry.enroll("south", Writer(STRANGER).entries[0])
    assert [site.name for site in registry.sites()] == ["north", "south"]


def test_only_a_genesis_is_enrolled(folder: Path) -> None:
    site = honest()
    for entry in (site.entries[1], replace(site.entries[0], signature="0" * 128)):
        with pytest.raises(ReceiptError):
            Registry(folder).enroll("north", entry)
    assert not Registry(folder).sites()


def test_chain_and_anchors_outlive_the_process(registry: Registry, folder: Path) -> None:
    site = honest()
    anchor = registry.accept(registry.chain(site.entries[0].key_id).extended(site.entries[:6]))
    later = Registry(folder)
    assert [entry.hash for entry in later.chain(anchor.site_key_id).entries] == [
        entry.hash for entry in site.entries[:6]
    ]
    assert later.anchors(anchor.site_key_id) == [anchor]
    assert anchor.server_key == later.server_key
    anchor.check()


def test_two_processes_of_the_server_see_each_others_heads(registry: Registry, folder: Path) -> None:
    """Two runs at once: neither's copy may grow old, and neither may undo the other's."""
    site, other = honest(), Registry(folder)
    key = site.entries[0].key_id
    old = other.chain(key)
    registry.accept(registry.chain(key).extended(site.entries[:6]))
    assert other.chain(key).head.seq == 5
    anchor = other.accept(old.extended(site.entries[:4]))  # decided upon before, stored after: a prefix
    assert anchor.seq == 3
    assert registry.chain(key).head.seq == other.chain(key).head.seq == 5
    other.accept(other.chain(key).extended(site.entries))
    assert registry.chain(key).head.seq == 11
    assert [each.seq for each in registry.anchors(key)] == [3, 5, 11]


def test_a_fork_between_two_processes_is_found_when_it_is_stored(registry: Registry, folder: Path) -> None:
    site, lying, other = honest(), honest(), Registry(folder)
    lying.entries, lying.spent = lying.entries[:6], site.entries[4].body.spent
    lying.add(Burnt(lying.reserve("run-q", 1).hash))
    key = site.entries[0].key_id
    held = other.chain(key)
    registry.accept(registry.chain(key).extended(site.entries[:9]))
    with pytest.raises(ForkError) as caught:
        other.accept(held.extended(lying.entries))
    assert caught.value.proof is not None
    caught.value.proof.verify(site.genesis.public_key)
    assert [entry.hash for entry in registry.chain(key).entries] == [entry.hash for entry in site.entries[:9]]


def test_a_fork_in_a_batch_keeps_no_other_site_out(registry: Registry, folder: Path) -> None:
    site, lying, other = honest(), honest(), Registry(folder)
    lying.entries, lying.spent = lying.entries[:6], site.entries[4].body.spent
    lying.add(Burnt(lying.reserve("run-q", 1).hash))
    second = Writer(STRANGER)
    other.enroll("second", second.entries[0])
    held = other.chain(site.entries[0].key_id)
    registry.accept(registry.chain(site.entries[0].key_id).extended(site.entries[:9]))
    second.reserve("run-a", 1)
    fork = Extension(held.extended(lying.entries))
    sound = Extension(other.chain(second.entries[0].key_id).extended(second.entries))
    with other.kept_open():
        found = other.accept_all([fork, sound])
    assert isinstance(found[0], ForkError)
    assert isinstance(found[1], Countersignature)
    assert registry.chain(second.entries[0].key_id).head.seq == 1
    assert registry.chain(site.entries[0].key_id).head.seq == 8


def test_a_site_is_barred_by_a_proof_only(registry: Registry) -> None:
    site = honest()
    key = site.entries[0].key_id
    with pytest.raises(NoEquivocationError):
        registry.bar(key, EquivocationProof(site.entries[3], site.entries[3]))
    assert not registry.sites()[0].barred
    other = Writer()
    other.reserve("run-z", 1)
    registry.bar(key, EquivocationProof(site.entries[1], other.entries[1]))
    assert registry.sites()[0].barred
    assert len(registry.proofs(key)) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("DELETE FROM entries WHERE seq = 11", "truncated"),
        ("DELETE FROM entries WHERE seq = 4", "sequence_gap"),
        (
            "UPDATE entries SET entry = (SELECT entry FROM entries WHERE seq = 3) WHERE seq = 5",
            "sequence_repeated",
        ),
        ('UPDATE entries SET entry = replace(entry, \'"steps":"10"\', \'"steps":"11"\')', "bad_signature"),
        ("UPDATE entries SET entry = x'00' WHERE seq = 5", "malformed_json"),
    ],
)
def test_an_edited_registry_is_refused_when_it_is_read(
    registry: Registry, folder: Path, change: str, reason: str
) -> None:
    site = honest()
    registry.accept(registry.chain(site.entries[0].key_id).extended(site.entries))
    with sqlite3.connect(folder / "registry.sqlite") as db:
        db.execute(change.replace("replace(entry", "replace(CAST(entry AS TEXT)"))
        db.execute("UPDATE entries SET entry = CAST(entry AS BLOB)")
    with pytest.raises(ReceiptError) as caught:
        RegistryReader(folder).chain(site.entries[0].key_id)
    assert caught.value.reason == reason


def test_a_tail_lost_with_a_restored_backup_is_told(registry: Registry, folder: Path, tmp_path: Path) -> None:
    site = honest()
    key = site.entries[0].key_id
    registry.accept(registry.chain(key).extended(site.entries[:6]))
    with sqlite3.connect(folder / "registry.sqlite") as db:
        db.execute("DELETE FROM entries WHERE seq > 3")
    with pytest.raises(TruncatedError):
        Registry(folder).chain(key)


def test_an_auditor_reads_a_copy_without_the_servers_key(
    registry: Registry, folder: Path, tmp_path: Path
) -> None:
    site = honest()
    key = site.entries[0].key_id
    registry.accept(registry.chain(key).extended(site.entries))
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("server.key"))
    reader = RegistryReader(copy)
    assert reader.chain(key).head.seq == 11
    assert reader.anchors(key)[0].server_key == registry.server_key
    assert not (copy / "server.key").exists()


def test_what_is_no_registry_is_said_in_words(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="holds no registry"):
        RegistryReader(tmp_path)
    (tmp_path / "registry.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(RegistryError, match="cannot be read or written"):
        RegistryReader(tmp_path).sites()
    with pytest.raises(RegistryError, match="no site is enrolled under key"):
        Registry(tmp_path / "new").chain("a" * 64)
