"""A server's countersignature over the head of a site's chain: what makes rewriting history detectable.

Without it a site could drop the tail of its own ledger, or sign another past. Who keeps the anchored heads,
and which servers' keys are trusted, is not decided here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.privacy.canonical import Value, decode, encode
from common.privacy.faults import BadAnchorError, UnknownFormatError
from common.privacy.fields import DIGEST, SIGNATURE, count, exactly

FORMAT = "fedtide/anchor/1"
_FIELDS = {"format", "head", "seq", "server_key", "signature", "site_key_id"}


@dataclass(frozen=True, slots=True)
class Countersignature:
    """ "I have seen entry `seq` of this site's chain, and its hash was `head`", signed by a server.

    Attributes:
        site_key_id: id of the chain's key.
        seq, head: the entry countersigned, and its hash.
        server_key: the server's Ed25519 public key, in hex.
        signature: the server's, in hex.
    """

    site_key_id: str
    seq: int
    head: str
    server_key: str
    signature: str

    @property
    def server_key_id(self) -> str:
        """SHA-256 of the server's public key, in hex."""
        return hashlib.sha256(bytes.fromhex(self.server_key)).hexdigest()

    def _statement(self) -> dict[str, Value]:
        return {
            "format": FORMAT,
            "head": self.head,
            "seq": str(self.seq),
            "server_key": self.server_key,
            "site_key_id": self.site_key_id,
        }

    @classmethod
    def sign(
        cls, private_key: Ed25519PrivateKey, *, site_key_id: str, seq: int, head: str
    ) -> Countersignature:
        """A server's countersignature over a head that it has verified."""
        server_key = private_key.public_key().public_bytes_raw().hex()
        unsigned = cls(site_key_id, seq, head, server_key, "")
        return cls(site_key_id, seq, head, server_key, private_key.sign(encode(unsigned._statement())).hex())

    def check(self) -> None:
        """Verify the signature against the server key that it names.

        Raises:
            BadAnchorError: it does not verify.
        """
        try:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.server_key))
            key.verify(bytes.fromhex(self.signature), encode(self._statement()))
        except (InvalidSignature, ValueError) as error:
            raise BadAnchorError(f"the countersignature over head {self.seq} does not verify") from error

    def to_bytes(self) -> bytes:
        """Canonical bytes."""
        return encode({**self._statement(), "signature": self.signature})

    @classmethod
    def from_bytes(cls, data: bytes) -> Countersignature:
        """The countersignature of canonical bytes; its signature is not verified here.

        Raises:
            ReceiptError: its subclass names the fault.
        """
        found = exactly(decode(data, longest=4096), _FIELDS)
        if found["format"] != FORMAT:
            raise UnknownFormatError(f"this version understands {FORMAT} only")
        return cls(
            site_key_id=DIGEST.read(found["site_key_id"]),
            seq=count().read(found["seq"]),
            head=DIGEST.read(found["head"]),
            server_key=DIGEST.read(found["server_key"]),
            signature=SIGNATURE.read(found["signature"]),
        )
