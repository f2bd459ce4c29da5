"""Flower's SuperNode, but for four things.

It does not tell the server how long the site's work took: a step's time depends on how many users were drawn, and the
contract lets no wall time leave a site. Replies that it makes itself, where a ClientApp was killed, say nothing of when
they were made (`replies`). Its proof of who calls, which must hold a time, holds it to ten seconds. (That the server
sees when a reply arrives is another matter: docs/sharp-edges.md.) And while a run goes on it looks for messages more
often than each three seconds, and asks soon again for a part of a message that the server does not have yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any

from client.bundle_guard import FIRST_WAIT
from client.replies import keep_replies_timeless

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

    def __init__(self, look: Callable[..., int | None]) -> None:
        """Args:
        look: Flower's own, which gives the number of a run where a message came.
        """
        self._look, self._came, self._until = look, False, 0.0

    def look(self, **arguments: Any) -> int | None:
        """Looks for a message; whatever came at the look before is answered by now."""
        if self._came:
            self._until = time.monotonic() + _FOR
        found = self._look(**arguments)
        self._came = found is not None
        return found

    def sleep(self, seconds: float) -> None:
        """Waits, while a run goes on no longer than `_OFTEN`."""
        time.sleep(min(seconds, _OFTEN) if time.monotonic() < self._until else seconds)


def main() -> None:
    """`flower-supernode` of a site."""
    from flwr.client.grpc_rere_client import connection
    from flwr.client.grpc_rere_client import node_auth_client_interceptor as proof
    from flwr.supernode import start_client_internal as flower
    from flwr.supernode.cli import flower_supernode

    keep_replies_timeless()
    proof.now = coarsely(proof.now)
    connection.PushMessagesRequest = without_runtime(connection.PushMessagesRequest)
    flower.pull_objects = partial(flower.pull_objects, initial_backoff=FIRST_WAIT)
    looking = Looking(flower._pull_and_store_message)
    flower._pull_and_store_message, flower.time = looking.look, looking
    flower_supernode()


if __name__ == "__main__":
    main()
