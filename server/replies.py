"""What comes back for the messages of a round, reply by reply. Only this module touches the inside of Flower's grid.

Flower's `pull_messages` fetches one reply's objects after another, waits minutes for those that are absent, and lets
through whatever foreign bytes make its readers raise: one node could hold up, or end, everybody's run. Here nothing
waits, and what cannot be read is a fault of the one reply.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

if TYPE_CHECKING:
    from flwr.superlink.grid import HttpGrid

_log = logging.getLogger("fedtide.server")

MOST_OBJECTS = 64
"""Of Flower's objects in one reply, which is six (docs/server.md)."""
MOST_BYTES = 16 * 2**20
"""Of one reply's objects, packed and unpacked: the largest release is 4 MB, and its receipt far less."""

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
"""Seconds between two looks for an object that has not come yet; doubled from one to the next."""

NOT_WHOLE = "it was announced, and none of its objects came"
_GONE = "its objects did not come in time, and the server gave them up"
_TOO_MANY = f"it is of more than {MOST_OBJECTS} objects"
_TOO_LARGE = f"it is larger than {MOST_BYTES} bytes"


@dataclass(frozen=True)
class Reply:
    """What came back for one message.

    Attributes:
        asked: id of the message that it answers.
        content: as it was sent; None where there is none.
        error: Flower's code, where the node failed or is gone.
        fault: why the reply cannot be read, in the server's own words; empty where it can.
    """

    asked: str
    content: RecordDict | None = None
    error: int | None = None
    fault: str = ""


class Replies(Protocol):
    """The replies to some messages."""

    def look(self) -> list[Reply]:
        """Those that have come since the last look; returns at once."""

    def announced(self) -> list[str]:
        """Messages whose replies were announced, and of which nothing came."""


def connected(grid: Grid) -> list[int]:
    """Ids of the connected nodes, in order; none where SuperLink fails to say."""
    import httpx

    try:
        return sorted(grid.get_node_ids())
    except httpx.HTTPError as error:
        _log.warning("SuperLink failed to say who is connected (%s)", type(error).__name__)
        return []


def replies_to(grid: Grid, asked: Iterable[str]) -> Replies:
    """The replies to these messages.

    Args:
        asked: the messages' ids, as `push_messages` gave them.

    Raises:
        RuntimeError: this Flower's grid is not the one that is known here.
    """
    if not type(grid).__module__.startswith("flwr."):
        return _FromGrid(grid, asked)
    from flwr.superlink.grid import HttpGrid, InMemoryGrid

    if isinstance(grid, InMemoryGrid):  # a simulation: nothing travels
        return _FromGrid(grid, asked)
    inside = ("_runtime_client", "node", "run")
    if not isinstance(grid, HttpGrid) or not all(name in dir(grid) for name in inside):
        raise RuntimeError("this version of Flower fetches replies in another way: install flwr 1.39")
    return _FromSuperLink(grid, asked)


class _FromGrid:
    """From a grid in this process, by its own `pull_messages`."""

    def __init__(self, grid: Grid, asked: Iterable[str]) -> None:
        self._grid, self._waiting = grid, dict.fromkeys(asked)

    def look(self) -> list[Reply]:
        found = []
        for message in self._grid.pull_messages(list(self._waiting)):
            asked = message.metadata.reply_to_message_id
            if asked in self._waiting:
                del self._waiting[asked]
                found.append(_read(asked, message))
        return found

    def announced(self) -> list[str]:
        return []


def _read(asked: str, message: object) -> Reply:
    """Raises whatever Flower's classes raise for a reply that is none."""
    if not isinstance(message, Message):
        return Reply(asked, fault="it is no message")
    if message.has_error():
        return Reply(asked, error=int(message.error.code))
    return Reply(asked, content=message.content)


@dataclass
class _Half:
    """A reply of which SuperLink has the announcement."""

    asked: str
    root: str
    missing: list[str]
    objects: dict[str, bytes] = field(default_factory=dict)
    next_look: float = 0.0
    pause: float = _SHORTEST_PAUSE

    def put_off(self) -> None:
        self.next_look = time.monotonic() + self.pause
        self.pause = min(2 * self.pause, _LONGEST_PAUSE)


