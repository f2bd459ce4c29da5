"""A withdrawal's certificate: it travels, is read in its old form too, and says what was signed."""

from __future__ import annotations

import json

import pytest

from common.privacy.canonical import encode
from common.privacy.certificates import ClosingCertificate
from common.privacy.entries import Close
from common.privacy.renyi import NANO, renyi_to_epsilon
from tests.common.privacy.bad_certificates import certificate_of, closed
from tests.common.privacy.honest_chain import Writer, raw

# Each bad certificate is in the corpus: see test_receipts.py.


@pytest.mark.parametrize("first", [1, 12, 14])
def test_a_certificate_travels(first: int) -> None:
    site = closed()
    certificate = certificate_of(site, first)
    read = ClosingCertificate.from_bytes(certificate.to_bytes())
    assert read == certificate
    assert read.verify() == Close(site.spent, "2026-01-04")


def test_a_file_that_an_editor_spelled_anew_is_the_same_certificate() -> None:
    certificate = certificate_of(closed())
    found = json.loads(certificate.to_bytes())
    spelled = json.dumps(dict(reversed(found.items())), indent=7).encode()
    assert ClosingCertificate.from_bytes(spelled) == certificate


def test_a_certificate_from_before_there_was_a_format_is_read() -> None:
    statements = raw(closed().entries)
    old = encode({"close": statements[14], "genesis": statements[0]}) + b"\n"
    certificate = ClosingCertificate.from_bytes(old)
    assert certificate.verify().spent == closed().spent
    assert certificate == certificate_of(closed(), 14)


def test_the_words_give_amount_day_key_and_what_it_comes_to() -> None:
    site = closed()
    certificate = certificate_of(site)
    words = " ".join(certificate.in_words())
    assert f"withdrew on 2026-01-04 (UTC): its ledger, begun on {site.genesis.day}" in words
    assert f"{site.spent} of {site.genesis.cap} nano-units of Renyi divergence at order 3" in words
    assert " ".join(site.entries[0].key_id[at : at + 4] for at in (0, 4)) in words
    bound = renyi_to_epsilon(site.spent / NANO, 1e-5, 3)
    assert bound <= certificate.epsilon_bound() <= bound + 1e-4
    assert f"comes to epsilon {certificate.epsilon_bound()}, which is a bound only if" in words
    assert json.loads(certificate.to_bytes())["in_words"] == certificate.in_words()


def test_a_site_that_never_released_spent_nothing() -> None:
    """The filter's bound is no use at zero: at a fixed order it would say epsilon 4.8 of nothing."""
    site = Writer()
    site.add(Close(0, "2026-01-02"))
    certificate = certificate_of(site, 1)
    assert certificate.verify().spent == 0
    assert certificate.epsilon_bound() == 0
    assert "comes to epsilon 0, which" in " ".join(certificate.in_words())
