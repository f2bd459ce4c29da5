"""An attacker who has ca.crt alone, on another machine and on the server's own, beside a run that goes on."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from common.bundle import bundle_hash
from simulations.faults.judging import judge, mark
from simulations.faults.place import NETWORK, SITES, VICTIM, FaultError, Place
from simulations.faults.rows import ended_well

NOBODY = 65534
FROM_NETWORK, ON_MACHINE = "another machine", "another account on the server's machine"


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
    run = place.begin("attack", 3)
    place.until_round("attack", 2)
    before = mark(place, "attack", SITES)
    open_ = place.folder.parent / f"{place.folder.name}-open"
    open_.mkdir(mode=0o755, exist_ok=True)
    shutil.copy(place.server / "tls" / "ca.crt", open_ / "ca.crt")
    (open_ / "known.json").write_text(json.dumps(_known(place, open_ / "ca.crt")))
    for file in open_.iterdir():
        file.chmod(0o644)
    found = [Tried(FROM_NETWORK, *each) for each in _as_nobody(place, open_, "network")]
    ended_well(place, run)
    faults = judge(place, "attack", before, SITES, SITES)
    wrong = "; ".join(fault for each in faults.values() for fault in each)
    found.append(Tried("", "the run beside all this", wrong or "whole, and every check holds", not wrong))
    found += [Tried(ON_MACHINE, *each) for each in _as_nobody(place, open_, "machine")]
    shutil.rmtree(open_)
    found.append(Tried(ON_MACHINE, *_taken_out(place)))
    return found


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


def _as_nobody(place: Place, folder: Path, where: str) -> list[tuple[str, str, bool]]:
    inside = ["ip", "netns", "exec", NETWORK] if where == "network" and place.own_network else []
    other = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    intruder = [sys.executable, "-m", "simulations.faults.intruder", str(folder / "known.json"), where]
    done = subprocess.run(
        [*inside, *other, *intruder], cwd=folder, capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    if done.returncode:
        raise FaultError(f"the intruder could not try: {done.stderr[-500:]}")
    return [(what, said, holds) for what, said, holds in json.loads(done.stdout.splitlines()[-1])]


def _known(place: Place, authority: Path) -> dict[str, Any]:
    """What the intruder is given: ports, ids and public keys, which are no secrets, and an old signed header."""
    from flwr.common.constant import PUBLIC_KEY_HEADER, SIGNATURE_HEADER, TIMESTAMP_HEADER
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

    from client.connection import Connection

    with sqlite3.connect(f"{(place.server / 'state.db').as_uri()}?mode=ro", uri=True) as db:
        (run,) = db.execute("SELECT run_id FROM run ORDER BY rowid DESC LIMIT 1").fetchone()
        objects = [
            row[0] for row in db.execute("SELECT object_id FROM run_objects WHERE run_id = ? LIMIT 3", (run,))
        ]
    key = Connection.load(place.folder / VICTIM).private_key()
    public = public_key_to_bytes(key.public_key())
    stamp = (datetime.now(UTC) - timedelta(minutes=10)).isoformat()
    return {
        "host": place.host,
        **dict(zip(("fleet", "control", "metrics"), place.ports, strict=True)),
        "ca": str(authority),
        "server": str(place.server),
        "run": run % 2**64,
        "objects": objects or ["0" * 64],
        "bundle": bundle_hash(),
        "victim": _node_id(place, public),
        "victim_key": public.hex(),
        "stale": [
            [PUBLIC_KEY_HEADER, public.hex()],
            [TIMESTAMP_HEADER, stamp],
            [SIGNATURE_HEADER, sign_message(key, stamp.encode("ascii")).hex()],
        ],
    }


def _node_id(place: Place, public: bytes) -> int:
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        PublicFormat,
        load_pem_public_key,
    )

    from server.deployment import Deployment
    from server.nodes import known_nodes

    line = load_pem_public_key(public).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    return next(node.node_id for node in known_nodes(Deployment.load(place.server)) if node.key == line)
