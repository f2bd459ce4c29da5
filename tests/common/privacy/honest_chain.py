"""Honest chains to test with, and the tools to change one thing in them and sign everything anew."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.privacy.anchors import Countersignature
from common.privacy.entries import (
    NO_PREVIOUS,
    Anchor,
    AnyBody,
    Burnt,
    Entry,
    Genesis,
    Release,
    Reserve,
    key_id_of,
    public_key_of,
    signed_bytes,
)
from common.privacy.mechanisms import Event, GaussianSum, PoissonSubsampledGaussian
from common.privacy.renyi import cap_of, charge_at

SITE = Ed25519PrivateKey.from_private_bytes(b"s" * 32)
SERVER = Ed25519PrivateKey.from_private_bytes(b"v" * 32)
STRANGER = Ed25519PrivateKey.from_private_bytes(b"x" * 32)
PLAN, MODEL = "a" * 64, "b" * 64
UPDATE = b"\x00\x01update" * 100
TRAINING = PoissonSubsampledGaussian(0.05, 1.0, 10)
STATISTICS = GaussianSum(6.0)

Raw = dict[str, Any]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Writer:
    """Writes a chain as an honest site would; the ledger itself is tested elsewhere."""

    def __init__(self, key: Ed25519PrivateKey = SITE, epsilon: float = 8.0, delta: float = 1e-5) -> None:
        self.key, self.entries, self.spent = key, list[Entry](), 0
        self.genesis = Genesis(
            unit="user",
            adjacency="add_or_remove_one",
            mode="site",
            epsilon=epsilon,
            delta=delta,
            order=3,
            cap=cap_of(epsilon, delta, 3),
            public_key=public_key_of(key),
            dataset_commitment=None,
            day="2026-01-01",
        )
        self.add(self.genesis)

    def add(self, body: AnyBody) -> Entry:
        prev = self.entries[-1].hash if self.entries else NO_PREVIOUS
        self.entries.append(Entry.sign(self.key, seq=len(self.entries), prev=prev, body=body))
        return self.entries[-1]

    def reserve_body(
        self, run: str, round_: int, attempt: int = 0, *, event: Event = TRAINING, day: str = "2026-01-02"
    ) -> Reserve:
        charge = charge_at(event, self.genesis.order, self.genesis.cap)
        return Reserve(
            genesis=self.entries[0].hash,
            run=run,
            round=round_,
            attempt=attempt,
            event=event,
            charge=charge,
            spent=self.spent + charge,
            plan_hash=PLAN,
            model_hash=MODEL,
            nonce=digest(f"{run}/{round_}".encode()),
            clip_norm=1.0,
            normaliser=50.0,
            learning_rate=0.1 if isinstance(event, PoissonSubsampledGaussian) else None,
            day=day,
        )

    def reserve(self, run: str, round_: int, attempt: int = 0, **more: Any) -> Entry:
        body = self.reserve_body(run, round_, attempt, **more)
        self.spent = body.spent
        return self.add(body)

    def release(self, reservation: Entry, update: bytes = UPDATE, content: str = "update") -> Entry:
        return self.add(Release(reservation.hash, content, digest(update), len(update)))

    def anchor(self, seq: int) -> Entry:
        return self.add(Anchor.of(self.countersigned(seq)))

    def countersigned(self, seq: int, server: Ed25519PrivateKey = SERVER) -> Countersignature:
        key_id = key_id_of(self.genesis.public_key)
        return Countersignature.sign(server, site_key_id=key_id, seq=seq, head=self.entries[seq].hash)


def honest() -> Writer:
    """Twelve entries: 0 genesis, 1-2 update, 3 anchor, 4-5 statistics, 6-7 burnt, 8-9, 10-11 updates."""
    site = Writer()
    site.release(site.reserve("run-a", 1))
    site.anchor(2)
    site.release(site.reserve("run-b", 0, event=STATISTICS), content="statistics")
    site.add(Burnt(site.reserve("run-a", 2).hash))
    site.release(site.reserve("run-a", 2, 1))
    site.release(site.reserve("run-a", 3, day="2026-01-03"))
    return site


def raw(entries: list[Entry]) -> list[Raw]:
    """Entries as plain dictionaries, to be tampered with."""
    return [json.loads(entry.to_bytes()) for entry in entries]


def sign(statement: Raw, key: Ed25519PrivateKey = SITE) -> Raw:
    unsigned = {name: value for name, value in statement.items() if name != "signature"}
    return {**unsigned, "signature": key.sign(signed_bytes(unsigned)).hex()}


def hash_of(statement: Raw) -> str:
    return digest(json.dumps(statement, sort_keys=True, separators=(",", ":")).encode())


def resigned(statements: list[Raw], before: list[Raw]) -> list[Raw]:
    """Every entry signed anew by the site, with `prev` and references to changed entries repaired.

    `before` holds the same entries as they were; references to their hashes become references to the new.
    """
    new_hash: dict[str, str] = {}
    previous, found = NO_PREVIOUS, list[Raw]()
    for statement, old in zip(statements, before, strict=True):
        entry = copy.deepcopy(statement)
        for name in ("genesis", "reservation"):
            if name in entry["body"]:
                entry["body"][name] = new_hash.get(entry["body"][name], entry["body"][name])
        entry["prev"] = previous
        entry = sign(entry)
        new_hash[hash_of(old)] = previous = hash_of(entry)
        found.append(entry)
    return found


def read(statements: list[Raw]) -> list[Entry]:
    """Through the bytes, as a receiver would."""
    return [
        Entry.from_bytes(json.dumps(each, sort_keys=True, separators=(",", ":")).encode())
        for each in statements
    ]
