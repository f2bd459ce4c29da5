"""A Flower grid in one process: the same apps and messages, really serialised, without Ray.

Sites that are asked to train at the same time may be answered many in one go (`client/together.py`), and then a pull
gives one part of the answers; otherwise it gives one answer, so that rounds show progress.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

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

from common.phases import Phase
from common.wire import MESSAGE_TYPES

_log = logging.getLogger("fedtide.inline")

NodeConfigs = Mapping[int, Mapping[str, bool | float | int | str]]
AnswerTogether = Callable[[Sequence[tuple[Message, Context]]], Iterator[Mapping[int, RecordDict]]]
"""Contents of the answers to messages, by their places, part after part; what goes in and out is serialised there."""


def over_the_wire(message: Message) -> Message:
    """The message as its receiver would get it: to protobuf bytes and back."""
    proto = ProtoMessage()
    proto.ParseFromString(message_to_proto(message).SerializeToString())
    return message_from_proto(proto)


class InlineGrid(Grid):  # type: ignore[misc]
    """See the module.

    Args:
        client_app: answers every message.
        node_configs: node id -> its configuration; looked up when a node is asked, and not before.
        together: answers many messages that ask for training; None: each by itself.
    """

    def __init__(
        self, client_app: ClientApp, node_configs: NodeConfigs, together: AnswerTogether | None = None
    ) -> None:
        self._app = client_app
        self._run = Run.create_empty(run_id=1)
        self._configs = node_configs
        self._together = together
        self._numbers = itertools.count(1)
        self._waiting: dict[str, Message] = {}
        self._parts: Iterator[list[Message]] = iter(())

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
        return list(self._configs)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node) for node in self._configs]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{next(self._numbers)}"
            self._waiting[message.metadata.message_id] = message
            pushed.append(message.metadata.message_id)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        if (part := next(self._parts, None)) is not None:
            return part
        asked = [self._waiting[each] for each in message_ids if each in self._waiting]
        training = [each for each in asked if each.metadata.message_type == MESSAGE_TYPES[Phase.UPDATE]]
        if self._together is not None and len(training) > 1:
            for message in training:
                del self._waiting[message.metadata.message_id]
            self._parts = self._answered(training, self._together)
            return next(self._parts)
        if not asked:
            return []
        message = self._waiting.pop(asked[0].metadata.message_id)
        return [over_the_wire(self._numbered(self._answer(over_the_wire(message))))]

    def _answered(self, messages: list[Message], together: AnswerTogether) -> Iterator[list[Message]]:
        for part in together([(each, self._context(each)) for each in messages]):
            yield [
                self._numbered(Message(content, reply_to=messages[place])) for place, content in part.items()
            ]

    def _numbered(self, reply: Message) -> Message:
        reply.metadata.__dict__["_message_id"] = f"reply-{next(self._numbers)}"
        return reply

    def _context(self, message: Message) -> Context:
        node = message.metadata.dst_node_id
        config = dict(self._configs[node])
        return Context(run_id=1, node_id=node, node_config=config, state=RecordDict(), run_config={})

    def _answer(self, message: Message) -> Message:
        try:
            return self._app(message, self._context(message))
        except Exception as error:  # as Flower does for any exception of a ClientApp: an error reply, and on
            _log.exception("a ClientApp raised")
            code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
            return Message(Error(code=code, reason=type(error).__name__), reply_to=message)

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
    node_configs: NodeConfigs,
    run_config: Mapping[str, bool | float | int | str],
    together: AnswerTogether | None = None,
) -> None:
    """Runs a ServerApp against ClientApps in this process; exceptions of the ServerApp come through."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SUPERLINK_NODE_ID
    context = Context(
        run_id=1, node_id=SUPERLINK_NODE_ID, node_config={}, state=RecordDict(), run_config=dict(run_config)
    )
    server_app(grid=InlineGrid(client_app, node_configs, together), context=context)
