"""De-identification: the HMAC is the standard one, differs between sites, and its secret is guarded."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.events.deidentify import Keyed, SecretError, load_secret, new_secret, pseudonym, tie_key

ONE, OTHER = bytes(32), bytes([1]) * 32


def test_a_pseudonym_is_the_standard_hmac_cut_to_128_bits() -> None:
    expected = hmac.new(ONE, b"fedtide/user\0\xc3\xa9", hashlib.sha256).hexdigest()[:32]
    assert pseudonym("\u00e9", ONE) == expected


def test_pseudonyms_and_tie_keys_differ_between_users_and_sites() -> None:
    for derive in (pseudonym, tie_key):
        assert len({derive(user, secret) for user in ("a", "b") for secret in (ONE, OTHER)}) == 4
        assert derive("a", ONE) == derive("a", ONE)


@given(st.text(st.characters(codec="utf-8"), max_size=200), st.binary(min_size=32, max_size=32))
def test_keyed_at_once_is_keyed_one_by_one(user: str, secret: bytes) -> None:
    keyed = Keyed(secret)
    for _ in range(2):  # one user leaves no trace in the next one's
        assert keyed.pseudonym_bytes(user).hex() == pseudonym(user, secret)
        assert keyed.tie_key(user) == tie_key(user, secret)


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(SecretError, match="32 bytes"):
        pseudonym("a", b"short")
    with pytest.raises(SecretError, match="32 bytes"):
        Keyed(b"short")


def test_a_new_secret_is_private_random_and_never_overwritten(tmp_path: Path) -> None:
    secret = new_secret(tmp_path / "one")
    assert len(secret) == 32
    assert secret != new_secret(tmp_path / "two")
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o600
    assert load_secret(tmp_path / "one") == secret
    with pytest.raises(SecretError, match="exists"):
        new_secret(tmp_path / "one")
    assert load_secret(tmp_path / "one") == secret


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o700, 0o610])
def test_a_secret_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    new_secret(tmp_path / "secret")
    (tmp_path / "secret").chmod(mode)
    with pytest.raises(SecretError, match="chmod 600"):
        load_secret(tmp_path / "secret")


def test_a_secret_may_be_read_only(tmp_path: Path) -> None:
    secret = new_secret(tmp_path / "secret")
    (tmp_path / "secret").chmod(0o400)
    assert load_secret(tmp_path / "secret") == secret


@pytest.mark.parametrize("content", ["", "not hex", "abcd"])
def test_a_damaged_or_missing_secret_is_refused_without_showing_it(tmp_path: Path, content: str) -> None:
    with pytest.raises(SecretError, match="cannot be read"):
        load_secret(tmp_path / "secret")
    (tmp_path / "secret").write_text(content)
    (tmp_path / "secret").chmod(0o600)
    with pytest.raises(SecretError, match="is damaged") as caught:
        load_secret(tmp_path / "secret")
    assert not content or content not in str(caught.value)
