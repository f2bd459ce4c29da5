"""A real SuperLink over sockets, the ServerApp's real grid to it, and nodes that speak Flower's own protocol.

The nodes are Flower's own connections in this process; what they push in place of a site's honest reply is for a test
to say.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.client.grpc_rere_client.connection import grpc_request_response
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_children_ids_from_object_content,
    get_object_id,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

import client.app
from common.bundle import bundle_files
from tests.server.test_operation import free_ports


@dataclass
class Pushed:
    """What a node pushes: Flower's message and tree, and the objects that it then sends, by id."""

    message: Message
    tree: ObjectTree
    objects: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def honest(cls, reply: Message) -> Pushed:
        """A reply as Flower's SuperNode pushes it."""
        reply.metadata.__dict__["_message_id"] = reply.object_id
        objects = {name: each.deflate() for name, each in get_all_nested_objects(reply).items()}
        return cls(reply, get_object_tree(reply), objects)

    @classmethod
    def one_object(cls, reply: Message, content: bytes) -> Pushed:
        """In the place of the reply a single object of these bytes."""
        root = get_object_id(content)
        reply.metadata.__dict__["_message_id"] = root
        return cls(reply, ObjectTree(object_id=root), {root: content})

    def with_another(self, old: str, content: bytes) -> Pushed:
        """The same with other bytes in the place of one object, and what names it changed accordingly."""
        objects, renamed = dict(self.objects), {old: content}
        while renamed:
            before, now = renamed.popitem()
            after = get_object_id(now)
            objects.pop(before)
            for name, each in objects.items():
                if before.encode() in each:
                    renamed[name] = renamed.get(name, each).replace(before.encode(), after.encode())
            objects[after] = now
        (root,) = set(objects) - {child for each in objects.values() for child in _children(each)}
        self.message.metadata.__dict__["_message_id"] = root
        return Pushed(self.message, _tree(root, objects), objects)


def _children(content: bytes) -> list[str]:
    children: list[str] = get_object_children_ids_from_object_content(content)
    return children


def _tree(root: str, objects: Mapping[str, bytes]) -> ObjectTree:
    return ObjectTree(object_id=root, children=[_tree(each, objects) for each in _children(objects[root])])


Fate = Callable[[Message], Pushed | None]
"""From a site's honest reply to what its node pushes; None: nothing."""


class Nodes(threading.Thread):
    """Nodes of simulated sites, by number, in one thread; each answers what it is asked as the ClientApp does."""

    def __init__(self, fleet: str, fates: Mapping[int, Fate]) -> None:
        super().__init__(daemon=True)
        self._fleet, self._fates = fleet, fates
        self._over, self._ready = threading.Event(), threading.Event()
        self.ids: dict[int, int] = {}
        self.asked: list[tuple[int, Message]] = []
        self.failed: BaseException | None = None

    def run(self) -> None:
        try:
            with ExitStack() as stack:
                links = {}
                for number in self._fates:
                    invoker = RetryInvoker(exponential, (), max_tries=1, max_time=None)
                    links[number] = stack.enter_context(
                        grpc_request_response(self._fleet, insecure=True, retry_invoker=invoker)
                    )
                    self.ids[number] = links[number][0]
                self._ready.set()
                while not self._over.wait(0.05):
                    for number, link in links.items():
                        self._turn(number, link)
        except BaseException as error:
            self.failed = error
            self._ready.set()

    def _turn(self, number: int, link: Any) -> None:
        node, receive, send, _, _, pull, push, confirm = link
        got = receive()
        if got is None:
            return
        asked, tree = got
        run, root = asked.metadata.run_id, tree.object_id
        contents = {}
        for each in iterate_object_tree(tree):
            contents[each.object_id] = _whole(lambda name=each.object_id: pull(run, name))
        confirm(run, root)
        message = inflate_object_from_contents(root, contents)
        message.metadata.__dict__["_message_id"] = root
        self.asked.append((number, message))
        context = Context(run, node, {"partition-id": number}, RecordDict(), {})
        pushed = self._fates[number](client.app.app(message, context))
        if pushed is None:
            return
        wanted, session = send(pushed.message, pushed.tree, 0.0)
        for name, content in pushed.objects.items():
            if name in wanted:
                push(run, session, name, content)

    def __enter__(self) -> Nodes:
        self.start()
        assert self._ready.wait(60)
        if self.failed is not None:
            raise self.failed
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join(30)


def _whole(pull: Callable[[], bytes]) -> bytes:
    """An object, once the ServerApp has sent it."""
    for _ in range(400):
        try:
            return pull()
        except Exception:
            time.sleep(0.05)
    return pull()


@dataclass
class Link:
    """A SuperLink that is up, and a run at it."""

    fleet: str
    grid: HttpGrid


@contextmanager
def real_link(folder: Path) -> Iterator[Link]:
    """A SuperLink with its database in this folder, without TLS and node keys, and a ServerApp's place at it."""
    ports = free_ports()
    control, fleet = f"127.0.0.1:{ports['control_port']}", f"127.0.0.1:{ports['fleet_port']}"
    command = [
        str(Path(sys.executable).parent / "flower-superlink"), "--insecure", "--isolation", "process",
        "--host", "127.0.0.1", "--port", str(ports["control_port"]), "--fleet-api-address", fleet,
        "--database", str(folder / "state.db"), "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    quiet = {
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    with (folder / "superlink.log").open("wb") as log:
        superlink = subprocess.Popen(command, env={**os.environ, **quiet}, stdout=log, stderr=log)
    try:
        _until_up(f"http://{control}/health", superlink, folder / "superlink.log")
        with _place_at(control) as grid:
            yield Link(fleet, grid)
    finally:
        superlink.terminate()
        superlink.wait(30)


def _until_up(url: str, superlink: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert superlink.poll() is None, log.read_text(errors="replace")[-3000:]
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(log.read_text(errors="replace")[-3000:])


@contextmanager
def _place_at(control: str) -> Iterator[HttpGrid]:
    """Begins a run, takes its task as SuperExec does, and is its ServerApp."""
    from flwr.cli.build import build_fab_from_files

    version = [RuntimeVersionHttpInterceptor(component_name="test")]
    bundle, _ = build_fab_from_files(bundle_files())
    asking = ControlHttpClient.from_server_address(control, True, None, version)
    asking.StartRun(StartRunRequest(fab=fab_to_proto(Fab(get_object_id(bundle), bundle, {}))))
    asking.close()
    taking = RuntimeHttpClient.from_server_address(control, True, None, version)
    token = taking.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])).token
    taking.close()
    grid = HttpGrid(control, insecure=True, token=token)
    beats = HeartbeatSender(make_task_heartbeat_fn_http(grid._runtime_client))
    beats.start()
    task = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
    grid.set_run(Run.create_empty(task.run.run_id))
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = (
        task.task_id,
        task.run.run_id,
        SUPERLINK_NODE_ID,
    )
    try:
        yield grid
    finally:
        beats.stop()
        grid.close()
