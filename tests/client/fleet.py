# ruff: noqa: N802  # the methods' names are those of Flower's service
"""A server's Fleet API over real gRPC and TLS that fails as it is told to, and a site's processes before it.

The SuperNode, the starter and the ClientApps that it forks are the site's own; behind them listens what stands for the
worker, and answers as the test says.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import fab_to_proto, message_from_proto, message_to_proto, run_to_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.proto.fab_pb2 import GetFabResponse
from flwr.proto.fleet_pb2_grpc import FleetServicer, add_FleetServicer_to_server
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from client.app import content_to_bytes, question_from_bytes
from client.connection import new_node_key, write_connection
from client.private_files import write_private
from client.worker import SOCKET, listen, serve_one
from common.bundle import bundle_files
from common.invitation import Invitation
from server.certificates import new_authority, new_server_certificate

NODE_ID, RUN_ID = 4711, 12
NOT_ACTIVATED = json.dumps(
    {"code": 2004, "public_message": "Failed to activate SuperNode.", "public_details": None}
)
UNCOUNTED = json.dumps(
    {"code": 2003, "public_message": "Invalid heartbeat interval.", "public_details": None}
)


def until(so: Callable[[], object], seconds: float = 120.0, what: str = "it did not happen") -> None:
    end = time.monotonic() + seconds
    while not so():
        assert time.monotonic() < end, what
        time.sleep(0.05)


class Fleet(FleetServicer):  # type: ignore[misc]
    """Messages for one node, the replies that came, and what goes wrong: for each method a queue of faults."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.calls: Counter[str] = Counter()
        self.faults: dict[str, deque[Callable[[grpc.ServicerContext], None]]] = defaultdict(deque)
        self.hanging = threading.Event()
        self.online = False
        self.waiting: deque[Message] = deque()
        self.given: dict[str, Message] = {}
        self.kind = TaskType.SERVER_APP
        self.objects: dict[str, bytes] = {}
        self.replies: list[Message] = []
        self.parts: dict[str, set[str]] = {}
        self.pushed: dict[str, bytes] = {}
        self.runtimes: list[float] = []
        content, self.fab = bundle_files(), b""
        from flwr.cli.build import build_fab_from_files

        self.fab = build_fab_from_files(content)[0]

    def ends_with(self, method: str, code: grpc.StatusCode, details: str = "as told", times: int = 1) -> None:
        """Lets so many calls of a method end with a status."""
        self.faults[method].extend([lambda context: context.abort(code, details)] * times)

    def hangs(self, method: str, times: int = 1) -> None:
        """Lets so many calls of a method get no answer."""

        def hang(context: grpc.ServicerContext) -> None:
            self.hanging.wait(300)
            context.abort(grpc.StatusCode.CANCELLED, "it hung")

        self.faults[method].extend([hang] * times)

    def give(self, ttl: float = 600.0) -> str:
        """Puts a message where the node looks for it; its id."""
        content = RecordDict({"asked": ConfigRecord({"number": len(self.replies) + len(self.waiting) + 1})})
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, 1
        message = Message(content, dst_node_id=NODE_ID, message_type="query", ttl=ttl)
        message.metadata.__dict__.update(_run_id=RUN_ID, _src_node_id=1)
        message.metadata.__dict__["_message_id"] = message.object_id
        with self.lock:
            self.objects |= {name: each.deflate() for name, each in get_all_nested_objects(message).items()}
            self.waiting.append(message)
            self.given[message.metadata.message_id] = message
        return str(message.metadata.message_id)

    def reply_to(self, message_id: str) -> Message | None:
        """The reply to a message, if it came whole."""
        with self.lock:
            for each in self.replies:
                parts = self.parts[each.metadata.message_id]
                if each.metadata.reply_to_message_id == message_id and parts <= set(self.pushed):
                    return each
            return None

    def _begin(self, method: str, context: grpc.ServicerContext) -> None:
        with self.lock:
            self.calls[method] += 1
            fault = self.faults[method].popleft() if self.faults[method] else None
        if fault is not None:
            fault(context)

    def ActivateNode(self, request: Any, context: Any) -> Any:
        self._begin("ActivateNode", context)
        if request.heartbeat_interval < 0:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, UNCOUNTED)
        if self.online:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, NOT_ACTIVATED)
        self.online = True
        return fleet_pb2.ActivateNodeResponse(node_id=NODE_ID)

    def DeactivateNode(self, request: Any, context: Any) -> Any:
        self._begin("DeactivateNode", context)
        assert request.node_id == NODE_ID
        self.online = False
        return fleet_pb2.DeactivateNodeResponse()

    def SendNodeHeartbeat(self, request: Any, context: Any) -> Any:
        self._begin("SendNodeHeartbeat", context)
        return heartbeat_pb2.SendNodeHeartbeatResponse(success=True)

    def PullMessages(self, request: Any, context: Any) -> Any:
        self._begin("PullMessages", context)
        with self.lock:
            message = self.waiting.popleft() if self.waiting else None
        if message is None:
            return fleet_pb2.PullMessagesResponse()
        return fleet_pb2.PullMessagesResponse(
            messages_list=[message_to_proto(remove_content_from_message(message))],
            message_object_trees=[get_object_tree(message)],
        )

    def PushMessages(self, request: Any, context: Any) -> Any:
        self._begin("PushMessages", context)
        wanted = {part.object_id for part in iterate_object_tree(request.message_object_trees[0])}
        reply = message_from_proto(request.messages_list[0])
        with self.lock:
            self.runtimes += request.clientapp_runtime_list
            self.parts[reply.metadata.message_id] = wanted
            self.replies.append(reply)
        return fleet_pb2.PushMessagesResponse(objects_to_push=wanted, session_id="one")

    def GetRun(self, request: Any, context: Any) -> Any:
        self._begin("GetRun", context)
        run = Run.create_empty(RUN_ID)
        run.fab_id, run.fab_version = "fedtide/fedtide", "0.1.0"
        run.primary_task_type = self.kind
        run.fab_hash, run.series_id = hashlib.sha256(self.fab).hexdigest(), 5
        return run_pb2.GetRunResponse(run=run_to_proto(run))

    def GetFab(self, request: Any, context: Any) -> Any:
        self._begin("GetFab", context)
        return GetFabResponse(fab=fab_to_proto(Fab(hashlib.sha256(self.fab).hexdigest(), self.fab, {})))

    def PullObject(self, request: Any, context: Any) -> Any:
        self._begin("PullObject", context)
        return message_pb2.PullObjectResponse(
            object_found=True, object_available=True, object_content=self.objects[request.object_id]
        )

    def PushObject(self, request: Any, context: Any) -> Any:
        self._begin("PushObject", context)
        with self.lock:
            self.pushed[request.object_id] = request.object_content
        return message_pb2.PushObjectResponse(stored=True)

    def ConfirmMessageReceived(self, request: Any, context: Any) -> Any:
        self._begin("ConfirmMessageReceived", context)
        return message_pb2.ConfirmMessageReceivedResponse()


