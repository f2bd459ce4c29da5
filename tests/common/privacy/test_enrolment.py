"""The enrolment file: its genesis verified, its node key of the right kind, and nothing else in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from client.ledger import Ledger
from common.privacy.enrolment import (
    FORMAT,
    FORMAT_WITH_NODE,
    enrolment_from_bytes,
    enrolment_node_key,
    enrolment_to_bytes,
    node_fingerprint,
)
from common.privacy.entries import Entry
from common.privacy.faults import ReceiptError
from common.privacy.mechanisms import GaussianSum


def openssh(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


@pytest.fixture
def genesis(tmp_path: Path) -> Entry:
    with Ledger.create(
        tmp_path / "ledger", epsilon=8.0, delta=1e-5, typical_plan=[GaussianSum(3.0)]
    ) as ledger:
        return ledger.entries()[0]


def test_both_formats_come_back_as_they_were(genesis: Entry) -> None:
    key = openssh(ec.generate_private_key(ec.SECP384R1()))
    plain, whole = enrolment_to_bytes(genesis), enrolment_to_bytes(genesis, key)
    assert json.loads(plain)["format"] == FORMAT
    assert json.loads(whole)["format"] == FORMAT_WITH_NODE
    assert enrolment_from_bytes(plain) == enrolment_from_bytes(whole + b"\n") == genesis
    assert enrolment_node_key(plain) is None
    assert enrolment_node_key(whole + b"\n") == key
    assert node_fingerprint(key) != node_fingerprint(openssh(ec.generate_private_key(ec.SECP384R1())))


@pytest.mark.parametrize(
    "key",
    [
        openssh(ed25519.Ed25519PrivateKey.generate()),
        openssh(ec.generate_private_key(ec.SECP256R1())) + " a comment",
        "ecdsa-sha2-nistp384 AAAA",
        "no key",
        "",
    ],
    ids=["ed25519", "commented", "cut", "words", "empty"],
)
def test_another_kind_of_node_key_is_refused_on_both_sides(genesis: Entry, key: str) -> None:
    with pytest.raises(ReceiptError, match="node key"):
        enrolment_to_bytes(genesis, key)
    forged = json.loads(enrolment_to_bytes(genesis, openssh(ec.generate_private_key(ec.SECP384R1()))))
    forged["node_key"] = key
    data = json.dumps(forged, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(ReceiptError, match="node key"):
        enrolment_node_key(data)


def test_a_node_key_under_the_first_format_is_refused(genesis: Entry) -> None:
    forged = json.loads(enrolment_to_bytes(genesis, openssh(ec.generate_private_key(ec.SECP384R1()))))
    forged["format"] = FORMAT
    data = json.dumps(forged, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(ReceiptError):
        enrolment_from_bytes(data)
