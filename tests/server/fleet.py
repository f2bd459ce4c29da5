"""A real SuperLink on loopback, guarded as a server starts it or plain, with nodes that are enrolled and one run.

Nodes, the run and its messages are put into SuperLink's database by Flower's own code; all else goes over sockets.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, Metadata, RecordDict
from flwr.app.message.message import make_message, remove_content_from_message
from flwr.common.constant import (
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    PUBLIC_KEY_HEADER,
    SIGNATURE_HEADER,
    SUPERLINK_NODE_ID,
    TIMESTAMP_HEADER,
)
from flwr.common.serde import message_to_proto
from flwr.proto import fleet_pb2, message_pb2
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.interceptors import RuntimeVersionClientInterceptor
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.superlink.federation import NoOpFederationManager
from sqlalchemy import text

from common.wire import Reason, Refusal, answer_to_records
from server.deployment import Deployment
from server.setup import make_server
from tests.server.test_operation import free_ports

PLAIN = ("flower-superlink",)


@dataclass
class Caller:
    """Who calls the Fleet API with a key, as the node that it says it is."""

    address: str
    authority: bytes
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP384R1()))
    node: int = 0
    heard: str = ""

    @property
    def public(self) -> bytes:
        public: bytes = public_key_to_bytes(self.key.public_key())
        return public

    def headers(self) -> list[tuple[str, Any]]:
        stamp = datetime.now(UTC).isoformat()
        signed = sign_message(self.key, stamp.encode("ascii"))
        return [(PUBLIC_KEY_HEADER, self.public), (TIMESTAMP_HEADER, stamp), (SIGNATURE_HEADER, signed)]

    def channel(self) -> Any:
        options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        credentials = grpc.ssl_channel_credentials(self.authority)
        options += [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        whole = grpc.secure_channel(self.address, credentials, options=options)
        return grpc.intercept_channel(whole, RuntimeVersionClientInterceptor(component_name="SuperNode"))

    def __post_init__(self) -> None:
        self.stub = FleetStub(self.channel())

    def ask(self, method: str, request: Any, *, timeout: float = 60.0, signed: bool = True) -> Any:
        """The answer, or the status that the call was refused with."""
        try:
            headers = self.headers() if signed else []
            return getattr(self.stub, method)(request, metadata=headers, timeout=timeout)
        except grpc.RpcError as error:
            self.heard = str(error.details())
            return error.code()

    def activate(self) -> Any:
        request = fleet_pb2.ActivateNodeRequest(public_key=self.public, heartbeat_interval=30.0)
        return self.ask("ActivateNode", request)

    def pull(self) -> Any:
        return self.ask("PullMessages", fleet_pb2.PullMessagesRequest(node=Node(node_id=self.node)))

    def push(self, message: Message, tree: Any = None) -> Any:
        request = fleet_pb2.PushMessagesRequest(
            node=Node(node_id=self.node),
            messages_list=[message_to_proto(remove_content_from_message(message))],
            message_object_trees=[tree or get_object_tree(message)],
        )
        return self.ask("PushMessages", request)

    def push_objects(self, message: Message, run: int, session: str) -> list[Any]:
        return [
            self.ask("PushObject", self.part(name, each.deflate(), run, session))
            for name, each in get_all_nested_objects(message).items()
        ]

    def part(self, name: str, content: bytes, run: int, session: str) -> Any:
        return message_pb2.PushObjectRequest(
            node=Node(node_id=self.node),
            run_id=run,
            session_id=session,
            object_id=name,
            object_content=content,
        )

    def pull_object(self, name: str, run: int) -> Any:
        asked = message_pb2.PullObjectRequest(node=Node(node_id=self.node), run_id=run, object_id=name)
        return self.ask("PullObject", asked)

    def confirm(self, name: str, run: int) -> Any:
        asked = message_pb2.ConfirmMessageReceivedRequest(
            node=Node(node_id=self.node), run_id=run, message_object_id=name
        )
        return self.ask("ConfirmMessageReceived", asked)


@dataclass
class Fleet:
    """A SuperLink that is up, its database, two nodes c and d, a stranger, and a run that goes on."""

    server: Deployment
    process: subprocess.Popen[bytes]
    state: Any
    c: Caller
    d: Caller
    stranger: Caller
    run: int

    @property
    def log(self) -> str:
        return (self.server.folder.parent / "superlink.log").read_text(errors="replace")

    def memory(self) -> int:
        """Bytes that SuperLink holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.split("VmRSS:")[1].split()[0])

    def threads(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))

    def send(self, caller: Caller, words: str = "asked", *, ttl: float = 600.0) -> Message:
        """A message of the server to a node, whole."""
        told = Metadata(
            run_id=self.run, message_id="", src_node_id=SUPERLINK_NODE_ID, dst_node_id=caller.node,
            reply_to_message_id="", group_id="1", created_at=time.time(), ttl=ttl, message_type="query",
        )  # fmt: skip
        asked = make_message(told, RecordDict({"round": ConfigRecord({"run": words})}))
        identify(asked)
        session = self.state.start_session(self.run)
        _, missing = self.state.store_message_and_object_tree(
            remove_content_from_message(asked), get_object_tree(asked), session
        )
        parts = get_all_nested_objects(asked)
        for name in missing:
            self.state.store_object(self.run, session, name, parts[name].deflate())
        return asked

    def take_offline(self, caller: Caller) -> None:
        """Makes a node one that has gone."""
        with self.state.session() as session:
            session.execute(
                text("UPDATE node SET status = 'offline', online_until = 1 WHERE public_key = :key"),
                {"key": caller.public},
            )

    def replies(self) -> list[tuple[Any, ...]]:
        with self.state.session() as session:
            return [tuple(row) for row in session.execute(text("SELECT src_node_id FROM message_res"))]


