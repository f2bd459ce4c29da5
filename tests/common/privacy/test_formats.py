"""docs/formats.md is enough: a verifier that was written from it, and imports nothing of ours, judges as we do."""

from __future__ import annotations

import copy
import random
import re
from pathlib import Path

import pytest

from common.privacy.canonical import encode
from common.privacy.entries import NO_PREVIOUS, Close, Reserve
from common.privacy.faults import ReceiptError
from common.privacy.mechanisms import (
    Event,
    GaussianSum,
    PoissonSubsampledGaussian,
    event_to_fields,
    number_to_text,
)
from common.privacy.receipts import Receipt
from common.privacy.renyi import cap_of, charge_of
from tests.common.privacy import bad_receipts as corpus
from tests.common.privacy import worked_example
from tests.common.privacy.bad_certificates import certificate_of, closed
from tests.common.privacy.honest_chain import SITE, STRANGER, Raw, Writer, raw, resigned, sign
from tests.common.privacy.strangers_items import (
    KNOWN,
    VERIFIER,
    Item,
    fault,
    judged,
    of_certificate,
    of_chain,
    of_corpus,
    of_receipt,
    text,
)

UNREAD = {"certificate: words of a smaller share", "certificate: a sentence more"}
"""Items that are faulty only in the words of a certificate, which the page tells a program not to read."""

UNBOUND = {
    ("genesis", "mode"),
    ("genesis", "dataset_commitment"),
    ("reserve", "run"),
    ("reserve", "round"),
    ("reserve", "attempt"),
    ("reserve", "plan_hash"),
    ("reserve", "model_hash"),
    ("reserve", "nonce"),
    ("reserve", "clip_norm"),
    ("reserve", "normaliser"),
    ("reserve", "learning_rate"),
    ("release", "update_digest"),
    ("release", "update_bytes"),
    ("release", "content"),  # of sums: statistics may be called metrics
    ("genesis", "day"),  # a later one is as good as another
    ("reserve", "day"),
    ("close", "day"),
}
"""Fields of which a chain alone says nothing: a site may sign what it likes there. The page says so, and what each is
held against by who knows more."""


def page() -> str:
    return worked_example.PAGE.read_text()


def honest_items() -> dict[str, Item]:
    site, receipt = worked_example.ledger(), worked_example.receipt()
    good, update, request, held = corpus.good_receipt()
    statements = raw(closed().entries)
    old = encode({"close": statements[-1], "genesis": statements[0]})
    return {
        "ledger": of_chain(site.entries, {2: site.entries[2].hash}, site.entries[0].key_id),
        "longer ledger": of_chain(closed().entries),
        "receipt": of_receipt(receipt.to_bytes(), worked_example.UPDATE),
        "receipt in the middle": of_receipt(good.to_bytes(), update),
        "receipt against the chain": of_receipt(good.to_bytes(), update, request, held),
        "countersignature": {"kind": "countersignature", "data": text(site.countersigned(2).to_bytes())},
        "certificate": of_certificate(worked_example.certificate().to_bytes()),
        "certificate of a whole ledger": of_certificate(certificate_of(closed(), 1).to_bytes()),
        "certificate of earlier versions": of_certificate(old + b"\n"),
    }


@pytest.fixture(scope="module")
def items() -> dict[str, tuple[str, Item]]:
    return of_corpus()


def test_the_worked_example_is_what_the_code_makes() -> None:
    assert worked_example.in_page(page()) == worked_example.blocks()


def test_every_fault_has_its_place_on_the_page() -> None:
    ours = KNOWN - {ReceiptError.reason}
    theirs = set(re.findall(r'"([a-z]+_[a-z_]+)"\)$', VERIFIER.read_text(), re.MULTILINE))
    assert len(theirs) > 30
    assert {reason for reason in ours | theirs if f"`{reason}`" not in page()} == set()


def test_what_is_honest_is_believed(tmp_path: Path) -> None:
    assert set(judged(tmp_path, honest_items()).values()) == {""}


def test_each_bad_receipt_is_refused_for_its_own_reason(
    items: dict[str, tuple[str, Item]], tmp_path: Path
) -> None:
    told = judged(tmp_path, {name: item for name, (_, item) in items.items()})
    assert {name for name, said in told.items() if not said} == UNREAD
    wrong = {
        name: (said, items[name][0]) for name, said in told.items() if said and said != fault(items[name][0])
    }
    assert not wrong


