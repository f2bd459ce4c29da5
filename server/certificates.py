"""A certificate authority of the server's own, and the certificate that sites check it by: made, checked, watched.

tls/ca.crt holds the authorities that sites trust: one, or two while sites are given a new one (`renewal.py`).
"""

from __future__ import annotations

import datetime
import ipaddress
import logging
import ssl
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from server.deployment import Deployment, DeploymentError

_log = logging.getLogger("fedtide.server")

AUTHORITY_DAYS, SERVER_DAYS = 3650, 825
SOON = datetime.timedelta(days=30)
"""An end that is nearer is warned of."""


def new_authority(*, days: int = AUTHORITY_DAYS) -> tuple[bytes, bytes]:
    """A new authority's certificate and key, PEM."""
    key = ec.generate_private_key(ec.SECP384R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    # A name of its own: sites hold two authorities for a while, and look an issuer up by its name.
    called = f"Fedtide server authority {identifier.digest.hex()[:8]}"
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, called)])
    usage = _usage(key_cert_sign=True, crl_sign=True)
    certificate = (
        _begun(name, name, key, _in_days(days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA384())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), _private(key)


def new_server_certificate(
    authority: bytes, authority_key: bytes, host: str, *, days: int = SERVER_DAYS, names: Iterable[str] = ()
) -> tuple[bytes, bytes]:
    """A server's certificate and key, PEM, signed by an authority; for the host, and for this machine itself.

    Args:
        days: how long it is valid, but never longer than its authority; negative for one that has expired.
        names: other names and addresses that it is for.
    """
    issuer = x509.load_pem_x509_certificate(authority)
    issuer_key = serialization.load_pem_private_key(authority_key, password=None)
    if not isinstance(issuer_key, ec.EllipticCurvePrivateKey):
        raise DeploymentError("the authority's key is none of ours: restore tls/ca.key from a backup")
    key = ec.generate_private_key(ec.SECP256R1())
    # SuperExec, on this machine, checks the same certificate.
    wanted = dict.fromkeys([host, "localhost", "127.0.0.1", *names])
    end = min(_in_days(days), issuer.not_valid_after_utc)
    certificate = (
        _begun(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])]), issuer.subject, key, end)
        .add_extension(x509.SubjectAlternativeName(map(_general_name, wanted)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        )
        .sign(issuer_key, hashes.SHA384())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), _private(key)


def authorities(path: Path) -> list[x509.Certificate]:
    """The certificates in tls/ca.crt.

    Raises:
        DeploymentError: it holds none that can be read.
    """
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DeploymentError(
            f"{path} holds no certificate that can be read: restore it from a backup"
        ) from error


def loaded(path: Path) -> x509.Certificate:
    """The first certificate of a file.

    Raises:
        DeploymentError: it holds none that can be read.
    """
    return authorities(path)[0]


def issuer_among(certificate: x509.Certificate, known: Sequence[x509.Certificate]) -> x509.Certificate | None:
    """The authority that signed a certificate, if it is known."""
    for each in known:
        try:
            certificate.verify_directly_issued_by(each)
        except (ValueError, TypeError, InvalidSignature):
            continue
        return each
    return None


def names_of(certificate: x509.Certificate) -> list[str]:
    """The names and addresses that a certificate is for."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = [str(each) for each in names.get_values_for_type(x509.IPAddress)]
    return [*names.get_values_for_type(x509.DNSName), *addresses]


def is_valid_now(certificate: x509.Certificate) -> bool:
    """Whether today is between a certificate's dates."""
    return certificate.not_valid_before_utc <= _now() <= certificate.not_valid_after_utc


