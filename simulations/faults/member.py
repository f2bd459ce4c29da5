"""A malicious enrolled site beside honest ones: its own key and node, and whatever it likes to send with them.

It is enrolled as sites are, and never runs Fedtide: a loop here calls the Fleet API in its name, and does another wrong
at each message that it is sent. Each try is judged at once, and the run, in which the others go on, at its end.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from client.ledger import Ledger
from server.runs import RunFolder
from simulations.faults.attacker import Tried, node_id_of, public_key_of, signed_as
from simulations.faults.judging import judge, mark
from simulations.faults.place import OTHERS, SITES, VICTIM, FaultError, Place
from simulations.faults.rows import ended_well

NAME = "mallory"
MEMBER = "a malicious enrolled site"
_ROUNDS, _DEADLINE = 4, 120.0
_TREE = 20_000
_FLOOD = 600


@dataclass
class Member:
    """A node that has a key, and the run that it is asked in."""

    place: Place
    stub: Any
    node: int = 0
    found: list[Tried] = field(default_factory=list)
    answer: Any = None
    session: str = ""

    def ask(self, method: str, request: Any) -> str:
        """The name of the status that a call ended with."""
        import grpc  # type: ignore[import-untyped]

        try:
            headers = signed_as(self.place, NAME, datetime.now(UTC))
            self.answer = getattr(self.stub, method)(request, metadata=headers, timeout=90)
        except grpc.RpcError as error:
            return str(error.code().name)
        if method == "PushMessages":
            self.session = self.answer.session_id
        return "OK"

    def tried(self, what: str, said: str, holds: bool) -> None:
        self.found.append(Tried(MEMBER, what, said, holds))

    def refused(self, what: str, method: str, request: Any) -> None:
        """A try that is to be refused."""
        said = self.ask(method, request)
        self.tried(what, said, said in ("PERMISSION_DENIED", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"))

    def activate(self) -> None:
        from flwr.proto import fleet_pb2

        public = public_key_of(self.place, NAME)
        request = fleet_pb2.ActivateNodeRequest(public_key=public, heartbeat_interval=1800.0)
        said = self.ask("ActivateNode", request)
        if said != "OK":
            raise FaultError(f"{NAME} could not connect: {said}")
        self.node = self.answer.node_id
        victim = fleet_pb2.ActivateNodeRequest(
            public_key=public_key_of(self.place, VICTIM), heartbeat_interval=1800.0
        )
        self.refused("activate another site's node, to keep its place", "ActivateNode", victim)

    def pulled(self) -> Any:
        """A message that was sent to it, or nothing."""
        from flwr.proto import fleet_pb2
        from flwr.proto.node_pb2 import Node

        if self.ask("PullMessages", fleet_pb2.PullMessagesRequest(node=Node(node_id=self.node))) != "OK":
            return None
        return next(iter(self.answer.messages_list), None)


def betray(place: Place) -> list[Tried]:
    """All tries, one kind a round; last, whether the run came to its end with all others in it."""
    from flwr.proto import fleet_pb2
    from flwr.proto.fleet_pb2_grpc import FleetStub

    from simulations.faults.intruder import channel

    if not (place.folder / NAME).exists():
        place.make_site(NAME)
        place.enroll(NAME)
    way = {"host": "127.0.0.1", "fleet": place.ports[0], "ca": str(place.server / "tls" / "ca.crt")}
    member = Member(place, FleetStub(channel(way)))
    member.activate()
    before = mark(place, "member", SITES)
    run = place.begin(
        "member", _ROUNDS, quorum=len(SITES), grace=10.0, minimum_sites=2, round_deadline=_DEADLINE
    )
    kinds: Iterator[Any] = iter((forge_and_impersonate, lie, grow, stall, flood))
    end = time.monotonic() + 600
    while run.process.poll() is None and time.monotonic() < end:
        message = member.pulled()
        if message is not None and (kind := next(kinds, None)) is not None:
            kind(member, message)
        time.sleep(0.5)
    ended_well(place, run)
    member.ask(
        "DeactivateNode", fleet_pb2.DeactivateNodeRequest(node_id=member.node)
    )  # later runs wait for none
    place.well("server", "remove", place.server, NAME)
    faults = judge(place, "member", before, SITES, SITES)
    wrong = "; ".join(fault for each in faults.values() for fault in each)
    said = f"whole; sites admitted by round: {_admitted(place)}; every check holds"
    member.found.append(Tried("", "the run beside all this", wrong or said, not wrong))
    forged = _charged_for_nothing(place)
    member.found.append(Tried("", "charges at other sites for what it forged", str(forged), not forged))
    return member.found


def _charged_for_nothing(place: Place) -> int:
    """Charges in the honest sites' ledgers of runs that the server does not know."""
    known = {RunFolder(folder).name for folder in (place.server / "runs").iterdir() if folder.is_dir()}
    count = 0
    for site in SITES:
        with Ledger.open(place.folder / site / "ledger") as ledger:
            count += sum(each.reserve.run not in known for each in ledger.status().charges)
    return count


def _admitted(place: Place) -> str:
    records = [json.loads(line) for line in place.lines("member", "rounds.jsonl")]
    return ", ".join(str(len(record["admitted"])) for record in records)


