"""What a ledger says: the kinds of its entries, and the signed entry that carries one.

Here an entry is looked at alone: its form, its bounds, its signature. Whether a sequence of them is a ledger
is `chain.py`'s question; where they are stored is `client/ledger.py`'s. Nothing in an entry depends on a
user's data. Time is told by the day (UTC), at reservations only, so that no entry tells how long a training
took.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.privacy.anchors import Countersignature
from common.privacy.canonical import Value, decode, encode
from common.privacy.faults import (
    BadFieldError,
    BadSignatureError,
    MalformedEntryError,
    UnknownFormatError,
    UnknownKindError,
    WrongAdjacencyError,
    WrongContentError,
    WrongUnitError,
)
from common.privacy.fields import (
    DAY,
    DIGEST,
    EVENT,
    NAME,
    NONCE,
    OPTIONAL_DIGEST,
    OPTIONAL_POSITIVE,
    POSITIVE,
    SIGNATURE,
    Body,
    choice,
    count,
    exactly,
    number,
    stated,
)
from common.privacy.mechanisms import Event

FORMAT = "fedtide/entry/1"
LONGEST_ENTRY = 16_384
NO_PREVIOUS = "0" * 64
_FIELDS = {"body", "format", "key_id", "kind", "prev", "seq", "signature"}


@dataclass(frozen=True, slots=True)
class Genesis(Body):
    """The beginning: what this ledger promises, to whom, and the only cap it will ever have.

    Attributes:
        unit, adjacency: "user" and "add_or_remove_one"; others are refused.
        mode: trust mode, "site" (the site adds the noise alone) or "secagg".
        epsilon, delta: the guarantee, whatever happens next.
        order: the filter's integer Renyi order.
        cap: nano-units of Renyi divergence at that order, as `renyi.cap_of` gives.
        public_key: the ledger's Ed25519 key, 32 bytes in hex.
        dataset_commitment: a salted commitment, opened on the site only, or None.
        day: UTC.
    """

    kind: ClassVar[str] = "genesis"
    unit: str = stated(choice("user", fault=WrongUnitError))
    adjacency: str = stated(choice("add_or_remove_one", fault=WrongAdjacencyError))
    mode: str = stated(choice("site", "secagg", fault=BadFieldError))
    epsilon: float = stated(number(above=0, at_most=1000))
    delta: float = stated(number(above=0, at_most=0.01))
    order: int = stated(count(2, 256))
    cap: int = stated(count(1))
    public_key: str = stated(DIGEST)
    dataset_commitment: str | None = stated(OPTIONAL_DIGEST)
    day: str = stated(DAY)


@dataclass(frozen=True, slots=True)
class Reserve(Body):
    """A charge, made before the data is touched, and what it is for.

    Attributes:
        genesis: hash of the ledger's genesis, so that a receipt read alone names its unit, order and cap.
        run, round, attempt: unique together in a ledger.
        event: what will be released; an upper bound in its steps.
        charge: nano-units, as `renyi.charge_at` gives for the event and the genesis' order and cap.
        spent: nano-units charged so far, this charge included.
        plan_hash, model_hash: SHA-256 of the run's plan and of the parameters that the site received.
        nonce: the server's, which ties the release to one request (hex, 16 to 64 bytes).
        clip_norm: C; for a Gaussian sum, the norm that each user's contribution is scaled to.
        normaliser: the public constant that a noisy sum is divided by.
        learning_rate: of the site's local steps, where they are plain SGD; with the fields above it gives
            the standard deviation of the noise in the released vector. None where that does not apply.
        day: UTC.
    """

    kind: ClassVar[str] = "reserve"
    genesis: str = stated(DIGEST)
    run: str = stated(NAME)
    round: int = stated(count())
    attempt: int = stated(count())
    event: Event = stated(EVENT)  # noqa: RUF009 (a field, as the others)
    charge: int = stated(count())
    spent: int = stated(count())
    plan_hash: str = stated(DIGEST)
    model_hash: str = stated(DIGEST)
    nonce: str = stated(NONCE)
    clip_norm: float = stated(POSITIVE)
    normaliser: float = stated(POSITIVE)
    learning_rate: float | None = stated(OPTIONAL_POSITIVE)
    day: str = stated(DAY)


@dataclass(frozen=True, slots=True)
class Release(Body):
    """The receipt's heart: these bytes were released on that reservation.

    Attributes:
        reservation: hash of the RESERVE entry.
        content: "update" (DP-SGD), "statistics" or "metrics" (Gaussian sums).
        update_digest: SHA-256 of the released bytes.
        update_bytes: how many they are.
    """

    kind: ClassVar[str] = "release"
    reservation: str = stated(DIGEST)
    content: str = stated(choice("update", "statistics", "metrics", fault=WrongContentError))
    update_digest: str = stated(DIGEST)
    update_bytes: int = stated(count())


@dataclass(frozen=True, slots=True)
class Burnt(Body):
    """A reservation that will never be released; its charge stands. No reason: reasons depend on data."""

    kind: ClassVar[str] = "burnt"
    reservation: str = stated(DIGEST)


@dataclass(frozen=True, slots=True)
class Anchor(Body):
    """A server's countersignature over an earlier head of this chain (see `anchors.Countersignature`)."""

    kind: ClassVar[str] = "anchor"
    seq: int = stated(count())
    head: str = stated(DIGEST)
    server_key: str = stated(DIGEST)
    countersignature: str = stated(SIGNATURE)

    @classmethod
    def of(cls, countersignature: Countersignature) -> Anchor:
        """The entry that keeps a countersignature."""
        return cls(
            seq=countersignature.seq,
            head=countersignature.head,
            server_key=countersignature.server_key,
            countersignature=countersignature.signature,
        )

    def over(self, site_key_id: str) -> Countersignature:
        """The countersignature that this entry keeps, for the chain of that key."""
        return Countersignature(site_key_id, self.seq, self.head, self.server_key, self.countersignature)


