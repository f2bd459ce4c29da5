"""An attacker who has ca.crt alone, on another machine and on the server's own, beside a run that goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from common.bundle import bundle_hash
from simulations.faults.judging import Mark, judge, mark
from simulations.faults.place import NETWORK, OTHERS, SITES, VICTIM, FaultError, Place
from simulations.faults.rows import ended_well
from simulations.faults.tiny import STEPS

NOBODY = 65534
FROM_NETWORK, ON_MACHINE = "another machine", "another account on the server's machine"
ENROLLED = "an enrolled site"
_DEADLINE, _MEMORY = 400.0, 200_000_000
"""Seconds; bytes."""


@dataclass
class Tried:
    """A try: who, what, what it came to; whether it was kept out."""

    who: str
    what: str
    said: str
    holds: bool


def attack(place: Place) -> list[Tried]:
    """All tries, during a run; last, whether that run came to its end as if nothing had been.

    Raises:
        FaultError: this is not root, which it takes to become another user.
    """
    if os.geteuid() != 0:
        raise FaultError("needs root, to try as another user")
    open_ = place.folder.parent / f"{place.folder.name}-open"
    open_.mkdir(mode=0o755, exist_ok=True)
    shutil.copy(place.server / "tls" / "ca.crt", open_ / "ca.crt")
    (open_ / "ca.crt").chmod(0o644)
    run = place.begin("attack", 2, quorum=None, round_deadline=_DEADLINE)
    intruder = _as_nobody(place, open_, "network")
    try:
        before, found = _beside_a_round(place, open_, intruder)
    finally:
        intruder.kill()
    ended_well(place, run)
    faults = judge(place, "attack", before, SITES, SITES)
    wrong = "; ".join(fault for each in faults.values() for fault in each)
    found.append(Tried("", "the run beside all this", wrong or "whole, and every check holds", not wrong))
    found += [Tried(ON_MACHINE, *each) for each in _tried(_as_nobody(place, open_, "machine"))]
    shutil.rmtree(open_)
    found.append(Tried(ON_MACHINE, *_taken_out(place)))
    return found


def _beside_a_round(place: Place, open_: Path, intruder: subprocess.Popen[str]) -> tuple[Mark, list[Tried]]:
    """The tries from the network, and an enrolled site's own questions, while a site's update lies at the server.

    It would lie there for a moment only, so the ServerApp that fetches it stands still meanwhile.
    """
    place.until_training(OTHERS[0], 2, STEPS - 20)
    before = mark(place, "attack", SITES)
    link = place.up["server"].part("server.superlink")
    held = peak_memory(link)
    fetching = place.up["server"].part("flwr-serverapp")
    os.kill(fetching, signal.SIGSTOP)
    try:
        sender = node_id_of(place, public_key_of(place, OTHERS[0]))
        place.until(lambda: update_objects(place, sender), f"an update of {OTHERS[0]} at the server")
        known = _known(place, open_ / "ca.crt", update_objects(place, sender))
        aside = open_ / "known.aside"
        aside.write_text(json.dumps(known))
        aside.chmod(0o644)
        aside.replace(open_ / "known.json")
        found = [Tried(FROM_NETWORK, *each) for each in _tried(intruder)]
        more = peak_memory(link) - held
        said = f"{more / 1e6:.0f} MB more at the peak than the {held / 1e6:.0f} MB before"
        found.append(Tried(FROM_NETWORK, "fill SuperLink's memory by all this", said, more < _MEMORY))
        found += [Tried(ENROLLED, *each) for each in _enrolled(place, known)]
        if not set(known["objects"]) <= set(update_objects(place, sender)):
            raise FaultError("the update was taken away from the server while it was tried to read it")
    finally:
        os.kill(fetching, signal.SIGCONT)
    return before, found


def peak_memory(pid: int) -> int:
    """Bytes that a process held at most."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def update_objects(place: Place, sender: int) -> list[str]:
    """Ids of a node's update as it lies at the server now, the largest parts first; none while a part is on its way."""
    parts = (
        "WITH RECURSIVE part(id) AS (SELECT message_id FROM message_res WHERE src_node_id = ? UNION "
        "SELECT child_id FROM object_children JOIN part ON parent_id = part.id) "
        "SELECT object_id, is_available, length(content) FROM part JOIN objects ON object_id = part.id "
        "ORDER BY length(content) DESC"
    )
    signed = sender - 2**64 if sender >= 2**63 else sender
    with sqlite3.connect(f"{(place.server / 'state.db').as_uri()}?mode=ro", uri=True, timeout=10) as db:
        rows = db.execute(parts, (signed,)).fetchall()
    return [name for name, available, size in rows if size] if all(row[1] for row in rows) else []


