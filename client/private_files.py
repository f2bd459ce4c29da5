"""The ledger's folder on disk: who may read it, its signing key, and which processes are alive on it.

The key is a file of its own, apart from the database, so that a copy of the ledger (for an auditor, say)
carries no power to sign. What stands in the ledger is `ledger.py`'s business.
"""

from __future__ import annotations

import fcntl
import os
import stat
import uuid
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from client.ledger_errors import LedgerError

FILE_MODE, FOLDER_MODE = 0o600, 0o700


class LoosePermissionsError(LedgerError):
    """A private file or folder that others than its owner may read or write."""

    reason = "loose_permissions"


def check_private(path: Path) -> None:
    """Raises `LoosePermissionsError` if group or others have any right on the file or folder."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        wanted = FOLDER_MODE if path.is_dir() else FILE_MODE
        raise LoosePermissionsError(f"{path.name} has mode {mode:o}: run `chmod {wanted:o}` on it")


def write_private(path: Path, data: bytes) -> None:
    """Creates a file with mode 600 and this content, durably.

    Raises:
        FileExistsError: there is one already.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, FILE_MODE)
    try:
        os.fchmod(descriptor, FILE_MODE)
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    sync_file(path)


def sync_file(path: Path) -> None:
    """Makes what anybody wrote to a file durable.

    Raises:
        OSError: it is not there, or cannot be written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create_key(path: Path) -> Ed25519PrivateKey:
    """A new Ed25519 key, stored as unencrypted PKCS#8 PEM with mode 600."""
    key = Ed25519PrivateKey.generate()
    write_private(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return key


def load_key(path: Path) -> Ed25519PrivateKey:
    """The key that `create_key` stored.

    Raises:
        LoosePermissionsError: others may read it.
        ValueError: it is no Ed25519 key.
    """
    check_private(path)
    key = load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{path.name} holds no Ed25519 key")
    return key


class Presence:
    """A locked file that says "this process is at work here". The kernel drops the lock when it dies."""

    def __init__(self, folder: Path) -> None:
        """Enters a folder of presences."""
        self.name = uuid.uuid4().hex
        self._path = folder / self.name
        self._descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, FILE_MODE)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def leave(self) -> None:
        """Gives the lock up; what was begun under this name counts as abandoned."""
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)

    @staticmethod
    def alive(folder: Path, name: str) -> bool:
        """Whether the process that entered under this name still holds its lock."""
        try:
            descriptor = os.open(folder / name, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        else:
            (folder / name).unlink(missing_ok=True)
            return False
        finally:
            os.close(descriptor)
