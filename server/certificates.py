"""A certificate authority of the server's own, and the certificate that sites check it by."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from server.deployment import DeploymentError

AUTHORITY_DAYS, SERVER_DAYS = 3650, 825
_WARN_DAYS = 30

_RENEW = "`fedtide server renew DIR` makes a new one, under the authority that sites know"


def new_authority() -> tuple[bytes, bytes]:
    """A new authority's certificate and key, PEM."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Fedtide server authority")])
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    usage = _usage(key_cert_sign=True, crl_sign=True)
    certificate = (
        _begun(name, name, key, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA384())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), _private(key)


def new_server_certificate(
    authority: bytes, authority_key: bytes, host: str, *, days: int = SERVER_DAYS
) -> tuple[bytes, bytes]:
    """A server's certificate and key, PEM, signed by an authority; for the host, and for this machine itself.

    Args:
        days: how long it is valid; negative for one that has expired.
    """
    issuer = x509.load_pem_x509_certificate(authority)
    issuer_key = serialization.load_pem_private_key(authority_key, password=None)
    if not isinstance(issuer_key, ec.EllipticCurvePrivateKey):
        raise DeploymentError("the authority's key is none of ours: restore tls/ca.key from a backup")
    key = ec.generate_private_key(ec.SECP256R1())
    # SuperExec, on this machine, checks the same certificate.
    names = {host: _general_name(host), "localhost": x509.DNSName("localhost")}
    names["127.0.0.1"] = _general_name("127.0.0.1")
    certificate = (
        _begun(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])]), issuer.subject, key, days)
        .add_extension(x509.SubjectAlternativeName(names.values()), critical=False)
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


def check_certificates(authority: Path, certificate: Path, key: Path, host: str) -> list[str]:
    """Checks what the server will show: dates, authority, names, key.

    Returns:
        What is to be said although the server may start: an end that is near.

    Raises:
        DeploymentError: something is wrong; the message says what, and the way out.
    """
    now = datetime.datetime.now(datetime.UTC)
    issuer, own = _loaded(authority), _loaded(certificate)
    for path, each in ((authority, issuer), (certificate, own)):
        if not each.not_valid_before_utc <= now <= each.not_valid_after_utc:
            raise DeploymentError(
                f"{path} is valid from {each.not_valid_before_utc:%Y-%m-%d} to "
                f"{each.not_valid_after_utc:%Y-%m-%d}, and today is {now:%Y-%m-%d}: check the clock; {_RENEW}"
            )
    try:
        own.verify_directly_issued_by(issuer)
    except Exception as error:  # cryptography's own faults are of several kinds
        raise DeploymentError(f"{certificate} was not signed by {authority.name}: {_RENEW}") from error
    names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    for wanted in (host, "127.0.0.1"):
        if _general_name(wanted) not in names:
            raise DeploymentError(f"{certificate} is not for {wanted}, the server's host: {_RENEW}")
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except (ssl.SSLError, OSError) as error:
        raise DeploymentError(f"{key} is not the key of {certificate.name}: {_RENEW}") from error
    left = (own.not_valid_after_utc - now).days
    return [f"the server's certificate expires in {left} days: {_RENEW}"] if left < _WARN_DAYS else []


def fingerprint(certificate: bytes) -> str:
    """SHA-256 over a certificate, in pairs, as `openssl x509 -fingerprint -sha256` shows it."""
    return x509.load_pem_x509_certificate(certificate).fingerprint(hashes.SHA256()).hex(":").upper()


def _loaded(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DeploymentError(
            f"{path} holds no certificate that can be read: restore it from a backup"
        ) from error


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _begun(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    # An hour back, as clocks of sites differ.
    begins = now - datetime.timedelta(hours=1) + datetime.timedelta(days=min(days - 1, 0))
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(now + datetime.timedelta(days=days))
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
