"""The public key of the one server that a site believes, in the site's folder.

The site has it from its own administrator, by an invitation whose fingerprint was compared over another channel; no
message changes it. What is signed with it is verified in `origin.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

from client.private_files import sync_folder, write_private
from common.privacy.fields import DIGEST

SERVER_KEY = "server-key"
"""The server's public signing key, hex, in the site's folder."""


class NoServerKeyError(ValueError):
    """The site knows no signing key of its server; the message says how it comes to know one."""


def trust(folder: Path, server_key: str) -> None:
    """Keeps a server's public signing key, hex, in a site's folder, in place of one that it had.

    Raises:
        ReceiptError: it is no key.
    """
    aside = folder / f".{SERVER_KEY}.{os.getpid()}"
    aside.unlink(missing_ok=True)
    write_private(aside, DIGEST.read(server_key).encode("ascii") + b"\n")
    aside.replace(folder / SERVER_KEY)
    sync_folder(folder)


def trusted_key(folder: Path) -> str:
    """The signing key, hex, of the server that a site believes.

    Raises:
        NoServerKeyError: it knows none.
    """
    try:
        found: str = DIGEST.read((folder / SERVER_KEY).read_text(encoding="ascii").strip())
    except (OSError, ValueError) as error:
        raise NoServerKeyError(
            f"{folder} knows no signing key of its server, and refuses all that is asked: ask the server's owner for "
            f"its invitation.json, then run `fedtide site connect {folder} --invitation FILE`"
        ) from error
    return found
