"""The server's invitation.json: what its sites are given, of the name, authorities and signing key that it has now."""

from __future__ import annotations

import os

from common.invitation import Invitation
from server.deployment import Deployment
from server.registry import Registry


def write_invitation(server: Deployment) -> Invitation:
    """Writes the server's invitation, in place of an older one."""
    invitation = Invitation(
        server.host, server.fleet_port, server.authority.read_bytes(), Registry(server.registry).server_key
    )
    aside = server.invitation.with_name(f".{server.invitation.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    with open(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        file.write(invitation.to_bytes() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(server.invitation)
    return invitation
