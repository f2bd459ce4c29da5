"""Flower's SuperNode, but for three things.

It does not tell the server how long the site's work took: a step's time depends on how many users were drawn, and the
contract lets no wall time leave a site. (That a reply says nothing of when it was made is `app.reply_to`'s.) That the
server sees when a reply arrives is another matter (docs/sharp-edges.md). And while a run goes on it looks for messages
more often than each three seconds, and asks soon again for a part of a message that the server does not have yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from client.bundle_guard import FIRST_WAIT

_OFTEN, _FOR = 0.5, 60.0
"""Seconds between two looks for messages, for so long after the last one came."""


def without_runtime(make: Any) -> Any:
    """A maker of Flower's PushMessages requests that leaves the run time out."""

    def made(**fields: Any) -> Any:
        fields.pop("clientapp_runtime_list")  # a KeyError where Flower has changed: no site starts unawares
        return make(**fields)

    return made


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
    from flwr.supernode import start_client_internal as flower
    from flwr.supernode.cli import flower_supernode

    connection.PushMessagesRequest = without_runtime(connection.PushMessagesRequest)
    flower.pull_objects = partial(flower.pull_objects, initial_backoff=FIRST_WAIT)
    looking = Looking(flower._pull_and_store_message)
    flower._pull_and_store_message, flower.time = looking.look, looking
    flower_supernode()


if __name__ == "__main__":
    main()
