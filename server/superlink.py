"""Flower's SuperLink behind a guard: `python -m server.superlink` takes the options of `flower-superlink`.

The only module that touches SuperLink's inside. Flower checks that whoever calls the Fleet API shows the key of the
node that the call names, and little more; here is what else must hold before a call is read, and before it is done:

- a call is refused by its headers, and no body of it is read, unless an enrolled key signed it; a body that does not
  come is waited for some seconds, and a message is no larger than a release and a margin;
- a node sends replies alone: as itself, each to a message that was sent to it, of no more objects and bytes than a
  reply has; it reads, and confirms, what belongs to messages for itself; and activates itself alone;
- one node's calls at a time, and in a second, are bounded; what is refused is logged in a line a minute.

The database is asked for less: a look for messages that finds none writes nothing. A lock that another program holds
on it is waited for a minute.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import grpc  # type: ignore[import-untyped]
from flwr.common.constant import PUBLIC_KEY_HEADER, SUPERLINK_NODE_ID
from flwr.common.serde import message_from_proto
from flwr.proto import fleet_pb2, message_pb2
from flwr.server.superlink.fleet.grpc_rere.fleet_servicer import FleetServicer
from flwr.server.superlink.fleet.grpc_rere.node_auth_server_interceptor import NodeAuthServerInterceptor
from flwr.server.superlink.linkstate import linkstate_factory
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore import http_logging, sql_mixin
from flwr.supercore.error import ApiErrorCode, FlowerError, rpc_error_translator
from flwr.supercore.error.catalog import API_ERROR_MAP
from flwr.supercore.error.grpc import _flower_error_to_grpc_json as flower_words
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.utils import get_metadata_bytes, uint64_to_int64
from flwr.supercore.version import package_version
from sqlalchemy import text

from common.supervision import Pulse

FLOWER = "1.39."
OBJECTS_IN_REPLY = 6
"""An update: the message, two records, an array, its bytes' one chunk; see docs/server.md. A refusal has fewer."""
LARGEST_OBJECT = 6 * 2**20
"""Bytes. Flower cuts arrays into chunks of 5 MiB."""
LARGEST_REPLY = 8 * 2**20
"""Bytes of all its objects: a release (4 MB at most) and its receipt."""
LARGEST_MESSAGE, LARGEST_HEADERS, _LARGEST_WORDS = LARGEST_OBJECT + 2**16, 8192, 2**16
"""Bytes of a call's message, of its headers, and of a message that carries no object."""

CALLS_AT_A_TIME, CALLS_IN_A_SECOND, CALLS_AT_ONCE = 16, 50.0, 250.0
"""Of one node. An honest SuperNode makes four at a time, and twenty in the second of its answer."""
_WORDS_WAIT, _OBJECT_WAIT = 10.0, 120.0
"""Seconds that a node's message may take to arrive, and one with an object, over a slow line."""
_CONNECTION_CALLS, _HANDSHAKE, _IDLE, _PING, _PONG = 64, 10, 120, 60, 20
"""Calls of one connection at a time; then seconds: for TLS, without a call, between pings, for a ping's answer."""
_LOCK_WAIT = 60
"""Seconds that a call waits for a database that another holds, such as a backup."""
_CONNECTIONS, _CONNECTION_WAIT = 32, 2 * _LOCK_WAIT
"""With the database, and seconds that a call waits for one of them."""
_PUSHES = 10_000
"""Replies on their way that are remembered."""
_KEY_SECONDS, _ERRORS_SECONDS, _TOKENS_SECONDS, _SAID_SECONDS = 1.0, 2.0, 1.0, 60.0

_ROUTINE = frozenset(
    f"/v1/runtime/{each}"
    for each in ("pull-messages", "push-messages", "pull-object", "push-object", "confirm-message-received")
)
"""What a ServerApp asks many times a round, five times a second some of it: no line of the log is one such question."""

_log = logging.getLogger("flwr")

