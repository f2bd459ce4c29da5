"""What a server's folder says of its sites and runs: for a person's table, and for Prometheus. Loads no torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from server.certificates import certificate_ends
from server.deployment import Deployment
from server.nodes import enrolled_keys, flower_runs, known_nodes
from server.registry import RegistryReader

INCOMPLETE, DISCARDED_FOLDER = ".incomplete", ".discarded"
COMPLETED, FAILED, RUNNING, INTERRUPTED = "completed", "failed", "running", "interrupted"
DISCARDED = "discarded"


@dataclass(frozen=True)
class SiteLine:
    """One enrolled site.

    Attributes:
        node: "online", "offline", "never seen", "pending" (to be registered) or "none" (no node key was enrolled).
        heartbeat: when its node was last heard of, ISO 8601; None if never.
        removed: taken out by the server's owner.
    """

    name: str
    key_id: str
    barred: bool
    node: str
    heartbeat: str | None
    removed: bool = False


@dataclass
class RunLine:
    """One run's folder.

    Attributes:
        state: "completed", "failed", "running", "interrupted" (the same command continues it), or "discarded".
        reason: of a failure.
        waiting: what a run that is at work waits for, in words; empty where for nothing.
        refusals: reason -> how often an answer was left out for it.
        by_site: site -> admitted releases.
    """

    name: str
    state: str
    rounds: int = 0
    aggregated: int = 0
    admitted: int = 0
    missing: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    reason: str = ""
    waiting: str = ""
    refusals: dict[str, int] = field(default_factory=dict)
    by_site: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CertificateLines:
    """The server's certificates.

    Attributes:
        server, authority: until when the server's own and the authority that signed it are valid, ISO 8601; None where
            that cannot be read.
        warnings: what is wrong with them or ends soon, with the way out.
    """

    server: str | None
    authority: str | None
    warnings: list[str]


@dataclass(frozen=True)
class Overview:
    """A server at one moment."""

    up: bool
    sites: list[SiteLine]
    runs: list[RunLine]
    certificates: CertificateLines

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return asdict(self)


def overview(server: Deployment) -> Overview:
    """What there is now; whether or not the server is up.

    Raises:
        DeploymentError, RegistryError: a file cannot be read.
    """
    return Overview(server.running(), site_lines(server), run_lines(server), certificate_lines(server))


def certificate_lines(server: Deployment) -> CertificateLines:
    """Until when the server's certificates are valid, and what is to be said of that."""
    found = certificate_ends(server)
    server_end, authority_end = (
        None if end is None else end.isoformat(timespec="seconds") for end in (found.server, found.authority)
    )
    return CertificateLines(server_end, authority_end, found.warnings)


def site_lines(server: Deployment) -> list[SiteLine]:
    """The enrolled sites, by name."""
    up, keys = server.running(), enrolled_keys(server)
    nodes = {node.key: node for node in known_nodes(server) if node.registered}
    lines = []
    for site in RegistryReader(server.registry).sites():
        key = keys.get(site.name)
        node = nodes.get(key) if key else None
        if node is None:
            state = "pending" if key else "none"
        elif node.heartbeat is None:
            state = "never seen"
        else:
            state = "online" if up and node.online else "offline"
        heartbeat = (
            None if node is None or node.heartbeat is None else node.heartbeat.isoformat(timespec="seconds")
        )
        removed = site.out == "removed"
        barred = site.shut_out and not removed
        lines.append(SiteLine(site.name, site.key_id, barred, state, heartbeat, removed))
    return lines


def run_lines(server: Deployment) -> list[RunLine]:
    """The runs, oldest first."""
    active = {run.run_dir for run in flower_runs(server) if run.active} if server.running() else set()
    return [
        run_line(folder, active=str(folder) in active)
        for folder in sorted(server.runs.iterdir() if server.runs.is_dir() else [])
        if folder.is_dir() and (folder / "plan.json").is_file()
    ]


def run_line(folder: Path, *, active: bool) -> RunLine:
    """One run, from its folder.

    Args:
        active: whether Flower says that it goes on.
    """
    status, reason = ending(folder) or ("", "")
    if status not in (COMPLETED, FAILED):
        status = RUNNING if active else INTERRUPTED
    if folder.name.endswith(DISCARDED_FOLDER):
        status = DISCARDED
    name = folder.name.removesuffix(INCOMPLETE).removesuffix(DISCARDED_FOLDER)
    line = RunLine(name, status, reason=reason, waiting=waiting_for(folder) if status == RUNNING else "")
    refusals: Counter[str] = Counter()
    by_site: Counter[str] = Counter()
    for record in round_records(folder):
        line.rounds += 1
        line.aggregated += bool(record["aggregated"])
        line.admitted += len(record["admitted"])
        line.missing += record["missing"]
        line.bytes_down += record["bytes_down"]
        line.bytes_up += record["bytes_up"]
        line.seconds += record["seconds"]
        refusals.update(each["reason"] for each in record["left_out"])
        by_site.update(record["admitted"])
    line.refusals, line.by_site = dict(refusals), dict(by_site)
    return line


def waiting_for(folder: Path) -> str:
    """What a run says that it waits for; empty where for nothing."""
    try:
        said = json.loads((folder / "waiting.json").read_bytes())
        more, number = int(said["more"]), int(said["round"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f"waiting for {more} more {'site' if more == 1 else 'sites'} before round {number}"


def round_records(folder: Path) -> Iterator[dict[str, Any]]:
    """The rounds so far, as `RunFolder.records` gives them."""
    file = folder / "rounds.jsonl"
    if file.is_file():
        for line in file.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                yield json.loads(line)


def ending(folder: Path) -> tuple[str, str] | None:
    """How the ServerApp says that it ended, and why; None while it works, or if it was killed."""
    try:
        found = json.loads((folder / "ending.json").read_bytes())
        return str(found["status"]), str(found.get("reason", ""))
    except (OSError, ValueError, KeyError, TypeError):
        return None
