"""What a site tells Prometheus, on loopback alone: rounds, refusals, budget. Nothing about users.

The time of a step is told as a power of two, as an exact one would depend on how many users a step drew.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from common.phases import Phase

if TYPE_CHECKING:
    from common.wire import Refusal, Request, Update

Note = Callable[["Request | None", "Update | Refusal"], None]


def budget_left(ledger_folder: Path) -> float:
    """The share of the budget that is left; not a number where the ledger cannot be read just now."""
    from client.ledger import Ledger

    try:
        with Ledger.open(ledger_folder) as ledger:
            return 1 - ledger.status().share
    except Exception:
        return math.nan


def coarse(seconds: float) -> float:
    """The power of two next to a time."""
    return float(2.0 ** round(math.log2(max(seconds, 2.0**-20))))


class SiteMetrics:
    """The counters of one worker. They begin at zero with each process, as Prometheus expects of counters."""

    def __init__(self, folder: Path, ledger_folder: Path) -> None:
        """Of the site in a folder, with this ledger."""
        from client.link import is_connected

        self.registry = CollectorRegistry()
        connected = Gauge(
            "fedtide_connected",
            "1 while the server answers this site's node, 0 while it does not.",
            registry=self.registry,
        )
        connected.set_function(lambda: float(is_connected(folder)))
        self._answered = Counter(
            "fedtide_site_rounds_answered",
            "Rounds answered with a release.",
            ["phase"],
            registry=self.registry,
        )
        self._refused = Counter(
            "fedtide_site_refusals", "Requests refused, by reason.", ["reason"], registry=self.registry
        )
        left = Gauge(
            "fedtide_site_budget_left", "Share of the privacy budget that is left.", registry=self.registry
        )
        left.set_function(lambda: budget_left(ledger_folder))
        self._step = Gauge(
            "fedtide_site_step_seconds",
            "Mean time of a step in the last round, to a power of two.",
            registry=self.registry,
        )

    @contextmanager
    def round(self) -> Iterator[Note]:
        """Around one answer: gives what is to be told of it."""
        from common.config import make_plan
        from common.wire import Refusal

        began = time.monotonic()

        def note(request: Request | None, reply: Update | Refusal) -> None:
            if isinstance(reply, Refusal):
                self._refused.labels(reply.reason.value).inc()
            elif request is not None:
                self._answered.labels(request.phase.value).inc()
                if request.phase is Phase.UPDATE:
                    steps = make_plan(json.loads(request.plan)).training.steps_per_round
                    self._step.set(coarse((time.monotonic() - began) / steps))

        yield note

    def serve(self, port: int) -> None:
        """Answers Prometheus on a port of loopback, in a thread."""
        start_http_server(port, addr="127.0.0.1", registry=self.registry)
