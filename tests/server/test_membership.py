"""Sites that are removed or barred: asked nothing from the next round on, admitted nothing, and what they did stays."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.ledger import Ledger
from common.cli import UserError
from common.privacy.enrolment import enrolment_to_bytes
from common.privacy.entries import Entry
from common.privacy.mechanisms import GaussianSum
from server.admission import LeftOut, admit
from server.cli import app
from server.deployment import Deployment
from server.membership import bar, remove, unbar
from server.nodes import enrolled_keys
from server.overview import overview
from server.registry import Registry, RegistryError, RegistryReader
from server.setup import make_server
from tests.server.bad_replies import answered, expectation, reply, scene, update
from tests.server.test_operation import enroll, free_ports, node_key
from tests.server.test_rounds import LATE, Sites, records, sites, start

__all__ = ["sites"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Deployment]:
    made = Deployment(tmp_path / "server", "127.0.0.1", **free_ports())
    make_server(made)
    return made


@pytest.fixture
def north(tmp_path: Path, server: Deployment) -> Entry:
    """An enrolled site's genesis."""
    with Ledger.create(
        tmp_path / "ledger", epsilon=4.0, delta=1e-6, typical_plan=[GaussianSum(8.0)]
    ) as ledger:
        genesis = ledger.entries()[0]
    enroll(server, "north", enrolment_to_bytes(genesis, node_key()))
    return genesis


def command(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    if done.exception is not None:
        raise done.exception
    return str(done.output)


def test_a_barred_site_is_asked_nothing_until_it_is_let_in_again(sites: Sites) -> None:
    registry = Registry(sites.registry)
    run = sites.run(minimum_sites=2)
    registry.shut_out("site-2", "barred", "its key leaked")
    try:
        grid = start(sites, run)
        assert LATE not in {message.metadata.dst_node_id for message in grid.sent}
        assert [each["admitted"] for each in records(run)] == [["site-0", "site-1"]] * 2
        assert all(each["missing"] == 0 and not each["left_out"] for each in records(run))
        assert sites.charges(2, run) == []
    finally:
        registry.let_in("site-2")
    again = sites.run(minimum_sites=3)
    start(sites, again)
    assert [len(each["admitted"]) for each in records(again)] == [3, 3]


@pytest.mark.parametrize("state", ["barred", "removed"])
def test_an_answer_of_a_site_that_is_out_is_left_out_with_the_word(tmp_path: Path, state: str) -> None:
    it = scene(tmp_path / "registry")
    content = reply(update(), answered(it.site, update()))
    it.registry.shut_out("north", state, "it left")  # type: ignore[arg-type]
    verdict = admit(content, expectation(), it.registry, [])
    assert isinstance(verdict, LeftOut)
    assert (verdict.reason, verdict.site) == (state, "north")
    it.registry.let_in("north")
    assert not isinstance(admit(content, expectation(), it.registry, []), LeftOut)


def test_a_removed_site_is_out_for_good_and_its_chain_stays(server: Deployment, north: Entry) -> None:
    said = command("remove", server.folder, "north", "--reason", "the contract ended")
    assert "Site north is removed: its node may not connect any more" in said
    assert enrolled_keys(server) == {}
    (line,) = overview(server).sites
    assert (line.removed, line.barred, line.node) == (True, False, "none")
    reader = RegistryReader(server.registry)
    assert reader.chain(north.key_id).entries == [north]
    (listed,) = json.loads(command("sites", server.folder, "--json"))
    assert (listed["removed"], listed["barred"], listed["reason"]) == (True, False, "the contract ended")
    assert "north is removed: the contract ended" in command("sites", "--registry", server.registry)
    with pytest.raises(RegistryError, match=r"was removed: `fedtide server enroll` takes it in again"):
        unbar(server, "north")
    with pytest.raises(RegistryError, match="was removed: it is out already"):
        bar(server, "north", "why not")


def test_a_removed_site_is_enrolled_again_and_a_barred_one_is_not(server: Deployment, north: Entry) -> None:
    remove(server, "north")
    enroll(server, "north", enrolment_to_bytes(north, key := node_key()))
    assert enrolled_keys(server) == {"north": key}
    assert [site.shut_out for site in RegistryReader(server.registry).sites()] == [False]
    command("bar", server.folder, "north", "--reason", "its key leaked")
    with pytest.raises(RegistryError, match=r"barred: `fedtide server unbar .* north` comes first"):
        enroll(server, "north", enrolment_to_bytes(north, node_key()))
    assert enrolled_keys(server) == {"north": key}
    command("unbar", server.folder, "north")
    enroll(server, "north", enrolment_to_bytes(north, node_key()))


def test_a_bar_outlives_a_removal_and_a_reason_a_second_one(server: Deployment, north: Entry) -> None:
    remove(server, "north", "the contract ended")
    remove(server, "north")
    assert Registry(server.registry).named("north").reason == "the contract ended"
    enroll(server, "north", enrolment_to_bytes(north, node_key()))
    bar(server, "north", "its key leaked")
    remove(server, "north")
    assert enrolled_keys(server) == {}
    site = Registry(server.registry).named("north")
    assert (site.out, site.reason) == ("barred", "its key leaked")
    with pytest.raises(RegistryError, match=r"`fedtide server unbar .* north` comes first"):
        enroll(server, "north", enrolment_to_bytes(north, node_key()))


def test_a_proven_cheat_loses_its_node_and_is_not_taken_in_again(server: Deployment, north: Entry) -> None:
    with sqlite3.connect(server.registry / "registry.sqlite") as database:
        database.execute("UPDATE sites SET barred = 1")
    database.close()
    remove(server, "north")
    assert enrolled_keys(server) == {}
    assert Registry(server.registry).named("north").barred
    with pytest.raises(
        RegistryError, match="two histories of its ledger, which is proven: it is not taken in"
    ):
        enroll(server, "north", enrolment_to_bytes(north, node_key()))


def test_a_name_that_nobody_has_and_a_bar_without_a_reason_are_refused(
    server: Deployment, north: Entry
) -> None:
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: remove(server, "../north"), "no site is enrolled as '../north': there are north"),
        (lambda: bar(server, "south", "x"), "no site is enrolled as 'south'"),
        (lambda: bar(server, "north", " "), "say why with --reason"),
        (lambda: unbar(server, "north"), f"is not barred: `fedtide server sites {server.folder}` lists"),
    ]
    for do, says in cases:
        with pytest.raises(RegistryError, match=says):
            do()
    assert len(enrolled_keys(server)) == 1


def test_sites_are_listed_by_the_servers_folder_or_by_a_registry_alone(
    server: Deployment, north: Entry
) -> None:
    by_folder = command("sites", server.folder, "--json")
    assert by_folder == command("sites", "--registry", server.registry, "--json")
    for wrong in (["sites"], ["sites", server.folder, "--registry", server.registry]):
        with pytest.raises(UserError, match="fedtide server sites DIR"):
            command(*wrong)


def test_a_registry_of_before_is_read_as_it_is(server: Deployment, north: Entry) -> None:
    file = server.registry / "registry.sqlite"
    with sqlite3.connect(file) as db:
        db.execute("DROP TABLE outs")
    assert [site.shut_out for site in RegistryReader(server.registry).sites()] == [False]
    bar(server, "north", "its key leaked")
    assert [site.shut_out for site in RegistryReader(server.registry).sites()] == [True]
