"""The Flower ClientApp: finds the site's folder in the node's own configuration, and hands over to `site.py`.

Where the node's configuration names a resident worker, the worker computes and this process carries bytes alone.
torch is imported when a message comes that is answered here, not when Flower loads the app.
"""

from __future__ import annotations

import logging
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.replies import reply_to

if TYPE_CHECKING:
    from common.wire import Refusal, Request, Update

app = ClientApp()

_log = logging.getLogger("fedtide.site")

SITES_FOLDER = "FEDTIDE_SITES"
"""Where a simulation keeps its sites, one folder a partition."""


def site_folder(context: Context) -> Path:
    """The site's folder: `site` in the node's configuration, or a simulation's partition. Never the server's choice."""
    named = context.node_config.get("site")
    if named:
        return Path(str(named))
    return Path(os.environ[SITES_FOLDER]) / f"{int(str(context.node_config['partition-id'])):05d}"


def answered(
    folder: Callable[[], Path],
    content: RecordDict,
    note: Callable[[Request | None, Update | Refusal], None] = lambda _request, _reply: None,
    *,
    until: float = math.inf,
) -> RecordDict:
    """A site's answer to a message's content. Never raises, and tells no text.

    Args:
        folder: finds the site's.
        note: told of the request, where it was one, and of the answer; for the site's own metrics.
        until: when the message expires, in seconds since 1970.
    """
    from client.origin import heard
    from client.site import answer, named, refusal_of
    from client.site_folder import Site
    from common.wire import Refusal, answer_to_records

    reply: Update | Refusal
    request: Request | None = None
    try:
        asked = heard(folder(), content, until)
        site, request = Site.load(asked.folder), asked.request
        reply = answer(site, asked)
    except Exception as error:
        reply = refusal_of(error)
    if request is not None and isinstance(reply, Refusal):
        _log.info("%s: refused: %s", named(request), reply.reason.value)
    note(request, reply)
    return answer_to_records(reply)


def content_to_bytes(content: RecordDict) -> bytes:
    """A message's content as Flower serialises it."""
    from flwr.common.serde import recorddict_to_proto

    data: bytes = recorddict_to_proto(content).SerializeToString(deterministic=True)
    return data


def content_from_bytes(data: bytes) -> RecordDict:
    """What `content_to_bytes` wrote."""
    from flwr.common.serde import recorddict_from_proto
    from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

    return recorddict_from_proto(ProtoRecordDict.FromString(data))


_UNTIL = struct.Struct(">d")


def question_to_bytes(content: RecordDict, until: float) -> bytes:
    """What the worker is asked: when the message expires, then its content."""
    return _UNTIL.pack(until) + content_to_bytes(content)


def question_from_bytes(data: bytes) -> tuple[RecordDict, float]:
    """What `question_to_bytes` wrote."""
    return content_from_bytes(data[_UNTIL.size :]), _UNTIL.unpack_from(data)[0]


def _answered_by_worker(socket: Path, content: RecordDict, until: float) -> RecordDict:
    from client.worker import WorkerError, ask

    try:
        return content_from_bytes(ask(socket, question_to_bytes(content, until)))
    except (WorkerError, OSError) as error:
        from common.wire import Reason, Refusal, answer_to_records

        _log.error("the site's worker did not answer: %s", error)
        return answer_to_records(Refusal(Reason.FAILED))


def _answered(message: Message, context: Context) -> Message:
    worker, until = context.node_config.get("worker"), message.metadata.created_at + message.metadata.ttl
    if worker:
        return reply_to(message, _answered_by_worker(Path(str(worker)), message.content, until))
    return reply_to(message, answered(lambda: site_folder(context), message.content, until=until))


@app.query()  # type: ignore[untyped-decorator]
def query(message: Message, context: Context) -> Message:
    """Statistics, as a Gaussian sum."""
    return _answered(message, context)


@app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """One round of private fine-tuning."""
    return _answered(message, context)


@app.evaluate()  # type: ignore[untyped-decorator]
def evaluate(message: Message, context: Context) -> Message:
    """Metrics, as a Gaussian sum, where the site's policy allows them."""
    return _answered(message, context)
