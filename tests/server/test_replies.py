"""One site's reply concerns that site: whatever its node pushes, every other release of the round is taken in.

Over sockets: a real SuperLink, the ServerApp's real grid, nodes that speak Flower's own protocol, real sites.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message
from flwr.proto.message_pb2 import ObjectTree

from client.app import SITES_FOLDER
from server import replies
from server.registry import Registry
from server.rounds import run_rounds
from server.runs import RunFolder
from tests.server.real_link import Fate, Link, Nodes, Pushed, real_link
from tests.server.test_rounds import Sites

BAD, WELL = 2, (0, 1)
"""The site whose node pushes what is said, and the others."""
DEADLINE = 20.0


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterable[Sites]:
    folder = tmp_path_factory.mktemp("replies")
    it = Sites(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDTIDE_HOME", str(folder / "cache"))
        patch.setenv(SITES_FOLDER, str(folder / "sites"))
        yield it


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterable[Link]:
    with real_link(tmp_path_factory.mktemp("link")) as it:
        yield it


def one_run(sites: Sites, link: Link, fate: Fate, **server: Any) -> tuple[RunFolder, Nodes]:
    """A run over three sites, of which the last one's node pushes what `fate` makes of its honest reply."""
    run = sites.run(**{"minimum_sites": 2, "round_deadline": DEADLINE, **server})
    fates = dict.fromkeys(WELL, Pushed.honest) | {BAD: fate}
    with Nodes(link.fleet, fates) as nodes:
        over(sites, link, run, nodes)
    return run, nodes


def over(sites: Sites, link: Link, run: RunFolder, nodes: Nodes) -> None:
    """The rounds of a run, to their end, with all nodes there at its beginning."""
    names = {node: f"site-{number}" for number, node in nodes.ids.items()}
    arguments = link.grid, run.plan(), run, Registry(sites.registry), run.round_state(0)
    run_rounds(*arguments, nodes_expected=len(names), names=lambda: names)


def without_objects(reply: Message) -> Pushed:
    pushed = Pushed.honest(reply)
    pushed.objects.clear()
    return pushed


def in_part(reply: Message) -> Pushed:
    pushed = Pushed.honest(reply)
    pushed.objects.pop(reply.metadata.message_id)
    return pushed


def lying_tree(reply: Message) -> Pushed:
    """One object whose head names a child that the tree lacks."""
    child = "0ed72cd3" * 8
    return Pushed.one_object(reply, f"Message {child} 0".encode() + b"\0")


def garbage(reply: Message) -> Pushed:
    """What SuperLink takes for a message, by its head, and protobuf does not."""
    body = b"\xff" * 40
    return Pushed.one_object(reply, b"Message  40\0" + body)


def another_object(reply: Message) -> Pushed:
    return Pushed.one_object(reply, ConfigRecord({"a": 1}).deflate())


def many_objects(reply: Message) -> Pushed:
    pushed = Pushed.honest(reply)
    extra = [ObjectTree(object_id=f"{number:064x}") for number in range(1, replies.MOST_OBJECTS + 1)]
    pushed.tree.children.extend(extra)
    return pushed


def one_chunk_many_times(reply: Message) -> Pushed:
    """An array that names its one chunk so often that it unpacks to more than any release."""
    array = Array(dtype="uint8", shape=(2**20,), stype="none", data=b"x" * 2**20)
    reply.content["update"] = ArrayRecord({"one": array})
    (chunk,) = array.children or {}
    places = b"[" + b",".join([b"0"] * (replies.MOST_BYTES // 2**20 + 1)) + b"]"
    body = b'{"dtype": "uint8", "shape": [1], "stype": "none", "arraychunk_ids": ' + places + b"}"
    content = f"Array {chunk} {len(body)}".encode() + b"\0" + body
    return Pushed.honest(reply).with_another(array.object_id, content)


def unweighable(reply: Message) -> Pushed:
    """Records of a kind that Fedtide never sends."""
    reply.content["update"] = ConfigRecord({"numbers": [1, 2, 3]})
    return Pushed.honest(reply)


def in_turn(*fates: Fate) -> Fate:
    """One for each round."""
    left = iter(fates)

    def next_one(reply: Message) -> Pushed | None:
        return next(left)(reply)

    return next_one


BAD_REPLIES = [
    (lying_tree, garbage),
    (another_object, many_objects),
    (unweighable, one_chunk_many_times),
]


@pytest.mark.parametrize("fates", BAD_REPLIES)
def test_a_reply_that_cannot_be_read_is_left_out_by_name_and_the_others_are_taken_in(
    sites: Sites, link: Link, fates: tuple[Fate, ...], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fedtide.server"):
        run, nodes = one_run(sites, link, in_turn(*fates))
    records = list(run.records())
    assert len(records) == len(fates)
    for record in records:
        assert record["admitted"] == ["site-0", "site-1"]
        assert record["aggregated"]
        assert record["missing"] == 0
        (left_out,) = record["left_out"]
        assert (left_out["node"], left_out["reason"]) == (str(nodes.ids[BAD]), "malformed")
    said = [each.getMessage() for each in caplog.records]
    assert sum("is left out: malformed: " in line for line in said) == len(fates)


def test_a_reply_without_its_objects_holds_nobody_up(sites: Sites, link: Link) -> None:
    """It is left out at the deadline, or where quorum and grace are over; a reply that came in part is missing."""
    run, nodes = one_run(
        sites, link, in_turn(without_objects, in_part), quorum=2, grace=5.0, round_deadline=900.0
    )
    without, part = run.records()
    for record in (without, part):
        assert record["admitted"] == ["site-0", "site-1"]
        assert record["aggregated"]
    (left_out,) = without["left_out"]
    assert (left_out["node"], left_out["reason"]) == (str(nodes.ids[BAD]), "malformed")
    assert (without["missing"], part["missing"], part["left_out"]) == (0, 1, [])


def test_a_reply_says_nothing_about_whose_it_is(sites: Sites, link: Link) -> None:
    """One that names another message in its own bytes is taken for what SuperLink had it for."""
    others: list[str] = []

    def first(reply: Message) -> Pushed:
        others.append(reply.metadata.reply_to_message_id)
        return Pushed.honest(reply)

    def claims(reply: Message) -> Pushed:
        pushed = Pushed.honest(reply)
        own = reply.metadata.reply_to_message_id
        root = pushed.objects[reply.metadata.message_id]
        return pushed.with_another(reply.metadata.message_id, root.replace(own.encode(), others[-1].encode()))

    run = sites.run(minimum_sites=2, round_deadline=DEADLINE)
    with Nodes(link.fleet, {0: first, 1: Pushed.honest, BAD: claims}) as nodes:
        over(sites, link, run, nodes)
    assert [record["admitted"] for record in run.records()] == [["site-0", "site-1", "site-2"]] * 2
