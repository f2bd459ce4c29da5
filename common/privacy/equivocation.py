"""The proof that a key signed two histories. It needs no chain and no trust in whoever shows it."""

from __future__ import annotations

from dataclasses import dataclass

from common.privacy.canonical import decode, encode
from common.privacy.entries import LONGEST_ENTRY, Entry, key_id_of
from common.privacy.faults import NoEquivocationError
from common.privacy.fields import exactly


@dataclass(frozen=True, slots=True)
class EquivocationProof:
    """Two entries that one key signed at one sequence number: anyone who has the key can tell it lied."""

    first: Entry
    second: Entry

    def verify(self, public_key: str) -> None:
        """Raises `NoEquivocationError` or `BadSignatureError` unless this proves that the key equivocated."""
        for entry in (self.first, self.second):
            if entry.key_id != key_id_of(public_key):
                raise NoEquivocationError("an entry names another key")
            entry.check_signature(public_key)
        if self.first.seq != self.second.seq:
            raise NoEquivocationError("the entries stand at different sequence numbers")
        if self.first.hash == self.second.hash:
            raise NoEquivocationError("the entries are the same")

    def to_bytes(self) -> bytes:
        """Canonical bytes."""
        return encode({"first": self.first.to_fields(), "second": self.second.to_fields()})

    @classmethod
    def from_bytes(cls, data: bytes) -> EquivocationProof:
        """The proof of canonical bytes, not verified. Raises `ReceiptError`."""
        found = exactly(decode(data, longest=2 * LONGEST_ENTRY), {"first", "second"})
        return cls(Entry.from_fields(found["first"]), Entry.from_fields(found["second"]))
