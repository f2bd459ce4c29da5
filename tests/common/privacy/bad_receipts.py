"""A corpus of bad receipts and ledgers: each is made from an honest one by one change, and names its fault.

The attacker here is the strongest there is: the site itself, which holds the key. Unless a case is about
signatures, every entry is signed again after the change and every reference repaired, so that the fault named
is the only one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

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
    site.release(site.reserve("run-a", 1))
    site.spent = site.genesis.cap
    site.release(site.reserve("run-a", 2))
    return check_receipt_alone(receipt_of(site, 3, 4))


def _receipt_bytes(change: Callable[[bytes], bytes]) -> object:
    data = good_receipt()[0].to_bytes()
    changed = change(data)
    assert changed != data
    return Receipt.from_bytes(changed)


def with_bytes(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    """An edit of a file: the first `old` in it becomes `new`."""
    return lambda data: data.replace(old, new, 1)


def _without_entries(data: bytes) -> bytes:
    return b'{"entries":""' + data[data.index(b',"format":"fedtide/receipt/1"') :]


for _name, _reason, _change in (
    ("a bare float", "float_number", with_bytes(b'"clip_norm":"1"', b'"clip_norm":1.0')),
    ("a bare whole number", "whole_number", with_bytes(b'"round":"3"', b'"round":3')),
    ("a bare NaN", "float_number", with_bytes(b'"clip_norm":"1"', b'"clip_norm":NaN')),
    ("a null", "literal", with_bytes(b'"learning_rate":"0.1"', b'"learning_rate":null')),
    ("a duplicate key", "duplicate_key", with_bytes(b'"round":"3"', b'"round":"3","round":"4"')),
    ("non-ASCII bytes", "non_ascii", with_bytes(b"run-a", "rün".encode())),
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
    ("another format", "unknown_format", with_bytes(b"fedtide/receipt/1", b"fedtide/receipt/9")),
    ("a field more", "malformed_entry", with_bytes(b'"kind":"release"', b'"kind":"release","loss":"0.25"')),
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
