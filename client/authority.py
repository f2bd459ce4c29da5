"""The authorities in a site's ca.crt: until when they are valid, and which date of a server's certificate is wrong.

The connection itself is checked by OpenSSL (`probe.py`); what OpenSSL does not tell apart is told here.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from client.connection import AUTHORITY, ConnectionSetupError

SOON = timedelta(days=30)
"""An end that is nearer is warned of."""
NEW_AUTHORITY = (
    "ask the server's owner for its new invitation.json, which `fedtide server renew --authority` there makes"
)


def authority_end(file: Path) -> datetime:
    """Until when a ca.crt is valid: the latest end of its certificates.

    Raises:
        ConnectionSetupError: it holds none.
    """
    return max(each.not_valid_after_utc for each in _authorities(file))


def authority_warning(folder: Path) -> str:
    """What is to be said of a site's ca.crt, with the way out; empty where it is valid for long, or there is none."""
    file = folder / AUTHORITY
    if not file.is_file():
        return ""
    try:
        end = authority_end(file)
    except ConnectionSetupError as error:
        return str(error)
    left = end - datetime.now(UTC)
    if left >= SOON:
        return ""
    if left < timedelta():
        return f"the server's authority in ca.crt expired on {end:%Y-%m-%d}, so no server is trusted: {NEW_AUTHORITY}"
    return (
        f"the server's authority in ca.crt ends on {end:%Y-%m-%d}, in {left.days} days, and no server is trusted then: "
        f"{NEW_AUTHORITY}"
    )


def dated_fault(shown: bytes, file: Path, now: datetime) -> str:
    """Which of a server's certificate (DER) and the authority that signed it is not valid now, with the way out."""
    certificate, known = x509.load_der_x509_certificate(shown), _authorities(file)
    issuer = _issuer(certificate, known)
    if issuer is None or _is_valid(issuer, now):
        if certificate.not_valid_before_utc > now:
            return (
                f"the server's certificate is not valid before {certificate.not_valid_before_utc:%Y-%m-%d}: check this "
                "machine's clock, and the server's when it made the certificate"
            )
        return (
            f"the server's certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d}: the server's owner runs "
            "`fedtide server renew`"
        )
    if issuer.not_valid_before_utc > now:
        begins = f"{issuer.not_valid_before_utc:%Y-%m-%d}"
        return f"the authority in ca.crt is not valid before {begins}: check this machine's clock"
    expired = (
        f"the authority that signed the server's certificate expired on {issuer.not_valid_after_utc:%Y-%m-%d}"
    )
    if any(_is_valid(each, now) for each in known):
        return f"{expired}, and ca.crt holds the next one: the server's owner runs `fedtide server renew --switch`"
    return f"{expired}: {NEW_AUTHORITY}"


def _is_valid(certificate: x509.Certificate, now: datetime) -> bool:
    return certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc


def _issuer(certificate: x509.Certificate, known: Sequence[x509.Certificate]) -> x509.Certificate | None:
    for each in known:
        try:
            certificate.verify_directly_issued_by(each)
        except (ValueError, TypeError, InvalidSignature):
            continue
        return each
    return None


def _authorities(file: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConnectionSetupError(
            f"{file} holds no certificate that can be read: restore it from the backup of the site"
        ) from error