def _enrolled(place: Place, known: dict[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """The same questions with sites' own keys. What it may have is asked for last, so that a refusal says something."""
    from flwr.proto import fab_pb2, message_pb2
    from flwr.proto.fleet_pb2_grpc import FleetStub
    from flwr.proto.node_pb2 import Node

    from simulations.faults.intruder import answered, channel

    stub, run = FleetStub(channel(known)), known["run"]
    for site, whose in ((OTHERS[0], "its own, sent"), (VICTIM, "another site's")):
        node = Node(node_id=node_id_of(place, public_key_of(place, site)))
        for number, name in enumerate(known["objects"]):
            update = message_pb2.PullObjectRequest(node=node, run_id=run, object_id=name)
            said, refused = answered(stub.PullObject, update, signed_as(place, site, datetime.now(UTC)))
            yield f"read {whose} update, its id known ({number + 1})", said, refused
    fab = fab_pb2.GetFabRequest(node=node, hash_str=known["bundle"], run_id=run)
    said, refused = answered(stub.GetFab, fab, signed_as(place, VICTIM, datetime.now(UTC)))
    yield "fetch the bundle of a run, its hash known", said, not refused


def _taken_out(place: Place) -> tuple[str, str, bool]:
    """Whether the server knows just its sites' nodes again, whatever was registered behind its back."""
    from server.deployment import Deployment
    from server.nodes import known_nodes, pending_changes

    what, server = "stay registered with that node key", Deployment.load(place.server)
    try:
        place.until(lambda: not any(pending_changes(server)), "the stranger's node taken out", 0.5)
    except FaultError as error:
        return what, str(error), False
    gone = sum(not node.registered for node in known_nodes(server))
    return what, f"the server took out {gone} node that is no site's", True


def _as_nobody(place: Place, folder: Path, where: str) -> subprocess.Popen[str]:
    """The intruder, who waits until known.json is there."""
    inside = ["ip", "netns", "exec", NETWORK] if where == "network" and place.own_network else []
    other = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    intruder = [sys.executable, "-m", "simulations.faults.intruder", str(folder / "known.json"), where]
    return subprocess.Popen(
        [*inside, *other, *intruder], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip


def _tried(intruder: subprocess.Popen[str]) -> list[tuple[str, str, bool]]:
    said, wrong = intruder.communicate(timeout=600)
    if intruder.returncode:
        raise FaultError(f"the intruder could not try: {wrong[-500:]}")
    return [(what, came_to, holds) for what, came_to, holds in json.loads(said.splitlines()[-1])]


def _known(place: Place, authority: Path, objects: list[str]) -> dict[str, Any]:
    """What the intruder is given: ports, ids and public keys, which are no secrets, and an old signed header."""
    with sqlite3.connect(f"{(place.server / 'state.db').as_uri()}?mode=ro", uri=True, timeout=10) as db:
        (run,) = db.execute("SELECT run_id FROM run ORDER BY rowid DESC LIMIT 1").fetchone()
    public = public_key_of(place, VICTIM)
    return {
        "host": place.host,
        **dict(zip(("fleet", "control", "metrics"), place.ports, strict=True)),
        "ca": str(authority),
        "server": str(place.server),
        "run": run % 2**64,
        "objects": objects[:2],
        "bundle": bundle_hash(),
        "victim": node_id_of(place, public),
        "victim_key": public.hex(),
        "stale": [
            [name, value.hex() if isinstance(value, bytes) else value]
            for name, value in signed_as(place, VICTIM, datetime.now(UTC) - timedelta(minutes=10))
        ],
    }


def public_key_of(place: Place, site: str) -> bytes:
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    from client.connection import Connection

    public: bytes = public_key_to_bytes(Connection.load(place.folder / site).private_key().public_key())
    return public


def signed_as(place: Place, site: str, when: datetime) -> list[tuple[str, Any]]:
    """The headers that a site's SuperNode would show at a time."""
    from flwr.common.constant import PUBLIC_KEY_HEADER, SIGNATURE_HEADER, TIMESTAMP_HEADER
    from flwr.supercore.primitives.asymmetric import sign_message

    from client.connection import Connection

    key, stamp = Connection.load(place.folder / site).private_key(), when.isoformat()
    return [
        (PUBLIC_KEY_HEADER, public_key_of(place, site)),
        (TIMESTAMP_HEADER, stamp),
        (SIGNATURE_HEADER, sign_message(key, stamp.encode("ascii"))),
    ]


def node_id_of(place: Place, public: bytes) -> int:
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        PublicFormat,
        load_pem_public_key,
    )

    from server.deployment import Deployment
    from server.nodes import known_nodes

    line = load_pem_public_key(public).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    return next(node.node_id for node in known_nodes(Deployment.load(place.server)) if node.key == line)
