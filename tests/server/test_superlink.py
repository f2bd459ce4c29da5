"""What the guard of SuperLink keeps out, over real sockets; beside it a plain SuperLink, which takes most of it."""

from __future__ import annotations

import base64
import hashlib
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any

import grpc  # type: ignore[import-untyped]
import pytest
from flwr.app import ConfigRecord, RecordDict
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate import LinkStateFactory, linkstate_factory
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager
from sqlalchemy import text

from common.wire import Reason, Refusal, Update, answer_to_records
from server import superlink
from simulations.faults.raw_calls import closed, connect, half_open
from tests.server.fleet import PLAIN, Caller, Fleet, fleet, reply_to, words

DENIED, UNSIGNED = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED
EXHAUSTED, INVALID = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fleet(tmp_path_factory.mktemp("guarded")) as made:
        made.c.activate(), made.d.activate()
        yield made


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fleet(tmp_path_factory.mktemp("plain"), PLAIN) as made:
        made.c.activate(), made.d.activate()
        yield made


def pulled(caller: Caller) -> list[str]:
    return [message.metadata.message_id for message in caller.pull().messages_list]


def forged(made: Fleet) -> Any:
    """A request to c, as the server makes it, pushed by d."""
    asked = made.send(made.c, "from the server")
    assert pulled(made.c) == [asked.metadata.message_id]
    return reply_to(
        asked, made.d, RecordDict({"round": ConfigRecord({"run": f"forged-{time.monotonic()}"})}),
        src_node_id=1, dst_node_id=made.c.node, reply_to_message_id="",
    )  # fmt: skip


def test_a_request_that_a_node_forges_reaches_no_other(guarded: Fleet, plain: Fleet) -> None:
    request = forged(plain)
    plain.d.push(request)
    assert pulled(plain.c) == [request.metadata.message_id]
    request = forged(guarded)
    assert guarded.d.push(request) == DENIED
    assert pulled(guarded.c) == []
    assert "refused: PushMessages of node" in guarded.log


def test_an_answer_whole_is_taken_and_its_retry_and_no_second(guarded: Fleet) -> None:
    asked = guarded.send(guarded.c)
    assert pulled(guarded.c) == [asked.metadata.message_id]
    for name, each in get_all_nested_objects(asked).items():
        assert guarded.c.pull_object(name, guarded.run).object_content == each.deflate()
    assert type(guarded.c.confirm(asked.metadata.message_id, guarded.run)) is (
        message_pb2.ConfirmMessageReceivedResponse
    )
    reply = reply_to(asked, guarded.c, answer_to_records(Update(b"\1" * 4_000_000, b"receipt")))
    assert len(get_all_nested_objects(reply)) == superlink.OBJECTS_IN_REPLY
    for _ in range(2):  # the retry of a push whose answer was lost
        said = guarded.c.push(reply)
        assert len(said.objects_to_push) == superlink.OBJECTS_IN_REPLY
    stored = guarded.c.push_objects(reply, guarded.run, said.session_id)
    assert [each.stored for each in stored] == [True] * superlink.OBJECTS_IN_REPLY
    assert guarded.c.push(reply_to(asked, guarded.c, group_id="1", ttl=9.0)) == DENIED


def test_a_node_answers_for_no_other(guarded: Fleet, plain: Fleet) -> None:
    for made, taken in ((plain, True), (guarded, False)):
        asked, before = made.send(made.c), len(made.replies())
        said = made.d.push(reply_to(asked, made.d, src_node_id=made.c.node))
        assert (said != DENIED) == taken
        assert len(made.replies()) - before == taken
        assert pulled(made.c) == [asked.metadata.message_id]
        if not taken:
            assert made.d.push(reply_to(asked, made.d)) == DENIED
            assert made.c.push(reply_to(asked, made.c)) != DENIED