def test_charges_and_caps_come_out_the_same_by_other_arithmetic(tmp_path: Path) -> None:
    chance = random.Random(7)
    asked: dict[str, Item] = {}
    ours: dict[str, str] = {}

    def ask(event: Event, order: int) -> None:
        name = f"{event} at {order}"
        asked[name] = {"kind": "charge", "event": event_to_fields(event), "order": order}
        ours[name] = str(charge_of(event, order))

    for order in (2, 3, 17, 256):
        for sigma in (0.1, 0.5, 1.5, 6.0, 1e6):
            ask(GaussianSum(sigma), order)
            for rate in (1e-40, 1e-9, 0.05, 1.0):
                ask(PoissonSubsampledGaussian(rate, sigma, 7), order)
    for _ in range(150):
        sigma = round(10 ** chance.uniform(-0.9, 3), chance.randrange(1, 9))
        rate, steps = (
            chance.choice([1.0, chance.random(), 10 ** chance.uniform(-6, 0)]),
            chance.randrange(1, 5000),
        )
        ask(PoissonSubsampledGaussian(rate, max(sigma, 0.1), steps), chance.randrange(2, 65))
        goal = (chance.uniform(6, 900), 10 ** chance.uniform(-9, -2), chance.randrange(2, 257))
        asked[str(goal)] = {
            "kind": "cap",
            "goal": [number_to_text(goal[0]), number_to_text(goal[1]), goal[2]],
        }
        ours[str(goal)] = str(cap_of(*goal))
    assert judged(tmp_path, asked) == ours


