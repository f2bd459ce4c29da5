"""Rounds with sites that are slow, gone or half done: quorum, grace, deadline, and what a resume repairs."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error

import client.app
from client.app import SITES_FOLDER
from client.ledger import Ledger
from common.config import Plan, PlanError, make_plan
from common.events.catalog import Catalog
from common.wire import request_from_records
from server.aggregation import check_aggregation
from server.app import app as server_app
from server.asking import nonce_of
from server.exchange import RoundRecord
from server.registry import Registry, RegistryReader
from server.rounds import run_rounds
from server.runs import RunError, RunFolder, write_whole
from simulations import inline
from simulations.sites import registry_folder
from tests.tiny import tiny_run

NODES = 3
FAST: dict[str, Any] = {
    "privacy": {"noise_multiplier": 60.0, "sampling_rate": 1.0, "epsilon": 90.0},
    "training": {"rounds": 2, "steps_per_round": 1, "server_momentum": 0.5},
}
LATE = 4
"""The node of site-2."""


class Sites:
    """Three sites that outlive the runs over them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        first = tiny_run(folder, plan=FAST, sites=folder / "sites", site_budget=90.0, n_sites=NODES)
        self.first, self.registry = first, registry_folder(folder / "sites")

    def run(self, **server: Any) -> RunFolder:
        plan = self.first.plan
        plan = plan.model_copy(
            update={
                "name": "more",  # a run of the first one's name, begun in the same second, is the same to a site
                "server": plan.server.model_validate({**plan.server.model_dump(), **server}),
            }
        )
        run = RunFolder.create(
            self.folder / "more", plan, Catalog.load(self.folder / "sites" / "catalog.jsonl")
        )
        run.save_round(0, self.first.run.round_state(0))
        return run

    def charges(self, number: int, run: RunFolder) -> list[int]:
        with Ledger.open(self.folder / "sites" / f"{number:05d}" / "ledger") as ledger:
            return [each.reserve.round for each in ledger.status().charges if each.reserve.run == run.name]


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterable[Sites]:
    folder = tmp_path_factory.mktemp("rounds")
    it = Sites(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDTIDE_HOME", str(folder / "cache"))
        patch.setenv(SITES_FOLDER, str(folder / "sites"))
        yield it


class Network(inline.InlineGrid):
    """The inline grid, with one node that does not answer, or whose process is gone.

    Attributes:
        fate: "silent", "gone" or "well".
    """

    def __init__(self, fate: str) -> None:
        super().__init__(client.app.app, {node: {"partition-id": node - 2} for node in range(2, 2 + NODES)})
        self.fate, self.sent = fate, list[Message]()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        self.sent += messages
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message_id in message_ids:
            message = self._waiting.get(message_id)
            if message is None or message.metadata.dst_node_id != LATE or self.fate == "well":
                answers = list(super().pull_messages([message_id]))
                if answers:
                    return answers
            elif self.fate == "gone":
                reply = Message(Error(code=5, reason="gone"), reply_to=self._waiting.pop(message_id))
                reply.metadata.__dict__["_src_node_id"] = 1  # as the SuperLink signs such a reply
                return [reply]
        return []


def start(sites: Sites, run: RunFolder, fate: str = "well", grid: Network | None = None) -> Network:
    grid = grid or Network(fate)
    inline.TaskIdentity.task_id, inline.TaskIdentity.run_id, inline.TaskIdentity.node_id = 1, 1, 1
    config = {"run-dir": str(run.path), "registry-dir": str(sites.registry)}
    server_app(grid=grid, context=Context(1, 1, {}, RecordDict(), config))
    return grid


def asked_in(grid: Network) -> list[tuple[int, int, str]]:
    """Round, node and nonce of each request that was sent."""
    said = [(each.metadata.dst_node_id, request_from_records(each.content).said) for each in grid.sent]
    return [(each.round, node, each.nonce) for node, each in said]


def records(run: RunFolder) -> list[dict[str, Any]]:
    return list(run.records())


# --- who is waited for


def test_after_quorum_and_grace_a_round_goes_on_without_the_slow_site(
    sites: Sites, caplog: pytest.LogCaptureFixture
) -> None:
    run = sites.run(quorum=2, grace=0.05, round_deadline=300.0)
    with caplog.at_level(logging.INFO, "fedtide.server"):
        start(sites, run, "silent")
    assert [(each["missing"], each["admitted"]) for each in records(run)] == [(1, ["site-0", "site-1"])] * 2
    said = [record.getMessage() for record in caplog.records if record.name == "fedtide.server"]
    assert "round 1 (update) begins: 3 sites are asked" in said
    assert "round 1: site-0 is admitted" in said
    assert any(line.startswith("round 1: site-2 is left out: missing: no answer in time") for line in said)
    assert "round 2 is aggregated: site-0, site-1" in said
    assert sites.charges(2, run) == []


def test_without_a_quorum_all_sites_are_waited_for_until_the_deadline(sites: Sites) -> None:
    run = sites.run(round_deadline=3.0)
    start(sites, run, "silent")
    assert [each["missing"] for each in records(run)] == [1, 1]
    assert all(each["seconds"] >= 3.0 for each in records(run))


def test_no_message_outlives_its_round(sites: Sites) -> None:
    grid = start(sites, sites.run(round_deadline=60.0))
    assert len(grid.sent) == 2 * NODES
    assert all(59.0 - 30.0 < message.metadata.ttl <= 60.0 for message in grid.sent)


def test_a_site_that_is_gone_is_known_by_what_its_error_answers(sites: Sites) -> None:
    run = sites.run(round_deadline=300.0)
    start(sites, run, "gone")
    for record in records(run):
        (away,) = record["left_out"]
        assert (away["node"], away["reason"], away["code"]) == (str(LATE), "node_error", 5)
        assert away["site"] == "site-2"
        assert (record["admitted"], record["missing"]) == (["site-0", "site-1"], 0)


def test_a_site_that_never_answered_is_named_as_enrolled(
    sites: Sites, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, folder = sites.run(round_deadline=300.0), tmp_path / "registry"
    shutil.copytree(sites.registry, folder)
    with sqlite3.connect(folder / "registry.sqlite") as db:  # as of a server that nobody has answered yet
        db.execute("DELETE FROM nodes")
    inline.TaskIdentity.task_id, inline.TaskIdentity.run_id, inline.TaskIdentity.node_id = 1, 1, 1
    arguments = Network("gone"), run.plan(), run, Registry(folder), run.round_state(0)
    with caplog.at_level(logging.INFO, "fedtide.server"):
        run_rounds(*arguments, names=lambda: {node: f"site-{node - 2}" for node in range(2, 2 + NODES)})
    said = [record.getMessage() for record in caplog.records if record.name == "fedtide.server"]
    assert any(line.startswith("round 1: site-2 is left out: node_error 5") for line in said)
    assert "round 1: site-0 is admitted" in said


def test_a_quorum_that_could_not_be_aggregated_is_refused() -> None:
    with pytest.raises(PlanError, match=r"quorum is 2, but a round needs minimum_sites = 3 updates: raise"):
        make_plan({"server": {"quorum": 2, "minimum_sites": 3}})
    plan = make_plan({"server": {"quorum": 2, "aggregation": "median", "malicious_sites": 1}})
    with pytest.raises(PlanError, match=r"server\.quorum is 2, but median with malicious_sites 1 needs 3"):
        check_aggregation(plan.server, 5)
    assert Plan().server.quorum is None


# --- what a resume repairs


def test_a_half_done_round_asks_only_the_missing_site_and_with_the_same_nonce(sites: Sites) -> None:
    run = sites.run(minimum_sites=3, round_deadline=2.0)
    with pytest.raises(RunError, match="no round was aggregated"):
        start(sites, run, "silent")
    run.drop_last_record()
    run.drop_last_record()
    run.rounds_file.unlink()  # as if it had been killed in round 1, before its line
    for file in (run.path / "rounds").glob("00002.*"):
        file.unlink()
    lines = run.receipts_file.read_bytes().splitlines(keepends=True)
    run.receipts_file.write_bytes(b"".join(lines[:2]))
    for file in (run.path / "updates").glob("00002-*"):
        file.unlink()
    grid = start(sites, run)
    registry = Registry(sites.registry)
    late = next(site.key_id for site in registry.sites() if site.name == "site-2")
    nonce = nonce_of(registry, run.name, 1, late)
    assert [each for each in asked_in(grid) if each[0] == 1] == [(1, LATE, nonce)]
    assert len(records(run)[0]["admitted"]) == NODES
    assert sites.charges(0, run).count(1) == sites.charges(2, run).count(1) == 1


def chosen(sites: Sites, run: RunFolder, number: int) -> list[str]:
    names = {site.key_id: site.name for site in Registry(sites.registry).sites()}
    return sorted(names[key_id] for key_id in run.asked(number))


def test_a_resumed_round_asks_the_sites_that_it_chose(sites: Sites) -> None:
    run = sites.run(sites_per_round=2, minimum_sites=2, round_deadline=60.0)
    start(sites, run)
    first = chosen(sites, run, 1)
    assert len(first) == 2
    assert records(run)[0]["admitted"] == first
    forget_all_but_the_start(run)
    keys = {site.name: site.key_id for site in Registry(sites.registry).sites()}
    other = sorted({"site-0", "site-1", "site-2"} - {first[0]})
    run.save_asked(1, {keys[name] for name in other})  # as if chance had chosen these before the crash
    start(sites, run)
    assert records(run)[0]["admitted"] == other


def test_a_server_that_lost_what_it_chose_chooses_the_same_again(sites: Sites) -> None:
    run = sites.run(sites_per_round=2, minimum_sites=2, round_deadline=60.0)
    start(sites, run)
    before = [chosen(sites, run, number) for number in (1, 2)]
    forget_all_but_the_start(run)
    start(sites, run)
    assert [chosen(sites, run, number) for number in (1, 2)] == before
    assert sum(len(sites.charges(number, run)) for number in range(NODES)) == 4


def forget_all_but_the_start(run: RunFolder) -> None:
    """As a copy from before the first round has it."""
    for file in run.path.rglob("*"):
        if file.is_file() and file.name not in (
            "plan.json",
            "version.json",
            "catalog.jsonl",
            "00000.safetensors",
        ):
            file.unlink()


def test_a_server_restored_from_a_copy_asks_for_the_same_releases_and_nobody_pays_twice(sites: Sites) -> None:
    """The copy is of run and registry, after two of five rounds; it asks for the three that it lost once more."""
    whole = sites.run()
    plan = whole.plan()
    training = plan.training.model_copy(update={"rounds": 5})
    run = sites.run()
    write_whole(run.path / "plan.json", plan.model_copy(update={"training": training}).to_json().encode())
    copy = sites.folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)

    def keep_a_copy(record: RoundRecord) -> None:
        if record.round == 2:
            shutil.copytree(run.path, copy / "run")
            shutil.copytree(sites.registry, copy / "registry")

    run_here(sites, run, on_round=keep_a_copy)
    model, receipts = run.model_state(), run.receipts_file.read_bytes()
    charged = [sites.charges(number, run) for number in range(NODES)]
    assert charged == [[1, 2, 3, 4, 5]] * NODES
    for there, here in (("run", run.path), ("registry", sites.registry)):
        shutil.rmtree(here)
        shutil.copytree(copy / there, here)
    assert len(records(run)) == 2
    grid = run_here(sites, run)
    assert {number for number, _, _ in asked_in(grid)} == {3, 4, 5}
    assert [each["admitted"] for each in records(run)] == [["site-0", "site-1", "site-2"]] * 5
    assert [sites.charges(number, run) for number in range(NODES)] == charged
    assert run.receipts_file.read_bytes() == receipts
    assert all((model[name] == value).all() for name, value in run.model_state().items())
    more = sites.run()  # and what comes after is taken in like any other
    start(sites, more)
    assert [len(each["admitted"]) for each in records(more)] == [NODES] * 2


def run_here(
    sites: Sites, run: RunFolder, on_round: Callable[[RoundRecord], None] = lambda _: None
) -> Network:
    """The run's rounds, told of each."""
    grid = Network("well")
    inline.TaskIdentity.task_id, inline.TaskIdentity.run_id, inline.TaskIdentity.node_id = 1, 1, 1
    run_rounds(grid, run.plan(), run, Registry(sites.registry), run.round_state(0), on_round=on_round)
    return grid


def test_another_servers_key_asks_under_other_nonces_and_is_told_no(sites: Sites, tmp_path: Path) -> None:
    """What the test above rests on is the key: a registry that is the same but for it is nobody to these sites."""
    run = sites.run()
    shutil.copytree(sites.registry, tmp_path / "registry")
    (tmp_path / "registry" / "server.key").unlink()
    grid = Network("well")
    inline.TaskIdentity.task_id, inline.TaskIdentity.run_id, inline.TaskIdentity.node_id = 1, 1, 1
    with pytest.raises(RunError, match="no round was aggregated"):
        run_rounds(grid, run.plan(), run, Registry(tmp_path / "registry"), run.round_state(0))
    assert {each["reason"] for record in records(run) for each in record["left_out"]} == {"origin"}
    assert [sites.charges(number, run) for number in range(NODES)] == [[]] * NODES
    registry = Registry(sites.registry)
    for number, node, nonce in asked_in(grid):
        key_id = registry.sites_by_node()[node].key_id
        assert nonce != nonce_of(registry, run.name, number, key_id)


def test_heads_that_the_registry_holds_already_are_admitted_again_with_the_same_anchors(sites: Sites) -> None:
    run = sites.run()
    start(sites, run)
    model, receipts = run.model_state(), set(run.receipts_file.read_bytes().splitlines())
    for file in (run.rounds_file, run.receipts_file):
        file.unlink()
    start(sites, run)
    assert set(run.receipts_file.read_bytes().splitlines()) == receipts
    assert all((model[name] == value).all() for name, value in run.model_state().items())
    assert sites.charges(1, run) == [1, 2]


def test_a_registry_that_lost_the_last_heads_gets_them_from_the_receipts(sites: Sites) -> None:
    copy = sites.folder / "older"
    shutil.rmtree(copy, ignore_errors=True)
    run = sites.run()
    shutil.copytree(sites.registry, copy)
    start(sites, run)
    heads = {
        site.key_id: Registry(sites.registry).chain(site.key_id).entries[-1]
        for site in Registry(copy).sites()
    }
    newest = sites.folder / "newest"
    shutil.rmtree(newest, ignore_errors=True)
    shutil.copytree(sites.registry, newest)
    # The run stopped in round 1, and its registry is from before it.
    run.rounds_file.unlink()
    lines = run.receipts_file.read_bytes().splitlines(keepends=True)
    run.receipts_file.write_bytes(b"".join(lines[:NODES]))
    shutil.rmtree(sites.registry)
    shutil.copytree(copy, sites.registry)
    grid = start(sites, run)
    assert {number for number, _, _ in asked_in(grid)} == {2}
    reader = RegistryReader(sites.registry)
    assert {key: reader.chain(key).entries[head.seq].hash for key, head in heads.items()} == {
        key: head.hash for key, head in heads.items()
    }
    assert sites.charges(1, run) == [1, 2]


@pytest.mark.parametrize("damage", ["checkpoint", "momentum", "torn line"])
def test_a_last_round_that_is_not_all_there_is_done_again(sites: Sites, damage: str) -> None:
    run = sites.run()
    start(sites, run)
    before = run.round_state(2)
    match damage:
        case "checkpoint":
            (run.path / "rounds" / "00002.safetensors").unlink()
        case "momentum":
            (run.path / "rounds" / "00002.velocity.safetensors").write_bytes(b"")
        case "torn line":
            data = run.rounds_file.read_bytes()
            run.rounds_file.write_bytes(data[:-9])
    grid = start(sites, run)
    assert grid.sent == []  # its updates are kept
    assert [each["round"] for each in records(run)] == [1, 2]
    assert all((before[name] == value).all() for name, value in run.round_state(2).items())


def test_a_run_that_lacks_an_earlier_checkpoint_says_so(sites: Sites) -> None:
    run = sites.run()
    start(sites, run)
    (run.path / "rounds" / "00001.safetensors").unlink()
    with pytest.raises(RunError, match=r"missing or damaged .* restore the folder from a backup"):
        start(sites, run)
    assert run.ending() is not None


def test_a_receipt_of_another_run_is_not_taken_in_at_a_resume(sites: Sites) -> None:
    run, other = sites.run(), sites.run()
    start(sites, run)
    start(sites, other)
    shutil.copytree(other.path / "updates", run.path / "updates", dirs_exist_ok=True)
    lines = [json.loads(line) for line in other.receipts_file.read_bytes().splitlines()]
    run.receipts_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.unlink(run.rounds_file)
    with pytest.raises(RunError, match=r"a receipt of round 1 in .* does not fit run or registry"):
        start(sites, run)