class _FromSuperLink:
    """From SuperLink: first what was announced, of all messages at once, then each reply's objects as they come.

    Who sent a reply, and what it answers, is read from SuperLink's own record of it, never from the reply.
    """

    def __init__(self, grid: HttpGrid, asked: Iterable[str]) -> None:
        self._grid = grid
        self._waiting = dict.fromkeys(asked)
        self._halves: dict[str, _Half] = {}
        self._singly = False

    def look(self) -> list[Reply]:
        found = self._announcements()
        for half in [each for each in self._halves.values() if each.next_look <= time.monotonic()]:
            try:
                reply = self._fetched(half)
            except Exception as error:  # whatever Flower's readers make of foreign bytes
                reply = Reply(half.asked, fault=f"Flower cannot read it ({type(error).__name__})")
            if reply is not None:
                del self._halves[half.asked]
                self._forget(half.root)
                found.append(reply)
        return found

    def announced(self) -> list[str]:
        return [half.asked for half in self._halves.values() if not half.objects]

    def _announcements(self) -> list[Reply]:
        """Replies that are errors; of the others the halves are begun."""
        from flwr.proto.runtime_pb2 import PullAppMessagesRequest

        found: list[Reply] = []
        waiting = list(self._waiting)
        for batch in [[each] for each in waiting] if self._singly else [waiting] if waiting else []:
            said = self._asked("PullMessages", PullAppMessagesRequest(message_ids=batch))
            if said is None:  # so that one message, if it is one's fault, keeps back no other's reply
                self._singly = True
                continue
            for message, tree in zip(said.messages_list, said.message_object_trees, strict=False):
                asked = message.metadata.reply_to_message_id
                if asked not in self._waiting:  # it answers nothing that was asked
                    continue
                del self._waiting[asked]
                if message.HasField("error"):
                    found.append(Reply(asked, error=int(message.error.code)))
                    self._forget(tree.object_id)
                else:
                    self._begin(asked, tree, found)
        return found

    def _begin(self, asked: str, tree: Any, found: list[Reply]) -> None:
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

        ids: dict[str, None] = {}
        for each in iterate_object_tree(tree):
            ids[each.object_id] = None
            if len(ids) > MOST_OBJECTS:
                found.append(Reply(asked, fault=_TOO_MANY))
                self._forget(tree.object_id)
                return
        self._halves[asked] = _Half(asked, tree.object_id, list(ids))

    def _fetched(self, half: _Half) -> Reply | None:
        """The reply, once all its objects are there; raises what Flower's readers raise."""
        from flwr.proto.message_pb2 import PullObjectRequest
        from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

        while half.missing:
            asked = PullObjectRequest(
                node=self._grid.node, run_id=self._grid.run.run_id, object_id=half.missing[0]
            )
            said = self._asked("PullObject", asked)
            if said is not None and not said.object_found:
                return Reply(half.asked, fault=_GONE)
            if said is None or not said.object_available:
                half.put_off()
                return None
            half.objects[half.missing.pop(0)] = said.object_content
            if sum(map(len, half.objects.values())) > MOST_BYTES:
                return Reply(half.asked, fault=_TOO_LARGE)
        if _unpacked_bytes(half.objects) > MOST_BYTES:
            return Reply(half.asked, fault=_TOO_LARGE)
        return _read(half.asked, inflate_object_from_contents(half.root, half.objects))

    def _asked(self, method: str, request: Any) -> Any:
        """SuperLink's answer; None where it failed, which is said, and asked again at the next look.

        A SuperLink that is down is waited for, by Flower's own client; a run that was stopped ends here.
        """
        import httpx

        try:
            return getattr(self._grid._runtime_client, method)(request)
        except (httpx.HTTPError, ValueError) as error:
            _log.warning("SuperLink failed at %s (%s): it is asked again", method, type(error).__name__)
            return None

    def _forget(self, root: str) -> None:
        """Lets SuperLink drop a reply's objects."""
        from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest

        self._asked(
            "ConfirmMessageReceived",
            ConfirmMessageReceivedRequest(
                node=self._grid.node, run_id=self._grid.run.run_id, message_object_id=root
            ),
        )


def _unpacked_bytes(objects: dict[str, bytes]) -> int:
    """What the arrays among these objects come to: an array may name one chunk as often as it likes."""
    from flwr.app import Array
    from flwr.supercore.inflatable.inflatable_object import (
        get_object_body,
        get_object_head_values_from_object_content,
    )

    total = 0
    for content in objects.values():
        kind, chunks, _ = get_object_head_values_from_object_content(content)
        if kind == Array.__qualname__:
            for place in json.loads(get_object_body(content, Array))["arraychunk_ids"]:
                total += len(objects[chunks[place]])
                if total > MOST_BYTES:
                    return total
    return total
