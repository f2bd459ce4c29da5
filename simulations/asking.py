"""The word of a server that is not there: for audits, benchmarks and tests that ask sites themselves.

Sites verify here as everywhere; each is first made to believe this process' own key.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.ledger import Ledger
from client.origin import Asked
from client.private_files import load_key
from common.privacy.entries import key_id_of, public_key_of
from common.wire import Request, SignedRequest
from simulations.sites import trust_once

KEY = Ed25519PrivateKey.generate()
"""This process' own."""

_SECONDS = 3600


def signed_for(
    folder: Path, request: Request, *, key: Ed25519PrivateKey = KEY, seconds: int = _SECONDS
) -> SignedRequest:
    """A request to the site in a folder, signed; the site believes this process from now on.

    Args:
        key: the server's; another than this process' is not believed.
        seconds: until it expires.
    """
    trust_once(folder, public_key_of(KEY))
    site = key_id_of(public_key_of(load_key(folder / "ledger" / Ledger.FILES[1])))
    return SignedRequest.of(replace(request, site=site), key, expires=math.ceil(time.time()) + seconds)


def asked_of(folder: Path, request: Request, *, until: float = math.inf) -> Asked:
    """What the site in a folder verifies of such a request.

    Args:
        until: when the message expires, in seconds since 1970.
    """
    return Asked(folder, signed_for(folder, request), until)
