"""What the tests of the ledger share: an event, servers, a fresh ledger, and how it is asked and anchored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.ledger import Ledger
from client.ledger_reading import Reservation
from common.privacy.anchors import Countersignature
from common.privacy.mechanisms import Event, PoissonSubsampledGaussian

TRAINING = PoissonSubsampledGaussian(0.05, 1.0, 10)
PLAN, MODEL = "a" * 64, "b" * 64
SERVER = Ed25519PrivateKey.from_private_bytes(b"v" * 32)
OTHER_SERVER = Ed25519PrivateKey.from_private_bytes(b"w" * 32)


def nonce_of(run: str, round_: int) -> str:
    return hashlib.sha256(f"{run}/{round_}".encode()).hexdigest()


def reserve(
    ledger: Ledger, round_: int, attempt: int = 0, *, run: str = "run-a", event: Event = TRAINING
) -> Reservation:
    return ledger.reserve(
        run=run,
        round=round_,
        attempt=attempt,
        event=event,
        plan_hash=PLAN,
        model_hash=MODEL,
        nonce=nonce_of(run, round_),
        clip_norm=1.0,
        normaliser=50.0,
        learning_rate=0.1,
    )


def anchor(ledger: Ledger, server: Ed25519PrivateKey = SERVER) -> Countersignature:
    """What a server would send after having verified the head."""
    status = ledger.status()
    return Countersignature.sign(server, site_key_id=ledger.key_id, seq=status.seq, head=status.head)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "site" / "ledger"


@pytest.fixture
def ledger(folder: Path) -> Iterator[Ledger]:
    with Ledger.create(folder, epsilon=8, delta=1e-5, typical_plan=[TRAINING]) as made:
        yield made
