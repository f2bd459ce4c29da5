"""Makes a server's folder: authority, certificate, secret, registry, configuration, units. Whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from pathlib import Path

from server.certificates import new_authority, new_server_certificate
from server.deployment import Deployment, DeploymentError
from server.invitations import write_invitation
from server.units import unit_files

_SECRET_BYTES = 48


def make_server(server: Deployment) -> None:
    """A new server in a folder that does not exist yet or is empty.

    Raises:
        DeploymentError: the folder holds something, or cannot be made.
    """
    folder = server.folder
    if '"' in str(folder) or "\\" in str(folder):
        raise DeploymentError(f"{folder} has a quote or a backslash in its name: give another folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DeploymentError(
            f"{folder} is not empty: give a new folder, as a server's keys and registry are not made twice"
        )
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(mode=0o700)
    except OSError as error:
        raise DeploymentError(f"{folder} cannot be made ({error.strerror}): choose another place") from error
    try:
        _fill(Deployment(partial, server.host, **_ports(server)), server)
        if folder.exists():
            folder.rmdir()  # empty, as was seen above
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _ports(server: Deployment) -> dict[str, int]:
    return {f"{name}_port": port for name, port in server.ports().items()}


def _fill(made: Deployment, final: Deployment) -> None:
    """Fills the folder `made`, which is to be renamed to `final`'s: paths in files are of the latter."""
    for path in (made.authority.parent, made.nodes, made.runs, made.logs, made.units, made.flower_home):
        path.mkdir(mode=0o700)
    authority, authority_key = new_authority()
    certificate, key = new_server_certificate(authority, authority_key, made.host)
    _write(made.authority, authority, 0o644)
    _write(made.authority_key, authority_key, 0o600)
    _write(made.certificate, certificate, 0o644)
    _write(made.key, key, 0o600)
    # Flower reads the file as raw bytes: no line end.
    _write(made.secret, secrets.token_hex(_SECRET_BYTES).encode(), 0o600)
    write_invitation(made)  # which makes the registry, and its key
    for name, text in unit_files(final, str(Path(sys.executable).parent / "fedtide")).items():
        _write(made.units / name, text.encode(), 0o644)
    _write(made.folder / "server.toml", made.to_toml().encode(), 0o600)


def _write(path: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
