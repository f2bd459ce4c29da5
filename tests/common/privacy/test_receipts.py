"""Receipts and chains: the honest ones verify, each bad one of the corpus is refused for its own reason."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.privacy import canonical, faults
from common.privacy.anchors import Countersignature
from common.privacy.chain import verified_chain, verify_chain
from common.privacy.entries import Burnt, Entry, Genesis, Release, Reserve
from common.privacy.equivocation import EquivocationProof
from common.privacy.faults import BadFieldError, ForkError, ReceiptError, WrongChargeError
from common.privacy.mechanisms import GaussianSum
from common.privacy.receipts import (
    Receipt,
    check_receipt,
    check_receipt_alone,
)
from common.privacy.renyi import charge_at, charge_of, least_charge
from common.privacy.rules import check_charge
from tests.common.privacy import bad_receipts as corpus
from tests.common.privacy import honest_chain as chains
from tests.common.privacy.bad_certificates import CASES


@pytest.mark.parametrize("name", CASES)
def test_each_bad_receipt_is_refused_for_its_own_reason(name: str) -> None:
    reason, case = CASES[name]
    with pytest.raises(ReceiptError) as caught:
        case()
    assert caught.value.reason == reason


def test_the_corpus_is_large_and_meets_every_fault() -> None:
    assert len(CASES) >= 40
    met = {reason for reason, _ in CASES.values()}
    known: set[type[ReceiptError]] = {
        each
        for module in (faults, canonical)
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, ReceiptError)
    }
    assert len({each.reason for each in known}) == len(known)
    # "unsupported_type" is met by Python values only: see test_canonical
    assert {each.reason for each in known} - met == {ReceiptError.reason, "unsupported_type"}


def test_the_unmodified_originals_verify() -> None:
    site = chains.honest()
    before = chains.raw(site.entries)
    report = verify_chain(
        chains.read(before), anchored_heads={2: site.entries[2].hash, 11: site.entries[11].hash}
    )
    assert (report.seq, report.head) == (11, site.entries[11].hash)
    assert (report.reserved, report.released, report.burnt, report.open) == (5, 4, 1, 0)
    assert report.spent == site.spent == 4 * charge_of(chains.TRAINING, 3) + charge_of(chains.STATISTICS, 3)
    # signing anew an unchanged chain changes nothing: the corpus' faults are its edits, not its machinery
    assert chains.resigned(before, before) == before
    receipt, update, request, chain = corpus.good_receipt()
    extended = check_receipt(Receipt.from_bytes(receipt.to_bytes()), update, request, chain)
    assert extended.head.seq == 11
    assert chain.head.seq == 9
    assert check_receipt_alone(receipt, update).round == 3


def test_a_perfect_lie_verifies_without_an_anchor() -> None:
    """Why anchors are not optional: this is undetectable, and must stay documented as such."""
    assert verify_chain(corpus.rewritten()).released == 6
    assert verify_chain(chains.honest().entries[:8]).released == 2


def test_the_charge_is_recomputed_from_the_receipt_alone() -> None:
    receipt, *_ = corpus.good_receipt()
    read = Receipt.from_bytes(receipt.to_bytes())
    assert isinstance(read.genesis.body, Genesis)
    genesis = read.genesis.body
    assert charge_at(read.reserve.event, genesis.order, genesis.cap) == read.reserve.charge
    check_charge(read.reserve, genesis)


NEARLY_FREE = GaussianSum(1e4)


def charged(charge: int) -> list[Entry]:
    """A ledger of one reservation of a nearly free event, signed by the site."""
    site = chains.Writer()
    body = site.reserve_body("run-a", 1, event=NEARLY_FREE)
    site.add(dataclasses.replace(body, charge=charge, spent=charge))
    return site.entries


def test_a_charge_is_the_events_own_or_the_least_and_nothing_else() -> None:
    """The first stands in ledgers from before there was a least charge; it covers what the event costs."""
    genesis = chains.Writer().genesis
    exact, least = charge_of(NEARLY_FREE, genesis.order), least_charge(genesis.cap)
    assert 2 < exact < least - 2
    for charge in (exact, least):
        entries = charged(charge)
        assert verify_chain(entries).spent == charge
        assert isinstance(entries[1].body, Reserve)
        check_charge(entries[1].body, genesis)
    for charge in (1, exact - 1, exact + 1, (exact + least) // 2, least - 1, least + 1, genesis.cap):
        entries = charged(charge)
        with pytest.raises(WrongChargeError, match=f"the event is charged {least}"):
            verify_chain(entries)
        assert isinstance(entries[1].body, Reserve)
        with pytest.raises(WrongChargeError):
            check_charge(entries[1].body, genesis)


def test_an_event_that_costs_more_than_the_least_is_charged_what_it_costs() -> None:
    genesis = chains.Writer().genesis
    exact = charge_of(chains.TRAINING, genesis.order)
    assert exact > least_charge(genesis.cap)
    site = chains.Writer()
    body = site.reserve_body("run-a", 1)
    site.add(dataclasses.replace(body, charge=least_charge(genesis.cap), spent=least_charge(genesis.cap)))
    with pytest.raises(WrongChargeError):
        verify_chain(site.entries)


def test_a_segment_may_repeat_what_is_held_and_arrive_twice() -> None:
    site = chains.honest()
    chain = corpus.held(site, 6)
    longer = chain.extended(site.entries[3:10])
    assert longer.head.seq == 9
    assert longer.extended(site.entries[4:8]).report() == longer.report()
    assert chain.head.seq == 5
    assert longer.extended(site.entries[10:]).report() == verify_chain(site.entries)


def test_a_faulty_segment_leaves_the_chain_as_it_was() -> None:
    site = chains.honest()
    chain = corpus.held(site, 6)
    before = chain.report()
    with pytest.raises(ReceiptError):
        chain.extended([*site.entries[6:9], site.entries[11]])
    assert chain.report() == before


def test_equivocation_leaves_a_proof_that_travels() -> None:
    site, other = chains.honest(), chains.honest()
    other.entries = other.entries[:10]
    other.reserve("run-a", 3, day="2026-01-04")
    with pytest.raises(ForkError) as caught:
        corpus.held(site, 12).extended(other.entries[9:])
    assert caught.value.proof is not None
    proof = EquivocationProof.from_bytes(caught.value.proof.to_bytes())
    proof.verify(site.genesis.public_key)
    assert proof.first.seq == proof.second.seq == 10


def test_a_countersignature_travels() -> None:
    signed = chains.honest().countersigned(5)
    read = Countersignature.from_bytes(signed.to_bytes())
    read.check()
    assert read == signed
    with pytest.raises(ReceiptError) as caught:
        dataclasses.replace(read, seq=6).check()
    assert caught.value.reason == "bad_anchor"


def test_nothing_in_an_entry_can_depend_on_a_user() -> None:
    """The whole vocabulary of what leaves a site; a field more needs a look at DESIGN.md section 2."""
    assert {each.name for each in dataclasses.fields(Release)} == {
        "reservation",
        "content",
        "update_digest",
        "update_bytes",
    }
    assert {each.name for each in dataclasses.fields(Burnt)} == {"reservation"}
    assert "day" in {each.name for each in dataclasses.fields(Reserve)}
    assert not {"time", "ts", "timestamp"} & {each.name for each in dataclasses.fields(Reserve)}


def test_a_body_out_of_bounds_cannot_be_made() -> None:
    with pytest.raises(BadFieldError, match="round"):
        dataclasses.replace(chains.Writer().reserve_body("run-a", 1), round=-1)
    with pytest.raises(BadFieldError, match="clip_norm"):
        dataclasses.replace(chains.Writer().reserve_body("run-a", 1), clip_norm=float("nan"))


@given(st.floats(0.1, 1e6), st.floats(1e-9, 1e9), st.integers(0, 10**18), st.none() | st.floats(1e-6, 1e6))
@settings(max_examples=50, deadline=None)
def test_any_reservation_travels_unchanged(
    noise: float, norm: float, round_: int, learning_rate: float | None
) -> None:
    site = chains.Writer()
    body = dataclasses.replace(
        site.reserve_body("run-a", 1, event=GaussianSum(noise)),
        clip_norm=norm,
        round=round_,
        learning_rate=learning_rate,
    )
    entry = site.add(body)
    assert Entry.from_bytes(entry.to_bytes()) == entry


@given(st.integers(0, 11), st.integers(0, 10_000), st.binary(min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_any_change_to_any_byte_of_a_chain_is_refused(seq: int, where: int, new: bytes) -> None:
    data = _HONEST[seq].to_bytes()
    where %= len(data)
    mutated = data[:where] + new + data[where + len(new) :]
    if mutated == data:
        return
    with pytest.raises(ReceiptError):
        verify_chain([*_HONEST[:seq], Entry.from_bytes(mutated), *_HONEST[seq + 1 :]])


_HONEST = chains.honest().entries


def test_a_long_chain_verifies() -> None:
    """How long ten thousand entries take is measured by `simulations.benchmarks.ledger`."""
    site = chains.Writer(epsilon=900.0)
    for round_ in range(500):
        site.release(site.reserve("run-a", round_, event=GaussianSum(40.0)), content="metrics")
    data = [entry.to_bytes() for entry in site.entries]
    chain = verified_chain([Entry.from_bytes(each) for each in data])
    assert chain.report().released == 500
    with pytest.raises(ReceiptError):
        verified_chain([Entry.from_bytes(each) for each in (*data[:700], *data[701:])])
