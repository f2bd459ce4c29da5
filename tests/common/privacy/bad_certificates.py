"""Bad certificates of a withdrawal, in the corpus of `bad_receipts`: the site itself signed most of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.privacy.anchors import Countersignature
from common.privacy.certificates import ClosingCertificate
from common.privacy.entries import Anchor, Burnt, Close
from tests.common.privacy.bad_receipts import CASES, bad, with_bytes
from tests.common.privacy.honest_chain import (
    SERVER,
    STATISTICS,
    STRANGER,
    Writer,
    honest,
    raw,
    read,
    sign,
)

__all__ = ["CASES", "certificate_of", "closed"]


def closed() -> Writer:
    """The honest chain and its end: 12 another reservation, 13 burnt, 14 closed."""
    site = honest()
    site.add(Burnt(site.reserve("run-c", 1, day="2026-01-04").hash))
    site.add(Close(site.spent, "2026-01-04"))
    return site


def certificate_of(site: Writer, first: int = 12) -> ClosingCertificate:
    return ClosingCertificate(site.entries[0], tuple(site.entries[first:]))


def read_certificate(data: bytes) -> Close:
    """What a reader does with a certificate's file."""
    return ClosingCertificate.from_bytes(data).verify()


def _certificate(name: str, reason: str, *edit: Callable[[bytes], bytes]) -> None:
    """A case: the file of an honest certificate with its bytes changed."""

    def case() -> object:
        data = certificate_of(closed()).to_bytes()
        for each in edit:
            before, data = data, each(data)
            assert data != before
        return read_certificate(data)

    bad(f"certificate: {name}", reason)(case)


def _without_words(data: bytes) -> bytes:
    """As a site would sign it: only the signed part is of interest, so the words are made to fit."""
    found = json.loads(data)
    signed = ClosingCertificate(
        read([found["signed"]["genesis"]])[0], tuple(read(list(found["signed"]["entries"])))
    )
    found["in_words"] = signed.in_words()
    return json.dumps(found).encode()


