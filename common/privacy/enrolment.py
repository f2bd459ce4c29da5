"""What a site hands to a server to be enrolled: its ledger's genesis, and so its public key
and its promise, and beside it the public key that its node shows to the server's network.

Nothing in it depends on a user, and it may be sent in the open; that it came from that site is what the
fingerprint is compared for, over another channel.
"""

from __future__ import annotations

import hashlib
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from common.privacy.canonical import decode, encode
from common.privacy.entries import LONGEST_ENTRY, Entry
from common.privacy.faults import MalformedEntryError, UnknownFormatError
from common.privacy.fields import exactly
from common.privacy.rules import check_genesis

FORMAT = "fedtide/enrolment/1"
FORMAT_WITH_NODE = "fedtide/enrolment/2"

_LONGEST_NODE_KEY = 512


def check_node_key(line: str) -> str:
    """The line, if it is an OpenSSH public key of an elliptic curve, without a comment.

    Raises:
        MalformedEntryError: it is something else.
    """
    parts = line.split(" ")
    try:
        if len(line) > _LONGEST_NODE_KEY or len(parts) != 2 or not line.isascii():
            raise ValueError("not two words")
        if not isinstance(load_ssh_public_key(line.encode("ascii")), EllipticCurvePublicKey):
            raise ValueError("another kind of key")
    except (ValueError, UnsupportedAlgorithm) as error:
        raise MalformedEntryError(
            "the node key must be an OpenSSH public key of an elliptic curve: ask for a new enrolment file"
        ) from error
    return line


def enrolment_to_bytes(genesis: Entry, node_key: str | None = None) -> bytes:
    """The enrolment file of a ledger, and of a node where there is one, canonical bytes."""
    check_genesis(genesis)
    if node_key is None:
        return encode({"format": FORMAT, "genesis": genesis.to_fields()})
    return encode(
        {"format": FORMAT_WITH_NODE, "genesis": genesis.to_fields(), "node_key": check_node_key(node_key)}
    )


def _fields(data: bytes) -> dict[str, Any]:
    found = decode(data.rstrip(b"\n"), longest=LONGEST_ENTRY + 128 + _LONGEST_NODE_KEY)
    named = isinstance(found, dict) and found.get("format") == FORMAT_WITH_NODE
    fields = exactly(found, {"format", "genesis"} | ({"node_key"} if named else set()))
    if fields["format"] not in (FORMAT, FORMAT_WITH_NODE):
        raise UnknownFormatError(f"this version understands {FORMAT} and {FORMAT_WITH_NODE} only")
    return dict(fields)


def enrolment_from_bytes(data: bytes) -> Entry:
    """The genesis in an enrolment file, verified.

    Raises:
        ReceiptError: its subclass names the fault.
    """
    genesis = Entry.from_fields(_fields(data)["genesis"])
    check_genesis(genesis)
    return genesis


def enrolment_node_key(data: bytes) -> str | None:
    """The node's public key in an enrolment file, one OpenSSH line without a comment; None where it names no node.

    Raises:
        ReceiptError: its subclass names the fault.
    """
    key = _fields(data).get("node_key")
    if key is None:
        return None
    if not isinstance(key, str):
        raise MalformedEntryError("the node key must be text")
    return check_node_key(key)


def fingerprint(key_id: str) -> str:
    """A key's id in groups of four, for two people to read to one another."""
    return " ".join(key_id[place : place + 4] for place in range(0, len(key_id), 4))


def node_fingerprint(node_key: str) -> str:
    """The sha256 of a node's public key in groups of four, for two people to read to one another."""
    return fingerprint(hashlib.sha256(node_key.encode("ascii")).hexdigest())