def _reply(member: Member, asked: Any, **metadata: Any) -> tuple[Any, dict[str, bytes]]:
    """A push of a reply, of a refusal, with what else in its metadata; and its objects."""
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.app.message.message import remove_content_from_message
    from flwr.common.serde import message_from_proto, message_to_proto
    from flwr.proto.fleet_pb2 import PushMessagesRequest
    from flwr.proto.node_pb2 import Node
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

    content = RecordDict({"refusal": ConfigRecord({"reason": "policy", "salt": os.urandom(8)})})
    reply = Message(content, reply_to=message_from_proto(asked))
    for name, value in {"src_node_id": member.node, "message_id": "", **metadata}.items():
        vars(reply.metadata)[f"_{name}"] = value
    vars(reply.metadata)["_message_id"] = reply.object_id
    push = PushMessagesRequest(
        node=Node(node_id=member.node),
        messages_list=[message_to_proto(remove_content_from_message(reply))],
        message_object_trees=[get_object_tree(reply)],
    )
    return push, {name: each.deflate() for name, each in get_all_nested_objects(reply).items()}


def _part(member: Member, asked: Any, name: str, content: bytes) -> Any:
    from flwr.proto.message_pb2 import PushObjectRequest
    from flwr.proto.node_pb2 import Node

    return PushObjectRequest(
        node=Node(node_id=member.node),
        run_id=asked.metadata.run_id,
        session_id=member.session,
        object_id=name,
        object_content=content,
    )


def forge_and_impersonate(member: Member, asked: Any) -> None:
    """A request in the server's name, and an answer in another site's; then its own, and a second one."""
    from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
    from flwr.proto.node_pb2 import Node

    victim = node_id_of(member.place, public_key_of(member.place, VICTIM))
    own = node_id_of(member.place, public_key_of(member.place, OTHERS[0]))
    push, _ = _reply(member, asked, src_node_id=1, dst_node_id=victim, reply_to_message_id="")
    member.refused("send another site a request, as the server", "PushMessages", push)
    other = _sent_to(member.place, (victim, own))
    push, _ = _reply(member, asked, src_node_id=victim, reply_to_message_id=other)
    member.refused("answer in another site's name, its message's id known", "PushMessages", push)
    push, _ = _reply(member, asked, reply_to_message_id=other)
    member.refused("answer what another site was asked, in its own name", "PushMessages", push)
    gone = ConfirmMessageReceivedRequest(
        node=Node(node_id=member.node), run_id=asked.metadata.run_id, message_object_id=other
    )
    said = member.ask("ConfirmMessageReceived", gone)
    held = _has(member.place, other)
    member.tried("take away what another site was sent", f"{said}, and it is there", held)
    push, parts = _reply(member, asked)
    if member.ask("PushMessages", push) != "OK":
        raise FaultError("an answer of its own was not taken")
    for name, content in parts.items():
        member.ask("PushObject", _part(member, asked, name, content))
    push, _ = _reply(member, asked, ttl=5.0)
    member.refused("answer a second time", "PushMessages", push)


def lie(member: Member, asked: Any) -> None:
    """A tree of other objects than the reply's; then a reply whose bytes are not what its tree says."""
    push, parts = _reply(member, asked)
    whole = push.message_object_trees[0]
    bare = type(push)()
    bare.CopyFrom(push)
    del bare.message_object_trees[0].children[:]
    said = member.ask("PushMessages", bare)
    root = next(iter(name for name in parts if name == whole.object_id))
    stored = member.ask("PushObject", _part(member, asked, root, parts[root]))
    member.tried(
        "answer with a tree that lacks what its head names", f"{said}, then {stored}: left out", said == "OK"
    )


def grow(member: Member, asked: Any) -> None:
    """More objects, and more bytes, than a reply has."""
    push, parts = _reply(member, asked)
    for number in range(_TREE):
        push.message_object_trees[0].children.add(object_id=f"{number:064x}")
    member.refused(f"answer with a tree of {_TREE:,} objects", "PushMessages", push)
    push, parts = _reply(member, asked)
    if member.ask("PushMessages", push) != "OK":
        raise FaultError("an answer of its own was not taken")
    name = next(iter(parts))
    member.refused("send an object of 50 MB", "PushObject", _part(member, asked, name, b"x" * 50_000_000))


def stall(member: Member, asked: Any) -> None:
    """A reply whose objects never come."""
    push, _ = _reply(member, asked)
    said = member.ask("PushMessages", push)
    member.tried(
        "answer, and never send the parts",
        f"{said}: left out, and nobody waits for it past the round's grace",
        said == "OK",
    )


def flood(member: Member, asked: Any) -> None:
    """As many calls as it can make."""
    from collections import Counter

    from flwr.proto import fleet_pb2
    from flwr.proto.node_pb2 import Node

    request = fleet_pb2.PullMessagesRequest(node=Node(node_id=member.node))
    told = Counter(member.ask("PullMessages", request) for _ in range(_FLOOD))
    said = ", ".join(f"{name} {count}" for name, count in sorted(told.items()))
    member.tried(f"ask {_FLOOD} times as fast as it can", said, set(told) <= {"OK", "RESOURCE_EXHAUSTED"})


def _query(place: Place, query: str, *values: Any) -> list[Any]:
    with sqlite3.connect(f"{(place.server / 'state.db').as_uri()}?mode=ro", uri=True, timeout=10) as db:
        return db.execute(query, values).fetchall()


def _sent_to(place: Place, nodes: tuple[int, ...]) -> str:
    """A message that one of these nodes was sent and has not answered."""
    for node in nodes:
        signed = node - 2**64 if node >= 2**63 else node
        rows = _query(place, "SELECT message_id FROM message_ins WHERE dst_node_id = ?", signed)
        if rows:
            return str(rows[0][0])
    raise FaultError("no other site was sent anything")


def _has(place: Place, name: str) -> bool:
    return bool(_query(place, "SELECT 1 FROM objects WHERE object_id = ?", name))