_OWN_MESSAGE = "SELECT 1 FROM message_ins WHERE message_id = ? AND dst_node_id = ?"
_ASKED = "SELECT run_id, message_type, group_id FROM message_ins WHERE message_id = ? AND dst_node_id = ?"
_ANSWERED = "SELECT message_id FROM message_res WHERE reply_to_message_id = ?"
_WAITING = "SELECT 1 FROM message_ins WHERE dst_node_id = ? AND delivered_at = '' LIMIT 1"
_OWN_OBJECT = (
    "WITH RECURSIVE part(id) AS (SELECT message_id FROM message_ins WHERE dst_node_id = ? UNION "
    "SELECT child_id FROM object_children JOIN part ON parent_id = part.id) SELECT 1 FROM part WHERE id = ?"
)
_PARTS = (
    "SELECT object_id, child_id FROM objects LEFT JOIN object_children ON parent_id = object_id "
    "WHERE object_id = :id"
)
_SENT = (
    "WITH RECURSIVE part(id) AS (SELECT message_id FROM message_ins UNION "
    "SELECT child_id FROM object_children JOIN part ON parent_id = part.id) SELECT 1 FROM part WHERE id = :id"
)
_OWN_SESSION = (
    "SELECT 1 FROM object_push_session_roots JOIN message_res ON message_id = root_object_id "
    "WHERE session_id = ? AND src_node_id = ?"
)


class State(SqlLinkState):  # type: ignore[misc]
    """Flower's state in SQLite, which writes only where there is something to write."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._nodes: dict[bytes, tuple[float, int]] = {}
        self._looked: dict[int, float] = {}
        self._tokens = 0.0

    def first(self, query: str, *values: object) -> tuple[Any, ...] | None:
        """The first row of a look that changes nothing."""
        with self._engine.connect() as connection:
            row = connection.exec_driver_sql(query, values).first()
        return None if row is None else tuple(row)

    def get_node_id_by_public_key(self, public_key: bytes) -> int | None:
        """As Flower's; what was found holds for a second."""
        until, node = self._nodes.get(public_key, (0.0, 0))
        if time.monotonic() < until:
            return node
        found: int | None = super().get_node_id_by_public_key(public_key)
        self._nodes.pop(public_key, None)
        if found is not None:
            self._nodes[public_key] = (time.monotonic() + _KEY_SECONDS, found)
        return found

    def get_message_ins(self, node_id: int, limit: int | None, *, run_id: int | None = None) -> list[Any]:
        """As Flower's."""
        if self.first(_WAITING, uint64_to_int64(node_id)) is None:
            return []
        return list(super().get_message_ins(node_id, limit, run_id=run_id))

    def get_message_res(self, message_ids: set[str], run_id: int) -> list[Any]:
        """As Flower's; that a node is gone, or a message too old, is looked for every two seconds."""
        marks = ", ".join("?" * len(message_ids))
        query = (
            f"SELECT 1 FROM message_res WHERE delivered_at = '' AND reply_to_message_id IN ({marks}) LIMIT 1"
        )
        due = time.monotonic() > self._looked.get(run_id, 0.0)
        if not due and self.first(query, *message_ids) is None:
            return []
        self._looked = {run_id: time.monotonic() + _ERRORS_SECONDS}
        return list(super().get_message_res(message_ids, run_id))

    def store_message_and_object_tree(
        self, message: Any, object_tree: Any, session_id: str
    ) -> tuple[bool, list[str]]:
        """As Flower's, which takes what was said first of an object's parts for true, whoever said it.

        An object's id is the hash of its content, and some contents are the same in every round: a node that names
        such an id with parts of its own would end a run, or keep another's reply out. So what is told anew counts,
        unless a node contradicts what the server sent.
        """
        by_server = not message.metadata.reply_to_message_id
        with self.session() as session:
            for node in iterate_object_tree(object_tree):
                said = {child.object_id for child in node.children}
                rows = session.execute(text(_PARTS), {"id": node.object_id}).all()
                if not rows or said == {child for _, child in rows if child is not None}:
                    continue
                if not by_server and session.execute(text(_SENT), {"id": node.object_id}).first():
                    return False, []
                session.execute(text("DELETE FROM objects WHERE object_id = :id"), {"id": node.object_id})
            stored: tuple[bool, list[str]] = super().store_message_and_object_tree(
                message, object_tree, session_id
            )
            return stored

    def store_traffic(self, run_id: int, *, bytes_sent: int, bytes_recv: int) -> None:
        """Nothing: what travels is counted in the run's own folder."""

    def _cleanup_expired_task_tokens(self) -> None:
        """As Flower's, once a second."""
        if time.monotonic() > self._tokens:
            self._tokens = time.monotonic() + _TOKENS_SECONDS
            super()._cleanup_expired_task_tokens()