@pytest.mark.parametrize(
    "wrong",
    [{"dst_node_id": 2}, {"message_type": "train"}, {"run_id": 5}, {"group_id": "7"}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_reply_that_is_not_to_what_was_asked_is_refused(guarded: Fleet, wrong: dict[str, Any]) -> None:
    asked = guarded.send(guarded.c, str(wrong))
    assert guarded.c.push(reply_to(asked, guarded.c, **wrong)) == DENIED
    assert guarded.c.push(reply_to(asked, guarded.c)) != DENIED


def test_a_tree_of_more_objects_than_a_reply_has_is_refused_before_the_database_is_held(
    guarded: Fleet, plain: Fleet
) -> None:
    def names(made: Fleet) -> int:
        with made.state.session() as session:
            count: int = session.execute(text("SELECT count(*) FROM objects")).scalar_one()
        return count

    for made, taken in ((plain, True), (guarded, False)):
        asked = made.send(made.d)
        reply, before = reply_to(asked, made.d), names(made)
        tree = get_object_tree(reply)
        for number in range(500):
            tree.children.add(object_id=f"{number:064x}")
        said = made.d.push(reply, tree)
        assert (said != DENIED) == taken
        assert (names(made) - before > 500) == taken
    deep = get_object_tree(reply)
    place = deep
    for number in range(superlink.OBJECTS_IN_REPLY):
        place = place.children.add(object_id=f"{number:064x}")
    assert guarded.d.push(reply, deep) == DENIED
    assert guarded.d.push(reply, message_pb2.ObjectTree(object_id="0" * 64)) == DENIED
    assert guarded.d.push(reply) != DENIED


def test_a_reply_has_no_more_bytes_than_a_release_and_a_margin(guarded: Fleet) -> None:
    asked = guarded.send(guarded.d)
    reply = reply_to(asked, guarded.d, RecordDict({"words": ConfigRecord({"words": b"x" * 7_000_000})}))
    said = guarded.d.push(reply)
    stored = guarded.d.push_objects(reply, guarded.run, said.session_id)
    assert INVALID in stored or EXHAUSTED in stored
    name, content = "0" * 64, b"x" * 5_000_000
    tries = [
        guarded.d.ask("PushObject", guarded.d.part(name, content, guarded.run, said.session_id))
        for _ in range(4)
    ]
    assert tries[-1] == DENIED
    long = fleet_pb2.PullMessagesRequest(node=Node(node_id=guarded.d.node), message_ids=["x" * 100_000])
    assert guarded.d.ask("PullMessages", long) == INVALID


def test_a_part_is_taken_of_a_nodes_own_reply_alone(guarded: Fleet) -> None:
    asked = guarded.send(guarded.c)
    reply = reply_to(asked, guarded.c, words())
    said = guarded.c.push(reply)
    for session in (said.session_id, ""):
        assert guarded.d.push_objects(reply, guarded.run, session) == [DENIED] * 3
    assert [each.stored for each in guarded.d.push_objects(reply, guarded.run, "unknown")] == [False] * 3
    for _ in range(2):  # the same again, as where an answer is lost on its way
        stored = guarded.c.push_objects(reply, guarded.run, said.session_id)
        assert [each.stored for each in stored] == [True] * 3


def test_the_parts_of_a_reply_are_taken_after_its_head_was_fetched(guarded: Fleet) -> None:
    asked = guarded.send(guarded.c)
    reply = reply_to(asked, guarded.c, words())
    said = guarded.c.push(reply)
    guarded.state.delete_messages(
        {asked.metadata.message_id}
    )  # as where a ServerApp asks for replies just now
    stored = guarded.c.push_objects(reply, guarded.run, said.session_id)
    assert [each.stored for each in stored] == [True] * 3


def test_another_nodes_update_is_given_to_nobody_who_knows_its_name(guarded: Fleet, plain: Fleet) -> None:
    for made, given in ((plain, True), (guarded, False)):
        asked = made.send(made.c, "c alone is asked this")
        reply = reply_to(asked, made.c, answer_to_records(Update(b"\2" * 1000, b"receipt")))
        made.c.push_objects(reply, made.run, made.c.push(reply).session_id)
        for name in get_all_nested_objects(reply):
            assert made.d.pull_object(name, made.run).object_found == given
        for name in get_all_nested_objects(asked):
            assert made.d.pull_object(name, made.run).object_found == given
            assert made.c.pull_object(name, made.run).object_found


def test_no_node_takes_away_anothers_message(guarded: Fleet, plain: Fleet) -> None:
    for made, gone in ((plain, True), (guarded, False)):
        while pulled(made.c):
            pass
        asked = made.send(made.c, "asked, and confirmed by another")
        made.d.confirm(asked.metadata.message_id, made.run)
        assert (pulled(made.c) == []) == gone


def test_a_node_activates_itself_alone_and_so_does_no_stranger(guarded: Fleet, plain: Fleet) -> None:
    for made, taken in ((plain, True), (guarded, False)):
        made.take_offline(made.c)
        request = fleet_pb2.ActivateNodeRequest(public_key=made.c.public, heartbeat_interval=1800.0)
        for caller in (made.stranger, made.d):
            answer = caller.ask("ActivateNode", request)
            assert (not isinstance(answer, grpc.StatusCode)) == taken
            if taken:
                break
        assert isinstance(made.c.activate(), grpc.StatusCode) == taken  # shut out for an hour
        made.take_offline(made.c)
        made.c.activate()


def test_who_shows_no_enrolled_key_hears_what_flower_says(guarded: Fleet, plain: Fleet) -> None:
    requests = {
        "RegisterNode": fleet_pb2.RegisterNodeFleetRequest(public_key=guarded.stranger.public),
        "ActivateNode": fleet_pb2.ActivateNodeRequest(
            public_key=guarded.stranger.public, heartbeat_interval=30.0
        ),
        "PullMessages": fleet_pb2.PullMessagesRequest(node=Node(node_id=guarded.c.node)),
        "SendNodeHeartbeat": heartbeat_pb2.SendNodeHeartbeatRequest(
            node=Node(node_id=guarded.c.node), heartbeat_interval=30.0
        ),
    }
    for signed in (True, False):
        for method, request in requests.items():
            heard = [
                (made.stranger.ask(method, request, signed=signed), made.stranger.heard)
                for made in (plain, guarded)
            ]
            assert isinstance(heard[0][0], grpc.StatusCode)
            assert heard[0] == heard[1], method
    assert guarded.d.ask("PullMessages", requests["PullMessages"]) == UNSIGNED
    garbage = [("flwr-public-key-bin", b"x"), ("flwr-timestamp", "x"), ("flwr-signature-bin", b"x")]
    with pytest.raises(grpc.RpcError) as refused:
        guarded.stranger.stub.PullMessages(requests["PullMessages"], metadata=garbage, timeout=30)
    assert refused.value.code() == UNSIGNED


def test_calls_that_a_stranger_begins_and_never_sends_take_nothing(guarded: Fleet, plain: Fleet) -> None:
    for made, shut in ((plain, True), (guarded, False)):
        server = made.server
        opened = [connect("127.0.0.1", server.fleet_port, server.authority) for _ in range(2)]
        for each in opened:
            half_open(each, "PullMessages", 550)
        until(lambda made=made: made.threads() > 1000 or b"refused" in made.log.encode())
        answers = [made.c.pull() for _ in range(10)]
        assert (EXHAUSTED in answers) == shut
        assert (made.threads() > 1000) == shut
        for each in opened:
            each.close()
    lines = [line for line in guarded.log.splitlines() if "no valid signature" in line]
    assert 1 <= len(lines) < 10


def test_calls_that_a_node_begins_and_never_sends_are_ended(guarded: Fleet) -> None:
    headers = [
        (name, base64.b64encode(value).decode() if isinstance(value, bytes) else value)
        for name, value in guarded.d.headers()
    ]
    with closing(connect("127.0.0.1", guarded.server.fleet_port, guarded.server.authority)) as opened:
        half_open(opened, "PullMessages", 60, headers)
        until(lambda: guarded.d.pull() == EXHAUSTED)
        assert not isinstance(guarded.c.pull(), grpc.StatusCode)
        until(lambda: not isinstance(guarded.d.pull(), grpc.StatusCode))
    assert "no whole message came" in guarded.log


def test_a_connection_that_says_nothing_is_closed(guarded: Fleet) -> None:
    server = guarded.server
    with closing(connect("127.0.0.1", server.fleet_port, server.authority)) as silent:
        assert closed(silent, 60.0)


def test_large_messages_without_a_key_are_not_read(guarded: Fleet, plain: Fleet) -> None:
    for made, kept in ((plain, True), (guarded, False)):
        part = made.c.part("0" * 64, b"x" * 150_000_000, made.run, "")
        before, most, ended = made.memory(), [0], threading.Event()

        def watch(made: Fleet = made, most: list[int] = most, ended: threading.Event = ended) -> None:
            while not ended.wait(0.02):
                most.append(made.memory())

        watching = threading.Thread(target=watch)
        watching.start()
        with ThreadPoolExecutor(2) as pool:
            callers = [Caller(made.c.address, made.c.authority) for _ in range(2)]
            answers = list(
                pool.map(lambda one, part=part: one.ask("PushObject", part, signed=False), callers)
            )
        ended.set()
        watching.join()
        assert not [each for each in answers if each not in (UNSIGNED, EXHAUSTED)]
        assert (max(most) - before > 100_000_000) == kept
    part = guarded.d.part("0" * 64, b"x" * 50_000_000, guarded.run, "")
    assert guarded.d.ask("PushObject", part) in (EXHAUSTED, INVALID)


def test_a_database_that_is_held_for_some_seconds_fails_no_call(guarded: Fleet, plain: Fleet) -> None:
    def held(made: Fleet) -> list[Any]:
        beat = heartbeat_pb2.SendNodeHeartbeatRequest(node=Node(node_id=made.c.node), heartbeat_interval=30.0)
        with closing(sqlite3.connect(made.server.database, isolation_level=None)) as database:
            database.execute("BEGIN EXCLUSIVE")
            with ThreadPoolExecutor(40) as pool:
                asked = [pool.submit(made.c.ask, "SendNodeHeartbeat", beat) for _ in range(12)]
                time.sleep(12)
                database.execute("ROLLBACK")
                return [each.result() for each in asked]

    with ThreadPoolExecutor(2) as pool:
        failed, answered = pool.map(held, (plain, guarded))
    assert grpc.StatusCode.INTERNAL in failed
    assert not [each for each in answered if isinstance(each, grpc.StatusCode)]


def test_a_node_that_floods_is_told_so_and_others_are_answered(guarded: Fleet) -> None:
    with ThreadPoolExecutor(4) as pool:
        flood = list(pool.map(lambda _: guarded.d.pull(), range(600)))
    assert EXHAUSTED in flood
    assert not isinstance(guarded.c.pull(), grpc.StatusCode)
    assert len([line for line in guarded.log.splitlines() if "too many calls" in line]) < 5


def test_another_flower_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(superlink, "package_version", "1.40.0")
        with pytest.raises(RuntimeError, match=r"flwr is 1\.40\.0"):
            superlink.guard()
    with pytest.raises(RuntimeError, match="has no"):
        superlink._put(superlink, "of another name", None)


def until(so: Callable[[], bool]) -> None:
    end = time.monotonic() + 90
    while not so():
        assert time.monotonic() < end
        time.sleep(0.2)


def received(made: Fleet, caller: Caller, words: str) -> Any:
    """A message of the server that a node has fetched."""
    asked = made.send(caller, words)
    while asked.metadata.message_id not in pulled(caller):
        continue
    return asked


def lying_reply(made: Fleet, target: str) -> Any:
    """Of d, who never sends it: it says that an object of others' consists of one that nobody has."""
    asked = received(made, made.d, "to d")
    reply = reply_to(asked, made.d, words())
    nowhere = ObjectTree(object_id=hashlib.sha256(os.urandom(9)).hexdigest())
    between = ObjectTree(object_id=target, children=[nowhere])
    return made.d.push(reply, ObjectTree(object_id=reply.metadata.message_id, children=[between]))


def refusal(made: Fleet) -> Any:
    """Of c, in words that are the same each time, and so have the same id."""
    asked = received(made, made.c, "to c")
    return reply_to(asked, made.c, answer_to_records(Refusal(Reason.EXPIRED)))


def test_parts_that_a_node_makes_up_for_anothers_reply_keep_it_out_no_more(
    guarded: Fleet, plain: Fleet
) -> None:
    for made, taken in ((plain, False), (guarded, True)):
        honest = refusal(made)
        (part,) = get_object_tree(honest).children
        assert not isinstance(lying_reply(made, part.object_id), grpc.StatusCode)
        pushed = made.c.push(honest)
        assert isinstance(pushed, grpc.StatusCode) is not taken
    assert made.c.push_objects(honest, made.run, pushed.session_id)
    tree = get_object_tree(honest)
    assert made.state.object_store.get_object_tree(tree.object_id) == tree


def test_parts_that_a_node_makes_up_for_what_the_server_sends_end_no_run(
    guarded: Fleet, plain: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    (part,) = get_object_tree(plain.send(plain.c, "the same in each round")).children
    assert not isinstance(lying_reply(guarded, part.object_id), grpc.StatusCode)
    with pytest.raises(ValueError, match="different children"):  # Flower's own
        guarded.send(guarded.c, "the same in each round")
    monkeypatch.setattr(linkstate_factory, "SqlLinkState", superlink.State)
    database = str(guarded.server.database)
    store = ObjectStoreFactory(database)
    own = replace(guarded, state=LinkStateFactory(database, NoOpFederationManager(), store).state())
    sent = received(own, own.c, "the same in each round")
    assert own.state.object_store.get_object_tree(sent.metadata.message_id) == get_object_tree(sent)
    # What the server has sent no node can say anything else of.
    lying_reply(own, part.object_id)
    assert own.state.object_store.get_object_tree(sent.metadata.message_id) == get_object_tree(sent)


@pytest.mark.parametrize("what", ["_created_at", "_ttl"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reply_whose_time_is_no_number_is_refused(guarded: Fleet, what: str, value: float) -> None:
    asked = received(guarded, guarded.d, "to d")
    reply = reply_to(asked, guarded.d, words())
    vars(reply.metadata)[what] = value
    assert guarded.d.push(reply) == DENIED
