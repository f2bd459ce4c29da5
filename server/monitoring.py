"""Metrics for Prometheus, on loopback alone: computed from the run folders and the registry at each scrape."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.deployment import Deployment, DeploymentError
from server.overview import COMPLETED, DISCARDED, FAILED, INTERRUPTED, RUNNING, overview
from server.registry import RegistryError

_log = logging.getLogger("fedtide.server")


class ServerCollector(Collector):
    """What Prometheus is told of a server. Nothing of it is about a user: sites released it, or refused."""

    def __init__(self, server: Deployment) -> None:
        self._server = server

    def describe(self) -> list[Metric]:
        """Nothing: names are told at each scrape, so that none is computed before the first."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The metrics at this moment."""
        try:
            found = overview(self._server)
        except (DeploymentError, RegistryError, OSError, ValueError) as error:
            _log.warning("metrics cannot be computed: %s", error)
            yield GaugeMetricFamily("fedtide_readable", "Whether the server's folder can be read.", value=0)
            return
        yield GaugeMetricFamily("fedtide_readable", "Whether the server's folder can be read.", value=1)
        sites = GaugeMetricFamily(
            "fedtide_sites", "Enrolled sites, by the state of their node.", labels=["node"]
        )
        nodes = Counter(site.node.replace(" ", "_") for site in found.sites)
        for state in ("online", "offline", "never_seen", "pending", "none"):
            sites.add_metric([state], nodes[state])
        yield sites
        barred = sum(site.barred for site in found.sites)
        yield GaugeMetricFamily("fedtide_sites_barred", "Sites that are barred.", value=barred)
        runs = GaugeMetricFamily("fedtide_runs", "Runs, by state.", labels=["state"])
        states = Counter(run.state for run in found.runs)
        for state in (COMPLETED, FAILED, RUNNING, INTERRUPTED, DISCARDED):
            runs.add_metric([state], states[state])
        yield runs
        yield _counted("fedtide_rounds", "Rounds that ended.", sum(run.rounds for run in found.runs))
        yield _counted(
            "fedtide_rounds_aggregated", "Rounds with enough releases.", sum(r.aggregated for r in found.runs)
        )
        yield _counted(
            "fedtide_missing", "Answers that did not come in time.", sum(r.missing for r in found.runs)
        )
        yield _labelled("fedtide_admitted", "Admitted releases.", "site", [run.by_site for run in found.runs])
        yield _labelled(
            "fedtide_refusals", "Answers left out.", "reason", [run.refusals for run in found.runs]
        )
        ends = GaugeMetricFamily(
            "fedtide_certificate_end_seconds",
            "Until when the server's certificate and its authority are valid, Unix time.",
            labels=["certificate"],
        )
        for name, moment in (
            ("server", found.certificates.server),
            ("authority", found.certificates.authority),
        ):
            if moment is not None:
                ends.add_metric([name], datetime.fromisoformat(moment).timestamp())
        yield ends
        moved = CounterMetricFamily("fedtide_bytes", "Bytes to and from sites.", labels=["direction"])
        moved.add_metric(["down"], sum(run.bytes_down for run in found.runs))
        moved.add_metric(["up"], sum(run.bytes_up for run in found.runs))
        yield moved
        yield _counted(
            "fedtide_round_seconds", "Time that rounds took.", sum(run.seconds for run in found.runs)
        )


def _counted(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def _labelled(name: str, text: str, label: str, counts: list[dict[str, int]]) -> Metric:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in sorted(total.items()):
        family.add_metric([value], count)
    return family


@dataclass(frozen=True)
class MetricsServer:
    """A loopback HTTP server in a thread."""

    server: WSGIServer
    thread: Thread

    @property
    def port(self) -> int:
        return int(self.server.server_port)

    def close(self) -> None:
        """Ends it."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def serve_metrics(server: Deployment, port: int | None = None) -> MetricsServer:
    """Serves a server's metrics on 127.0.0.1.

    Args:
        port: the configured one where None; 0 for any.
    """
    registry = CollectorRegistry()
    registry.register(ServerCollector(server))
    started: Any = start_http_server(
        server.metrics_port if port is None else port, addr="127.0.0.1", registry=registry
    )
    return MetricsServer(*started)