class Said:
    """What was refused, a line at once and then one a minute for each caller: a flood of calls is none of lines."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()

    def refused(self, caller: str, method: str, why: str) -> None:
        """Notes a refused call."""
        now, which = time.monotonic(), (caller, why)
        with self._lock:
            until, unsaid = self._told.get(which, (0.0, 0))
            if now < until:
                self._told[which] = (until, unsaid + 1)
                return
            self._told[which] = (now + _SAID_SECONDS, 0)
            self._told.move_to_end(which)
            while len(self._told) > 1000:
                self._told.popitem(last=False)
        more = f" (and {unsaid} times before)" if unsaid else ""
        _log.warning("refused: %s of %s: %s%s", method, caller, why, more)


class Bounds:
    """How much each node does at a time, and in a second."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._busy: dict[int, int] = {}
        self._left: dict[int, tuple[float, float]] = {}

    @contextmanager
    def call(self, node: int) -> Iterator[bool]:
        """Counts a call while inside; whether it is within the bounds."""
        with self._lock:
            now = time.monotonic()
            left, then = self._left.get(node, (CALLS_AT_ONCE, now))
            left = min(CALLS_AT_ONCE, left + (now - then) * CALLS_IN_A_SECOND)
            within = left >= 1 and self._busy.get(node, 0) < CALLS_AT_A_TIME
            self._left[node] = (left - within, now)
            self._busy[node] = self._busy.get(node, 0) + 1
        try:
            yield within
        finally:
            with self._lock:
                self._busy[node] -= 1


class Deadlines:
    """Ends calls whose message does not come: one thread looks each second."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._due: dict[int, tuple[float, Any]] = {}
        threading.Thread(target=self._look, name="deadlines", daemon=True).start()

    @contextmanager
    def within(self, seconds: float, context: Any) -> Iterator[None]:
        """Ends the call if it is inside for longer."""
        with self._lock:
            self._due[id(context)] = (time.monotonic() + seconds, context)
        try:
            yield
        finally:
            with self._lock:
                del self._due[id(context)]

    def _look(self) -> None:
        while True:
            time.sleep(1.0)
            now = time.monotonic()
            with self._lock:
                late = [context for due, context in self._due.values() if due < now]
            for context in late:
                with suppress(Exception):  # over meanwhile; this thread bounds all other calls, too
                    context.cancel()


_said, _bounds, _deadlines = Said(), Bounds(), Deadlines()


def _refuse(
    context: Any, node: int, method: str, why: str, code: Any = grpc.StatusCode.PERMISSION_DENIED
) -> None:
    _said.refused(f"node {node} ({_address(context)})", method, why)
    context.abort(code, f"refused: {why}")


def _address(context: Any) -> str:
    """Of a caller, without its port."""
    return str(context.peer()).rpartition(":")[0]


class Guard(NodeAuthServerInterceptor):  # type: ignore[misc]
    """Flower's proof of who calls, before anything of the call's message is read."""

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        """As Flower's; a call that it ends is ended by its headers."""
        proved: list[bool] = []

        def go_on(details: Any) -> Any:
            proved.append(True)
            return continuation(details)

        method = handler_call_details.method.rpartition("/")[2]
        metadata = handler_call_details.invocation_metadata
        try:
            handler = super().intercept_service(go_on, handler_call_details)
        except Exception:  # foreign bytes for a key, a time or a signature
            return _ended(method, "its key, time or signature cannot be read")
        if handler is None:
            return None
        if not proved:
            return _ended_by(method, handler)
        return self._after(method, handler, get_metadata_bytes(metadata, PUBLIC_KEY_HEADER))

    def _after(self, method: str, handler: Any, key: bytes) -> Any:
        def answer(requests: Iterator[Any], context: Any) -> Any:
            node = self.state_factory.state().get_node_id_by_public_key(key)
            if node is None:
                _stranger(method, context)
            with _bounds.call(node) as within:
                if not within:
                    _refuse(context, node, method, "too many calls", grpc.StatusCode.RESOURCE_EXHAUSTED)
                request = _read(requests, context, node, method)
                if isinstance(request, fleet_pb2.ActivateNodeRequest) and request.public_key != key:
                    _refuse(context, node, method, "another node's key")
                with rpc_error_translator(context, method):
                    return handler.unary_unary(request, context)

        return grpc.stream_unary_rpc_method_handler(
            answer, handler.request_deserializer, handler.response_serializer
        )


def _read(requests: Iterator[Any], context: Any, node: int, method: str) -> Any:
    """The message of a node's call, which ends where it does not come, or is too large."""
    carries = method == "PushObject"
    request: Any = None
    try:
        with _deadlines.within(_OBJECT_WAIT if carries else _WORDS_WAIT, context):
            request = next(requests, None)
    except grpc.RpcError:  # ended by this side, by the other, or by the bound on a message
        pass
    if request is None:
        _refuse(context, node, method, "no whole message came", grpc.StatusCode.INVALID_ARGUMENT)
    if not carries and request.ByteSize() > _LARGEST_WORDS:
        _refuse(context, node, method, "a message of too many bytes", grpc.StatusCode.INVALID_ARGUMENT)
    return request


