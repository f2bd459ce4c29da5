"""`fedtide server backup`: a copy that is right whenever it is made, and a server that goes on from it.

The runs are real ones over in-process sites; a copy is made between any two writes of a run. The whole deployment is in
`test_deployment.py`.
"""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.superlink.federation import NoOpFederationManager
from typer.testing import CliRunner

import server.backup
import server.runs
from client.app import SITES_FOLDER
from common.backup import BackupError, copy_database, copy_files
from common.events.catalog import Catalog
from server.backup import back_up
from server.cli import app
from server.deployment import Deployment
from server.nodes import known_nodes
from server.registry import Registry, RegistryReader
from server.runs import RunFolder
from server.setup import make_server
from tests.server.test_rounds import NODES, Sites, records, start

_WRITES = ("write_all_whole", "append_lines")


class Place(Sites):
    """Three sites and a server's folder with their registry, in which runs are begun."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.server = Deployment(folder / "server", "127.0.0.1")
        make_server(self.server)
        shutil.rmtree(self.server.registry)
        shutil.copytree(self.registry, self.server.registry)
        self.registry, self.count = self.server.registry, 0

    def begun(self, **options: Any) -> RunFolder:
        self.count += 1  # a run of an earlier one's name is the same to a site
        plan = self.first.plan
        of_server = plan.server.model_validate({**plan.server.model_dump(), **options})
        run = RunFolder.create(
            self.server.runs,
            plan.model_copy(update={"name": f"run-{self.count}", "server": of_server}),
            Catalog.load(self.folder / "sites" / "catalog.jsonl"),
        )
        run.save_round(0, self.first.run.round_state(0))
        return run

    def restore(self, copy: Path) -> None:
        shutil.rmtree(self.server.folder)
        shutil.copytree(copy, self.server.folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterable[Place]:
    folder = tmp_path_factory.mktemp("backup")
    it = Place(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDTIDE_HOME", str(folder / "cache"))
        patch.setenv(SITES_FOLDER, str(folder / "sites"))
        patch.setattr(os, "sync", lambda: None)  # of the whole machine: no test here pulls its plug
        yield it


class Died(BaseException):
    """The server's machine is gone."""


def at_each_write(patch: pytest.MonkeyPatch, hook: Callable[[], None]) -> None:
    """Calls the hook before each write of a run: of its files, of its lines, and of the registry."""
    for name in _WRITES:
        real = getattr(server.runs, name)

        def hooked(*arguments: Any, real: Callable[..., None] = real) -> None:
            hook()
            real(*arguments)

        for module in (server.runs, server.exchange, server.rounds):
            if hasattr(module, name):
                patch.setattr(module, name, hooked)
    accept = Registry.accept_all

    def accepted(self: Registry, extensions: Any) -> Any:
        hook()
        return accept(self, extensions)

    patch.setattr(Registry, "accept_all", accepted)


def check_whole(place: Place, run: RunFolder) -> None:
    """Each round once, with every site; each site charged once a round; the registry holds every receipt."""
    assert [each["admitted"] for each in records(run)] == [["site-0", "site-1", "site-2"]] * 2
    for number in range(NODES):
        assert place.charges(number, run) == [1, 2]
    reader = RegistryReader(place.registry)
    server.backup._check_run(run, reader)


def test_a_copy_made_between_any_two_writes_of_a_run_asks_for_the_same_bytes_and_nobody_pays_twice(
    place: Place, tmp_path: Path
) -> None:
    """Each copy is put back after the run went on to its end: older than its sites, as a backup is."""
    run, copies = place.begun(), list[Path]()

    def hook() -> None:
        copies.append(tmp_path / str(len(copies)))
        back_up(place.server, copies[-1])

    with pytest.MonkeyPatch.context() as patch:
        at_each_write(patch, hook)
        start(place, run)
    model, receipts = run.model_state(), sorted(run.receipts_file.read_bytes().splitlines())
    assert len(copies) >= 12
    for copy in copies:
        place.restore(copy)
        start(place, run)
        check_whole(place, run)
        assert all((model[name] == value).all() for name, value in run.model_state().items())
        assert sorted(run.receipts_file.read_bytes().splitlines()) == receipts


