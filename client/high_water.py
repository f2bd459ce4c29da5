"""The ledger's high-water mark: which entry was the newest when something last left, in a file of its own.

A database can lose its end without a trace: its write-ahead log is lost, or the file alone is put back from a
backup. The mark is what it is held against. It follows each commit and is durable before that commit is told to
anyone, so that it may be behind the database (a crash between the two, made good when the ledger is opened) but
never ahead of it. The file has two places, written in turn: whatever a power cut leaves of one, the other is whole.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.ledger_errors import MarkLostError
from client.private_files import sync_folder, write_private
from common.privacy.canonical import Value, decode, encode
from common.privacy.entries import Entry, key_id_of, public_key_of
from common.privacy.faults import ReceiptError
from common.privacy.fields import DIGEST, SIGNATURE, count, exactly

FORMAT = "fedtide/high-water/1"
_FIELDS = {"format", "head", "key_id", "seq", "signature"}
_PLACE = 4096
"""Bytes of a place: a block of its own on the disk, so that no write touches both."""

_WAY_OUT = (
    "put high-water back from any copy of this ledger's folder; if there is none, and this is certainly the "
    "ledger's newest copy, `fedtide site renew-mark` says so for good"
)


def _lost(what: str) -> MarkLostError:
    return MarkLostError(f"{what}, so nobody can tell whether the database lacks its end: {_WAY_OUT}")


_sync = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


@dataclass(frozen=True, slots=True)
class Mark:
    """An entry that was committed: its sequence number, and its hash."""

    seq: int
    head: str


class HighWater:
    """The mark's file beside a database. Opened and locked for each use, so that processes share it."""

    def __init__(self, path: Path, key: Ed25519PrivateKey) -> None:
        """Of the ledger that this key signs; reads and writes nothing yet."""
        self.path, self._key = path, key
        self._key_id = key_id_of(public_key_of(key))

    def create(self, newest: Entry) -> None:
        """Makes the file, with mode 600, whole or not at all; what is there already is replaced."""
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.unlink(missing_ok=True)
        write_private(partial, self._record(newest) + bytes(_PLACE))
        partial.rename(self.path)
        sync_folder(self.path.parent)

    def follow(self, newest: Callable[[Mark], Entry], *, surely: bool = True) -> None:
        """Moves the mark up to the newest entry, durably; never down.

        Args:
            surely: write it where the file says so already, too, since whoever wrote that may have died, or failed,
                before it was on the disk. Needless where nothing leaves.
            newest: the newest committed entry, asked for under the mark's lock with the mark as it stands. What it
                raises, because the ledger does not hold the marked entry, leaves the mark as it is.

        Raises:
            MarkLostError: the file is not there, cannot be read, or is another ledger's.
            OSError: it cannot be written.
        """
        with self._locked() as file:
            places = [self._read(os.pread(file, _PLACE, place * _PLACE)) for place in range(2)]
            mark = max((each for each in places if each is not None), key=lambda each: each.seq, default=None)
            if mark is None:
                raise _lost("the ledger's high-water mark cannot be read")
            entry = newest(mark)
            if surely or entry.seq > mark.seq:
                older = 1 if places[0] == mark else 0
                if os.pwrite(file, self._record(entry), older * _PLACE) != _PLACE:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                _sync(file)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        try:
            file = os.open(self.path, os.O_RDWR)
        except FileNotFoundError as error:
            raise _lost("the ledger's high-water mark is lost") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)

    def _record(self, entry: Entry) -> bytes:
        statement: dict[str, Value] = {
            "format": FORMAT,
            "head": entry.hash,
            "key_id": self._key_id,
            "seq": str(entry.seq),
        }
        signature = self._key.sign(encode(statement)).hex()
        return encode({**statement, "signature": signature}).ljust(_PLACE, b"\0")

    def _read(self, record: bytes) -> Mark | None:
        """The mark that a place holds; None where nothing was written there, or not to its end."""
        try:
            found = exactly(decode(record.rstrip(b"\0")), _FIELDS)
            mark = Mark(count().read(found["seq"]), DIGEST.read(found["head"]))
            key_id, signature = DIGEST.read(found["key_id"]), SIGNATURE.read(found.pop("signature"))
        except ReceiptError:
            return None
        if key_id != self._key_id:
            raise _lost("the file high-water is another ledger's mark")
        try:
            self._key.public_key().verify(bytes.fromhex(signature), encode(found))
        except InvalidSignature:
            return None
        if found["format"] != FORMAT:
            raise _lost(
                f"the ledger's high-water mark is of a form that this version does not know ({FORMAT})"
            )
        return mark