def _stranger(method: str, context: Any) -> None:
    """Ends a call that was signed with a key of no node, in the words that Flower has for it."""
    _said.refused(_address(context), method, "its key is not enrolled")
    number = {
        "ActivateNode": ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED,
        "RegisterNode": ApiErrorCode.FLEET_SUPERNODE_REGISTRATION_DISABLED,
    }.get(method)
    if number is None:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "Invalid node ID")
    words = API_ERROR_MAP[number]
    context.abort(words.status_code, flower_words(FlowerError(number, ""), words.public_message))


def _ended(method: str, why: str) -> Any:
    def end(_: object, context: Any) -> None:
        _said.refused(_address(context), method, why)
        context.abort(grpc.StatusCode.UNAUTHENTICATED, why)

    return grpc.stream_unary_rpc_method_handler(end)


def _ended_by(method: str, handler: Any) -> Any:
    """What a handler of Flower's that only refuses says, without the message that it would wait for."""

    def end(_: object, context: Any) -> None:
        _said.refused(_address(context), method, "no valid signature of now")
        handler.unary_unary(None, context)

    return grpc.stream_unary_rpc_method_handler(end)


@dataclass
class Push:
    """Of a reply whose parts are on their way: whose, how many bytes came, and which parts are stored."""

    node: int
    size: int = 0
    stored: set[str] = field(default_factory=set)


class Fleet(FleetServicer):  # type: ignore[misc]
    """Flower's Fleet API, for calls that keep the rules."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._pushes: OrderedDict[str, Push] = OrderedDict()
        self._lock = threading.Lock()

    def _first(self, query: str, *values: object) -> tuple[Any, ...] | None:
        row: tuple[Any, ...] | None = self.state_factory.state().first(query, *values)
        return row

    def _push_of(self, session: str, node: int) -> Push:
        """What came under a session: its name is a secret of who pushed the reply, also where it is not known here."""
        with self._lock:
            found = self._pushes.setdefault(session, Push(node))
            while len(self._pushes) > _PUSHES:
                self._pushes.popitem(last=False)
        return found

    def PushMessages(self, request: Any, context: Any) -> Any:  # noqa: N802
        """A reply, as itself, to a message that was sent to this node."""
        node = request.node.node_id
        why = self._fault_of(request, node)
        if why:
            _refuse(context, node, "PushMessages", why)
        response = super().PushMessages(request, context)
        self._push_of(response.session_id, node)
        return response

    def _fault_of(self, request: Any, node: int) -> str:
        """What is wrong with a reply; nothing where it may be stored."""
        if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
            return "not one message and its tree"
        (message,), (tree,) = request.messages_list, request.message_object_trees
        try:
            message_from_proto(message)
        except Exception:  # Flower's reading of foreign bytes raises what it likes
            return "a message that cannot be read"
        said = message.metadata
        if not (math.isfinite(said.created_at) and math.isfinite(said.ttl)):
            return "a message whose time is no number"
        if said.src_node_id != node or said.dst_node_id != SUPERLINK_NODE_ID:
            return "a message of, or to, another node"
        asked = self._first(_ASKED, said.reply_to_message_id, uint64_to_int64(node))
        if asked is None:
            return "a reply to nothing that it was sent, or to what is over"
        if asked != (uint64_to_int64(said.run_id), said.message_type, said.group_id):
            return "a reply of another run or type"
        before = self._first(_ANSWERED, said.reply_to_message_id)
        if before is not None and before[0] != said.message_id:
            return "a second reply"
        if said.message_id != tree.object_id:
            return "a tree of another message"
        return "" if _size(tree) <= OBJECTS_IN_REPLY else f"a tree of more than {OBJECTS_IN_REPLY} objects"

    def PushObject(self, request: Any, context: Any) -> Any:  # noqa: N802
        """A part of a reply that this node gave, of no more bytes than it may have; the same again is well."""
        node, name, size = request.node.node_id, request.object_id, len(request.object_content)
        push = self._push_of(request.session_id, node)
        if not request.session_id or push.node != node:
            _refuse(context, node, "PushObject", "a part of no reply of this node")
        if name in push.stored:  # the answer to the call before was lost
            return message_pb2.PushObjectResponse(stored=True)
        push.size += size
        if size > LARGEST_OBJECT or push.size > 2 * LARGEST_REPLY:  # twice: what failed is sent again
            _refuse(context, node, "PushObject", "a reply of too many bytes")
        response = super().PushObject(request, context)
        if response.stored:
            push.stored.add(name)
        return response

    def PullObject(self, request: Any, context: Any) -> Any:  # noqa: N802
        """A part of a message for this node; of all others it is not said whether they are here."""
        node = request.node.node_id
        if self._first(_OWN_OBJECT, uint64_to_int64(node), request.object_id) is None:
            return message_pb2.PullObjectResponse(object_found=False, object_available=False)
        return super().PullObject(request, context)

    def ConfirmMessageReceived(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Of a message for this node; what is no such message is here no more, or is another's."""
        node = request.node.node_id
        if self._first(_OWN_MESSAGE, request.message_object_id, uint64_to_int64(node)) is None:
            return message_pb2.ConfirmMessageReceivedResponse()
        return super().ConfirmMessageReceived(request, context)