@pytest.mark.parametrize("moment", [2, 8])
def test_a_server_that_dies_at_a_copys_moment_goes_on_from_the_copy(
    place: Place, tmp_path: Path, moment: int
) -> None:
    run, left = place.begun(), [moment]

    def hook() -> None:
        left[0] -= 1
        if left[0] == 0:
            back_up(place.server, tmp_path / "copy")
        if left[0] <= 0:  # from then on nothing is written
            raise Died

    with pytest.MonkeyPatch.context() as patch:
        at_each_write(patch, hook)
        with pytest.raises(Died):
            start(place, run)
    place.restore(tmp_path / "copy")
    assert len(records(run)) < 2
    start(place, run)
    check_whole(place, run)


def test_where_another_site_answers_in_time_than_before_later_rounds_are_lost_and_nobody_pays_twice(
    place: Place, tmp_path: Path
) -> None:
    """What docs/server.md says of an older copy: then the parameters are others than those that sites answered to."""
    run, left = place.begun(quorum=2, grace=0.05, round_deadline=60.0), [2]

    def hook() -> None:
        left[0] -= 1
        if left[0] == 0:
            back_up(place.server, tmp_path / "copy")

    with pytest.MonkeyPatch.context() as patch:
        at_each_write(patch, hook)
        start(place, run, "silent")
    before = [place.charges(number, run) for number in range(NODES)]
    assert before == [[1, 2], [1, 2], []]
    place.restore(tmp_path / "copy")
    start(place, run)
    first, second = records(run)
    assert first["admitted"] == ["site-0", "site-1", "site-2"]
    assert [each["reason"] for each in second["left_out"]] == ["wrong_request", "wrong_request"]
    assert [place.charges(number, run) for number in range(NODES)] == [[1, 2], [1, 2], [1, 2]]