def test_both_charges_of_the_page_are_believed_and_nothing_between(tmp_path: Path) -> None:
    site = Writer()
    cheap = GaussianSum(1000.0)
    exact, least = charge_of(cheap, 3), -(-site.genesis.cap // 1000)
    assert exact < least

    def charged(charge: int) -> Item:
        again = Writer()
        body = again.reserve_body("run-a", 1, event=cheap).to_fields() | {
            "charge": str(charge),
            "spent": str(charge),
        }
        again.add(Reserve.from_fields(body))
        return of_chain(again.entries)

    amounts = (exact - 1, exact, exact + 1, least - 1, least, least + 1)
    told = judged(tmp_path, {str(amount): charged(amount) for amount in amounts})
    assert {name for name, said in told.items() if not said} == {str(exact), str(least)}
    assert set(told.values()) == {"", "wrong_charge"}


# --- planted faults


def _other(value: str) -> str:
    """Another value of the same form: the last letter or digit is another."""
    swap = {
        "9": "8",
        "f": "e",
        "user": "item",
        "site": "secagg",
        "update": "metrics",
        "statistics": "metrics",
        "": "1",
    }
    if value in swap:
        return swap[value]
    last = value[-1]
    return value[:-1] + (chr(ord(last) + 1) if last not in "9fz" else chr(ord(last) - 1))


def _flips(statements: list[Raw]) -> list[tuple[int, tuple[str, ...]]]:
    """Every field of every entry, of its body, and of its event."""
    found = list[tuple[int, tuple[str, ...]]]()
    for place, entry in enumerate(statements):
        found += [(place, (name,)) for name in entry if name != "body"]
        found += [(place, ("body", name)) for name in entry["body"] if name != "event"]
        found += [(place, ("body", "event", name)) for name in entry["body"].get("event", {})]
    return found


def _flipped(statements: list[Raw], place: int, path: tuple[str, ...]) -> list[Raw]:
    changed = raw_copy(statements)
    within = changed[place]
    for name in path[:-1]:
        within = within[name]
    empty = path[-1] == "dataset_commitment"
    within[path[-1]] = "c" * 64 if empty else _other(within[path[-1]])
    return changed


def raw_copy(statements: list[Raw]) -> list[Raw]:
    return copy.deepcopy(statements)


def as_chain(statements: list[Raw]) -> Item:
    return of_chain([encode(each) for each in statements])


def test_any_field_flipped_is_refused_where_the_site_does_not_sign_anew(tmp_path: Path) -> None:
    honest = raw(worked_example.ledger().entries)
    told = judged(
        tmp_path,
        {f"{place} {path}": as_chain(_flipped(honest, place, path)) for place, path in _flips(honest)},
    )
    assert len(told) > 80
    assert not [name for name, said in told.items() if not said]


def test_any_field_flipped_by_the_site_itself_is_refused_but_those_that_bind_nothing(tmp_path: Path) -> None:
    """The site has the key, and no server has countersigned yet: all is signed anew, every reference repaired."""
    honest = raw(worked_example.ledger(anchored=False).entries)
    items, fields = dict[str, Item](), dict[str, tuple[str, str]]()
    for place, path in _flips(honest):
        if path[-1] in ("signature", "prev") or path == ("seq",):
            continue  # made anew by signing; of places: below
        name = f"{place} {path}"
        items[name] = as_chain(resigned(_flipped(honest, place, path), honest))
        fields[name] = (honest[place]["kind"], path[-1])
    believed = {fields[name] for name, said in judged(tmp_path, items).items() if not said}
    assert believed == UNBOUND
    listed = page().split("## What no verifier sees")[1]
    assert {name for _, name in UNBOUND if f"`{name}`" not in listed} == set()


def test_nothing_before_an_anchor_can_be_rewritten_by_the_site_itself(tmp_path: Path) -> None:
    honest = raw(worked_example.ledger().entries)
    items = {
        f"{place} {path}": as_chain(resigned(_flipped(honest, place, path), honest))
        for place, path in _flips(honest)
        if place <= 2 and path[-1] not in ("signature", "prev", "seq")
    }
    assert len(items) > 35
    assert all(judged(tmp_path, items).values())


def test_what_binds_nothing_alone_is_refused_against_request_and_bytes(tmp_path: Path) -> None:
    _, update, request, _ = corpus.good_receipt()
    before = raw(corpus.honest().entries)
    items = dict[str, Item]()
    for place, name in [(10, each) for each in ("run", "round", "plan_hash", "model_hash", "nonce")] + [
        (11, "update_digest"),
        (11, "update_bytes"),
    ]:
        entries = corpus.read(resigned(_flipped(before, place, ("body", name)), before))
        items[name] = of_receipt(Receipt(entries[0], tuple(entries[10:12])).to_bytes(), update, request)
    told = judged(tmp_path, items)
    assert set(told.values()) == {"wrong_request", "wrong_digest"}


def test_entries_swapped_dropped_or_doubled_are_refused(tmp_path: Path) -> None:
    honest = raw(worked_example.ledger().entries)
    items = dict[str, Item]()

    def rechained(statements: list[Raw]) -> list[Raw]:
        """By the site itself: numbers, hashes and signatures anew; references stay."""
        previous, found = NO_PREVIOUS, list[Raw]()
        for place, each in enumerate(statements):
            found.append(sign({**each, "seq": str(place), "prev": previous}))
            previous = corpus.digest(encode(found[-1]))
        return found

    for place in range(len(honest)):
        dropped = honest[:place] + honest[place + 1 :]
        doubled = honest[: place + 1] + honest[place:]
        swapped = [*honest[:place], *reversed(honest[place : place + 2]), *honest[place + 2 :]]
        for name, statements in (("dropped", dropped), ("doubled", doubled), ("swapped", swapped)):
            if statements == honest or (name == "dropped" and place == len(honest) - 1):
                continue  # a chain cut short is a chain: only an anchor tells
            items[f"{name} {place}"] = as_chain(statements)
            items[f"{name} {place}, signed anew"] = as_chain(rechained(statements))
    believed = {name for name, said in judged(tmp_path, items).items() if not said}
    # The site may leave an anchor out of a history that it signs anew: only who kept the head tells (`fork`).
    assert believed <= {"dropped 3, signed anew"}


def test_another_genesis_or_key_is_refused(tmp_path: Path) -> None:
    site, receipt = worked_example.ledger(), worked_example.receipt()
    other, richer = Writer(STRANGER).entries[0], Writer(SITE, epsilon=80.0).entries[0]
    certificate = worked_example.certificate()
    told = judged(
        tmp_path,
        {
            "receipt, another site": of_receipt(Receipt(other, receipt.entries).to_bytes()),
            "receipt, larger budget": of_receipt(Receipt(richer, receipt.entries).to_bytes()),
            "certificate, another site": of_certificate(
                type(certificate)(other, certificate.entries).to_bytes()
            ),
            "certificate, larger budget": of_certificate(
                type(certificate)(richer, certificate.entries).to_bytes()
            ),
            "ledger, another key enrolled": of_chain(site.entries, key_id=other.key_id),
            "ledger, another head anchored": of_chain(site.entries, {2: site.entries[3].hash}),
            "ledger, cut short": of_chain(site.entries[:2], {2: site.entries[2].hash}),
        },
    )
    assert all(told.values()), told


def test_a_verifier_that_forgot_a_rule_does_not_pass(
    items: dict[str, tuple[str, Item]], tmp_path: Path
) -> None:
    """The corpus can tell: each rule taken out of the verifier lets an item through, or names another fault."""
    source = VERIFIER.read_text()
    for rule in (
        'need(charge in (due, max(due, -(-self.cap // 1000))), "wrong_charge")',
        'need(spent <= self.cap, "over_cap")',
        'need(each["prev"] == hash_of(before), "wrong_previous_hash")',
        "check_signature(each, self.promise",
        'need(self.cap == cap_of(promise["epsilon"], promise["delta"], self.order), "wrong_cap")',
        'check_signature(signed, body["server_key"], "bad_anchor")',
        'need(was is None, "second_release" if kind == "release" else "released_reservation")',
        'need(set(self.reserves) <= set(self.outcomes), "open_reservation")',
        "need((size, digest) ==",
        'need(not canonical or spell(value) == data, "not_canonical")',
    ):
        (line,) = [each for each in source.splitlines() if rule in each]
        broken = tmp_path / "broken.py"
        broken.write_text(source.replace(line, line.split(line.lstrip())[0] + "pass"))
        told = judged(tmp_path, {name: item for name, (_, item) in items.items()}, broken)
        assert any(said != fault(items[name][0]) for name, said in told.items() if name not in UNREAD), rule


def test_the_closing_entry_of_a_certificate_that_is_lower_than_its_last_charge_is_refused(
    tmp_path: Path,
) -> None:
    site = worked_example.ledger()
    site.entries.pop()
    site.add(Close(site.spent - 1, "2026-01-04"))

    def make(first: int) -> Item:
        return of_certificate(certificate_of(site, first).to_bytes())

    told = judged(tmp_path, {"end": make(3), "whole": make(1), "close alone": make(6)})
    # whose last charge is not shown cannot be told: only who holds the chain can
    assert told == {"end": "wrong_total", "whole": "wrong_total", "close alone": ""}