def _size(tree: Any) -> int:
    """Objects of a tree, counted no further than one too many."""
    found, left = 0, [tree]
    while left and found <= OBJECTS_IN_REPLY:
        found += 1
        left += left.pop().children
    return found


def fleet_server(
    servicer_and_add_fn: tuple[Any, Callable[[Any, Any], None]],
    server_address: str,
    max_message_length: int,
    certificates: tuple[bytes, bytes, bytes],
    interceptors: Sequence[Any],
) -> Any:
    """A gRPC server as Flower makes it for the Fleet API, with bounds on what a connection takes."""
    servicer, add = servicer_and_add_fn
    del max_message_length  # 2 GB
    authority, certificate, key = certificates
    server = grpc.server(
        ThreadPoolExecutor(1000, "fleet"),
        maximum_concurrent_rpcs=1000,
        interceptors=interceptors,
        options=[
            ("grpc.max_receive_message_length", LARGEST_MESSAGE),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", LARGEST_HEADERS),
            ("grpc.absolute_max_metadata_size", LARGEST_HEADERS),
            ("grpc.max_concurrent_streams", _CONNECTION_CALLS),
            ("grpc.server_handshake_timeout_ms", 1000 * _HANDSHAKE),
            ("grpc.max_connection_idle_ms", 1000 * _IDLE),
            ("grpc.keepalive_time_ms", 1000 * _PING),
            ("grpc.keepalive_timeout_ms", 1000 * _PONG),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.so_reuseport", 0),
        ],
    )
    add(servicer, server)
    credentials = grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=False)
    port = server.add_secure_port(server_address, credentials)
    server.bound_address = f"{server_address.rpartition(':')[0]}:{port}"
    return server


def _put(module: Any, name: str, own: Any) -> None:
    """Puts our own in the place of Flower's.

    Raises:
        RuntimeError: it has none of that name.
    """
    if not hasattr(module, name):
        raise RuntimeError(f"this version of Flower has no {module.__name__}.{name}: install flwr {FLOWER}*")
    setattr(module, name, own)


def guard() -> None:
    """Puts the guard in front of Flower's own classes.

    Raises:
        RuntimeError: this is another Flower than the one that it was made for.
    """
    if not package_version.startswith(FLOWER):
        raise RuntimeError(
            f"flwr is {package_version}, but the guard of its server is for {FLOWER}*: install that"
        )
    pragmas = dict(sql_mixin.SQLITE_PRAGMAS)
    if "busy_timeout" not in pragmas:
        raise RuntimeError(f"this version of Flower sets no busy_timeout: install flwr {FLOWER}*")
    pragmas["busy_timeout"] = str(1000 * _LOCK_WAIT)
    _put(sql_mixin, "SQLITE_PRAGMAS", tuple(pragmas.items()))
    engine = partial(sql_mixin.create_engine, pool_size=_CONNECTIONS, pool_timeout=_CONNECTION_WAIT)
    _put(sql_mixin, "create_engine", engine)
    _put(linkstate_factory, "SqlLinkState", State)
    flower = import_module("flwr.superlink.cli.flower_superlink")  # its package has a function of that name
    _put(flower, "NodeAuthServerInterceptor", Guard)
    _put(flower, "FleetServicer", Fleet)
    _put(flower, "generic_create_grpc_server", fleet_server)
    _put(http_logging, "ROUTINE_ACCESS_PATHS", http_logging.ROUTINE_ACCESS_PATHS | _ROUTINE)


def _show_life(pulse: Pulse) -> None:
    while True:
        pulse.show()
        time.sleep(1.0)


def main() -> None:
    """`flower-superlink` of a server, which shows that it lives: one that stands still is started again."""
    threading.Thread(target=_show_life, args=(Pulse(),), name="life", daemon=True).start()
    guard()
    import_module("flwr.superlink.cli").flower_superlink()


if __name__ == "__main__":
    main()
