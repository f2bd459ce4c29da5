"""De-identification: a user id becomes an HMAC under the site's secret before anything else sees it.

The same user has other pseudonyms at other sites, and nobody without the secret can test a guess. This is
hygiene for what lies on the site's disk: differential privacy, not this, protects what leaves a site.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

SECRET_BYTES = 32
PSEUDONYM_CHARACTERS = 32
"""128 bits of the HMAC as hex: collisions among a billion users have odds of 1 in 10^20."""


class SecretError(ValueError):
    """The site's secret is missing, damaged, or open to others."""


def pseudonym(user: str, secret: bytes) -> str:
    """HMAC-SHA-256 of the user id under the site's secret, its first 128 bits as hex.

    Raises:
        SecretError: the secret is not 32 bytes long.
    """
    return _keyed(b"user", user, secret).hex()[:PSEUDONYM_CHARACTERS]


def tie_key(user: str, secret: bytes) -> int:
    """64 secret bits of a user, by which cleaning orders that user's events of one time."""
    return int.from_bytes(_keyed(b"ties", user, secret)[:8], "big")


def _keyed(purpose: bytes, user: str, secret: bytes) -> bytes:
    return hmac.digest(_checked(secret), _said_first(purpose) + user.encode(), hashlib.sha256)


def _said_first(purpose: bytes) -> bytes:
    return b"fedtide/" + purpose + b"\0"


def _checked(secret: bytes) -> bytes:
    if len(secret) != SECRET_BYTES:
        raise SecretError(f"a site secret has {SECRET_BYTES} bytes: make one with new_secret")
    return secret


class Keyed:
    """`pseudonym` and `tie_key` of many users: HMAC (RFC 2104) with what depends on the secret alone done once.

    Raises:
        SecretError: the secret is not 32 bytes long.
    """

    def __init__(self, secret: bytes) -> None:
        key = _checked(secret).ljust(hashlib.sha256().block_size, b"\0")
        inner, self._outer = (hashlib.sha256(bytes(byte ^ pad for byte in key)) for pad in (0x36, 0x5C))
        self._user, self._ties = inner.copy(), inner.copy()
        self._user.update(_said_first(b"user"))
        self._ties.update(_said_first(b"ties"))

    def pseudonym_bytes(self, user: str) -> bytes:
        """The 16 bytes that `pseudonym` writes as hex."""
        return self._digest(self._user.copy(), user)[: PSEUDONYM_CHARACTERS // 2]

    def tie_key(self, user: str) -> int:
        """As `deidentify.tie_key`."""
        return int.from_bytes(self._digest(self._ties.copy(), user)[:8], "big")

    def _digest(self, inner: hashlib._Hash, user: str) -> bytes:
        outer = self._outer.copy()
        inner.update(user.encode())
        outer.update(inner.digest())
        return outer.digest()


def new_secret(path: str | Path) -> bytes:
    """Draws a secret and writes it as hex to a new file that its owner alone may read (mode 0600).

    Raises:
        SecretError: the file exists: a new secret would change every pseudonym.
    """
    path = Path(path)
    secret = secrets.token_bytes(SECRET_BYTES)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise SecretError(f"secret {path} exists: keep it, or delete it to start anew") from error
    except OSError as error:
        raise SecretError(f"secret {path} cannot be written: {error.strerror}") from error
    with os.fdopen(descriptor, "w") as file:
        os.fchmod(descriptor, 0o600)
        file.write(secret.hex() + "\n")
        file.flush()
        os.fsync(descriptor)
    return secret


def load_secret(path: str | Path) -> bytes:
    """The secret in a file that `new_secret` wrote.

    Raises:
        SecretError: no such file, a mode looser than 0600, or something else in it.
    """
    path = Path(path)
    try:
        with path.open() as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o177:
                raise SecretError(f"secret {path} has mode {mode:04o}: others may read it; chmod 600 it")
            secret = bytes.fromhex(file.read().strip())
    except SecretError:
        raise
    except OSError as error:
        raise SecretError(f"secret {path} cannot be read: {error.strerror}; make one") from error
    except ValueError as error:
        raise SecretError(f"secret {path} is damaged: restore it from its backup") from error
    if len(secret) != SECRET_BYTES:
        raise SecretError(f"secret {path} is damaged: restore it from its backup")
    return secret
