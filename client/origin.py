"""Whether a request is the server's word to this site: asked before anything else, of the request's bytes alone.

What is charged is an `Asked`, and there is none of a request that the server whose key the site has (`server_key.py`)
did not sign for this site.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from client.ledger import Ledger
from client.private_files import load_key
from client.server_key import trusted_key
from common.privacy.entries import key_id_of, public_key_of
from common.privacy.faults import ReceiptError
from common.requests import is_signed
from common.wire import Reason, Request, SignedRequest, WireError, request_from_records

if TYPE_CHECKING:
    from flwr.app import RecordDict

_QUIET = 60.0
"""Seconds between two lines about requests that are not the server's word: who sends them must not fill a log."""

_log = logging.getLogger("fedtide.site")


class OriginError(ValueError):
    """A request is not the server's word to this site, or not any more. A few words, and nothing of the request.

    Attributes:
        reason: the one that the site refuses with.
    """

    def __init__(self, said: str, reason: Reason = Reason.ORIGIN) -> None:
        super().__init__(said)
        self.reason = reason


@dataclass(frozen=True)
class Asked:
    """A request that is the server's word to the site in a folder: that is verified as one is made.

    In the order of what it costs: the signature, whom it is for, until when, and then the digests of what came with it.

    Attributes:
        until: when it expires, in seconds since 1970: as the server signed it, or sooner.

    Raises:
        OriginError: it is not.
        NoServerKeyError: the site knows no server.
    """

    folder: Path
    signed: SignedRequest
    until: float

    def __post_init__(self) -> None:
        if not is_signed(self.signed.statement, self.signed.signature, trusted_key(self.folder)):
            raise OriginError("it is not signed by the server that this site knows")
        try:
            said = self.signed.said
        except ReceiptError as error:
            raise OriginError("the server signed something else") from error
        if said.site != _own_key_id(self.folder):
            raise OriginError("it is for another site")
        if not self.until <= said.expires:  # nor where the message's own time is no number
            object.__setattr__(self, "until", float(said.expires))
        if not time.time() <= self.until:
            raise OriginError("it has expired, or this machine's clock is ahead", Reason.EXPIRED)
        if not self.signed.fits():
            raise OriginError("it is not what the server signed")

    @cached_property
    def request(self) -> Request:
        """What is asked.

        Raises:
            WireError: its tensors cannot be read.
        """
        return self.signed.request()


def heard(folder: Path, content: RecordDict, until: float) -> Asked:
    """What the server asks of the site in a folder, by a message's content.

    Args:
        until: when the message expires, in seconds since 1970.

    Raises:
        OriginError: it is not the server's word to this site.
        NoServerKeyError: the site knows no server.
    """
    try:
        signed = request_from_records(content)
    except WireError as error:
        raise OriginError("it has no form that a server signs") from error
    return Asked(folder, signed, until)


def _own_key_id(folder: Path) -> str:
    """Of the site's ledger, from the key that it signs with; its database is not opened."""
    return key_id_of(public_key_of(load_key(folder / "ledger" / Ledger.FILES[1])))


class _Seldom:
    """Says what strangers make it say once in a while, and how often it kept silent meanwhile."""

    def __init__(self) -> None:
        self._silent_until, self._unsaid = -_QUIET, 0

    def __call__(self, error: Exception) -> None:
        now = time.monotonic()
        if now < self._silent_until:
            self._unsaid += 1
            return
        before = f" ({self._unsaid} more before)" if self._unsaid else ""
        _log.warning("a request is refused: %s%s", error, before)
        self._silent_until, self._unsaid = now + _QUIET, 0


say_seldom = _Seldom()
"""Logs that a request was refused by its origin: a line a minute."""
