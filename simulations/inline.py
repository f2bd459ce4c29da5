"""A Flower grid in one process: the same apps and messages, really serialised, without Ray.

For tests and for finding faults. One message is answered at each pull, so that rounds show progress.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping

from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

_log = logging.getLogger("fedtide.inline")


def over_the_wire(message: Message) -> Message:
    """The message as its receiver would get it: to protobuf bytes and back."""
    proto = ProtoMessage()
    proto.ParseFromString(message_to_proto(message).SerializeToString())
    return message_from_proto(proto)


class InlineGrid(Grid):  # type: ignore[misc]
    """See the module.

    Args:
        client_app: answers every message.
        node_configs: node id -> its configuration.
    """

    def __init__(
        self, client_app: ClientApp, node_configs: Mapping[int, Mapping[str, bool | float | int | str]]
    ) -> None:
        self._app = client_app
        self._run = Run.create_empty(run_id=1)
        self._contexts = {
            node: Context(run_id=1, node_id=node, node_config=dict(config), state=RecordDict(), run_config={})
            for node, config in node_configs.items()
        }
        self._numbers = itertools.count(1)
        self._waiting: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node) for node in self._contexts]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{next(self._numbers)}"
            self._waiting[message.metadata.message_id] = message
            pushed.append(message.metadata.message_id)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message_id in message_ids:
            message = self._waiting.pop(message_id, None)
            if message is not None:
                return [over_the_wire(self._answer(over_the_wire(message)))]
        return []

    def _answer(self, message: Message) -> Message:
        context = self._contexts[message.metadata.dst_node_id]
        try:
            reply = self._app(message, context)
        except Exception as error:  # as Flower does for any exception of a ClientApp: an error reply, and on
            _log.exception("a ClientApp raised")
            code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
            reply = Message(Error(code=code, reason=type(error).__name__), reply_to=message)
        reply.metadata.__dict__["_message_id"] = f"reply-{next(self._numbers)}"
        return reply

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        waiting = set(self.push_messages(messages))
        replies: list[Message] = []
        while waiting:
            for reply in self.pull_messages(list(waiting)):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
        return replies


def run_inline(
    server_app: ServerApp,
    client_app: ClientApp,
    node_configs: Mapping[int, Mapping[str, bool | float | int | str]],
    run_config: Mapping[str, bool | float | int | str],
) -> None:
    """Runs a ServerApp against ClientApps in this process; exceptions of the ServerApp come through."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SUPERLINK_NODE_ID
    context = Context(
        run_id=1, node_id=SUPERLINK_NODE_ID, node_config={}, state=RecordDict(), run_config=dict(run_config)
    )
    server_app(grid=InlineGrid(client_app, node_configs), context=context)
