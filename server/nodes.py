"""The sites' nodes in SuperLink: their keys are kept in nodes/NAME.pub, and SuperLink is made to know just these.

This is the only module that reads Flower's database, of the version that is pinned; it writes to a copy of it alone.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.privacy.enrolment import check_node_key
from server.deployment import Deployment, DeploymentError, NotRunningError

_log = logging.getLogger("fedtide.server")

_PATIENCE = 2
"""Flower takes a node for gone after two heartbeats that did not come."""


@dataclass(frozen=True)
class Node:
    """A site's node as SuperLink knows it.

    Attributes:
        key: one OpenSSH line, without a comment.
        heartbeat: when it was last heard of; None if never.
    """

    node_id: int
    key: str
    registered: bool
    online: bool
    heartbeat: datetime | None


@dataclass(frozen=True)
class FlowerRun:
    """A run as Flower knows it: `status` is its word, such as "running" or "finished:failed"."""

    run_id: int
    run_dir: str
    status: str
    details: str

    @property
    def active(self) -> bool:
        return not self.status.startswith("finished")


@contextmanager
def _database(server: Deployment) -> Iterator[sqlite3.Connection | None]:
    """Flower's database, to read; None before the first start."""
    if not server.database.is_file():
        yield None
        return
    db = sqlite3.connect(f"{server.database.as_uri()}?mode=ro", uri=True, timeout=10)
    try:
        yield db
    except sqlite3.DatabaseError as error:
        if "no such table" not in str(error):  # SuperLink is only just making them
            raise DeploymentError(f"{server.database} cannot be read ({error}): see {server.logs}") from error
    finally:
        db.close()


def _rows(server: Deployment, query: str) -> list[Any]:
    found: list[Any] = []
    with _database(server) as db:
        if db is not None:
            found = db.execute(query).fetchall()
    return found


def known_nodes(server: Deployment) -> list[Node]:
    """All nodes that SuperLink ever knew, those that were taken out included."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

    now, found = time.time(), []
    query = "SELECT node_id, public_key, status, online_until, heartbeat_interval FROM node"
    for node_id, key, status, until, interval in _rows(server, query):
        if key is None:
            continue
        line = load_pem_public_key(key).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode("ascii")
        found.append(
            Node(
                node_id=node_id % 2**64,
                key=line,
                registered=status != "unregistered",
                online=status == "online" and until is not None and until > now,
                heartbeat=None
                if until is None
                else datetime.fromtimestamp(min(until - _PATIENCE * (interval or 0), now), UTC),
            )
        )
    return found


def flower_runs(server: Deployment) -> list[FlowerRun]:
    """All runs that Flower knows, oldest first."""
    query = (
        "SELECT run.run_id, override_config, starting_at, running_at, finished_at, sub_status, details "
        "FROM run JOIN task ON task.task_id = run.primary_task_id ORDER BY pending_at"
    )
    found = []
    for run_id, config, starting, running, finished, sub_status, details in _rows(server, query):
        if finished:
            status = f"finished:{sub_status}"
        else:
            status = "running" if running else "starting" if starting else "pending"
        folder = str(json.loads(config or "{}").get("run-dir", ""))
        found.append(FlowerRun(run_id % 2**64, folder, status, details or ""))
    return found


_ON_THEIR_WAY = (
    "message_ins", "message_res", "task_message", "objects", "object_children", "run_objects",
    "object_push_sessions", "object_push_session_pending", "object_push_session_roots",
)  # fmt: skip
"""Of Flower's database: messages and their parts, which are sent and deleted within a round."""


def forget_what_is_at_work(database: Path) -> None:
    """Ends, in a copy of Flower's database, the runs that were at work, and takes out what was on its way.

    A server that is put back asks again for the same bytes, which have the same names as the parts that had come: those
    of a run whose end Flower notices later would go with it.

    Raises:
        sqlite3.Error: Flower's database is another one than that of the pinned version.
    """
    now = datetime.now(UTC).isoformat(" ")
    with closing(sqlite3.connect(database)) as db, db:
        for table in _ON_THEIR_WAY:
            db.execute(f"DELETE FROM {table}")
        db.execute(
            "UPDATE task SET finished_at = ?, sub_status = 'stopped', details = 'put back from a copy', token = NULL "
            "WHERE finished_at IS NULL",
            (now,),
        )


def enrolled_keys(server: Deployment) -> dict[str, str]:
    """Site -> its node's public key, of the sites that have one."""
    return {
        file.stem: file.read_text(encoding="ascii").strip() for file in sorted(server.nodes.glob("[!.]*.pub"))
    }


def site_names(server: Deployment) -> dict[int, str]:
    """Id of a node -> its site, of the enrolled sites, whether or not they ever answered."""
    names = {key: name for name, key in enrolled_keys(server).items()}
    return {node.node_id: names[node.key] for node in known_nodes(server) if node.key in names}


def check_unused(server: Deployment, name: str, key: str) -> None:
    """Raises `DeploymentError` if another site than the named one has this node key, or it was taken out before."""
    for other, its_key in enrolled_keys(server).items():
        if its_key == key and other != name:
            raise DeploymentError(
                f"the node key belongs to site {other!r}: ask this site's administrator for a key of its own"
            )
    if any(node.key == key and not node.registered for node in known_nodes(server)):
        raise DeploymentError(
            "the node key was taken out here, and SuperLink takes no key twice: the site's administrator runs "
            "`fedtide site connect`, which makes a new one, and sends the new enrolment.json"
        )


def keep_node_key(server: Deployment, name: str, key: str) -> None:
    """Keeps a site's node key, in place of an older one, for `register_nodes`.

    Raises:
        DeploymentError: another site has this key.
    """
    check_unused(server, name, key)
    aside = server.nodes / f".{name}.{os.getpid()}"
    aside.write_text(check_node_key(key) + "\n", encoding="ascii")
    aside.replace(server.nodes / f"{name}.pub")


def pending_changes(server: Deployment) -> tuple[dict[str, str], list[Node]]:
    """What SuperLink is to be told: sites whose node key it lacks, and nodes that are no site's any more."""
    wanted, nodes = enrolled_keys(server), known_nodes(server)
    known = {node.key for node in nodes}
    missing = {name: key for name, key in wanted.items() if key not in known}
    return missing, [node for node in nodes if node.registered and node.key not in wanted.values()]


def register_nodes(server: Deployment) -> list[str]:
    """Makes SuperLink know just the nodes of the enrolled sites.

    Returns:
        Names of the sites whose nodes were registered.

    Raises:
        NotRunningError: the server is not up; what is pending stays so.
        DeploymentError: SuperLink refuses.
    """
    from server.control import control

    missing, extra = pending_changes(server)
    if not missing and not extra:
        return []
    with control(server) as asked:
        for node in extra:
            asked.unregister(node.node_id)
            _log.info("node %d is no site's any more: it was taken out", node.node_id)
        for name, key in missing.items():
            try:
                asked.register(name, key)
            except NotRunningError:
                raise
            except DeploymentError:
                if name in pending_changes(server)[0]:  # else another process was quicker
                    raise
            _log.info("site %s: its node is registered", name)
    return list(missing)
