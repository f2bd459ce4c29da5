"""Certificates of chosen dates, and a server on loopback that shows one: for tests that cannot wait for an end."""

from __future__ import annotations

import datetime
import ssl
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from socket import create_connection, create_server, socket

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Dated:
    """A certificate and its key."""

    certificate: x509.Certificate
    private: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key(self) -> bytes:
        return self.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def put(self, certificate: Path, key: Path) -> None:
        """Writes both, where the server's folder has such."""
        certificate.write_bytes(self.pem)
        key.write_bytes(self.key)


def dated(begins: float, ends: float, issuer: Dated | None = None, *, name: str = "an authority") -> Dated:
    """Valid from and until so many days from now; an authority where no issuer is given, else for 127.0.0.1."""
    now = datetime.datetime.now(datetime.UTC)
    key = ec.generate_private_key(ec.SECP256R1())
    own = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signing = key if issuer is None else issuer.private
    builder = (
        x509.CertificateBuilder()
        .subject_name(own)
        .issuer_name(own if issuer is None else issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=begins))
        .not_valid_after(now + datetime.timedelta(days=ends))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False
        )
    )
    if issuer is not None:
        names = [
            x509.IPAddress(ip_address("127.0.0.1")),
            x509.DNSName("localhost"),
            x509.DNSName("fedtide.example.org"),
        ]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return Dated(builder.sign(signing, hashes.SHA256()), key)


@contextmanager
def shown(certificate: Path, key: Path) -> Iterator[int]:
    """A TLS server of HTTP/2 that shows this certificate to whoever calls, and no more; its port."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["h2"])
    plain = create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def serve() -> None:
        while True:
            taken, _ = plain.accept()
            with taken:
                if ended.is_set():
                    return
                taken.settimeout(10)
                try:
                    with context.wrap_socket(taken, server_side=True) as secure:
                        secure.recv(1)
                except OSError:
                    continue

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield plain.getsockname()[1]
    finally:
        ended.set()
        with _called(plain.getsockname()[1]):  # wakes it
            thread.join(10)
        plain.close()


def _called(port: int) -> socket:
    return create_connection(("127.0.0.1", port), timeout=10)


def takes(authority: bytes, certificate: Path, key: Path) -> bool:
    """Whether a gRPC client with this ca.crt, as a SuperNode's, and a Python one take the certificate; both, or none.

    Over sockets: a gRPC server shows it, and a call to it gets through or not.
    """
    server = grpc.server(futures.ThreadPoolExecutor(1))
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        with grpc.secure_channel(
            f"127.0.0.1:{port}",
            grpc.ssl_channel_credentials(authority),
            options=[("grpc.enable_http_proxy", 0)],
        ) as channel:
            try:
                channel.unary_unary("/none/None")(b"", timeout=10)
            except grpc.RpcError as error:
                by_grpc = error.code() is grpc.StatusCode.UNIMPLEMENTED
        context = ssl.create_default_context(cadata=authority.decode("ascii"))
        context.set_alpn_protocols(["h2"])
        try:
            with _called(port) as plain, context.wrap_socket(plain, server_hostname="127.0.0.1"):
                by_python = True
        except ssl.SSLCertVerificationError:
            by_python = False
    finally:
        server.stop(None).wait()
    assert by_grpc == by_python
    return by_grpc