_certificate("words of a smaller share", "wrong_words", lambda data: re.sub(rb"\([0-9.]+%", b"(1.0%", data))
_certificate(
    "a sentence more", "wrong_words", with_bytes(b'"in_words": [', b'"in_words": ["No user was here.", ')
)
_certificate(
    "the total edited, and its words", "bad_signature", lambda data: _without_words(_lower_total(data))
)
_certificate("another format", "unknown_format", with_bytes(b"certificate/1", b"certificate/9"))
_certificate(
    "a count of users beside it", "malformed_entry", with_bytes(b'"signed"', b'"users": "1042", "signed"')
)
_certificate("a number", "whole_number", with_bytes(b'"seq": "14"', b'"seq": 14'))
_certificate("cut short", "malformed_json", lambda data: data[: len(data) // 2])


def _lower_total(data: bytes) -> bytes:
    found = json.loads(data)
    found["signed"]["entries"][-1]["body"]["spent"] = "1"
    return json.dumps(found).encode()


def _signed_certificate(name: str, reason: str, change: Callable[[Writer], object], first: int = 12) -> None:
    """A case: a certificate that the site itself, with its key, made of another end."""

    def case() -> object:
        site = honest()
        change(site)
        return read_certificate(certificate_of(site, first).to_bytes())

    bad(f"certificate: {name}", reason)(case)


def _closed_at(site: Writer, off: int, *, reserve: bool = True, day: str = "2026-01-05") -> None:
    if reserve:
        site.add(Burnt(site.reserve("run-c", len(site.entries), day="2026-01-04").hash))
    site.add(Close(site.spent + off, day))


def _closed_open(site: Writer) -> None:
    site.reserve("run-c", 1, day="2026-01-04")
    site.add(Close(site.spent, "2026-01-04"))


def _settled_twice(site: Writer, released: int, burnt: int) -> None:
    reserved = site.reserve("run-c", 1, day="2026-01-04")
    for _ in range(released):
        site.release(reserved)
    for _ in range(burnt):
        site.add(Burnt(reserved.hash))
    _closed_at(site, 0)


def _earlier_twice(site: Writer) -> None:
    for _ in range(2):
        site.release(site.entries[10])
    _closed_at(site, 0)


def _asked_twice(site: Writer) -> None:
    for _ in range(2):
        site.release(site.reserve("run-c", 1, day="2026-01-04"))
    _closed_at(site, 0)


def _sum_as_update(site: Writer) -> None:
    site.release(site.reserve("run-c", 1, event=STATISTICS, day="2026-01-04"))
    _closed_at(site, 0)


def _anchored(site: Writer, other: Ed25519PrivateKey) -> None:
    held = site.countersigned(11)
    forged = Countersignature.sign(other, site_key_id=held.site_key_id, seq=11, head=held.head)
    site.add(replace(Anchor.of(held), countersignature=forged.signature))
    _closed_at(site, 0)


def _anchored_ahead(site: Writer) -> None:
    held = site.countersigned(11)
    site.add(Anchor.of(Countersignature.sign(SERVER, site_key_id=held.site_key_id, seq=40, head=held.head)))
    _closed_at(site, 0)


_signed_certificate("another total than its entries", "wrong_total", lambda site: _closed_at(site, -1))
_signed_certificate("another total, whole ledger", "wrong_total", lambda site: _closed_at(site, -1), first=1)
_signed_certificate("more than the cap", "over_cap", lambda site: _closed_at(site, 10**12, reserve=False))
_signed_certificate("a reservation left open", "open_reservation", _closed_open)
_signed_certificate("a reservation released twice", "second_release", lambda site: _settled_twice(site, 2, 0))
_signed_certificate("released, then burnt", "released_reservation", lambda site: _settled_twice(site, 1, 1))
_signed_certificate("burnt twice", "burnt_reservation", lambda site: _settled_twice(site, 0, 2))
_signed_certificate("an earlier reservation released twice", "second_release", _earlier_twice)
_signed_certificate("one request reserved twice", "second_reservation", _asked_twice)
_signed_certificate("a sum released as an update", "wrong_content", _sum_as_update)
_signed_certificate("a countersignature forged", "bad_anchor", lambda site: _anchored(site, STRANGER))
_signed_certificate("a countersignature of what comes later", "fork", _anchored_ahead)
_signed_certificate("closed twice", "after_close", lambda site: (_closed_at(site, 0), _closed_at(site, 0)))
_signed_certificate("clock backwards", "clock_backwards", lambda site: _closed_at(site, 0, day="2025-12-31"))


@bad("certificate: without its end", "missing_close")
def _() -> object:
    whole = certificate_of(closed()).to_bytes()
    found = json.loads(whole)
    found["signed"]["entries"].pop()
    return read_certificate(json.dumps(found).encode())


@bad("certificate: an entry left out", "sequence_gap")
def _() -> object:
    site = closed()
    site.entries.pop(13)
    return read_certificate(certificate_of(site).to_bytes())


@bad("certificate: of another site's genesis", "key_mismatch")
def _() -> object:
    return read_certificate(
        ClosingCertificate(Writer(STRANGER).entries[0], certificate_of(closed()).entries).to_bytes()
    )


@bad("certificate: signed by a stranger", "bad_signature")
def _() -> object:
    site = closed()
    forged = read([sign(raw(site.entries)[14], STRANGER)])[0]
    return read_certificate(ClosingCertificate(site.entries[0], (*site.entries[12:14], forged)).to_bytes())


@bad("certificate: of before there was a format, forged", "bad_signature")
def _() -> object:
    statements = raw(closed().entries)
    statements[14]["body"]["spent"] = "1"
    return read_certificate(json.dumps({"close": statements[14], "genesis": statements[0]}).encode())
