"""One value, one spelling: round trips, refusals by name, and a fuzzer that finds no third outcome."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.privacy.canonical import DEEPEST, CanonicalError, Value, decode, encode

texts = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12)
values: st.SearchStrategy[Value] = st.recursive(
    texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


@given(values)
def test_what_is_encoded_decodes_to_the_same(value: Value) -> None:
    data = encode(value)
    assert decode(data) == value
    assert encode(decode(data)) == data
    assert data.isascii()


@given(values, values)
def test_different_values_have_different_bytes(one: Value, other: Value) -> None:
    assert (encode(one) == encode(other)) == (one == other)


@given(st.dictionaries(texts, texts, max_size=6))
def test_the_order_of_insertion_does_not_matter(value: dict[str, Value]) -> None:
    assert encode(value) == encode(dict(reversed(value.items())))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"a":1.5}', "float_number"),
        (b'{"a":1e400}', "float_number"),
        (b'["x",NaN]', "float_number"),
        (b"[-Infinity]", "float_number"),
        (b'{"a":1}', "whole_number"),
        (b"9" * 10_000, "whole_number"),
        (b"[true]", "literal"),
        (b'{"a":null}', "literal"),
        (b'{"a":"1","a":"2"}', "duplicate_key"),
        (b'{"a":"1","\\u0061":"2"}', "duplicate_key"),
        ('{"a":"é"}'.encode(), "non_ascii"),
        (b'{"a":"\\u00e9"}', "non_ascii"),
        (b'"\\n"', "non_ascii"),
        (b'"\\ud800"', "non_ascii"),
        (b"[" * 17 + b"]" * 17, "too_deep"),
        (b"[" * 500_000, "too_deep"),
        (b'{"a":' * 200_000, "too_deep"),
        (b'"' + b"a" * (1 << 20) + b'"', "too_long"),
        (b'{"a":"1"}x', "malformed_json"),
        (b'{"a":"1"}{}', "malformed_json"),
        (b"", "malformed_json"),
        (b"{'a':'1'}", "malformed_json"),
        (b'"\x07"', "malformed_json"),
        (b'{"a":"1"} ', "not_canonical"),
        (b'{"a": "1"}', "not_canonical"),
        (b'{"b":"1","a":"2"}', "not_canonical"),
        (b'"\\u0061"', "not_canonical"),
        (b'"\\/"', "not_canonical"),
        (b'\n["a"]', "not_canonical"),
    ],
)
def test_other_spellings_are_refused_by_name(data: bytes, reason: str) -> None:
    with pytest.raises(CanonicalError) as caught:
        decode(data)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (1.0, "float_number"),
        ([float("nan")], "float_number"),
        ({"a": 3}, "whole_number"),
        (True, "literal"),
        (None, "literal"),
        (b"a", "unsupported_type"),
        (("a",), "unsupported_type"),
        ({1: "a"}, "unsupported_type"),
        ("é", "non_ascii"),
        ({"\n": "a"}, "non_ascii"),
        ("a\n", "non_ascii"),
    ],
)
def test_values_without_a_canonical_form_are_refused_by_name(value: Value, reason: str) -> None:
    with pytest.raises(CanonicalError) as caught:
        encode(value)
    assert caught.value.reason == reason


@pytest.mark.parametrize("data", [b'"\\' * 500_000, b'"' * 1_000_000, b'[""' * 10 + b'"\\"' * 300_000])
def test_hostile_bytes_are_refused_before_the_time_limit_of_tests(data: bytes) -> None:
    with pytest.raises(CanonicalError):
        decode(data)


def test_the_deepest_value_still_travels() -> None:
    value: Value = "x"
    for _ in range(DEEPEST):
        value = [value]
    assert decode(encode(value)) == value
    with pytest.raises(CanonicalError) as caught:
        encode([value])
    assert caught.value.reason == "too_deep"
    assert decode(encode("[" * 100)) == "[" * 100  # brackets in a string are no nesting


def test_a_cycle_is_refused() -> None:
    cycle: list[Value] = []
    cycle.append(cycle)
    with pytest.raises(CanonicalError) as caught:
        encode(cycle)
    assert caught.value.reason == "too_deep"


@given(st.binary(max_size=60))
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:
    try:
        value = decode(data)
    except CanonicalError:
        return
    assert encode(value) == data


@given(values, st.integers(0), st.randoms(use_true_random=False))
@settings(max_examples=300)
def test_mutated_bytes_decode_to_another_value_or_are_refused(
    value: Value, edits: int, chance: random.Random
) -> None:
    original = encode(value)
    data = bytearray(original)
    for _ in range(1 + edits % 4):
        where = chance.randrange(len(data) + 1)
        match chance.randrange(4):
            case 0:
                data[where:where] = bytes([chance.randrange(256)])
            case 1:
                del data[where : where + 1]
            case 2:
                data[where : where + 1] = chance.choice(
                    [b'"', b"{", b"[", b"]", b"}", b",", b":", b"\\", b"0"]
                )
            case _:
                data[where:where] = data[: chance.randrange(len(data) + 1)]
    mutated = bytes(data)
    try:
        decoded = decode(mutated)
    except CanonicalError:
        return
    assert encode(decoded) == mutated
    assert (decoded == value) == (mutated == original)