@contextmanager
def fleet_at(folder: Path) -> Iterator[tuple[Fleet, int]]:
    """A Fleet API that listens on loopback, with an invitation to it in folder/invitation.json; the port."""
    authority, authority_key = new_authority()
    certificate, key = new_server_certificate(authority, authority_key, "localhost")
    fleet = Fleet()
    server = grpc.server(ThreadPoolExecutor(32))
    add_FleetServicer_to_server(fleet, server)
    port = server.add_secure_port("localhost:0", grpc.ssl_server_credentials([(key, certificate)]))
    signing = Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    invitation = Invitation("localhost", port, authority, signing)
    (folder / "invitation.json").write_bytes(invitation.to_bytes())
    server.start()
    try:
        yield fleet, port
    finally:
        fleet.hanging.set()
        server.stop(0.2).wait(5)


class Worker:
    """What listens where a site's worker does, and answers each question with what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.held, self.asked = threading.Event(), threading.Event()
        self.held.set()
        self._listening = listen(folder / SOCKET)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                serve_one(self._listening, self._answer)

    def _answer(self, question: bytes) -> bytes:
        self.asked.set()
        self.held.wait(300)
        return content_to_bytes(question_from_bytes(question)[0])

    def close(self) -> None:
        self.held.set()
        self._listening.close()


SUPERNODE = (
    "import client.fleet_calls as calls, client.unanswered as unanswered; unanswered._LATE = 0.0; "
    "calls._DEADLINE, calls._FIRST_WAIT, calls._LONGEST_WAIT = 3.0, 0.2, 0.5; "
    "from client.supernode import main; main()"
)
"""A SuperNode whose deadlines and waits are short."""


class Node:
    """A site's SuperNode and starter, started by hand; started again when they end, as `site up` would."""

    def __init__(self, folder: Path, fleet_port: int, own_port: int, starter: Sequence[str]) -> None:
        self.folder = folder
        self.kept_up = True
        write_connection(folder, Invitation.from_bytes((folder.parent / "invitation.json").read_bytes()))
        new_node_key(folder)
        write_private(folder / "superexec.secret", os.urandom(32))
        environment = {
            **os.environ,
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "PYTHONPATH": os.pathsep.join(each for each in sys.path if each),
            "PYTHONUNBUFFERED": "1",
        }
        self._environment, self.address = environment, f"127.0.0.1:{own_port}"
        secret = ["--superexec-auth-secret-file", str(folder / "superexec.secret")]
        self._commands = {
            "supernode": [
                *(sys.executable, "-c", SUPERNODE, str(folder), "--superlink", f"localhost:{fleet_port}"),
                *("--root-certificates", str(folder / "ca.crt")),
                *("--auth-supernode-private-key", str(folder / "node.key"), "--isolation", "process"),
                *(*secret, "--host", "127.0.0.1", "--port", str(own_port)),
                *("--node-config", f'site="{folder}" worker="{folder / SOCKET}"'),
            ],
            "starter": [
                *(sys.executable, *starter, str(folder), str(folder / "site.log")),
                *("--address", self.address, "--secret", str(folder / "superexec.secret")),
            ],
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.ended: Counter[str] = Counter()
        self.worker = Worker(folder)
        for name in self._commands:
            self._start(name)
        self._watch = threading.Thread(target=self._keep_up, daemon=True)
        self._watch.start()

    def _start(self, name: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                self._commands[name], env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    def _keep_up(self) -> None:
        while self.kept_up:
            for name, process in list(self.processes.items()):
                if process.poll() is not None:
                    self.ended[name] += 1
                    self._start(name)
            time.sleep(0.2)

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def site_log(self) -> str:
        file = self.folder / "site.log"
        return file.read_text() if file.exists() else ""

    def client_apps(self) -> set[int]:
        pid = self.processes["starter"].pid
        return {int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}

    def as_executor(self, token: str = "") -> Any:
        """A client of the SuperNode's Runtime API: the executor's, or that of who has a task's token."""
        from flwr.supercore.interceptors import (
            RuntimeTokenHttpInterceptor,
            RuntimeVersionHttpInterceptor,
            SuperExecAuthHttpInterceptor,
        )
        from flwr.supercore.runtime import RuntimeHttpClient
        from flwr.supercore.superexec.run_superexec import _SUPEREXEC_AUTH_METHODS

        own = (
            RuntimeTokenHttpInterceptor(token)
            if token
            else SuperExecAuthHttpInterceptor(
                master_secret=(self.folder / "superexec.secret").read_bytes(),
                protected_methods=_SUPEREXEC_AUTH_METHODS,
            )
        )
        return RuntimeHttpClient.from_server_address(
            server_address=self.address,
            insecure=True,
            root_certificates=None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), own],
        )

    def end(self) -> None:
        self.kept_up = False
        self._watch.join(5)
        for process in self.processes.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.worker.close()


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def node_at(
    folder: Path,
    prepare: Callable[[Fleet], None] = lambda _: None,
    starter: Sequence[str] = ("-m", "client.starter"),
    ready: Callable[[Fleet], bool] = lambda fleet: fleet.calls["PullMessages"] > 1,
) -> Iterator[tuple[Fleet, Node]]:
    """A Fleet API, made ready to fail, and a node that is connected to it."""
    with fleet_at(folder) as (fleet, port):
        prepare(fleet)
        site = folder / "site"
        site.mkdir(mode=0o700, exist_ok=True)
        node = Node(site, port, free_port(), starter)
        try:
            until(lambda: ready(fleet), what=node.said("supernode"))
            yield fleet, node
        finally:
            node.end()
