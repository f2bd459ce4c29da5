"""Reads all that sites push to a server, field by field and byte by byte, and says what in it is more than a release.

Of the calls that a recording proxy noted between real SuperNodes and a real SuperLink.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import Message, ObjectTree, PushObjectRequest
from google.protobuf.message import Message as ProtoMessage
from google.protobuf.unknown_fields import UnknownFieldSet

from tests.server.recording_proxy import Call

WHO = ("src_node_id", "dst_node_id", "reply_to_message_id", "src_task_id", "dst_task_id")
"""Of metadata: who talks to whom; each site has its own."""
AUTHENTICATION = ("flwr-public-key-bin", "flwr-signature-bin", "flwr-timestamp")
_DIGEST = re.compile(rb"[0-9a-f]{32,}")
"""Hashes, keys, nonces and signatures: each of a receipt's is over what else is compared, or over the release."""


@dataclass(frozen=True)
class Reply:
    """What a site pushed for one request.

    Attributes:
        times: (created_at, ttl) of the reply, and of the request.
        parts: all else, where what is the site's own by its nature (who it is, released numbers, digests,
            signatures) stands as its name and length: equal for two sites that released in one round.
        numbers: the bytes of `parts`, and of what was replaced but for the released numbers.
    """

    times: tuple[tuple[float, float], tuple[float, float]]
    parts: tuple[object, ...]
    numbers: bytes


def replies_of(calls: Sequence[Call], node: bytes) -> list[Reply]:
    """What a node pushed, in order."""
    asked: dict[str, Message] = {}
    found = []
    for call in calls:
        if call.node != node:
            continue
        if call.method == "PullMessages":
            for message in PullMessagesResponse.FromString(call.response).messages_list:
                asked[message.metadata.message_id] = message
        if call.method == "PushMessages":
            found.append(_reply(call, calls, asked))
    return found


def _reply(call: Call, calls: Sequence[Call], asked: dict[str, Message]) -> Reply:
    request, session = (
        PushMessagesRequest.FromString(call.request),
        PushMessagesResponse.FromString(call.response),
    )
    (message,), (tree,) = request.messages_list, request.message_object_trees
    question = asked[message.metadata.reply_to_message_id]
    ids = list(_ids(tree))
    objects = {}
    for each in calls:
        if each.method == "PushObject":
            pushed = PushObjectRequest.FromString(each.request)
            if pushed.session_id == session.session_id:
                assert set(_fields(pushed)) == {"node", "object_id", "object_content", "run_id", "session_id"}
                objects[pushed.object_id] = pushed.object_content
    assert set(objects) == set(ids)
    parts: list[object] = [
        {name: value for name, value in _fields(request).items() if name not in _SPLIT},
        _metadata(message),
        _form(tree),
    ]
    numbers = message.SerializeToString()
    for each_id in ids:
        part, read = _object(objects[each_id], ids)
        parts.append(part)
        numbers += read
    metadata, of_request = message.metadata, question.metadata
    times = (metadata.created_at, metadata.ttl), (of_request.created_at, of_request.ttl)
    return Reply(times, tuple(parts), numbers)


_SPLIT = ("node", "messages_list", "message_object_trees")


def _object(content: bytes, ids: Sequence[str]) -> tuple[object, bytes]:
    """One of Flower's objects, as `Reply.parts` and `Reply.numbers` hold it."""
    head, _, body = content.partition(b"\0")
    kind = head.partition(b" ")[0]
    for number, each in enumerate(ids):
        body = body.replace(each.encode(), b"object %d" % number)
        head = head.replace(each.encode(), b"object %d" % number)
    if kind == b"Message":
        message = Message.FromString(body)
        return (kind, _metadata(message), sorted(_fields(message))), content
    if kind == b"ArrayChunk":  # the release, as safetensors: a length, a header, numbers
        (length,) = struct.unpack_from("<Q", body)
        return (head, body[: 8 + length], len(body)), head + body[: 8 + length]
    return (head, _DIGEST.sub(lambda digest: b"digest of %d" % len(digest[0]), body)), content


def _ids(tree: ObjectTree) -> Iterator[str]:
    yield tree.object_id
    for child in tree.children:
        yield from _ids(child)


def _form(tree: ObjectTree) -> tuple[object, ...]:
    assert set(_fields(tree)) <= {"object_id", "children"}
    return tuple(_form(child) for child in tree.children)


def _metadata(message: Message) -> dict[str, object]:
    """The metadata but for times, who talks to whom, and the message's own id, which is the digest of it all."""
    assert set(_fields(message)) <= {"metadata", "content"}
    assert not message.content.ByteSize()  # the content travels as objects
    kept = _fields(message.metadata)
    return {
        name: value for name, value in kept.items() if name not in (*WHO, "message_id", "created_at", "ttl")
    }


def _fields(message: ProtoMessage) -> dict[str, object]:
    """Every field of a message that is set, by name; one that this Flower does not know is refused."""
    assert not list(UnknownFieldSet(message))
    return {field.name: value for field, value in message.ListFields()}


def times_in(data: bytes, began: float, known: Sequence[float]) -> list[float]:
    """Numbers of eight bytes anywhere in these, at whatever offset, that would be times since `began`."""
    found = []
    for form in ("<d", ">d"):
        for offset in range(len(data) - 7):
            (value,) = struct.unpack_from(form, data, offset)
            if began - 1 <= value <= began + 3600 and value not in known:
                found.append(value)
    return found


def faults_of(calls: Sequence[Call], nodes: Sequence[bytes], began: float) -> list[str]:
    """What in these nodes' replies is more than a release: nothing, where all is a function of the requests.

    Args:
        nodes: of sites that were asked the same.
        began: seconds since 1970, before the first request.
    """
    found = []
    replies = [replies_of(calls, node) for node in nodes]
    if len({len(each) for each in replies}) != 1 or not replies[0]:
        return ["the sites did not answer as often as one another"]
    for number, each in enumerate(zip(*replies, strict=True), start=1):
        if len({repr(reply.parts) for reply in each}) != 1:
            found.append(
                f"exchange {number}: replies differ in more than released numbers, digests and names"
            )
        for reply in each:
            said, asked = reply.times
            if said != asked:
                found.append(f"exchange {number}: a reply says {said}, and its request {asked}")
            if times_in(reply.numbers, began, asked[:1]):
                found.append(f"exchange {number}: a reply holds a time")
    for call in calls:
        if call.node in nodes:
            found += [f"{call.method}: {fault}" for fault in _faults_of_headers(call)]
    return found


def _faults_of_headers(call: Call) -> Iterator[str]:
    """Beside a call: who calls, the proof of it, Flower's version; of the clock ten seconds."""
    unknown = set(call.headers) - {*AUTHENTICATION, *VERSIONS}
    if unknown:
        yield f"headers {sorted(unknown)}"
    time = datetime.fromisoformat(str(call.headers["flwr-timestamp"]))
    if time.second % 10 or time.microsecond:
        yield f"a clock of {time.isoformat()}"


VERSIONS = ("flwr-component-name", "flwr-package-name", "flwr-package-version")
