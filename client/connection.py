"""How a site reaches its server: the address, the server's certificate authority, and the node's own key.

Where the server is and how it is known comes from its invitation (`common/invitation.py`). The node key opens the
connection and nothing more: receipts are signed with the ledger's key, which is another one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from client.private_files import check_private, write_private
from client.server_key import trust, trusted_key
from common.invitation import Invitation
from common.privacy.faults import ReceiptError

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
            NoServerKeyError: it was made before servers signed what they ask.
            LoosePermissionsError: others may read the key.
        """
        try:
            fields = json.loads((folder / CONNECTION).read_text(encoding="utf-8"))
            host, port = str(fields["host"]), int(fields["port"])
        except FileNotFoundError as error:
            raise ConnectionSetupError(
                f"{folder} knows no server: tell it one with `fedtide site connect {folder} --invitation FILE`, of "
                "the server's invitation.json"
            ) from error
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ConnectionSetupError(f"{folder / CONNECTION} cannot be read: restore it") from error
        found = cls(folder, host, port)
        for file in (found.node_key, found.authority):
            if not file.is_file():
                raise ConnectionSetupError(f"{file} is missing: restore it from the backup of the site")
        trusted_key(folder)
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


def read_invitation(file: Path) -> Invitation:
    """A server's invitation.

    Raises:
        ConnectionSetupError: the file holds none.
    """
    try:
        return Invitation.from_bytes(file.expanduser().read_bytes())
    except OSError as error:
        raise ConnectionSetupError(
            f"--invitation {file} cannot be read ({error.strerror}): give the server's invitation.json"
        ) from error
    except ReceiptError as error:
        raise ConnectionSetupError(
            f"{file} holds no invitation ({error}): ask the server's owner for invitation.json, which `fedtide server "
            "invitation` writes"
        ) from error


def write_connection(folder: Path, invitation: Invitation) -> None:
    """Writes into a folder where a site's server is, and how it is known; no key of the site's."""
    (folder / AUTHORITY).write_bytes(invitation.authority)
    fields = {"host": invitation.host, "port": invitation.port}
    (folder / CONNECTION).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    trust(folder, invitation.signing_key)


def invitation_of(connection: Connection) -> Invitation:
    """What a site holds of its server, as the invitation that it came from: its fingerprint can be compared again.

    Raises:
        NoServerKeyError: the site was made before servers signed.
    """
    return Invitation(
        connection.host, connection.port, connection.authority.read_bytes(), trusted_key(connection.folder)
    )


def new_node_key(folder: Path) -> str:
    """Writes a new node key (EC P-384, OpenSSH, mode 600); returns the public one as an OpenSSH line."""
    key = ec.generate_private_key(ec.SECP384R1())
    write_private(folder / NODE_KEY, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    line = public_line(key)
    (folder / NODE_PUBLIC).write_text(line + "\n", encoding="ascii")
    return line


def public_line(key: ec.EllipticCurvePrivateKey) -> str:
    """The public half of a node key, one OpenSSH line."""
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode("ascii")


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