def identify(message: Message) -> None:
    """Gives a message the id that is the digest of it all."""
    vars(message.metadata)["_message_id"] = ""
    vars(message.metadata)["_message_id"] = message.object_id


def words() -> RecordDict:
    """A content like no other."""
    return RecordDict({"words": ConfigRecord({"words": os.urandom(16)})})


def reply_to(asked: Message, caller: Caller, content: RecordDict | None = None, **metadata: Any) -> Message:
    """What a node answers: a refusal, or something else, with whatever else in its metadata."""
    content = content or answer_to_records(Refusal(Reason.POLICY))
    reply = Message(content, reply_to=asked)
    for name, value in {"src_node_id": caller.node, **metadata}.items():
        vars(reply.metadata)[f"_{name}"] = value
    identify(reply)
    return reply


@contextmanager
def fleet(folder: Path, program: tuple[str, ...] = ()) -> Iterator[Fleet]:
    """A SuperLink with all that is in `Fleet`; ended afterwards, by pid.

    Args:
        program: in place of the guarded one.
    """
    server = Deployment(folder / "server", "127.0.0.1", **free_ports())
    make_server(server)
    command = server.superlink_command(program) if program else server.superlink_command()
    environment = {**server.environment(), "PYTHONPATH": os.pathsep.join([os.getcwd()])}
    with (folder / "superlink.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, cwd=server.folder, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 120
        while not server.answers():
            assert process.poll() is None, (folder / "superlink.log").read_text()
            assert time.monotonic() < end, (folder / "superlink.log").read_text()
            time.sleep(0.2)
        address, authority = f"127.0.0.1:{server.fleet_port}", server.authority.read_bytes()
        c, d, stranger = (Caller(address, authority) for _ in range(3))
        database = str(server.database)
        state = LinkStateFactory(database, NoOpFederationManager(), ObjectStoreFactory(database)).state()
        for each in (c, d):
            each.node = state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, each.public, 30.0)
        run = begun(state)
        yield Fleet(server, process, state, c, d, stranger, run)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def begun(state: Any) -> int:
    """A run whose ServerApp works, for all that SuperLink knows."""
    run: int = state.create_run(
        "fedtide", "1", "0" * 64, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
    )
    now = datetime.now(UTC).isoformat()
    with state.session() as session:
        session.execute(text("UPDATE task SET starting_at = :now, running_at = :now"), {"now": now})
    return run