@dataclass(frozen=True, slots=True)
class Close(Body):
    """The site withdraws: nothing may be reserved or released any more. `spent` is the final total."""

    kind: ClassVar[str] = "close"
    spent: int = stated(count())
    day: str = stated(DAY)


AnyBody = Genesis | Reserve | Release | Burnt | Anchor | Close
_KINDS: dict[str, type[AnyBody]] = {
    body.kind: body for body in (Genesis, Reserve, Release, Burnt, Anchor, Close)
}


def key_id_of(public_key: str) -> str:
    """A key's id: SHA-256, in hex, of the 32 bytes of an Ed25519 public key given in hex."""
    return hashlib.sha256(bytes.fromhex(public_key)).hexdigest()


def public_key_of(private_key: Ed25519PrivateKey) -> str:
    """The public half of a key, 32 bytes in hex."""
    return private_key.public_key().public_bytes_raw().hex()


def signed_bytes(statement: dict[str, Value]) -> bytes:
    """What is signed: the statement's canonical form (its `format` keeps kinds of statements apart)."""
    return encode(statement, longest=LONGEST_ENTRY)


@dataclass(frozen=True)
class Entry:
    """One signed entry. `prev` is the hash of the entry before it, `NO_PREVIOUS` for the genesis."""

    seq: int
    prev: str
    key_id: str
    body: AnyBody
    signature: str

    @classmethod
    def sign(cls, private_key: Ed25519PrivateKey, *, seq: int, prev: str, body: AnyBody) -> Entry:
        """The entry, signed."""
        unsigned = cls(seq, prev, key_id_of(public_key_of(private_key)), body, "")
        signature = private_key.sign(signed_bytes(unsigned._statement())).hex()
        return cls(seq, prev, unsigned.key_id, body, signature)

    @property
    def kind(self) -> str:
        """The kind of its body."""
        return self.body.kind

    @cached_property
    def hash(self) -> str:
        """SHA-256, in hex, of the signed entry's canonical bytes: what the next entry's `prev` repeats."""
        return hashlib.sha256(self._bytes).hexdigest()

    @cached_property
    def _bytes(self) -> bytes:
        return encode(self.to_fields(), longest=LONGEST_ENTRY)

    def _statement(self) -> dict[str, Value]:
        return {
            "body": self.body.to_fields(),
            "format": FORMAT,
            "key_id": self.key_id,
            "kind": self.kind,
            "prev": self.prev,
            "seq": str(self.seq),
        }

    def check_signature(self, public_key: str) -> None:
        """Verify the signature against a public key (hex).

        Raises:
            BadSignatureError: it is not that key's over this entry.
        """
        try:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
            key.verify(bytes.fromhex(self.signature), signed_bytes(self._statement()))
        except (InvalidSignature, ValueError) as error:
            raise BadSignatureError(f"entry {self.seq} is not signed by the key it names") from error

    def to_fields(self) -> dict[str, Value]:
        """The signed entry as strings and objects, for canonical JSON."""
        return {**self._statement(), "signature": self.signature}

    def to_bytes(self) -> bytes:
        """The signed entry's canonical bytes."""
        return self._bytes

    @classmethod
    def from_fields(cls, value: Value) -> Entry:
        """The entry that `to_fields` wrote. Its signature is not verified here.

        Raises:
            ReceiptError: its subclass names the fault.
        """
        if isinstance(value, dict) and value.get("format", FORMAT) != FORMAT:
            raise UnknownFormatError(f"this version understands {FORMAT} only")
        found = exactly(value, _FIELDS)
        kind = found["kind"]
        if not isinstance(kind, str):
            raise MalformedEntryError("kind must be a string")
        if kind not in _KINDS:
            raise UnknownKindError(f"kind {kind[:40]!r} is unknown; known are {', '.join(sorted(_KINDS))}")
        return cls(
            seq=count().read(found["seq"]),
            prev=DIGEST.read(found["prev"]),
            key_id=DIGEST.read(found["key_id"]),
            body=_KINDS[kind].from_fields(found["body"]),
            signature=SIGNATURE.read(found["signature"]),
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Entry:
        """The entry of canonical bytes. Its signature is not verified here.

        Raises:
            ReceiptError: its subclass names the fault.
        """
        return _entry(data)


@lru_cache(maxsize=1024)
def _entry(data: bytes) -> Entry:
    """Entries cannot be changed, so one that was read may be given out again: a ledger looks at its last often."""
    return Entry.from_fields(decode(data, longest=LONGEST_ENTRY))
