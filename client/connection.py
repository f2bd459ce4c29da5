"""How a site reaches its server: the address, the server's certificate authority, and the node's own key.

The node key opens the connection and nothing more: receipts are signed with the ledger's key, which is another one.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from client.private_files import check_private, write_private

CONNECTION, NODE_KEY, NODE_PUBLIC, AUTHORITY = "connection.json", "node.key", "node.pub", "ca.crt"


class ConnectionSetupError(ValueError):
    """The site's connection is not in order; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class Connection:
    """A site's way to its server.

    Attributes:
        folder: of the site.
        host, port: of the server's Fleet API.
    """

    folder: Path
    host: str
    port: int

    @property
    def address(self) -> str:
        """HOST:PORT, an IPv6 host in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def authority(self) -> Path:
        """The certificate authority that the server's certificate must come from."""
        return self.folder / AUTHORITY

    @property
    def node_key(self) -> Path:
        """The node's private key."""
        return self.folder / NODE_KEY

    @classmethod
    def load(cls, folder: Path) -> Connection:
        """The connection of a site; its key's mode is checked.

        Raises:
            ConnectionSetupError: the site has none, or it is not in order.
            LoosePermissionsError: others may read the key.
        """
        try:
            fields = json.loads((folder / CONNECTION).read_text(encoding="utf-8"))
            host, port = str(fields["host"]), int(fields["port"])
        except FileNotFoundError as error:
            raise ConnectionSetupError(
                f"{folder} knows no server: tell it one with `fedtide site connect {folder} --server HOST:PORT "
                "--ca ca.crt`"
            ) from error
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ConnectionSetupError(f"{folder / CONNECTION} cannot be read: restore it") from error
        found = cls(folder, host, port)
        for file in (found.node_key, found.authority):
            if not file.is_file():
                raise ConnectionSetupError(f"{file} is missing: restore it from the backup of the site")
        check_private(found.node_key)
        return found

    def private_key(self) -> ec.EllipticCurvePrivateKey:
        """The node's key.

        Raises:
            ConnectionSetupError: the file holds no such key.
            LoosePermissionsError: others may read it.
        """
        check_private(self.node_key)
        try:
            key = load_ssh_private_key(self.node_key.read_bytes(), password=None)
        except (OSError, ValueError) as error:
            raise ConnectionSetupError(
                f"{self.node_key} holds no OpenSSH key: restore it from the backup of the site"
            ) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConnectionSetupError(
                f"{self.node_key} holds another kind of key: restore it from the backup"
            )
        return key


def parse_server(text: str) -> tuple[str, int]:
    """HOST:PORT as host and port.

    Raises:
        ConnectionSetupError: it is something else.
    """
    host, colon, port = text.strip().rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or "/" in host or any(each.isspace() for each in host):
        raise ConnectionSetupError(f"--server {text!r} must read HOST:PORT, such as fedtide.example.org:9092")
    if not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ConnectionSetupError(f"--server {text!r} has port {port!r}, but a port is 1 to 65535")
    return host, int(port)


def check_authority(data: bytes, name: Path) -> None:
    """Raises `ConnectionSetupError` for bytes that are no PEM certificates that an ssl context takes."""
    try:
        found = x509.load_pem_x509_certificates(data)
        ssl.create_default_context(cadata=data.decode("ascii"))
    except (ValueError, ssl.SSLError) as error:
        raise ConnectionSetupError(
            f"{name} holds no certificate in PEM: give the server's tls/ca.crt"
        ) from error
    if b"PRIVATE KEY" in data or not found:
        raise ConnectionSetupError(f"{name} must hold certificates alone: give the server's tls/ca.crt")


def make_connection(folder: Path, server: str, authority: Path) -> str:
    """Writes a site's connection: address, authority, and a new node key (EC P-384, OpenSSH, mode 600).

    Returns:
        The public key as one OpenSSH line.

    Raises:
        ConnectionSetupError: the address or the authority is wrong.
    """
    host, port = parse_server(server)
    try:
        data = authority.expanduser().read_bytes()
    except OSError as error:
        raise ConnectionSetupError(
            f"--ca {authority} cannot be read ({error.strerror}): give the server's tls/ca.crt"
        ) from error
    check_authority(data, authority)
    (folder / AUTHORITY).write_bytes(data)
    key = ec.generate_private_key(ec.SECP384R1())
    write_private(folder / NODE_KEY, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode("ascii")
    (folder / NODE_PUBLIC).write_text(line + "\n", encoding="ascii")
    (folder / CONNECTION).write_text(
        json.dumps({"host": host, "port": port}, indent=2) + "\n", encoding="utf-8"
    )
    return line


def own_network(environment: Mapping[str, str], host: str) -> dict[str, str]:
    """The environment of what runs Flower at a site: no telemetry, no proxy on the way to the server and loopback."""
    kept = [each for each in environment.get("NO_PROXY", environment.get("no_proxy", "")).split(",") if each]
    away = ",".join(dict.fromkeys([*kept, "127.0.0.1", "localhost", "::1", host]))
    return {
        **environment,
        "NO_PROXY": away,
        "no_proxy": away,
        "no_grpc_proxy": away,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PYTHONUNBUFFERED": "1",
    }