def check_certificates(server: Deployment) -> list[str]:
    """Checks what the server will show: dates, authority, names, key.

    Returns:
        What is to be said although the server may start: an end that is near.

    Raises:
        DeploymentError: something is wrong; the message says what, and the way out.
    """
    renew = _renews(server)
    known, own = authorities(server.authority), loaded(server.certificate)
    issuer = issuer_among(own, known)
    if issuer is None:
        raise DeploymentError(f"{server.certificate} was not signed by {server.authority.name}: {renew}")
    if not is_valid_now(issuer):
        raise DeploymentError(
            f"the authority in {server.authority} that signed the server's certificate {_dates(issuer)}: check the "
            f"clock; {_another_authority(server, known, issuer)}"
        )
    if not is_valid_now(own):
        raise DeploymentError(f"{server.certificate} {_dates(own)}: check the clock; {renew}")
    for wanted in (server.host, "127.0.0.1"):
        if _general_name(wanted) not in map(_general_name, names_of(own)):
            raise DeploymentError(f"{server.certificate} is not for {wanted}, the server's host: {renew}")
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(server.certificate, server.key)
    except (ssl.SSLError, OSError) as error:
        raise DeploymentError(f"{server.key} is not the key of {server.certificate.name}: {renew}") from error
    return _near(server, known, issuer, own)


@dataclass(frozen=True)
class Ends:
    """Until when a server's certificates are valid.

    Attributes:
        server: its own; None where it cannot be read.
        authority: of the one that signed it; None where that is not known.
        warnings: what is wrong with them, or ends soon, with the way out.
    """

    server: datetime.datetime | None
    authority: datetime.datetime | None
    warnings: list[str]


def certificate_ends(server: Deployment) -> Ends:
    """What there is to say of a server's certificates; raises nothing."""
    end = authority_end = None
    try:
        known, own = authorities(server.authority), loaded(server.certificate)
        end, issuer = own.not_valid_after_utc, issuer_among(own, known)
        authority_end = None if issuer is None else issuer.not_valid_after_utc
        return Ends(end, authority_end, check_certificates(server))
    except DeploymentError as error:
        return Ends(end, authority_end, [str(error)])


def warn_of_ends(server: Deployment) -> None:
    """Says in the log what is wrong with a server's certificates or ends soon."""
    for warning in certificate_ends(server).warnings:
        _log.warning("%s", warning)


def _near(
    server: Deployment, known: Sequence[x509.Certificate], issuer: x509.Certificate, own: x509.Certificate
) -> list[str]:
    """What ends soon; a new certificate does not help where it is the authority that ends."""
    end = issuer.not_valid_after_utc
    if end - _now() < SOON:
        return [
            f"the authority in {server.authority} ends {_left(end)}, and no site is let in after that: "
            f"{_another_authority(server, known, issuer)}"
        ]
    end = own.not_valid_after_utc
    return [f"the server's certificate ends {_left(end)}: {_renews(server)}"] if end - _now() < SOON else []


def _renews(server: Deployment) -> str:
    return f"`fedtide server renew {server.folder}` makes a new one, under the authority that sites know"


def _another_authority(
    server: Deployment, known: Sequence[x509.Certificate], issuer: x509.Certificate
) -> str:
    if any(is_valid_now(each) and each.not_valid_after_utc > issuer.not_valid_after_utc for each in known):
        return (
            f"the new one is made: give every site the new {server.authority.name}, then "
            f"`fedtide server renew {server.folder} --switch`"
        )
    return f"`fedtide server renew {server.folder} --authority` makes a new one, for every site to be given"


def _dates(certificate: x509.Certificate) -> str:
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    word = "expired: it was" if ends < _now() else "is"
    return f"{word} valid from {begins:%Y-%m-%d} to {ends:%Y-%m-%d}, and today is {_now():%Y-%m-%d}"


def _left(end: datetime.datetime) -> str:
    return f"on {end:%Y-%m-%d}, in {(end - _now()).days} days"


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _in_days(days: int) -> datetime.datetime:
    return _now() + datetime.timedelta(days=days)


def fingerprint(certificate: bytes) -> str:
    """SHA-256 over the first certificate of a PEM file, in pairs, as `openssl x509 -fingerprint -sha256` shows it."""
    return fingerprint_of(x509.load_pem_x509_certificate(certificate))


def fingerprint_of(certificate: x509.Certificate) -> str:
    """The same of a certificate."""
    return certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _begun(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, end: datetime.datetime
) -> x509.CertificateBuilder:
    # An hour back, as clocks of sites differ; one that has expired was valid for a day.
    begins = min(_now() - datetime.timedelta(hours=1), end - datetime.timedelta(days=1))
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(end)
    )


def _usage(**given: bool) -> x509.KeyUsage:
    names = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{name: given.get(name, False) for name in names})


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
