"""Flower's SuperNode, but for what follows.

It does not tell the server how long the site's work took: a step's time depends on how many users were drawn, and the
contract lets no wall time leave a site. Replies that it makes itself, where a ClientApp was killed, say nothing of when
they were made (`replies`). Its proof of who calls, which must hold a time, holds it to ten seconds. (That the server
sees when a reply arrives is another matter: docs/sharp-edges.md.) While a run goes on it looks for messages more often
than each three seconds, and asks soon again for a part of a message that the server does not have yet. And nothing ends
its work without ending it: not a call, whatever it ends with (`fleet_calls`), not a message that is malformed, not a
task without an answer (`unanswered`); it shows `fedtide site up` that it lives.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from logging import ERROR
from pathlib import Path
from typing import Any

from client.bundle_guard import FIRST_WAIT
from client.fleet_calls import FleetCalls, never_ending
from client.link import NODE
from client.replies import keep_replies_timeless
from client.unanswered import await_answer
from common.supervision import Pulse

_OFTEN, _FOR = 0.5, 60.0
"""Seconds between two looks for messages, for so long after the last one came."""


def without_runtime(make: Any) -> Any:
    """A maker of Flower's PushMessages requests that leaves the run time out."""

    def made(**fields: Any) -> Any:
        fields.pop("clientapp_runtime_list")  # a KeyError where Flower has changed: no site starts unawares
        return make(**fields)

    return made


def coarsely(now: Callable[[], datetime]) -> Callable[[], datetime]:
    """A clock that shows whole ten seconds: enough for a SuperLink, which takes a time up to 300 s behind its own."""

    def shown() -> datetime:
        time = now()
        return time.replace(second=time.second - time.second % 10, microsecond=0)

    return shown


class Looking:
    """Flower's look for messages, and what stands for the module `time` where it waits between two."""

    def __init__(self, look: Callable[..., int | None], pulse: Pulse) -> None:
        """Args:
        look: Flower's own, which gives the number of a run where a message came.
        """
        self._look, self._pulse, self._came, self._until = look, pulse, False, 0.0

    def look(self, **arguments: Any) -> int | None:
        """Looks for a message; whatever came at the look before is answered by now. What cannot be taken is said."""
        if self._came:
            self._until = time.monotonic() + _FOR
        self._came = False
        try:
            found = self._look(**arguments)
        except Exception as error:
            from flwr.supercore import log

            log(ERROR, "A message could not be taken: %s: %s", type(error).__name__, error)
            return None
        self._came = found is not None
        return found

    def sleep(self, seconds: float) -> None:
        """Waits, while a run goes on no longer than `_OFTEN`."""
        self._pulse.show()
        time.sleep(min(seconds, _OFTEN) if time.monotonic() < self._until else seconds)


def pushing(push: Callable[..., None], insert: Callable[..., None], sleep: Callable[[float], None]) -> Any:
    """Flower's sending of answers, once there is a whole one; what cannot be sent is said.

    Args:
        insert: Flower's own, of an answer that is made at the SuperNode.
    """

    def pushed(*, state: Any, object_store: Any, **more: Any) -> None:
        if not await_answer(state, object_store, insert, sleep=sleep):
            return
        try:
            push(state=state, object_store=object_store, **more)
        except Exception as error:
            from flwr.supercore import log

            log(ERROR, "An answer could not be sent: %s: %s", type(error).__name__, error)
            state.delete_messages()  # one at a time: there is no other

    return pushed


def main() -> None:
    """`flower-supernode` of a site, whose folder is the first argument."""
    pulse, folder = Pulse(), Path(sys.argv.pop(1))

    from flwr.client.grpc_rere_client import connection
    from flwr.client.grpc_rere_client import node_auth_client_interceptor as proof
    from flwr.supernode import start_client_internal as flower
    from flwr.supernode.cli import flower_supernode

    keep_replies_timeless()
    proof.now = coarsely(proof.now)
    connection.PushMessagesRequest = without_runtime(connection.PushMessagesRequest)
    flower.pull_objects = partial(flower.pull_objects, initial_backoff=FIRST_WAIT)
    if not callable(connection.wrap_stub):
        raise RuntimeError("this version of Flower wraps no stub: install flwr 1.39")
    connection.wrap_stub = FleetCalls(pulse, folder / NODE).wrap
    connection.HeartbeatSender = never_ending(connection.HeartbeatSender)
    looking = Looking(flower._pull_and_store_message, pulse)
    flower._push_messages = pushing(flower._push_messages, flower._insert_message, looking.sleep)
    flower._pull_and_store_message, flower.time = looking.look, looking
    flower_supernode()


if __name__ == "__main__":
    main()
