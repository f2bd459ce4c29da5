"""What a server hands to a site so that the site can find it and believe it: address, authority, signing key.

Nothing in it is secret. That it came from that server is what its fingerprint is compared for, over another channel:
whoever's signing key stands in it can spend what the site's policy allows.
"""

from __future__ import annotations

import base64
import hashlib
import re
import ssl
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from common.privacy.canonical import decode, encode
from common.privacy.faults import BadFieldError, UnknownFormatError
from common.privacy.fields import DIGEST, count, exactly

FORMAT = "fedtide/invitation/1"
LONGEST_INVITATION = 1 << 16

_PORT = count(1, 65535)
_HOST = re.compile(r"[A-Za-z0-9.:-]{1,253}")


@dataclass(frozen=True)
class Invitation:
    """A server's word of where it is and how it is known.

    Attributes:
        host, port: of its Fleet API.
        authority: the certificates, PEM, that its own must come from: one, or two while it changes them.
        signing_key: Ed25519, public, hex: what requests are signed with.
    """

    host: str
    port: int
    authority: bytes
    signing_key: str

    def to_bytes(self) -> bytes:
        """Canonical bytes.

        Raises:
            ValueError: what stands in it is out of bounds.
        """
        found = x509.load_pem_x509_certificates(self.authority)
        data = encode(
            {
                "authority": [base64.b64encode(each.public_bytes(Encoding.DER)).decode() for each in found],
                "format": FORMAT,
                "host": self.host,
                "port": _PORT.write(self.port),
                "signing_key": self.signing_key,
            },
            longest=LONGEST_INVITATION,
        )
        Invitation.from_bytes(data)
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> Invitation:
        """The invitation in a file.

        Raises:
            ReceiptError: its subclass names the fault.
        """
        value = decode(data.rstrip(b"\n"), longest=LONGEST_INVITATION)
        fields = exactly(value, {"authority", "format", "host", "port", "signing_key"})
        if fields["format"] != FORMAT:
            raise UnknownFormatError(f"this version understands {FORMAT} only")
        host, authority = fields["host"], fields["authority"]
        if not isinstance(host, str) or not _HOST.fullmatch(host):
            raise BadFieldError("the host must be a name or an address")
        if not isinstance(authority, list) or not authority:
            raise BadFieldError("the authority must be a list of certificates")
        try:
            certificates = [_certificate(each) for each in authority]
            pem = b"".join(each.public_bytes(Encoding.PEM) for each in certificates)
            ssl.create_default_context(cadata=pem.decode("ascii"))
        except (ValueError, ssl.SSLError) as error:
            raise BadFieldError("the authority holds something else than certificates") from error
        return cls(host, _PORT.read(fields["port"]), pem, DIGEST.read(fields["signing_key"]))

    @property
    def digest(self) -> str:
        """SHA-256, hex, of its canonical bytes: its fingerprint, for two people to read to one another."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def _certificate(text: object) -> x509.Certificate:
    if not isinstance(text, str):
        raise ValueError("a certificate must be text")
    return x509.load_der_x509_certificate(base64.b64decode(text, validate=True))
