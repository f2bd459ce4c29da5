"""What a site hands to a server to be enrolled: its ledger's genesis, and so its public key and its promise.

Nothing in it depends on a user, and it may be sent in the open; that it came from that site is what the
fingerprint is compared for, over another channel.
"""

from __future__ import annotations

from common.privacy.canonical import decode, encode
from common.privacy.entries import LONGEST_ENTRY, Entry
from common.privacy.faults import UnknownFormatError
from common.privacy.fields import exactly
from common.privacy.rules import check_genesis

FORMAT = "fedtide/enrolment/1"


def enrolment_to_bytes(genesis: Entry) -> bytes:
    """The enrolment file of a ledger, canonical bytes."""
    check_genesis(genesis)
    return encode({"format": FORMAT, "genesis": genesis.to_fields()})


def enrolment_from_bytes(data: bytes) -> Entry:
    """The genesis in an enrolment file, verified.

    Raises:
        ReceiptError: its subclass names the fault.
    """
    found = exactly(decode(data.rstrip(b"\n"), longest=LONGEST_ENTRY + 128), {"format", "genesis"})
    if found["format"] != FORMAT:
        raise UnknownFormatError(f"this version understands {FORMAT} only")
    genesis = Entry.from_fields(found["genesis"])
    check_genesis(genesis)
    return genesis


def fingerprint(key_id: str) -> str:
    """A key's id in groups of four, for two people to read to one another."""
    return " ".join(key_id[place : place + 4] for place in range(0, len(key_id), 4))
