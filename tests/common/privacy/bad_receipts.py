"""A corpus of bad receipts and ledgers: each is made from an honest one by one change, and names its fault.

The attacker here is the strongest there is: the site itself, which holds the key. Unless a case is about
signatures, every entry is signed again after the change and every reference repaired, so that the fault named
is the only one.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from common.privacy.certificates import ClosingCertificate
from common.privacy.chain import Chain, verify_chain
from common.privacy.entries import (
    Anchor,
    Burnt,
    Close,
    Entry,
    Reserve,
    key_id_of,
    public_key_of,
)
from common.privacy.equivocation import EquivocationProof
from common.privacy.mechanisms import PoissonSubsampledGaussian
from common.privacy.receipts import Receipt, Request, check_receipt, check_receipt_alone
from common.privacy.renyi import cap_of, charge_of
from tests.common.privacy.honest_chain import (
    MODEL,
    PLAN,
    SITE,
    STRANGER,
    TRAINING,
    UPDATE,
    Raw,
    Writer,
    digest,
    honest,
    raw,
    read,
    resigned,
    sign,
)

Case = Callable[[], object]
CASES: dict[str, tuple[str, Case]] = {}


def bad(name: str, reason: str) -> Callable[[Case], Case]:
    def keep(case: Case) -> Case:
        assert name not in CASES
        CASES[name] = (reason, case)
        return case

    return keep


def edited(name: str, reason: str, seq: int, *path: str, to: Any) -> None:
    """A case: one field of one entry changed, everything signed anew by the site."""

    def case() -> object:
        before = raw(honest().entries)
        after = copy.deepcopy(before)
        place: Any = after[seq]
        for step in path[:-1]:
            place = place[step]
        assert place.get(path[-1]) != to
        place[path[-1]] = to
        return verify_chain(read(resigned(after, before)))

    bad(name, reason)(case)


edited("sigma raised, charge kept", "wrong_charge", 1, "body", "event", "noise_multiplier", to="1.5")
edited("sigma lowered, charge kept", "wrong_charge", 1, "body", "event", "noise_multiplier", to="0.9")
edited("sampling rate lowered", "wrong_charge", 1, "body", "event", "sampling_rate", to="0.01")
edited("fewer steps", "wrong_charge", 1, "body", "event", "steps", to="1")
edited("charge 0", "wrong_charge", 1, "body", "charge", to="0")
edited("charge one nano-unit short", "wrong_charge", 1, "body", "charge", to=str(charge_of(TRAINING, 3) - 1))
edited("charge one nano-unit long", "wrong_charge", 1, "body", "charge", to=str(charge_of(TRAINING, 3) + 1))
edited("running total lowered", "wrong_total", 4, "body", "spent", to="1")
edited("a mechanism nobody knows", "unknown_mechanism", 1, "body", "event", "mechanism", to="laplace")
edited("an event with one field more", "unknown_mechanism", 1, "body", "event", "sampler", to="shuffle")
edited("steps fractional", "bad_event", 1, "body", "event", "steps", to="2.5")
edited("sampling rate above one", "bad_event", 1, "body", "event", "sampling_rate", to="1.5")
edited("sampling rate zero", "bad_event", 1, "body", "event", "sampling_rate", to="0")
edited("sigma tiny", "bad_event", 1, "body", "event", "noise_multiplier", to="0.01")
edited("sigma NaN", "bad_event", 1, "body", "event", "noise_multiplier", to="NaN")
edited("sigma in scientific notation", "bad_event", 1, "body", "event", "noise_multiplier", to="1e0")
edited("sigma a hundred thousand digits", "bad_event", 1, "body", "event", "noise_multiplier", to="1" * 9000)
edited("event a list", "malformed_entry", 1, "body", "event", to=["gaussian_sum"])
edited("charge huge", "bad_field", 1, "body", "charge", to="9" * 40)
edited("charge negative", "bad_field", 1, "body", "charge", to="-1")
edited("round with a leading zero", "bad_field", 1, "body", "round", to="01")
edited("clip norm infinite", "bad_field", 1, "body", "clip_norm", to="Infinity")
edited("run's name a path", "bad_field", 1, "body", "run", to="../../etc")
edited("day with a time", "bad_field", 1, "body", "day", to="2026-01-02T10:00:00")
edited("nonce short", "bad_field", 1, "body", "nonce", to="00")
edited("alpha* changed", "wrong_cap", 0, "body", "order", to="4")
edited("delta changed", "wrong_cap", 0, "body", "delta", to="0.0001")
edited("epsilon changed", "wrong_cap", 0, "body", "epsilon", to="9")
edited("cap raised", "wrong_cap", 0, "body", "cap", to=str(cap_of(8.0, 1e-5, 3) + 1))
edited("delta one", "bad_field", 0, "body", "delta", to="1")
edited("order fractional", "bad_field", 0, "body", "order", to="2.5")
edited("unit changed to event", "wrong_unit", 0, "body", "unit", to="event")
edited("adjacency changed", "wrong_adjacency", 0, "body", "adjacency", to="replace_one")
edited("trust mode unknown", "bad_field", 0, "body", "mode", to="trust-me")
edited("kind unknown", "unknown_kind", 2, "kind", to="refund")
edited("format of the future", "unknown_format", 2, "format", to="fedtide/entry/2")
edited("a number of users slipped in", "malformed_entry", 2, "body", "users", to="1042")
edited("content not covered by the mechanism", "wrong_content", 2, "body", "content", to="statistics")
edited("content unknown", "wrong_content", 2, "body", "content", to="raw-log")
edited("clock backwards", "clock_backwards", 10, "body", "day", to="2025-12-31")
edited("reservation of another genesis", "wrong_genesis", 1, "body", "genesis", to="c" * 64)
edited("release of no reservation", "missing_reservation", 2, "body", "reservation", to="c" * 64)
edited("burn of no reservation", "missing_reservation", 7, "body", "reservation", to="c" * 64)
edited("key id of another", "key_mismatch", 2, "key_id", to=key_id_of(public_key_of(STRANGER)))
edited("sequence number skipped", "sequence_gap", 6, "seq", to="7")
edited("sequence number repeated", "sequence_repeated", 6, "seq", to="5")
edited("same run, round and attempt reserved twice", "second_reservation", 8, "body", "attempt", to="0")


def _changed(change: Callable[[list[Raw]], object]) -> object:
    statements = raw(honest().entries)
    change(statements)
    return verify_chain(read(statements))


@bad("sigma edited in the database, signature kept", "bad_signature")
def _() -> object:
    return _changed(lambda it: it[1]["body"]["event"].update(noise_multiplier="2"))


@bad("signature of another entry", "bad_signature")
def _() -> object:
    return _changed(lambda it: it[1].update(signature=it[2]["signature"]))


@bad("signature all zeros", "bad_signature")
def _() -> object:
    return _changed(lambda it: it[1].update(signature="0" * 128))


@bad("entry signed by a stranger under the site's key id", "bad_signature")
def _() -> object:
    return _changed(lambda it: it.__setitem__(11, sign(it[11], STRANGER)))


@bad("entry deleted", "sequence_gap")
def _() -> object:
    return _changed(lambda it: it.pop(6))


@bad("first reservation deleted", "sequence_gap")
def _() -> object:
    return _changed(lambda it: it.pop(1))


@bad("entries swapped", "sequence_gap")
def _() -> object:
    return _changed(lambda it: it.insert(8, it.pop(6)))


@bad("entry twice", "sequence_repeated")
def _() -> object:
    return _changed(lambda it: it.insert(6, it[5]))


@bad("previous hash wrong", "wrong_previous_hash")
def _() -> object:
    return _changed(lambda it: it.__setitem__(6, sign({**it[6], "prev": "d" * 64})))


@bad("something before the genesis", "wrong_previous_hash")
def _() -> object:
    return _changed(lambda it: it.__setitem__(0, sign({**it[0], "prev": "d" * 64})))


@bad("genesis missing", "missing_genesis")
def _() -> object:
    return _changed(lambda it: it.pop(0))


@bad("no entries", "empty")
def _() -> object:
    return verify_chain([])


@bad("second genesis", "second_genesis")
def _() -> object:
    site = honest()
    site.add(site.genesis)
    return verify_chain(site.entries)


@bad("second release on one reservation", "second_release")
def _() -> object:
    site = honest()
    site.release(site.entries[10], b"noised again")
    return verify_chain(site.entries)


@bad("burnt, then released", "burnt_reservation")
def _() -> object:
    site = honest()
    site.release(site.entries[6])
    return verify_chain(site.entries)


@bad("burnt twice", "burnt_reservation")
def _() -> object:
    site = honest()
    site.add(Burnt(site.entries[6].hash))
    return verify_chain(site.entries)


@bad("released, then burnt", "released_reservation")
def _() -> object:
    site = honest()
    site.add(Burnt(site.entries[8].hash))
    return verify_chain(site.entries)


@bad("over the cap", "over_cap")
def _() -> object:
    site = honest()
    for round_ in range(4, 50):
        site.reserve("run-a", round_, day="2026-01-03")
    return verify_chain(site.entries)


@bad("reserve after close", "after_close")
def _() -> object:
    site = honest()
    site.add(Close(site.spent, "2026-01-04"))
    site.anchor(12)
    verify_chain(site.entries)  # an anchor may follow
    site.reserve("run-c", 1, day="2026-01-05")
    return verify_chain(site.entries)


@bad("closed with another total", "wrong_total")
def _() -> object:
    site = honest()
    site.add(Close(site.spent - 1, "2026-01-04"))
    return verify_chain(site.entries)


@bad("closed over an open reservation", "open_reservation")
def _() -> object:
    site = honest()
    site.reserve("run-c", 1, day="2026-01-04")
    site.add(Close(site.spent, "2026-01-04"))
    return verify_chain(site.entries)


@bad("anchor with a broken countersignature", "bad_anchor")
def _() -> object:
    site = honest()
    anchor = Anchor.of(site.countersigned(5))
    site.add(Anchor(anchor.seq, anchor.head, public_key_of(STRANGER), anchor.countersignature))
    return verify_chain(site.entries)


@bad("anchor of another head", "fork")
def _() -> object:
    site, other = honest(), Writer()
    other.reserve("run-z", 1)
    site.add(Anchor.of(other.countersigned(1)))
    return verify_chain(site.entries)


def rewritten() -> list[Entry]:
    """The site's history with the second update's noise doubled and everything consistent: a perfect lie."""
    site = Writer()
    site.release(site.reserve("run-a", 1, event=PoissonSubsampledGaussian(0.05, 2.0, 10)))
    for round_ in range(2, 7):
        site.release(site.reserve("run-a", round_))
    return site.entries


@bad("re-signed by the site itself, against an anchor", "fork")
def _() -> object:
    return verify_chain(rewritten(), anchored_heads={2: honest().entries[2].hash})


@bad("larger budget from the beginning, against the enrolled genesis", "fork")
def _() -> object:
    return verify_chain(Writer(epsilon=80.0).entries, anchored_heads={0: honest().entries[0].hash})


@bad("tail cut off, against an anchor", "truncated")
def _() -> object:
    site = honest()
    return verify_chain(site.entries[:8], anchored_heads={11: site.entries[11].hash})


@bad("key that nobody enrolled", "unknown_key")
def _() -> object:
    return verify_chain(Writer(STRANGER).entries, key_id=key_id_of(public_key_of(SITE)))


# --- receipts


def receipt_of(site: Writer, first: int, last: int) -> Receipt:
    return Receipt(site.entries[0], tuple(site.entries[first : last + 1]))


def request_of(run: str = "run-a", round_: int = 3) -> Request:
    return Request(run, round_, digest(f"{run}/{round_}".encode()), PLAN, MODEL)


def held(site: Writer, entries: int) -> Chain:
    return Chain.begin(site.entries[0]).extended(site.entries[1:entries])


def good_receipt() -> tuple[Receipt, bytes, Request, Chain]:
    """The last update of the honest chain, for a server that holds all entries up to its reservation."""
    site = honest()
    return receipt_of(site, 10, 11), UPDATE, request_of(), held(site, 10)


@bad("another update than the receipt's", "wrong_digest")
def _() -> object:
    receipt, update, request, chain = good_receipt()
    return check_receipt(receipt, update[:-1] + b"!", request, chain)


@bad("update with bytes appended", "wrong_digest")
def _() -> object:
    receipt, update, request, chain = good_receipt()
    return check_receipt(receipt, update + b"\0", request, chain)


@bad("replayed from another run", "wrong_request")
def _() -> object:
    receipt, update, _, chain = good_receipt()
    return check_receipt(receipt, update, request_of("run-z", 3), chain)


@bad("replayed from another round", "wrong_request")
def _() -> object:
    receipt, update, _, chain = good_receipt()
    return check_receipt(receipt, update, request_of("run-a", 4), chain)


@bad("trained on another model", "wrong_request")
def _() -> object:
    receipt, update, it, chain = good_receipt()
    return check_receipt(receipt, update, Request(it.run, it.round, it.nonce, it.plan_hash, "9" * 64), chain)


@bad("trained by another plan", "wrong_request")
def _() -> object:
    receipt, update, it, chain = good_receipt()
    return check_receipt(receipt, update, Request(it.run, it.round, it.nonce, "9" * 64, it.model_hash), chain)


@bad("answer to another nonce", "wrong_request")
def _() -> object:
    receipt, update, it, chain = good_receipt()
    return check_receipt(
        receipt, update, Request(it.run, it.round, "9" * 64, it.plan_hash, it.model_hash), chain
    )


@bad("receipt of another site", "wrong_genesis")
def _() -> object:
    other = Writer(STRANGER)
    other.release(other.reserve("run-a", 3))
    return check_receipt(receipt_of(other, 1, 2), UPDATE, request_of(), good_receipt()[3])


@bad("entries withheld between head and receipt", "detached_segment")
def _() -> object:
    receipt, update, request, _ = good_receipt()
    return check_receipt(receipt, update, request, held(honest(), 6))


@bad("another history than the server has seen", "fork")
def _() -> object:
    site, other = honest(), honest()
    other.entries = other.entries[:10]
    other.release(other.reserve("run-a", 3, day="2026-01-04"))
    return check_receipt(receipt_of(other, 10, 11), UPDATE, request_of(), held(site, 12))


@bad("receipt without its release", "missing_release")
def _() -> object:
    return check_receipt(receipt_of(honest(), 10, 10), UPDATE, request_of(), good_receipt()[3])


@bad("receipt without its reservation", "missing_reservation")
def _() -> object:
    return check_receipt_alone(receipt_of(honest(), 11, 11), UPDATE)


@bad("receipt read alone: charge 0", "wrong_charge")
def _() -> object:
    site = Writer()
    body = site.reserve_body("run-a", 1)
    lie = site.add(Reserve.from_fields({**body.to_fields(), "charge": "0"}))
    site.release(lie)
    return check_receipt_alone(receipt_of(site, 1, 2))


@bad("receipt read alone: over the cap", "over_cap")
def _() -> object:
    site = Writer()
    site.spent = site.genesis.cap
    site.release(site.reserve("run-a", 1))
    return check_receipt_alone(receipt_of(site, 1, 2))


def _receipt_bytes(change: Callable[[bytes], bytes]) -> object:
    data = good_receipt()[0].to_bytes()
    changed = change(data)
    assert changed != data
    return Receipt.from_bytes(changed)


def _with(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data.replace(old, new, 1)


def _without_entries(data: bytes) -> bytes:
    return b'{"entries":""' + data[data.index(b',"format":"fedtide/receipt/1"') :]


for _name, _reason, _change in (
    ("a bare float", "float_number", _with(b'"clip_norm":"1"', b'"clip_norm":1.0')),
    ("a bare whole number", "whole_number", _with(b'"round":"3"', b'"round":3')),
    ("a bare NaN", "float_number", _with(b'"clip_norm":"1"', b'"clip_norm":NaN')),
    ("a null", "literal", _with(b'"learning_rate":"0.1"', b'"learning_rate":null')),
    ("a duplicate key", "duplicate_key", _with(b'"round":"3"', b'"round":"3","round":"4"')),
    ("non-ASCII bytes", "non_ascii", _with(b"run-a", "rün".encode())),
    ("trailing bytes", "malformed_json", lambda data: data + b"{}"),
    ("trailing whitespace", "not_canonical", lambda data: data + b"\n"),
    ("cut short", "malformed_json", lambda data: data[: len(data) // 2]),
    ("nested too deep", "too_deep", lambda data: b"[" * 100_000 + data),
    ("too long", "too_long", lambda data: data + b" " * (1 << 24)),
    (
        "entries no list",
        "malformed_entry",
        _without_entries,
    ),
    ("another format", "unknown_format", _with(b"fedtide/receipt/1", b"fedtide/receipt/9")),
    ("a field more", "malformed_entry", _with(b'"kind":"release"', b'"kind":"release","loss":"0.25"')),
):
    bad(f"receipt with {_name}", _reason)(partial(_receipt_bytes, _change))


# --- proofs of equivocation that prove none


@bad("equivocation: the same entry twice", "no_equivocation")
def _() -> None:
    site = honest()
    EquivocationProof(site.entries[3], site.entries[3]).verify(site.genesis.public_key)


@bad("equivocation: entries at different places", "no_equivocation")
def _() -> None:
    site = honest()
    EquivocationProof(site.entries[3], site.entries[4]).verify(site.genesis.public_key)


@bad("equivocation: another key's entry", "no_equivocation")
def _() -> None:
    site = honest()
    EquivocationProof(site.entries[0], Writer(STRANGER).entries[0]).verify(site.genesis.public_key)


@bad("equivocation: forged by the accuser", "bad_signature")
def _() -> None:
    site = honest()
    forged = sign({**raw(site.entries)[3], "prev": "e" * 64}, STRANGER)
    EquivocationProof(site.entries[3], read([forged])[0]).verify(site.genesis.public_key)


# --- certificates of a withdrawal


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
_certificate("a sentence more", "wrong_words", _with(b'"in_words": [', b'"in_words": ["No user was here.", '))
_certificate(
    "the total edited, and its words", "bad_signature", lambda data: _without_words(_lower_total(data))
)
_certificate("another format", "unknown_format", _with(b"certificate/1", b"certificate/9"))
_certificate(
    "a count of users beside it", "malformed_entry", _with(b'"signed"', b'"users": "1042", "signed"')
)
_certificate("a number", "whole_number", _with(b'"seq": "14"', b'"seq": 14'))
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


_signed_certificate("another total than its entries", "wrong_total", lambda site: _closed_at(site, -1))
_signed_certificate("another total, whole ledger", "wrong_total", lambda site: _closed_at(site, -1), first=1)
_signed_certificate("more than the cap", "over_cap", lambda site: _closed_at(site, 10**12, reserve=False))
_signed_certificate("a reservation left open", "open_reservation", _closed_open)
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
