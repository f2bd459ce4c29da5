"""What a server signs of a request: the one statement without which a site looks at nothing.

It names all that the request asks, by digests of the bytes as they travel, the one site that it is for, and until when.
How it travels is `wire.py`'s business; which key a site believes, `client/origin.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from common.phases import Phase
from common.privacy.canonical import decode, encode
from common.privacy.faults import BadFieldError, UnknownFormatError
from common.privacy.fields import (
    DIGEST,
    NAME,
    NONCE,
    OPTIONAL_DIGEST,
    Body,
    choice,
    count,
    exactly,
    stated,
)

FORMAT = "fedtide/request/1"
LONGEST_STATEMENT = 4096


@dataclass(frozen=True, slots=True)
class Statement(Body):
    """ "I ask the site with this key, until then, for this", signed by a server.

    Attributes:
        site: id of the site's ledger key.
        expires: whole seconds since 1970, after which the request is nothing.
        run, round, attempt, nonce, phase: what is asked, as in `wire.Request`.
        plan, anchor, broadcast: sha256 of the plan's text, of the anchor, and of the tensors' bytes, as they travel; no
            anchor before the first.
        model: the digest of all that is broadcast, which receipts repeat.
        released: sha256 of what was released before, alone.
    """

    kind: ClassVar[str] = "request"
    site: str = stated(DIGEST)
    expires: int = stated(count())
    run: str = stated(NAME)
    round: int = stated(count(1))
    attempt: int = stated(count(1))
    nonce: str = stated(NONCE)
    phase: str = stated(choice(*(each.value for each in Phase), fault=BadFieldError))
    plan: str = stated(DIGEST)
    anchor: str | None = stated(OPTIONAL_DIGEST)
    broadcast: str = stated(DIGEST)
    model: str = stated(DIGEST)
    released: str = stated(DIGEST)

    def to_bytes(self) -> bytes:
        """Canonical bytes: what is signed. The format keeps them apart from all else that the same key signs."""
        return encode({**self.to_fields(), "format": FORMAT}, longest=LONGEST_STATEMENT)

    @classmethod
    def from_bytes(cls, data: bytes) -> Statement:
        """The statement of canonical bytes; no signature is verified here.

        Raises:
            ReceiptError: its subclass names the fault.
        """
        names = {"format", *(each.name for each in fields(cls))}
        found = exactly(decode(data, longest=LONGEST_STATEMENT), names)
        if found.pop("format") != FORMAT:
            raise UnknownFormatError(f"this version understands {FORMAT} only")
        return cls.from_fields(found)


def is_signed(statement: bytes, signature: bytes, server_key: str) -> bool:
    """Whether a server's key, hex, signed these bytes."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(server_key)).verify(signature, statement)
    except (InvalidSignature, ValueError):
        return False
    return True
