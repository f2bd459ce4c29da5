"""The receipt that travels with a release, and its check against what was asked for and what is held.

A receipt is the segment of the site's chain that extends the receiver's copy, up to the RELEASE entry, and
the genesis, so that a third party can recompute the charge from the receipt alone. What the server does with
a receipt that fails is `server/admission.py`'s business; how it is packed into messages, `common/wire.py`'s.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields

from common.privacy.canonical import Value, decode, encode
from common.privacy.chain import Chain
from common.privacy.chain_end import check_end
from common.privacy.entries import Entry, Release, Reserve
from common.privacy.faults import (
    MalformedEntryError,
    MissingReleaseError,
    MissingReservationError,
    UnknownFormatError,
    WrongDigestError,
    WrongGenesisError,
    WrongRequestError,
)
from common.privacy.fields import exactly

FORMAT = "fedtide/receipt/1"
LONGEST_RECEIPT = 1 << 24


@dataclass(frozen=True, slots=True)
class Receipt:
    """A genesis and consecutive entries of its chain, the last of which is the RELEASE it is a receipt for.

    The RESERVE that the release uses stands among the entries.
    """

    genesis: Entry
    entries: tuple[Entry, ...]

    @property
    def release(self) -> Release:
        """What was released.

        Raises:
            MissingReleaseError: the last entry is no RELEASE.
        """
        if not self.entries or not isinstance(body := self.entries[-1].body, Release):
            raise MissingReleaseError("a receipt ends in a release")
        return body

    @property
    def reserve(self) -> Reserve:
        """The reservation that the release uses.

        Raises:
            MissingReleaseError, MissingReservationError: one of the two is not in the receipt.
        """
        wanted = self.release.reservation
        for entry in reversed(self.entries):
            if isinstance(entry.body, Reserve) and entry.hash == wanted:
                return entry.body
        raise MissingReservationError("the reservation is not in the receipt")

    def to_bytes(self) -> bytes:
        """Canonical bytes."""
        entries: list[Value] = [entry.to_fields() for entry in self.entries]
        value: Value = {"entries": entries, "format": FORMAT, "genesis": self.genesis.to_fields()}
        return encode(value, longest=LONGEST_RECEIPT)

    @classmethod
    def from_bytes(cls, data: bytes) -> Receipt:
        """The receipt of canonical bytes; nothing is verified but its form.

        Raises:
            ReceiptError: its subclass names the fault.
        """
        found = exactly(decode(data, longest=LONGEST_RECEIPT), {"entries", "format", "genesis"})
        if found["format"] != FORMAT:
            raise UnknownFormatError(f"this version understands {FORMAT} only")
        if not isinstance(found["entries"], list):
            raise MalformedEntryError("the entries of a receipt must be a list")
        entries = tuple(Entry.from_fields(entry) for entry in found["entries"])
        return cls(Entry.from_fields(found["genesis"]), entries)


@dataclass(frozen=True, slots=True)
class Request:
    """What a server asked for: the fields of a reservation that must repeat it. `attempt` None: any."""

    run: str
    round: int
    nonce: str
    plan_hash: str
    model_hash: str
    attempt: int | None = None

    def check(self, reserve: Reserve) -> None:
        """Raises `WrongRequestError`, naming the fields, if the reservation answers another request."""
        wrong = [
            each.name
            for each in fields(self)
            if getattr(self, each.name) is not None
            and getattr(self, each.name) != getattr(reserve, each.name)
        ]
        if wrong:
            raise WrongRequestError(f"the reservation was made for another {', '.join(wrong)}")


def check_update(release: Release, update: bytes) -> None:
    """Raises `WrongDigestError` unless these are the bytes that were released."""
    if len(update) != release.update_bytes or hashlib.sha256(update).hexdigest() != release.update_digest:
        raise WrongDigestError("the update's bytes are not those that the receipt was signed for")


def check_receipt(receipt: Receipt, update: bytes, request: Request, chain: Chain) -> Chain:
    """Whether a receipt extends the chain held, answers the request, and covers the update.

    Args:
        receipt: as received.
        update: the released bytes, as received.
        request: what was asked for.
        chain: the receiver's verified copy of the site's chain.

    Returns:
        The extended chain: to be stored, and its head to be countersigned.

    Raises:
        ReceiptError: its subclass names the first fault; the chain given is unchanged.
    """
    if receipt.genesis.hash != chain.entries[0].hash:
        raise WrongGenesisError("the receipt belongs to another ledger")
    extended = chain.extended(receipt.entries)
    request.check(receipt.reserve)
    check_update(receipt.release, update)
    return extended


def check_receipt_alone(receipt: Receipt, update: bytes | None = None) -> Reserve:
    """What a third party can tell from the receipt alone: it is whole, signed, and charged what it must.

    What stands before its entries needs the chain.

    Returns:
        The reservation, its charge recomputed.

    Raises:
        ReceiptError: its subclass names the first fault.
    """
    check_end(receipt.genesis, receipt.entries)
    reserve = receipt.reserve
    if update is not None:
        check_update(receipt.release, update)
    return reserve
