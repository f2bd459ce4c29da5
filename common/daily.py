"""Something that is done once a day by a process that lives for long."""

from __future__ import annotations

import time
from collections.abc import Callable

_DAY_SECONDS = 86_400.0


class Daily:
    """Does something once a day, however often it is looked at."""

    def __init__(self, act: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        """The first time a day from now; `clock` in seconds."""
        self._act, self._clock = act, clock
        self._next = clock() + _DAY_SECONDS

    def look(self) -> None:
        """To be called often."""
        if self._clock() >= self._next:
            self._next = self._clock() + _DAY_SECONDS
            self._act()
