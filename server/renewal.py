"""A new certificate of the server, a new name in it, and a new authority, so that no site is cut off on the way.

Sites trust the authorities of tls/ca.crt as the invitation brought them. A new authority therefore comes in three
steps: it is made, and ca.crt and invitation hold both, while the server's certificate stays under the one that all
sites have; once they have the new invitation, the certificate is made under the new one; once that is shown, the old
one leaves ca.crt.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.serialization import Encoding

from server.certificates import (
    authorities,
    is_valid_now,
    issuer_among,
    loaded,
    names_of,
    new_authority,
    new_server_certificate,
)
from server.deployment import Deployment, DeploymentError, NotRunningError
from server.invitations import write_invitation

_HOST_LINE = re.compile(r"(?m)^host *=.*$")


def renew_certificate(server: Deployment, host: str | None = None) -> Deployment:
    """A new server certificate and key under the same authority: sites notice nothing.

    Args:
        host: the name or address that sites reach the server by from now on. The certificate is for the old names, too.

    Returns:
        The server, by its new name.

    Raises:
        DeploymentError: the host is none, the authority has expired, or a file is not in order.
    """
    server.check_private()
    named = server if host is None else replace(server, host=host)
    signing = _signing(server)
    if not is_valid_now(signing):
        step = "--switch" if _waiting(server) else "--authority"
        raise DeploymentError(
            f"the authority expired on {signing.not_valid_after_utc:%Y-%m-%d}, so no site trusts a certificate under "
            f"it: `fedtide server renew {server.folder} {step}` goes on with a new one"
        )
    _sign(named, signing, server.authority_key)
    if host is not None:
        config = server.folder / "server.toml"
        text = _HOST_LINE.sub(lambda _: f'host = "{host}"', config.read_text(encoding="utf-8"), count=1)
        _put(config, text.encode(), 0o600)
        write_invitation(named)
    return named


def begin_authority(server: Deployment) -> bool:
    """A new authority beside the present one, in ca.crt for sites to be given; the server's certificate stays.

    Where the present one has expired no site is in, so the certificate is made under the new one at once.

    Returns:
        Whether it was.

    Raises:
        DeploymentError: a new one was made already, or a file is not in order.
    """
    server.check_private()
    signing = _signing(server)
    if _waiting(server) is not None:
        raise DeploymentError(
            f"a new authority was made already: give every site the new {server.invitation}, then "
            f"`fedtide server renew {server.folder} --switch`"
        )
    certificate, key = new_authority()
    _put(server.next_authority_key, key, 0o600)
    _put_authorities(server, [signing, x509.load_pem_x509_certificate(certificate)])
    if is_valid_now(signing):
        return False
    switch_authority(server)
    return True


def switch_authority(server: Deployment) -> None:
    """The server's certificate under the new authority: a site that lacks the new ca.crt is cut off until it has it.

    Raises:
        DeploymentError: no new authority was made, or a file is not in order.
    """
    server.check_private()
    waiting = _waiting(server)
    if waiting is None:
        raise DeploymentError(
            f"no new authority waits for it: `fedtide server renew {server.folder} --authority` makes one"
        )
    known = authorities(server.authority)
    _sign(server, waiting, server.next_authority_key)
    server.next_authority_key.replace(server.authority_key)  # the old one's key is no more
    old = (each for each in known if each != waiting and is_valid_now(each))
    _put_authorities(server, [waiting, *old])


def drop_authority(server: Deployment) -> int:
    """Takes the authorities out of ca.crt that the server's certificate is not under.

    Returns:
        How many there were.

    Raises:
        DeploymentError: the certificate, or the one that the server shows, is under one of them.
    """
    server.check_private()
    known, signing = authorities(server.authority), _signing(server)
    if _waiting(server) is not None or issuer_among(loaded(server.certificate), known) != signing:
        raise DeploymentError(
            "the server's certificate is under the old authority: once every site has the new invitation, "
            f"`fedtide server renew {server.folder} --switch` makes one under the new"
        )
    if server.running() and not _shows_one_under(server, signing):
        raise DeploymentError(
            "the server that is up shows a certificate of the old authority: restart `fedtide server up` first"
        )
    _put_authorities(server, [signing])
    return len(known) - 1


def _signing(server: Deployment) -> x509.Certificate:
    """The authority that tls/ca.key signs for."""
    found = _of_key(server.authority_key, authorities(server.authority))
    if found is None:
        raise DeploymentError(
            f"{server.authority_key} is the key of no authority in {server.authority.name}: restore both from a backup"
        )
    return found


def _waiting(server: Deployment) -> x509.Certificate | None:
    """The new authority that was made, and that the server's certificate is not under yet."""
    if not server.next_authority_key.is_file():
        return None
    return _of_key(server.next_authority_key, authorities(server.authority))


def _of_key(key: Path, known: Sequence[x509.Certificate]) -> x509.Certificate | None:
    try:
        public = serialization.load_pem_private_key(key.read_bytes(), password=None).public_key()
    except (OSError, ValueError) as error:
        raise DeploymentError(f"{key} holds no key that can be read: restore it from a backup") from error
    return next((each for each in known if each.public_key() == public), None)


def _sign(server: Deployment, authority: x509.Certificate, key: Path) -> None:
    try:
        names = names_of(loaded(server.certificate))
    except (DeploymentError, x509.ExtensionNotFound):
        names = []  # what it was for is not known any more
    certificate, own_key = new_server_certificate(
        authority.public_bytes(Encoding.PEM), key.read_bytes(), server.host, names=names
    )
    _put(server.key, own_key, 0o600)
    _put(server.certificate, certificate, 0o644)


def _put_authorities(server: Deployment, found: Sequence[x509.Certificate]) -> None:
    _put(server.authority, b"".join(each.public_bytes(Encoding.PEM) for each in found), 0o644)
    write_invitation(server)


def _shows_one_under(server: Deployment, authority: x509.Certificate) -> bool:
    context = ssl.create_default_context(cadata=authority.public_bytes(Encoding.PEM).decode("ascii"))
    try:
        with (
            socket.create_connection(("127.0.0.1", server.control_port), timeout=5) as opened,
            context.wrap_socket(opened, server_hostname="127.0.0.1"),
        ):
            return True
    except ssl.SSLCertVerificationError:
        return False
    except OSError as error:
        raise NotRunningError(
            f"the server is up, but does not answer on {server.control} yet: wait a minute, then see {server.logs}"
        ) from error


def _put(path: Path, data: bytes, mode: int) -> None:
    """Puts a file in the place of another, whole."""
    aside = path.with_name(f".{path.name}.new")
    aside.unlink(missing_ok=True)
    with open(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode), "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