def test_a_round_that_ends_meanwhile_is_copied_whole_and_never_mixed(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real = place.begun(), server.backup.copy_database
    happened = []

    def late(source: Path, target: Path) -> None:
        """The registry is copied, and before the copy is made sure of, the run goes on to its end."""
        real(source, target)
        if source.name == "registry.sqlite" and not happened:
            happened.append(True)
            start(place, run)

    monkeypatch.setattr(server.backup, "copy_database", late)
    done = back_up(place.server, tmp_path / "copy")
    assert run.name in done.runs
    copied = RunFolder(tmp_path / "copy" / "runs" / run.path.name)
    assert [each["round"] for each in records(copied)] == [1, 2]
    assert {file.relative_to(run.path) for file in run.path.rglob("*")} == {
        file.relative_to(copied.path) for file in copied.path.rglob("*")
    }


def test_runs_copied_after_their_registry_are_seen_not_to_be_right(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order that an innocent copy takes, by name: the registry, and then the runs, which go on meanwhile."""
    run = place.begun()
    runs_of, database = server.backup._copied_runs, server.backup.copy_database

    def registry_first(from_server: Deployment, copy: Deployment) -> dict[str, int]:
        database(from_server.registry / "registry.sqlite", copy.registry / "registry.sqlite")
        start(place, run)
        return runs_of(from_server, copy)

    monkeypatch.setattr(server.backup, "_copied_runs", registry_first)
    monkeypatch.setattr(server.backup, "copy_database", lambda source, target: None)
    with pytest.raises(BackupError, match="has a receipt that its registry lacks"):
        back_up(place.server, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_runs_that_are_faster_than_the_copy_end_it_with_the_way_out(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter(range(10))
    monkeypatch.setattr(server.backup, "_TRIES", 3)
    monkeypatch.setattr(server.backup, "_ends", lambda _: {"run": next(counts)})
    with pytest.raises(BackupError, match=r"faster than they are copied: .*--stop --resume RUN"):
        back_up(place.server, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_a_copy_is_private_and_holds_no_socket_lock_or_half_written_file(
    place: Place, tmp_path: Path
) -> None:
    folder = place.server.folder
    (folder / "logs" / "superlink.log").write_text("a line\n")
    (folder / "runs" / ".a.1.partial").write_text("half")
    (folder / "up.lock").touch()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "s"))
        done = CliRunner().invoke(app, ["backup", str(folder), str(tmp_path / "copy")])
        assert done.exit_code == 0, done.exception
    assert "every receipt was found in it" in done.output
    copy = Deployment.load(tmp_path / "copy")
    copy.check_private()
    for path in [copy.folder, *copy.folder.rglob("*")]:
        source = folder / path.relative_to(copy.folder)
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(source.stat().st_mode), path
    left_out = {each.relative_to(folder) for each in folder.rglob("*")} - {
        each.relative_to(copy.folder) for each in copy.folder.rglob("*")
    }
    assert {str(each) for each in left_out if "-wal" not in each.name and "-shm" not in each.name} == {
        "s", "up.lock", "runs/.a.1.partial",
    }  # fmt: skip
    (folder / "s").unlink()


def test_in_the_copy_nodes_are_known_no_run_is_at_work_and_nothing_is_on_its_way(
    place: Place, tmp_path: Path
) -> None:
    database = place.server.database
    objects = ObjectStoreFactory(str(database))
    state = LinkStateFactory(str(database), NoOpFederationManager(), objects).state()
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    node = state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, public_key_to_bytes(key), 30.0)
    with sqlite3.connect(database) as db:
        db.execute(
            "INSERT INTO objects (object_id, content, is_available, ref_count) VALUES ('a', x'00', 1, 0)"
        )
        db.execute(
            "INSERT INTO task (task_id, type, run_id, token, pending_at) VALUES (1, 't', 1, 'word', ?)",
            (datetime.now(UTC).isoformat(" "),),
        )
    done = back_up(place.server, tmp_path / "copy")
    copy = Deployment.load(done.folder)
    assert [each.node_id for each in known_nodes(copy)] == [node]
    with sqlite3.connect(copy.database) as db:
        assert db.execute("SELECT count(*) FROM objects").fetchone() == (0,)
        assert db.execute("SELECT token, sub_status, finished_at IS NULL FROM task").fetchall() == [
            (None, "stopped", 0)
        ]
    with sqlite3.connect(database) as db:  # the server's own is as it was
        assert db.execute("SELECT count(*) FROM objects").fetchone() == (1,)
        assert db.execute("SELECT token, finished_at FROM task").fetchall() == [("word", None)]
        db.execute("DROP TABLE objects")
    with pytest.raises(BackupError, match="no such table: objects"):  # another Flower's
        back_up(place.server, tmp_path / "another")
    for file in place.server.folder.glob("state.db*"):
        file.unlink()


def test_a_target_that_is_there_or_within_is_refused_and_a_damaged_folder_gives_no_copy(
    place: Place, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(BackupError, match="is there already"):
        back_up(place.server, tmp_path / "there")
    for within in (place.server.folder / "copy", place.server.runs / "a" / "copy"):
        with pytest.raises(BackupError, match="lies within"):
            back_up(place.server, within)
    broken = tmp_path / "broken"
    shutil.copytree(place.server.folder, broken, ignore=shutil.ignore_patterns("s"))
    data = (broken / "registry" / "registry.sqlite").read_bytes()
    (broken / "registry" / "registry.sqlite").write_bytes(data[: len(data) // 2])
    with pytest.raises(BackupError, match=r"damaged|failed"):
        back_up(Deployment.load(broken), tmp_path / "copy")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["broken", "there"]


def test_a_database_is_copied_as_after_a_commit_while_another_process_writes(tmp_path: Path) -> None:
    source = tmp_path / "a.sqlite"
    writer = sqlite3.connect(source, check_same_thread=False, isolation_level=None)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.executescript("CREATE TABLE a (x); CREATE TABLE b (x);")
    ended = threading.Event()

    def write() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            writer.execute("BEGIN")
            writer.execute("INSERT INTO a VALUES (?)", (number,))
            writer.execute("INSERT INTO b VALUES (?)", (number,))
            writer.execute("COMMIT")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for number in range(20):
            copy_database(source, tmp_path / f"{number}.sqlite")
            with sqlite3.connect(tmp_path / f"{number}.sqlite") as db:
                a, b = (db.execute(f"SELECT x FROM {name} ORDER BY x").fetchall() for name in "ab")
            assert a == b == [(each + 1,) for each in range(len(a))]
    finally:
        ended.set()
        thread.join()
        writer.close()


def test_a_second_pass_takes_what_changed_and_drops_what_is_gone(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "sub").mkdir(parents=True)
    for name in ("a", "b", "sub/c"):
        (source / name).write_text(name)
    copy_files(source, target)
    inode = (target / "a").stat().st_ino
    (source / "b").unlink()
    (source / "sub" / "c").write_text("changed")
    (source / "link").symlink_to("a")
    copy_files(source, target)
    assert sorted(str(each.relative_to(target)) for each in target.rglob("*")) == [
        "a",
        "link",
        "sub",
        "sub/c",
    ]
    assert (target / "sub" / "c").read_text() == "changed"
    assert (target / "link").is_symlink()
    assert (target / "a").stat().st_ino == inode
